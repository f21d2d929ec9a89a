"""Checkpoints: each rank's pieces in a safetensors file, readable by any number of ranks.

    checkpoints/step-000500/rank-00000.safetensors …   pieces, keyed role/kind/parameter
                            state.json                 step, world size, update counts
    checkpoints/latest                                 name of the last complete one
    checkpoints/best                                   name of the best one, where a rule tells

A checkpoint is written beside its place and moved into it when all ranks have written; ``latest``
follows. A crash leaves the previous one whole. Nothing in it is pickled. DeepSpeed's own checkpoints
are pickles, and bound to the number of ranks and to the ZeRO stage.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.masters import Piece
from rtdmd.errors import UserError
from rtdmd.files import replace_file
from rtdmd.runs import LATEST, STATE, latest_checkpoint, read_progress

# role → kind → pieces
State = Mapping[str, Mapping[str, Sequence[Piece]]]

_BEST = "best"
_PARTIAL = ".partial"  # ends the hidden names of what isn't whole yet, or any more
_RNG = "rng/torch"


def _rng_states() -> dict[str, torch.Tensor]:
    """Torch's global generators of this rank; nothing of ours draws from them, reward models may."""
    states = {_RNG: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{_RNG}/cuda"] = torch.cuda.get_rng_state()
    return states


class CheckpointStore:
    """The checkpoints of one stage."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self._folder = folder
        self._ranks = ranks
        self._keep = keep

    def save(
        self,
        step: int,
        state: State,
        progress: dict[str, Any],
        whole_on_main: Sequence[str],
        best: int | None = None,
    ) -> None:
        """Collective: write the checkpoint of ``step`` finished steps.

        ``best`` is the step of the best checkpoint, which is kept however old it is. Roles in
        ``whole_on_main`` are replicated; rank 0 alone writes them. If a rank fails to write, all ranks
        raise.
        """
        final = self._folder / _folder_name(step)
        partial = final.with_name(f".{final.name}{_PARTIAL}")
        self._ranks.on_main_first(lambda: _fresh_folder(partial))
        with self._ranks.together():
            self._write_rank(partial, state, whole_on_main)
        record = progress | {"step": step, "world_size": self._ranks.world_size}
        self._ranks.on_main_first(lambda: self._complete(partial, final, record, best))

    def _write_rank(self, folder: Path, state: State, whole_on_main: Sequence[str]) -> None:
        tensors, starts = _rng_states(), {}
        for role, kinds in state.items():
            if role in whole_on_main and not self._ranks.is_main:
                continue
            for kind, pieces in kinds.items():
                for piece in pieces:
                    key = f"{role}/{kind}/{piece.name}"
                    tensors[key] = piece.value.detach().to("cpu", copy=True).contiguous()
                    starts[key] = piece.start
        path = _rank_file(folder, self._ranks.rank)
        save_file(tensors, str(path), {"starts": json.dumps(starts)})
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # on the disk before `latest` names it

    def _complete(self, partial: Path, final: Path, record: dict[str, Any], best: int | None) -> None:
        replace_file(partial / STATE, json.dumps(record, indent=2))
        if final.exists():
            _set_aside(final)
        partial.replace(final)
        replace_file(self._folder / LATEST, final.name)
        if best is None:
            (self._folder / _BEST).unlink(missing_ok=True)
        else:
            replace_file(self._folder / _BEST, _folder_name(best))
        # Steps beyond this one are of a run that was wound back.
        others = sorted(path for path in self._folder.glob("step-*") if path != final)
        earlier = [path for path in others if path.name < final.name]
        kept = earlier[len(earlier) - self._keep + 1 :] if self._keep > 1 else []
        for old in others:
            if old not in kept and (best is None or old.name != _folder_name(best)):
                _set_aside(old)
        for left in self._folder.glob(f".step-*{_PARTIAL}"):  # those of saves that were cut off, too
            shutil.rmtree(left, ignore_errors=True)

    def latest(self) -> Path | None:
        """Folder of the last complete checkpoint, or None."""
        return latest_checkpoint(self._folder)

    def at(self, step: int) -> Path | None:
        """Folder of the complete checkpoint of ``step`` finished steps, or None."""
        folder = self._folder / _folder_name(step)
        return folder if (folder / STATE).is_file() else None

    def load(self, folder: Path, state: State) -> None:
        """Fill the pieces of ``state``, and this rank's random states, from a checkpoint."""
        with _PieceReader(folder, read_progress(folder)["world_size"]) as reader:
            for role, kinds in state.items():
                for kind, pieces in kinds.items():
                    for piece in pieces:
                        reader.fill(f"{role}/{kind}/{piece.name}", piece)
            reader.restore_rng(self._ranks.rank)


def _folder_name(step: int) -> str:
    return f"step-{step:06d}"


def _set_aside(folder: Path) -> None:
    """No checkpoint any more; its files go once nobody reads them (NFS keeps what is open)."""
    folder.rename(folder.with_name(f".{folder.name}.{time.time_ns()}{_PARTIAL}"))


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


class _PieceReader:
    """Flat ranges of parameters out of the files of however many ranks wrote them."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self._folder = folder
        self._files: list[Any] = []
        self._index: dict[str, list[tuple[Any, int]]] = {}
        for rank in range(world_size):
            path = _rank_file(folder, rank)
            try:
                file = safe_open(str(path), framework="pt")
            except Exception as error:  # safetensors' errors have no common class
                raise UserError(
                    f"{path}: missing or damaged ({error}); name an older step in 'latest'"
                ) from error
            self._files.append(file)
            for key, start in json.loads(file.metadata()["starts"]).items():
                self._index.setdefault(key, []).append((file, start))

    def __enter__(self) -> _PieceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._index.clear()

    def fill(self, key: str, piece: Piece) -> None:
        """Copy the elements that ``piece`` spans out of every stored piece that overlaps it."""
        begin, end = piece.start, piece.start + piece.value.numel()
        filled = 0
        for file, start in self._index.get(key, []):
            stored = file.get_slice(key)
            low, high = max(begin, start), min(end, start + stored.get_shape()[0])
            if low < high:
                piece.value[low - begin : high - begin].copy_(stored[low - start : high - start])
                filled += high - low
        if filled != piece.value.numel():
            raise UserError(
                f"{self._folder}: holds {filled} of {piece.value.numel()} elements of {key}; "
                "the network differs from the checkpoint's: choose another `name`, or resume=never"
            )

    def restore_rng(self, rank: int) -> None:
        """Torch's generators as ``rank`` left them; a rank that wasn't there keeps its own."""
        if rank >= len(self._files):
            return
        file = self._files[rank]
        stored = set(file.keys())
        torch.set_rng_state(file.get_tensor(_RNG))
        if torch.cuda.is_available() and f"{_RNG}/cuda" in stored:
            torch.cuda.set_rng_state(file.get_tensor(f"{_RNG}/cuda"))
