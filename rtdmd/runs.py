"""How far the stages of a run have come, for those who write checkpoints and those who only read a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtdmd.errors import UserError
from rtdmd.files import read_json

LATEST = "latest"  # names the last complete checkpoint
STATE = "state.json"  # of a checkpoint: step, world size, update counts
METRICS_FILE = "metrics.jsonl"  # of a run: a record for each step of its stages
RECIPE_FILE = "recipe.yaml"  # of a run: the recipe that it has started with last
ENDING_FILE = "ended.json"  # of a stage that a rule has ended early: at which step


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Folder of the last complete checkpoint, or None: the one that ``latest`` names, else the newest.

    UserError if ``latest`` names none.
    """
    complete = sorted(state.parent for state in checkpoints.glob(f"step-*/{STATE}"))
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        return complete[-1] if complete else None
    name = pointer.read_text(encoding="utf-8").strip()
    if checkpoints / name not in complete:
        there = ", ".join(folder.name for folder in complete) or "none"
        raise UserError(
            f"{pointer}: names {name!r}, which is no complete checkpoint; write one of those here ({there})"
        )
    return checkpoints / name


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's ``state.json`` holds. UserError if that can't be read."""
    return read_json(checkpoint / STATE, "name an older step in 'latest'")


def ended_early(stage: Path, step: int) -> bool:
    """Whether a rule has ended the stage in this folder for good, after ``step`` steps."""
    ending = stage / ENDING_FILE
    return ending.is_file() and read_json(ending, "remove it")["step"] == step
