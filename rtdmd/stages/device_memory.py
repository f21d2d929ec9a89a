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

    def available(self) -> int:
        """What this process may allocate in all, less the margin."""
        ...

    def empty_cache(self) -> None:
        """Give back what is cached and not in use."""
        ...


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

    def available(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return int(free + torch.cuda.memory_reserved(self._device) - MARGIN * total)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()
