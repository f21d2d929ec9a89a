"""What is made of an epoch's scores: means, counts, and when they are no use."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rtdmd.errors import TrainingHalted
from rtdmd.stages.scores import EpochScores, finite_std

NAN = math.nan
SCORES = {"a": torch.tensor([1.0, NAN, 3.0, math.inf]), "b": torch.tensor([0.5, 0.5, NAN, 1.5])}


def epoch(rewards: Mapping[str, Tensor], monitors: Mapping[str, Tensor] | None = None) -> EpochScores:
    count = len(next(iter(rewards.values())))
    return EpochScores(torch.arange(count), rewards, monitors or {}, {"saturation": torch.ones(count)}, 0.25)


def test_means_run_over_finite_scores_and_the_others_are_counted() -> None:
    """a: (1 + 3)/2, b: (0.5 + 0.5 + 1.5)/3."""
    scores = epoch({"a": SCORES["a"]}, {"b": SCORES["b"]})
    assert scores.metrics() == {
        "reward/a": 2.0,
        "monitor/b": pytest.approx(2.5 / 3),
        "image/saturation": 1.0,
        "image/diversity": 0.25,
        "nonfinite/a": 2.0,
        "nonfinite/b": 1.0,
    }
    assert [notice.split()[:2] for notice in scores.notices()] == [["reward", "'a'"], ["monitor", "'b'"]]
    assert epoch({"a": torch.zeros(3)}).notices() == []
    assert finite_std(SCORES["a"]) == 1.0


def test_a_mean_of_nothing_is_not_logged() -> None:
    metrics = epoch({"a": torch.ones(1)}, {"b": torch.tensor([NAN])}).metrics()
    assert "monitor/b" not in metrics and metrics["nonfinite/b"] == 1.0


def test_a_reward_without_any_finite_score_halts() -> None:
    scores = epoch({"a": torch.ones(4), "b": torch.full((4,), NAN)})
    with pytest.raises(TrainingHalted, match="'b' gave no finite score for any of the epoch's 4 pictures"):
        scores.check_usable({"a": 1.0, "b": 1.0})
    scores.check_usable({"a": 1.0, "b": 0.0})


def test_no_sample_with_all_scores_halts() -> None:
    epoch(SCORES).check_usable({"a": 1.0, "b": 1.0})
    scores = epoch({"a": torch.tensor([1.0, NAN]), "b": torch.tensor([NAN, 1.0])})
    with pytest.raises(TrainingHalted, match="not finite: a 1, b 1"):
        scores.check_usable({"a": 1.0, "b": 1.0})
