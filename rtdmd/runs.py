"""How far the stages of a run have come, for those who write checkpoints and those who only read a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rtdmd.errors import UserError

LATEST = "latest"  # names the last complete checkpoint
STATE = "state.json"  # of a checkpoint: step, world size, update counts
ENDING_FILE = "ended.json"  # of a stage that a rule has ended early: at which step


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Folder of the last complete checkpoint, or None. UserError if ``latest`` names none."""
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        return None
    folder = checkpoints / pointer.read_text(encoding="utf-8").strip()
    if not (folder / STATE).is_file():
        raise UserError(f"{pointer}: names {folder.name}, which is no complete checkpoint; name another one")
    return folder


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's ``state.json`` holds."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def ended_early(stage: Path, step: int) -> bool:
    """Whether a rule has ended the stage in this folder for good, after ``step`` steps."""
    ending = stage / ENDING_FILE
    return ending.is_file() and json.loads(ending.read_text(encoding="utf-8"))["step"] == step
