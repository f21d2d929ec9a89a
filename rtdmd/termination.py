"""SIGTERM and Ctrl-C: noted while there is something to save, the end before that."""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: start me again

_came: list[int] = []


def leave_on_signals() -> None:
    """From now on SIGTERM and SIGINT end the process with EXIT_INTERRUPTED. Main thread only."""
    _handle(lambda _number, _frame: os._exit(EXIT_INTERRUPTED))


def note_signals() -> None:
    """From now on :func:`signal_came` says that one came; a second SIGINT interrupts as usual."""
    _came.clear()
    _handle(_note)


def signal_came() -> bool:
    """Whether SIGTERM or SIGINT has come since :func:`note_signals`."""
    return bool(_came)


def _note(number: int, _frame: FrameType | None) -> None:
    _came.append(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)


def _handle(handler: signal._HANDLER) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
