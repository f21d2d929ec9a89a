"""What a stage needs to know of a device's memory to make use of what is left of it."""

from __future__ import annotations

from typing import Protocol

import torch

GIB = 2**30
# Of the device's whole memory: for fragmentation, and for what differs between updates.
MARGIN = 0.1


class DeviceMemory(Protocol):
    """What there is to know of a device's memory, in bytes."""

    def reset_peak(self) -> None:
        """Begin to watch."""
        ...

    def peak(self) -> int:
        """Allocated at most since then."""
        ...

    def peak_reserved(self) -> int:
        """The same with what was cached for reuse, some of it in pieces too small for anything."""
        ...

    def reserved_by_others(self) -> int:
        """Of what is reserved now, what streams other than the present one have, and this one can't use."""
        ...

    def available(self) -> int:
        """What this process may allocate in all, less the margin."""
        ...

    def empty_cache(self) -> None:
        """Give back what is cached and not in use."""
        ...


class Watched:
    """Which of a stage's steps have been watched, until its use of memory is known.

    At the first update AdamW allocates its moments and kernels compile, so that the second one has all that
    there is, but for what is looked at now and then alone, monitors.
    """

    def __init__(self) -> None:
        self.updates = 0
        self.restart()

    def restart(self) -> None:
        """Something else was between steps: an update and a close look have to come again."""
        self._update = self._closely = False

    def after_step(self, generator_updated: bool, closely: bool) -> bool:
        """Whether it is known.

        The generator is updated the most rarely; once it has been, all roles have. ``closely`` says that the
        step has looked at all that a stage ever looks at.
        """
        self.updates += generator_updated
        self._update |= generator_updated
        self._closely |= closely
        return self.updates > 1 and self._update and self._closely


class CudaMemory:
    """A GPU's, through torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def peak_reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def reserved_by_others(self) -> int:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        segments = torch.cuda.memory_snapshot()
        mine = [each for each in segments if each["device"] == self._device.index]
        return sum(each["total_size"] for each in mine if each["stream"] != stream)

    def available(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return int(free + torch.cuda.memory_reserved(self._device) - MARGIN * total)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()
