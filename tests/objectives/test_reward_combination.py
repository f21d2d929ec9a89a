"""Clipping and weighting of several rewards."""

from __future__ import annotations

import math

import pytest
import torch

from rtdmd.objectives import clip_scores, combine_rewards


def test_clipping_by_hand() -> None:
    """Inside the bounds the identity with gradient 1, beyond them the bound with gradient 0."""
    scores = torch.tensor([-3.0, -1.0, 0.5, 4.0], requires_grad=True)
    clipped = clip_scores(scores, -2.0, 2.0)
    clipped.sum().backward()
    assert clipped.tolist() == [-2.0, -1.0, 0.5, 2.0]
    assert scores.grad is not None and scores.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_clipping_makes_no_score_of_what_is_none() -> None:
    clipped = clip_scores(torch.tensor([math.nan, math.inf, -math.inf]), -2.0, 2.0)
    assert clipped[0].isnan() and clipped[1:].tolist() == [math.inf, -math.inf]


def test_combination_by_hand() -> None:
    """2·a + 0.5·b; standardised by (1, 2) and (4, 0.5): 2·(a − 1)/2.0001 + 0.5·(b − 4)/0.5001."""
    rewards = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([4.0, 6.0])}
    weights = {"a": 2.0, "b": 0.5}
    assert combine_rewards(rewards, weights).tolist() == [4.0, 9.0]
    got = combine_rewards(rewards, weights, {"a": (1.0, 2.0), "b": (4.0, 0.5)})
    assert got.tolist() == pytest.approx([0.0, 4 / 2.0001 + 1 / 0.5001])


def test_combination_passes_the_gradient_on() -> None:
    """∂/∂a = w/(s + 1e-4)."""
    a = torch.tensor([1.0, 3.0], requires_grad=True)
    combine_rewards({"a": a}, {"a": 2.0}, {"a": (7.0, 0.25)}).sum().backward()
    assert a.grad is not None and a.grad.tolist() == pytest.approx([2 / 0.2501] * 2)
