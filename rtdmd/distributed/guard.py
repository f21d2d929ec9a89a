"""Notices ranks that call the engines in different orders or train different weights, or wait for each other.

Under ZeRO-3 two ranks that call engines in a different order exchange the wrong shards and go on
with finite, wrong numbers. Every engine call is therefore logged; before each optimizer step the
ranks compare a digest of their logs, and a checksum of the weights that each of them trains by
itself. A rank that makes a call more than the others blocks: a watchdog thread then says which rank
waits where, and ends the process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from hashlib import blake2b
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from rtdmd.distributed.collectives import Ranks
from rtdmd.errors import TrainingHalted
from rtdmd.transfer import to_device

_REMEMBERED_CALLS = 64
_GRACE_SECONDS = 5.0
EXIT_STUCK = 4


class CallLog:
    """The sequence of engine calls on this rank."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._digest = blake2b(digest_size=7)  # 56 bits: fits a signed 64-bit integer
        self._recent: deque[str] = deque(maxlen=_REMEMBERED_CALLS)
        self.count = 0
        self.last_progress = time.monotonic()

    def record(self, call: str) -> None:
        """Note that ``call`` (``generator.forward``, say) is about to be made."""
        self.count += 1
        self.last_progress = time.monotonic()
        self._recent.append(f"#{self.count} {call}")
        self._digest.update(call.encode() + b"\n")

    def touch(self) -> None:
        """Progress that isn't an engine call."""
        self.last_progress = time.monotonic()

    @property
    def last(self) -> str:
        return self._recent[-1] if self._recent else "no engine call yet"

    def differ(self, weights: Tensor) -> Tensor:
        """Collective: whether the ranks' logs differ, and whether their ``weights`` do, which is an int64.

        Two booleans on the device.
        """
        mine = torch.tensor([self.count, int.from_bytes(self._digest.digest(), "little")], dtype=torch.int64)
        device = self._ranks.device
        everyone = self._ranks.all_gather(torch.cat([to_device(mine, device), weights.view(1).to(device)]))
        unequal = (everyone != everyone[0]).any(dim=0)
        return torch.stack([unequal[:2].any(), unequal[2]])

    def halt(self) -> NoReturn:
        """Collective: raise TrainingHalted on every rank, with the calls where the logs differ."""
        logs = self._ranks.gather_objects(list(self._recent))
        raise TrainingHalted("ranks called the engines in different orders:\n" + _first_difference(logs))


def _first_difference(logs: list[list[str]]) -> str:
    """The calls around the first one that differs, one line a rank."""
    shortest = min(len(log) for log in logs)
    at = next((i for i in range(shortest) if len({log[i] for log in logs}) > 1), shortest)
    lines = []
    for rank, log in enumerate(logs):
        around = log[max(at - 1, 0) : at + 3]
        lines.append(f"  rank {rank}: … {', '.join(around)} …" if around else f"  rank {rank}: nothing more")
    return "\n".join(lines)


class Watchdog:
    """A thread that ends the process when nothing has progressed for ``timeout_seconds``.

    Progress is an engine call, a loaded tensor, a scored chunk of pictures, a finished exchange: whatever
    calls :meth:`CallLog.record` or :meth:`CallLog.touch`. Shortly before, every rank leaves its
    whereabouts in the process group's store, so that the report says where each of them waits.
    """

    def __init__(self, ranks: Ranks, calls: CallLog, timeout_seconds: float) -> None:
        self._ranks, self._calls, self._timeout = ranks, calls, timeout_seconds
        self._store = dist.PrefixStore("rtdmd-watchdog", dist.distributed_c10d._get_default_store())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rtdmd-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        published = None
        while not self._stopped.wait(min(1.0, self._timeout / 10)):
            waited = time.monotonic() - self._calls.last_progress
            if waited > self._timeout / 2 and published != self._calls.last_progress:
                published = self._calls.last_progress
                with suppress(Exception):  # rank 0, which keeps the store, may be gone
                    self._store.set(str(self._ranks.rank), self._calls.last)
            if waited > self._timeout:
                try:
                    print(self._report(waited), file=sys.stderr, flush=True)
                    # The others' reports are made of rank 0's store, and a rank that leaves ends their calls.
                    time.sleep(_GRACE_SECONDS)
                finally:
                    os._exit(EXIT_STUCK)

    def _report(self, waited: float) -> str:
        lines = [f"rtdmd: no progress for {waited:.0f} s; the last engine call of each rank:"]
        for rank in range(self._ranks.world_size):
            key = str(rank)
            # A key that isn't there would block: `check` asks without waiting.
            where = (
                self._store.get(key).decode()
                if self._store.check([key])
                else "still making progress, or gone"
            )
            lines.append(f"  rank {rank}: {where}")
        lines.append("A rank that is one call ahead waits for the others; look at what they did instead.")
        return "\n".join(lines)
