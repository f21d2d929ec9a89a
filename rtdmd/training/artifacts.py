"""The state dicts that a stage leaves for others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rtdmd.distributed.collectives import Ranks
from rtdmd.files import replacing

GENERATOR_FILE = "generator_ema.pt"
BEST_FILE = "generator_ema.best.pt"  # of the best checkpoint, while a stage with stop_when runs
LAST_FILE = "generator_ema.last.pt"  # of the last step, where stop_when ended the stage
FAKE_SCORE_FILE = "fake_score.pt"


def save_state_dict(tensors: Iterator[tuple[str, Tensor]], path: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Collective: write gathered tensors as a plain state dict; returns it on rank 0, {} elsewhere.

    Raises RuntimeError if a tensor is empty: an adapter that was saved without gathering.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if tensor.numel() == 0:
            raise RuntimeError(f"{path}: {name} is empty, its shards weren't gathered")
        if ranks.is_main:
            state[name] = tensor.detach().to("cpu", copy=True)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            torch.save(state, beside)

    ranks.on_main_first(write)
    return state


def copy_file(source: Path, target: Path) -> None:
    """Copy a file beside its place, then move it there. Call on rank 0."""
    with replacing(target) as beside:
        shutil.copyfile(source, beside)
