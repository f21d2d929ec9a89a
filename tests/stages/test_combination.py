"""Running statistics of rewards: by hand, around gaps, and through a checkpoint's JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rtdmd.stages.combination import Combination, RunningMoments

FIRST, SECOND = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0, 9.0])


def test_moments_by_hand() -> None:
    """Decay 0.5: weights 0.5 and 1. Means 2 and 7: (1 + 7)/1.5 = 16/3. Mean squares 5 and 155/3:
    (2.5 + 155/3)/1.5 = 325/9. Variance 325/9 − 256/9 = 69/9."""
    moments = RunningMoments()
    moments.update(FIRST, 0.5)
    assert (moments.mean, moments.std) == (2.0, 1.0)
    moments.update(SECOND, 0.5)
    assert moments.mean == pytest.approx(16 / 3)
    assert moments.std == pytest.approx(math.sqrt(69 / 9))


def test_the_total_is_raw_unless_told_otherwise() -> None:
    plain = Combination({"a": 2.0, "b": 0.0})
    plain.observe({"a": FIRST, "b": FIRST})
    assert plain.total({"a": FIRST}).tolist() == [2.0, 6.0]
    assert plain.state() == {}


def test_standardised_and_clipped_total() -> None:
    """Clipped to at most 2, (1, 3) is (1, 2): mean 1.5, std 0.5."""
    combination = Combination({"a": 1.0}, {"a": (0.0, 2.0)}, decay=0.9)
    combination.observe(combination.clip({"a": FIRST}))
    assert combination.total({"a": FIRST}).tolist() == pytest.approx([-0.5 / 0.5001, 0.5 / 0.5001])


def test_a_total_takes_statistics_of_its_own_rewards_alone() -> None:
    """One that is only logged may never have a finite score."""
    combination = Combination({"a": 1.0, "b": 0.0}, decay=0.9)
    assert not combination.is_ready(["a"]) and Combination({"a": 1.0}).is_ready(["a"])
    combination.observe({"a": FIRST, "b": torch.tensor([math.nan, math.nan])})
    assert combination.is_ready(["a"]) and not combination.is_ready(["a", "b"])


def test_scores_that_are_not_finite_do_not_count() -> None:
    one, other = Combination({"a": 1.0}, decay=0.9), Combination({"a": 1.0}, decay=0.9)
    one.observe({"a": torch.tensor([1.0, math.nan, 3.0, math.inf])})
    one.observe({"a": torch.tensor([math.nan])})
    other.observe({"a": FIRST})
    assert one.state() == other.state()


def test_restored_from_json_it_goes_on_exactly() -> None:
    straight = Combination({"a": 1.0, "b": 1.0}, decay=0.9)
    straight.observe({"a": FIRST / 3, "b": SECOND / 7})
    resumed = Combination({"a": 1.0, "b": 1.0}, decay=0.9)
    resumed.restore(json.loads(json.dumps(straight.state())))
    for combination in (straight, resumed):
        combination.observe({"a": SECOND / 3, "b": FIRST / 7})
    assert straight.state() == resumed.state()
    scores = {"a": FIRST, "b": FIRST}
    assert torch.equal(straight.total(scores), resumed.total(scores))
