"""Scoring beside the rollouts: one thread, on a GPU with a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class ScoringThread:
    """Runs jobs one after the other in the order they come, while the main thread goes on.

    Jobs must not touch engines: with ZeRO-3 their calls have to come in the same order on all ranks, which
    two threads can't promise. What a job returns must live on the CPU, or the main thread's stream would
    have to wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rtdmd-scoring")
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """Queue ``job``, which may use whatever the current stream has been told to compute so far.

        The caller keeps the job's inputs alive until its result is there.
        """
        if self._stream is None:
            return self._executor.submit(job)
        ready = torch.cuda.current_stream(self._device).record_event()
        return self._executor.submit(self._on_stream, job, self._stream, ready)

    def _on_stream(
        self, job: Callable[[], Result], stream: torch.cuda.Stream, ready: torch.cuda.Event
    ) -> Result:
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_event(ready)
            result = job()
            stream.synchronize()
            return result

    def close(self) -> None:
        """Let the job under way finish, and drop the others."""
        self._executor.shutdown(cancel_futures=True)
