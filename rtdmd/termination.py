"""SIGTERM and Ctrl-C: noted while there is something to save, the end before that."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

import psutil

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: start me again
_LOOK_SECONDS = 1.0

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


def end_with_launcher() -> None:
    """From now on the end of the ``deepspeed`` command counts as SIGTERM.

    On one machine it passes no signal on: its child, which has started this process, would go on without it.
    """
    starter = psutil.Process(os.getppid())
    threading.Thread(target=_watch, args=(starter, starter.ppid()), daemon=True).start()


def _watch(starter: psutil.Process, launcher: int) -> None:
    while True:
        time.sleep(_LOOK_SECONDS)
        try:
            is_alone = starter.ppid() != launcher  # an orphan has another parent at once
        except psutil.NoSuchProcess:
            is_alone = True
        if is_alone:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _note(number: int, _frame: FrameType | None) -> None:
    _came.append(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)


def _handle(handler: signal._HANDLER) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
