"""The GPUs that a process may use, by their names in CUDA_VISIBLE_DEVICES; timing one, having them alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ALONE = "BENCHMARK_ALONE"  # where processes that must have their GPUs alone say so: a folder
_SETTLING = 1.0  # seconds until the others' queued work is done


def visible_gpus() -> list[str]:
    """Those of CUDA_VISIBLE_DEVICES if it is set, else all by number."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def device_seconds(run: Callable[[], object]) -> float:
    """What the present GPU takes for what ``run`` gives its present stream; waits for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@contextmanager
def alone() -> Iterator[None]:
    """Within it, what benchmarks/jobs.py lets share this job's GPUs is held still."""
    folder = os.environ.get(ALONE)
    if folder is None:
        yield
        return
    mark = Path(folder, str(os.getpid()))
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        time.sleep(_SETTLING)
        yield
    finally:
        mark.unlink(missing_ok=True)
