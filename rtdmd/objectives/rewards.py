"""Several rewards as one, and reward back-propagation through the final-step decoder (arXiv 2605.26108)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rtdmd.objectives.reduction import STD_FLOOR, weighted_mean


def clip_scores(scores: Tensor, low: float, high: float) -> Tensor:
    """Finite scores clamped to [low, high]; a score beyond a bound has no gradient.

    Any shape. A score that isn't finite stays as it is: an infinite one is no good score, but none at all.
    """
    return torch.where(torch.isfinite(scores), scores.clamp(low, high), scores)


def combine_rewards(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    moments: Mapping[str, tuple[float, float]] | None = None,
) -> Tensor:
    """Σ w_i·r_i; with ``moments`` (mean m_i, standard deviation s_i), Σ w_i·(r_i − m_i)/(s_i + 1e-4).

    Shapes: each reward [B], the sum [B]; float32, differentiable. Standardised, each reward counts by its
    weight alone: raw scores differ by orders of magnitude (hpsv2 is about 0.25, aesthetic about 5).
    """
    terms = []
    for name, scores in rewards.items():
        scores = scores.float()
        if moments is not None:
            mean, std = moments[name]
            scores = (scores - mean) / (std + STD_FLOOR)
        terms.append(weights[name] * scores)
    return torch.stack(terms).sum(0)


def reward_hinge(reward: Tensor, margin: float) -> Tensor:
    """relu(margin − reward) per sample, float32.

    Shapes: ``reward`` [B] is the combination of the differentiable rewards. A sample whose reward exceeds
    the margin has no gradient.
    """
    return (margin - reward.float()).relu()


def reward_hinge_loss(reward: Tensor, margin: float, weights: Tensor | None = None) -> Tensor:
    """mean(relu(margin − reward)), float32. Shapes: ``reward`` [B], ``weights`` [B]."""
    return weighted_mean(reward_hinge(reward, margin), weights)
