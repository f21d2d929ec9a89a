"""The ranks of a run and what they exchange."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rtdmd.distributed.attention import mend_cudnn_backward
from rtdmd.errors import TrainingHalted, UserError

Result = TypeVar("Result")

_TOLD_BY_NAME: dict[str, type[Exception]] = {kind.__name__: kind for kind in (UserError, TrainingHalted)}


@dataclass(frozen=True)
class Ranks:
    """This process among the data-parallel ranks; every method but ``on_main`` is collective."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # of these ranks; None is all there are
    timeout: timedelta = timedelta(minutes=30)  # of a collective

    def part(self, size: int) -> Ranks:
        """The ``size`` consecutive ranks among which this one is; ValueError unless that divides them all.

        Collective over all ranks the first time. A part has no parts.
        """
        if size == self.world_size:
            return self
        if self.world_size % size or self.group is not None:
            raise ValueError(f"{self.world_size} ranks can't be divided into parts of {size}")
        groups = _groups(self.world_size, size, self.timeout)
        return Ranks(self.rank % size, size, self.device, groups[self.rank // size], self.timeout)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, action: Callable[[], Result]) -> Result | None:
        """Run ``action`` on rank 0 alone. Not collective: the others don't wait."""
        return action() if self.is_main else None

    def on_main_first(self, action: Callable[[], None]) -> None:
        """Run ``action`` on rank 0 while the others wait; if it fails there, it fails everywhere."""
        with self.together():
            self.on_main(action)

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block fails on one rank, it fails on all of them. The block must not be collective.

        The ranks that didn't fail raise UserError or TrainingHalted if the failing one did, else
        RuntimeError.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        # As text: not every exception survives pickling.
        mine = None if failure is None else (type(failure).__name__, f"rank {self.rank}: {failure}")
        found = [each for each in self.gather_objects(mine) if each is not None]
        if failure is not None:
            raise failure
        if found:
            name, text = found[0]
            raise _TOLD_BY_NAME.get(name, RuntimeError)(text)

    def all_gather(self, value: Tensor) -> Tensor:
        """[n, …] on each rank → [world_size, n, …], equal shapes on all ranks."""
        parts = [torch.empty_like(value) for _ in range(self.world_size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.stack(parts)

    def gather_objects(self, value: Any) -> list[Any]:
        """One small Python object per rank, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, value: Tensor) -> Tensor:
        """Element-wise sum over ranks (a new tensor)."""
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def mean(self, value: Tensor) -> Tensor:
        """Element-wise mean over ranks."""
        return self.sum(value) / self.world_size

    def average_(self, value: Tensor) -> None:
        """Element-wise mean over ranks, in place."""
        dist.all_reduce(value.div_(self.world_size), group=self.group)

    def max(self, value: Tensor) -> Tensor:
        """Element-wise maximum over ranks (a new tensor)."""
        largest = value.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank."""
        return bool(self.max(torch.tensor(int(flag), device=self.device)).item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.group)


@cache
def _groups(world_size: int, size: int, timeout: timedelta) -> list[dist.ProcessGroup]:
    """Of all parts: every rank has to make every group. They last, as they hold memory on GPUs."""
    return [
        dist.new_group(range(first, first + size), timeout=timeout) for first in range(0, world_size, size)
    ]


def start_ranks(timeout_seconds: float) -> Ranks:
    """Join the process group that the launcher (deepspeed, torchrun, srun) laid out.

    Without a launcher the process is the only rank. ``timeout_seconds`` bounds a collective that
    waits for a rank which never comes. UserError where ranks can't meet: without an address, or at a port
    that is taken.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    elif "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but MASTER_ADDR isn't set: start the ranks with "
            "deepspeed, torchrun or slurm/, which set both"
        )
    import deepspeed
    import deepspeed.comm  # registers the module patched below

    # DeepSpeed calls collectives by names that newer torch versions deprecate.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local_rank)
        mend_cudnn_backward()
    else:
        # On CPU, DeepSpeed would first compile a shared-memory collective (a minute and more);
        # gloo serves as well here.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    timeout = timedelta(seconds=timeout_seconds)
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            timeout=timeout,
            auto_mpi_discovery=False,
            verbose=False,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise UserError(
            f"port {port} is another's, such as another launch's on this machine; give one that is free: "
            f"deepspeed --master_port {int(port) + 1} train_ds.py …"
        ) from error
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device, timeout=timeout)


def stop_ranks() -> None:
    """Leave the process group."""
    _groups.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()
