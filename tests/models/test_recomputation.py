"""How many blocks are recomputed follows from what a block keeps, which is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rtdmd.models.recomputation import (
    Recomputation,
    SavedBytes,
    fewest_recomputed,
    predicted_peak,
    spread,
)


def test_chosen_blocks_are_spread_evenly() -> None:
    assert spread(0, 5) == set() and spread(5, 5) == {0, 1, 2, 3, 4}
    assert spread(3, 5) == {0, 2, 4} and spread(13, 25) == set(range(0, 25, 2))  # every other
    assert spread(1, 4) == {0} and spread(2, 8) == {0, 4}
    assert all(len(spread(count, 25)) == count for count in range(26))


def test_the_predicted_peak() -> None:
    """Four blocks that keep 10, 10, 3, 3; the first of each kind did so at the peak of 100.

    Without them it is 87; nothing recomputed: 87 + 26; blocks 0 and 2 recomputed: 87 + 10 + 3.
    """
    kept, measured = [10, 10, 3, 3], {0, 2}
    assert predicted_peak(100, kept, measured, {0, 1, 2, 3}) == 87
    assert predicted_peak(100, kept, measured, set()) == 113
    assert predicted_peak(100, kept, measured, {0, 2}) == 100


@pytest.mark.parametrize(
    ("available", "count"),
    [(113, 0), (112, 1), (103, 1), (102, 2), (100, 2), (99, 3), (90, 3), (89, 4), (0, 4)],
)
def test_as_few_blocks_as_fit(available: float, count: int) -> None:
    """Of the same blocks: one recomputed (the first) leaves 103, two (0 and 2) 100, three (0, 2, 3) 97."""
    expected = {0: 113, 1: 103, 2: 100, 3: predicted_peak(100, [10, 10, 3, 3], {0, 2}, spread(3, 4)), 4: 87}
    found = fewest_recomputed(100, [10, 10, 3, 3], {0, 2}, available)
    assert found == next((k for k in range(4) if expected[k] <= available), 4)


class Chain(nn.Module):
    """Blocks in a row, as diffusers runs them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.recomputation = Recomputation(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.recomputation.run(block, x) if torch.is_grad_enabled() else block(x)
        return x


def block(width: int) -> nn.Module:
    """Keeps what enters tanh's backward, 4·width a row (its output, which the last layer needs too)."""
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3))


def test_bytes_that_a_block_keeps() -> None:
    """Of 5 rows; storages that several operations need count once, parameters and arguments don't count."""
    counter, layer = SavedBytes(), block(8)
    x = torch.randn(5, 3, requires_grad=True)

    def forward() -> Tensor:
        with counter.counting(layer, (x,)):
            return layer(x)

    plain = torch.autograd.grad(layer(x).square().sum(), x)[0]
    first = forward()
    assert counter.most == 5 * 8 * 4
    second = forward()  # alive beside the first, as both of the fake score's are
    assert counter.most == 2 * 5 * 8 * 4
    (gradient,) = torch.autograd.grad(first.square().sum(), x)
    assert torch.equal(gradient, plain)
    del first, second
    forward()
    forward()  # each is gone before the next
    assert counter.most == 2 * 5 * 8 * 4


def test_one_block_of_each_kind_is_measured() -> None:
    network = Chain(*(block(width) for width in (8, 8, 16, 16, 16)))
    recomputation = network.recomputation
    recomputation.measure()
    assert recomputation.measured == {0, 2}
    network(torch.randn(2, 3)).sum().backward()
    assert recomputation.kept_bytes() == [2 * 4 * width for width in (8, 8, 16, 16, 16)]
    recomputation.choose(2)
    assert recomputation.measured == set()
