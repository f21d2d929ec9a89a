"""The errors that a command turns into one message and an exit code, without a traceback."""

from collections.abc import Sequence
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in what the user gave; the message says what to change. Commands exit with code 2."""


class TrainingHalted(Exception):
    """A run stopped itself to protect its state (non-finite numbers, diverging ranks). Exit code 3."""


def told_of_full_disk(error: Exception) -> str | None:
    """What to say of an error, OSError, safetensors' or torch's own, if it is that of a full disk."""
    if "No space left on device" not in str(error):
        return None
    return f"{error}; free some and start the same command again"


def nearest_hint(word: str, known: Sequence[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known word, else the list of known words."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}"
