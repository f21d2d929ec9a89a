"""Alarms by hand: sequences of means of a monitor or a picture statistic, and of the trained reward."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from rtdmd.stages.alarms import HackingAlarms, smoothed
from rtdmd.stages.scores import EpochScores


def spread(mean: float) -> torch.Tensor:
    """Two scores with this mean and the standard deviation 1."""
    return torch.tensor([mean - 1, mean + 1], dtype=torch.float64)


def notices(
    trained: Sequence[float], monitor: Sequence[float], saturation: Sequence[float] | None = None
) -> list[int]:
    """The epochs that gave an alarm; the state passes through JSON before each."""
    state, told = HackingAlarms({"r": 1.0}).state(), []
    for epoch, (reward, other) in enumerate(zip(trained, monitor, strict=True)):
        alarms = HackingAlarms({"r": 1.0})
        alarms.restore(json.loads(json.dumps(state)))
        value = saturation[epoch] if saturation else 0.5
        images = {"saturation": torch.full((2,), value, dtype=torch.float64)}
        scores = EpochScores(torch.zeros(2), {"r": spread(reward)}, {"m": spread(other)}, images, None)
        told += [epoch] * len(alarms.observe(scores))
        state = alarms.state()
    return told


def test_smoothing_by_hand() -> None:
    assert smoothed([[1.0, 0.0], [2.0, 3.0]]) == []
    assert smoothed([[1.0, 0.0], [2.0, 3.0], [6.0, 6.0], [7.0, 0.0]]) == [(3.0, 3.0), (5.0, 3.0)]


def test_a_monitor_that_falls_while_the_reward_rises() -> None:
    """Means of three: best 5 at epoch 2; at epoch 4 (5 + 4.7 + 4.7)/3 = 4.8 is not yet more than 0.2 below,
    at epoch 5 4.7 is. The alarm is given once."""
    rising = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert notices(rising, [5.0, 5.0, 5.0, 5.0, 4.71, 4.71, 4.6]) == [6]
    assert notices(rising, [5.0, 5.0, 5.0, 4.6, 4.6, 4.6, 4.6]) == [4]


def test_no_alarm_when_both_fall_or_both_rise() -> None:
    falling = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    fallen = [5.0, 5.0, 5.0, 4.0, 4.0, 4.0, 4.0]
    assert notices(falling, fallen) == []
    assert notices(falling[::-1], fallen[::-1]) == []


def test_an_alarm_is_given_again_after_it_has_cleared() -> None:
    rising = [i / 10 for i in range(13)]
    course = [5.0] * 3 + [4.0] * 3 + [5.0] * 3 + [4.0] * 4
    assert notices(rising, course) == [3, 9]


def test_a_statistic_that_leaves_its_start_either_way() -> None:
    rising = [i / 10 for i in range(6)]
    steady = [5.0] * 6
    assert notices(rising, steady, [0.5, 0.5, 0.5, 0.7, 0.7, 0.7]) == [5]
    assert notices(rising, steady, [0.5, 0.5, 0.5, 0.3, 0.3, 0.3]) == [5]
    assert notices(rising, steady, [0.5, 0.5, 0.5, 0.6, 0.6, 0.6]) == []
    assert notices(rising[::-1], steady, [0.5, 0.5, 0.5, 0.9, 0.9, 0.9]) == []
