"""Checkpoints: pieces of any layout, crashes while writing, damaged files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.masters import Piece
from rtdmd.errors import UserError
from rtdmd.runs import read_progress
from rtdmd.training.checkpoint import CheckpointStore


def cut(flat: torch.Tensor, bounds: list[int], name: str = "w") -> list[list[Piece]]:
    """One rank's pieces per consecutive pair of bounds."""
    return [
        [Piece(name, start, flat[start:stop].clone())] if stop > start else []
        for start, stop in pairwise(bounds)
    ]


def write(folder: Path, shards: list[list[Piece]], ranks: Ranks, step: int = 3, keep: int = 2) -> Path:
    """A checkpoint as several ranks would write it, one after the other."""
    store = CheckpointStore(folder, ranks, keep)
    store.save(step, {"generator": {"master": shards[0]}}, {}, [])
    final = store.latest()
    assert final is not None
    for rank, pieces in enumerate(shards[1:], start=1):
        other = CheckpointStore(folder, Ranks(rank, len(shards), torch.device("cpu")), keep)
        other._write_rank(final, {"generator": {"master": pieces}}, [])
    state = read_progress(final) | {"world_size": len(shards)}
    (final / "state.json").write_text(json.dumps(state))
    return final


@pytest.mark.parametrize("written", [[0, 10], [0, 5, 10], [0, 4, 8, 10], [0, 7, 7, 10]])
@pytest.mark.parametrize("read", [[0, 10], [0, 5, 10], [0, 3, 6, 9, 10]])
def test_any_layout_reads_any_other(
    tmp_path: Path, ranks: Ranks, written: list[int], read: list[int]
) -> None:
    flat = torch.randn(10)
    final = write(tmp_path, cut(flat, written), ranks)
    store = CheckpointStore(tmp_path, ranks, 2)
    for pieces in cut(torch.full((10,), float("nan")), read):
        store.load(final, {"generator": {"master": pieces}})
        for piece in pieces:
            assert torch.equal(piece.value, flat[piece.start : piece.start + piece.value.numel()])


def test_a_piece_that_is_not_there_is_an_error(tmp_path: Path, ranks: Ranks) -> None:
    final = write(tmp_path, cut(torch.randn(10), [0, 10]), ranks)
    store = CheckpointStore(tmp_path, ranks, 2)
    with pytest.raises(UserError, match="10 of 11 elements of generator/master/w"):
        store.load(final, {"generator": {"master": [Piece("w", 0, torch.zeros(11))]}})


def test_what_a_crash_leaves_does_not_count(tmp_path: Path, ranks: Ranks) -> None:
    first = write(tmp_path, cut(torch.randn(4), [0, 4]), ranks, step=1)
    partial = tmp_path / ".step-000002.partial"
    partial.mkdir()
    (partial / "rank-00000.safetensors").write_bytes(b"half")
    other = tmp_path / ".step-000007.partial"  # of a step that no later save is of
    other.mkdir()
    store = CheckpointStore(tmp_path, ranks, 2)
    assert store.latest() == first
    store.save(2, {"generator": {"master": [Piece("w", 0, torch.ones(4))]}}, {}, [])
    latest = store.latest()
    assert latest is not None and latest.name == "step-000002" and not partial.exists()
    assert not list(tmp_path.glob(".step-*"))


def test_only_the_newest_are_kept(tmp_path: Path, ranks: Ranks) -> None:
    for step in (1, 2, 3):
        write(tmp_path, cut(torch.randn(4), [0, 4]), ranks, step=step)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_is_kept_however_old(tmp_path: Path, ranks: Ranks, keep: int) -> None:
    store = CheckpointStore(tmp_path, ranks, keep)
    state = {"generator": {"master": [Piece("w", 0, torch.ones(4))]}}
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2)):
        store.save(step, state, {}, [], best)
    left = sorted(path.name for path in tmp_path.glob("step-*"))
    assert left == (
        ["step-000002", "step-000005"] if keep == 1 else ["step-000002", "step-000004", "step-000005"]
    )
    assert (tmp_path / "best").read_text() == "step-000002"
    assert store.at(2) == tmp_path / "step-000002" and store.at(3) is None
    store.save(6, state, {}, [], 6)
    assert store.at(2) is None and (tmp_path / "best").read_text() == "step-000006"
    store.save(7, state, {}, [], None)
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_wound_back_forgets_later_steps(tmp_path: Path, ranks: Ranks, keep: int) -> None:
    for step in (1, 500, 1000):
        write(tmp_path, cut(torch.randn(4), [0, 4]), ranks, step=step, keep=9)
    write(tmp_path, cut(torch.randn(4), [0, 4]), ranks, step=20, keep=keep)
    left = sorted(path.name for path in tmp_path.glob("step-*"))
    assert left == ["step-000001", "step-000020"][2 - keep :]
    assert (tmp_path / "latest").read_text() == "step-000020"


def test_a_damaged_file_is_named(tmp_path: Path, ranks: Ranks) -> None:
    final = write(tmp_path, cut(torch.randn(4), [0, 4]), ranks)
    (final / "rank-00000.safetensors").write_bytes(b"garbage")
    with pytest.raises(UserError, match="missing or damaged"):
        CheckpointStore(tmp_path, ranks, 2).load(final, {})


def test_a_failed_write_raises_and_leaves_the_previous_one(tmp_path: Path, ranks: Ranks) -> None:
    first = write(tmp_path, cut(torch.randn(4), [0, 4]), ranks, step=1)
    store = CheckpointStore(tmp_path, ranks, 2)
    unwritable = Piece("w", 0, torch.zeros(4).to_sparse())
    with pytest.raises(RuntimeError, match="unsupported memory format"):
        store.save(2, {"generator": {"master": [unwritable]}}, {}, [])
    assert store.latest() == first
