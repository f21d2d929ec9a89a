"""Scorers in processes of their own: the same numbers, in order, and failures with the scorer's words."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from rtdmd.errors import TrainingHalted, UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import load_rewards
from rtdmd.rewards.serving.pool import PooledReward

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pool() -> Iterator[PooledReward]:
    (reward,) = load_rewards([RewardSection("compressibility")], CPU, torch.float32, workers=2)
    assert isinstance(reward, PooledReward)
    yield reward
    reward.close()


def images(count: int) -> torch.Tensor:
    """Pictures that differ in how much noise they have, not rounded to 256 levels."""
    noise = torch.rand(count, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    return noise * torch.linspace(0.1, 1, count).view(-1, 1, 1, 1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_to_scoring_here(pool: PooledReward, count: int) -> None:
    (inline,) = load_rewards([RewardSection("compressibility")], CPU, torch.float32)
    prompts, rows = [f"prompt {i}" for i in range(count)], [{"tag": i} for i in range(count)]
    expected = inline.score(images(count), prompts, rows)
    for _ in range(2):
        assert torch.equal(pool.score(images(count), prompts, rows), expected)


def test_unfit_images_are_refused_here(pool: PooledReward) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        pool.score(images(2) + 1, ["a"] * 2, [{}] * 2)


def test_a_scorer_that_raises_is_quoted_and_goes_on() -> None:
    """The judge of shapes refuses both parts; the second one's answer is read all the same."""
    pool = PooledReward(RewardSection("shapes"), 2)
    for sides in ((24, 40), (40, 24)):
        with pytest.raises(UserError, match=f"judges pictures of 64×64 pixels, got {sides[0]}×{sides[1]}"):
            pool.score(torch.zeros(2, 3, *sides), ["a"] * 2, [{}] * 2)
    pool.close()


def test_a_scorer_that_does_not_load_is_quoted() -> None:
    with pytest.raises(RuntimeError, match=r"No module named 'rtdmd\.rewards\.nothing'"):
        PooledReward(RewardSection("nothing"), 1)


def test_a_process_that_ends_by_itself_halts_and_the_others_end_with_it() -> None:
    pool = PooledReward(RewardSection("compressibility"), 2)
    processes = pool._processes
    os.kill(processes[1].pid, signal.SIGTERM)  # a run that is told to stop saves first: ignored
    assert pool.score(images(2), ["a"] * 2, [{}] * 2).shape == (2,)
    os.kill(processes[1].pid, signal.SIGKILL)
    with pytest.raises(
        TrainingHalted, match=r"'compressibility': its process \d+ ended by itself \(code -9\)"
    ):
        pool.score(images(2), ["a"] * 2, [{}] * 2)
    pool.close()
    deadline = time.monotonic() + 10
    while processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes[0].returncode == 0
