"""The secret that a reward server and its clients share."""

from __future__ import annotations

from pathlib import Path

from rtdmd.errors import UserError


def read_token(path: str) -> str:
    """The token in a file, without the white space around it; UserError if there is none."""
    try:
        token = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path}: the token cannot be read: {reason}") from error
    if not token or not (token.isascii() and token.isprintable()):
        raise UserError(f"{path}: holds no token; write one line of printable ASCII into it")
    return token
