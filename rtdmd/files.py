"""Files that are whole or not there, and JSON that says where it is damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rtdmd.errors import UserError


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A name beside ``path`` for the block to write to; what it wrote then takes the place of ``path``.

    It is on the disk before, so that after a power cut, too, ``path`` is the old file or the new one. A block
    that fails leaves ``path`` as it was, and nothing beside it; what a killed process leaves, the next one
    overwrites, unless ``shared`` says that several may write at once and gives each a name of its own. The
    name is ``STEM.partial`` with the suffix of ``path`` (:func:`is_partial`).
    """
    own = f".{os.getpid()}" if shared else ""
    beside = path.with_name(f"{path.stem}{own}.partial{path.suffix}")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def is_partial(path: Path) -> bool:
    """Whether this is what a killed process has left beside a file."""
    return Path(path.stem).suffix == ".partial"


def replace_file(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write a file as a whole, see :func:`replacing`; text as UTF-8."""
    with replacing(path, shared=shared) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The mapping in a JSON file.

    UserError if it can't be read, and with ``advice`` if it is missing or damaged, or holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); {advice}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not a mapping; {advice}")
    return content
