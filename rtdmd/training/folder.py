"""A run's folder: one launch at a time trains there, and all ranks see the same files."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import uuid
from pathlib import Path
from typing import IO

from rtdmd.distributed.collectives import Ranks
from rtdmd.errors import UserError

LOCK_FILE = ".lock"  # whose first line says who trains here, its second is this launch's alone
PATIENCE = 60.0  # seconds until another machine sees what rank 0 has written


def occupy(run: Path, ranks: Ranks) -> IO[str] | None:
    """Collective: keep other launches out until the file that rank 0 gets is closed, or its process ends.

    Raises:
        UserError: another launch trains there, or ranks of other machines have a folder of their own by
            this name.
    """
    with ranks.together():
        lock = _lock(run) if ranks.is_main else None
    written = ranks.gather_objects(None if lock is None else _read(run))[0]
    with ranks.together():
        _wait_for(run, written)
    return lock


def _lock(run: Path) -> IO[str]:
    run.mkdir(parents=True, exist_ok=True)
    lock = open(run / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 (it is the lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _read(run).partition("\n")[0] or "another launch"
        lock.close()
        raise UserError(
            f"{run}: {owner} trains there; end it or wait for it, or choose another `name` (if it is gone "
            f"with its machine, remove {run / LOCK_FILE})"
        ) from None
    except OSError:
        pass  # a file system without locks
    job = os.environ.get("SLURM_JOB_ID")
    owner = f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}," if job else "")
    lock.truncate(0)
    lock.write(f"{owner}\n{uuid.uuid4().hex}\n")
    lock.flush()
    os.fsync(lock.fileno())
    return lock


def _read(run: Path) -> str:
    return (run / LOCK_FILE).read_text(encoding="utf-8")


def _wait_for(run: Path, written: str) -> None:
    """Until this rank sees it, too."""
    deadline = time.monotonic() + PATIENCE
    while not (run / LOCK_FILE).is_file() or _read(run) != written:
        if time.monotonic() > deadline:
            raise UserError(
                f"output: {run} on {socket.gethostname()} is another folder than on rank 0's machine; choose "
                "an `output` on a file system that all machines share"
            )
        time.sleep(0.1)
