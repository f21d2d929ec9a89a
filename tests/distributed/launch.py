"""Starts the ranks of a distributed test as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rtdmd.processes import free_port

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(
    arguments: Sequence[str],
    world_size: int,
    *,
    timeout: float = 840,
    codes: Sequence[int] = (0,),
    accelerator: str = "cpu",
) -> list[subprocess.CompletedProcess[str]]:
    """Run ``python arguments`` once per rank, as a launcher does; every exit code must be in ``codes``."""
    shared = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": accelerator,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    # Files, not pipes: a rank whose pipe is full would wait for its reader, and the others for it.
    outputs = [tempfile.TemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115 (closed below)
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]
    deadline = time.monotonic() + timeout
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    finished = []
    for process, output in zip(processes, outputs, strict=True):
        output.seek(0)
        finished.append(subprocess.CompletedProcess(arguments, process.returncode, output.read()))
        output.close()
    report = "\n".join(
        f"--- rank {rank} ended with {done.returncode}:\n{done.stdout[-4000:]}"
        for rank, done in enumerate(finished)
    )
    assert all(done.returncode in codes for done in finished), report
    return finished
