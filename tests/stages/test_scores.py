"""What is made of an epoch's scores: means, counts, and when they are no use."""

from __future__ import annotations

import math

import pytest
import torch

from rtdmd.errors import TrainingHalted
from rtdmd.stages.scores import check_usable, non_finite_notices, score_metrics

NAN = math.nan
SCORES = {"a": torch.tensor([1.0, NAN, 3.0, math.inf]), "b": torch.tensor([0.5, 0.5, NAN, 1.5])}


def test_means_run_over_finite_scores_and_the_others_are_counted() -> None:
    """a: (1 + 3)/2, b: (0.5 + 0.5 + 1.5)/3."""
    metrics = score_metrics("reward", SCORES)
    assert metrics == {
        "reward/a": 2.0,
        "reward/b": pytest.approx(2.5 / 3),
        "nonfinite/a": 2.0,
        "nonfinite/b": 1.0,
    }
    assert len(non_finite_notices(SCORES)) == 2
    assert non_finite_notices({"a": torch.zeros(3)}) == []


def test_a_mean_of_nothing_is_not_logged() -> None:
    assert score_metrics("monitor", {"a": torch.tensor([NAN])}) == {"nonfinite/a": 1.0}


def test_a_reward_without_any_finite_score_halts() -> None:
    scores = {"a": torch.ones(4), "b": torch.full((4,), NAN)}
    with pytest.raises(TrainingHalted, match="'b' gave no finite score for any of the epoch's 4 pictures"):
        check_usable(scores, {"a": 1.0, "b": 1.0})
    check_usable(scores, {"a": 1.0, "b": 0.0})


def test_no_sample_with_all_scores_halts() -> None:
    check_usable(SCORES, {"a": 1.0, "b": 1.0})
    scores = {"a": torch.tensor([1.0, NAN]), "b": torch.tensor([NAN, 1.0])}
    with pytest.raises(TrainingHalted, match="not finite: a 1, b 1"):
        check_usable(scores, {"a": 1.0, "b": 1.0})
