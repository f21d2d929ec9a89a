"""`activation_checkpointing: auto` chooses after the second update, from that update's peaks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rtdmd.distributed.collectives import Ranks
from rtdmd.models.recomputation import Recomputation
from rtdmd.stages.activations import AutomaticRecomputation
from rtdmd.stages.device_memory import GIB, CudaMemory
from tests.models.test_recomputation import Chain, block


class Scripted:
    """A device whose peaks are given, one for each time that is watched."""

    def __init__(self, peaks: Iterator[int], available: int) -> None:
        self._peaks = peaks
        self._available = available
        self.reserved = self.others = 0
        self.calls: list[str] = []

    def reset_peak(self) -> None:
        """The next peak is read at the next time's end."""
        self.calls.append("reset_peak")

    def peak(self) -> int:
        return next(self._peaks)

    def peak_reserved(self) -> int:
        return self.reserved

    def reserved_by_others(self) -> int:
        return self.others

    def available(self) -> int:
        return self._available

    def empty_cache(self) -> None:
        """What is cached is given back."""
        self.calls.append("empty_cache")
        self.reserved = 0


def chain(widths: tuple[int, ...]) -> tuple[Chain, Recomputation]:
    network = Chain(*(block(width) for width in widths))
    return network, network.recomputation


def recomputed(recomputation: Recomputation) -> list[bool]:
    return [each in recomputation._recomputed for each in recomputation.blocks]


def update(network: nn.Module) -> None:
    with torch.no_grad():  # a rollout is no time of a role's
        network(torch.randn(2, 3))
    network(torch.randn(2, 3)).sum().backward()


def test_roles_are_settled_after_the_second_generator_update(ranks: Ranks) -> None:
    """A block of width w keeps 8·w bytes here. The fake score has room for everything, the generator doesn't.

    Generator: peak 1000 with one of four blocks of 80 bytes kept, 1080 available: nothing recomputed would be
    1000 − 80 + 320; with two recomputed it is 1000 − 80 + 160 = 1080.
    """
    generator, of_generator = chain((10, 10, 10, 10))
    fake, of_fake = chain((10, 20))
    # At the first update all is larger: it doesn't count, nor what is outside the roles' times.
    outside = 0
    first, second = [outside, 9000, 9000], [outside, 700, 1000]
    peaks = iter([*first, outside, 700, outside, 600, *second])
    automatic = AutomaticRecomputation(Scripted(peaks, 1080), ranks)
    automatic.add("generator", generator, of_generator)
    automatic.add("fake_score", fake, of_fake)
    notices = []
    for updates_generator in (True, False, False, True, True):
        update(fake)
        if updates_generator:
            update(generator)
        notices.append(automatic.after_step(updates_generator))
    assert [len(each) for each in notices] == [0, 0, 0, 2, 0]
    assert "generator: 2 of 4 blocks" in notices[3][0] and "fake_score: 0 of 2 blocks" in notices[3][1]
    assert recomputed(of_generator) == [True, False, True, False]
    assert recomputed(of_fake) == [False, False]
    assert next(peaks, None) is None  # nothing is watched afterwards


@pytest.mark.parametrize(
    ("reserved", "others", "outside", "expected"),
    [
        (1000, 0, 0, 0),
        (1001, 0, 0, 1),  # 1240 + 1, for 1240 to be had
        (1081, 0, 0, 2),  # one recomputed has 1160 + 81
        (1500, 0, 1500, 0),  # something else had what activations will have
        (1500, 0, 1400, 2),  # 100 of it in pieces
        (1081, 81, 0, 2),  # another stream's
        (1581, 81, 1500, 2),  # likewise, beside something else on this stream
        (1581, 81, 1400, 3),  # and 100 in pieces: two recomputed have 1080 + 181
        (900, 0, 0, 0),  # less than the peak, 1000: of another time, before a cache was given back
    ],
)
def test_what_is_reserved_beside_the_peak_counts(
    ranks: Ranks, reserved: int, others: int, outside: int, expected: int
) -> None:
    """A peak of 1000 bytes with one of four blocks of 80 bytes kept; with all of them 1240, which there are.

    What was used at the first update, or while pictures were painted after it, doesn't count.
    """
    generator, of_generator = chain((10, 10, 10, 10))
    memory = Scripted(iter([9000, 9000, 9000, outside, 1000, outside]), 1240)
    automatic = AutomaticRecomputation(memory, ranks)
    automatic.add("generator", generator, of_generator)
    memory.reserved = 9000
    update(generator)
    assert automatic.after_step(True) == []
    automatic.gradient_is_done()
    memory.reserved += 9000
    automatic.restart()
    memory.reserved, memory.others = reserved, others
    update(generator)
    automatic.gradient_is_done()
    (notice,) = automatic.after_step(True)
    assert f"generator: {expected} of 4 blocks" in notice
    assert sum(recomputed(of_generator)) == expected
    automatic.gradient_is_done()  # and nothing is read of the device any more


def test_the_choice_waits_for_a_close_look(ranks: Ranks) -> None:
    """After the first update, and after what was between steps; the roles' peaks are of these steps, too."""
    generator, of_generator = chain((10, 10, 10, 10))
    peaks = iter([0, 9000, 0, 1000, 0, 9000, 0, 1000, 0, 990])
    automatic = AutomaticRecomputation(Scripted(peaks, 1240), ranks)
    automatic.add("generator", generator, of_generator)
    for closely in (True, False, False):
        update(generator)
        assert automatic.after_step(True, closely) == []
    automatic.restart()
    update(generator)
    assert automatic.after_step(True, closely=False) == []
    update(generator)
    (notice,) = automatic.after_step(True, closely=True)
    assert "generator: 0 of 4 blocks" in notice


def test_a_role_with_its_own_setting_is_left_alone(ranks: Ranks) -> None:
    generator, of_generator = chain((10, 10))
    fake, of_fake = chain((10, 10))
    of_fake.choose(1)
    automatic = AutomaticRecomputation(Scripted(itertools.repeat(10**6), 0), ranks)
    automatic.add("generator", generator, of_generator)
    automatic.add("fake_score", fake, None)
    for _ in range(2):
        update(fake)
        update(generator)
        notices = automatic.after_step(True)
    assert len(notices) == 1 and "generator: 2 of 2 blocks" in notices[0]
    assert recomputed(of_fake) == [True, False]


@pytest.mark.gpu
def test_what_other_streams_have_reserved() -> None:
    """Of a tensor of 64 MiB that a stream has had and let go of: torch keeps it for that stream."""
    memory = CudaMemory(torch.device("cuda", 0))
    memory.empty_cache()
    before = memory.reserved_by_others()
    with torch.cuda.stream(torch.cuda.Stream(0)):
        torch.empty(2**26, dtype=torch.uint8, device="cuda:0")
    torch.empty(2**27, dtype=torch.uint8, device="cuda:0")
    assert memory.reserved_by_others() - before == 2**26
    torch.cuda.synchronize()
    memory.empty_cache()
    assert memory.reserved_by_others() == before


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_what_is_predicted_is_an_upper_bound(share: float) -> None:
    """Twelve blocks that keep 64 MiB each, on a device with room for a share of them."""
    device = torch.device("cuda", 0)
    network = Chain(*(block(2**14) for _ in range(12))).to(device)
    recomputation = network.recomputation

    class Limited(CudaMemory):
        def available(self) -> int:
            return int(base + share * 12 * GIB / 16)

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        base = torch.cuda.memory_allocated(device) + GIB / 4  # gradients, one recomputed block
        automatic = AutomaticRecomputation(Limited(device), Ranks(0, 1, device))
        automatic.add("generator", network, recomputation)
        for number in range(3):
            torch.cuda.reset_peak_memory_stats(device)
            network(torch.randn(2**10, 3, device=device)).sum().backward()
            network.zero_grad()
            if number < 2:
                automatic.after_step(True)
    finally:
        dist.destroy_process_group()
    assert torch.cuda.max_memory_allocated(device) <= base + share * 12 * GIB / 16
    assert 0 < sum(recomputed(recomputation)) < 12
