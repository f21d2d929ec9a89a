"""`roles.whole_blocks: null` keeps what the second update leaves room for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.sharding import BlockShards, Placement, build_sharded
from rtdmd.models import get_family
from rtdmd.models.blocks import blocks_of
from rtdmd.models.weights import WeightSource
from rtdmd.stages.device_memory import GIB
from rtdmd.stages.residency import AutomaticResidency, keep_blocks, most_kept
from tests.stages.test_activations import Scripted


@pytest.fixture
def build(long_flux2: Path) -> list[BlockShards]:
    """Two bases of eight blocks or more, as one rank with its shards in host memory has them."""
    family = get_family("flux2").load(str(long_flux2), device=torch.device("cpu"), dtype=torch.float32)
    made = []
    for _ in range(2):
        source = WeightSource(str(long_flux2))
        _, shards = build_sharded(
            lambda config=source.config: family.transformer_class.from_config(config),  # type: ignore[misc]
            lambda network: blocks_of(network, family.block_lists),
            source,
            torch.float32,
            Placement(Ranks(0, 1, torch.device("cpu")), offload=True),
            lambda: None,
        )
        made.append(shards)
    return made


@pytest.mark.parametrize(
    ("room", "count"),
    [(-1, 0), (9, 0), (10, 1), (29, 1), (30, 1), (40, 2), (79, 2), (80, 3), (100, 4), (1000, 4)],
)
def test_most_kept(room: float, count: int) -> None:
    """Of 10, 20, 30, 40, as `spread` has them: the first; 10 + 30; 10 + 30 + 40; all."""
    sizes = [10, 20, 30, 40]
    assert most_kept(sizes, room) == count


def test_bases_share_the_room_after_the_second_update(build: list[BlockShards], ranks: Ranks) -> None:
    one, other = build
    sizes = one.block_bytes
    total = len(sizes)
    assert total >= 6
    memory = Scripted(iter(()), 7 * GIB + sum(sizes))  # for half of both
    residency = AutomaticResidency(memory, ranks, {"teacher, fake_score": one, "generator": other})
    memory.reserved = 7 * GIB
    notices = [residency.after_step(updated) for updated in (False, True, False, True, True)]
    assert [len(each) for each in notices] == [0, 0, 0, 2, 0] and residency.is_settled
    assert memory.calls == ["empty_cache", "reset_peak", "empty_cache"]
    counts = [shards.num_kept for shards in build]
    assert counts == [most_kept(sizes, sum(sizes) / 2)] * 2 and 0 < counts[0] < total
    first, second = notices[3]
    assert first.startswith(f"the base of teacher, fake_score: {counts[0]} of {total} blocks in shards stay")
    assert second.startswith("the base of generator: ") and "of 7.0 GiB to be had" in second


def test_without_room_none_is_kept(build: list[BlockShards], ranks: Ranks) -> None:
    memory = Scripted(iter(()), GIB)
    residency = AutomaticResidency(memory, ranks, {"teacher": build[0]})
    memory.reserved = 2 * GIB
    assert residency.after_step(True) == []
    (notice,) = residency.after_step(True)
    assert ": 0 of" in notice and build[0].num_kept == 0


def test_the_choice_waits_for_a_close_look(build: list[BlockShards], ranks: Ranks) -> None:
    """And for an update and a look after what was between steps, which counts for nothing."""
    memory = Scripted(iter(()), 100 * GIB)
    residency = AutomaticResidency(memory, ranks, {"teacher": build[0]})
    assert residency.after_step(True, closely=True) == []
    residency.restart()
    assert memory.calls == ["empty_cache", "reset_peak"] * 2
    for _ in range(3):
        assert residency.after_step(True, closely=False) == []
    residency.restart()
    assert residency.after_step(False, closely=True) == []
    assert len(residency.after_step(True, closely=False)) == 1


def test_kept_blocks_are_there_at_once(build: list[BlockShards], ranks: Ranks) -> None:
    residency = AutomaticResidency(Scripted(iter(()), 100 * GIB), ranks, {"teacher": build[0]})
    residency.after_step(True)
    residency.after_step(True)
    assert build[0].gathered_bytes == sum(build[0].block_bytes) > 0


def test_more_blocks_than_there_are_is_all_of_them(build: list[BlockShards]) -> None:
    keep_blocks(build[0], 100)
    assert build[0].num_kept == len(build[0].block_bytes)
    keep_blocks(build[0], 2)
    assert build[0].num_kept == 2
