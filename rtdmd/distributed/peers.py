"""Memory of one rank that the other ranks of a machine read, without its taking part."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rtdmd.distributed.collectives import Ranks
from rtdmd.errors import UserError


@dataclass(frozen=True)
class PeerMemory:
    """A flat tensor of every rank, as this rank sees them."""

    of_ranks: list[Tensor]
    mapping: Any = None  # what has to live as long as they


def share_memory(count: int, dtype: torch.dtype, ranks: Ranks) -> PeerMemory:
    """``count`` elements of every rank, without values; a rank's own are for it to fill.

    Collective. GPUs map each other's memory (torch's symmetric memory): copying from it needs NVLink or
    PCIe, but no multiprocessor of either. Processes on a CPU map files. Nobody may read what another rank
    has not filled yet. Raises UserError on every rank where that can't be: several machines, GPUs
    without peer access.
    """
    hosts = sorted(set(ranks.gather_objects(socket.gethostname())))
    if len(hosts) > 1:
        advice = "write collective, or give the engine a zero_hpz_partition_size of one machine's GPUs"
        raise UserError(
            f"roles.gather: copies is for ranks on one machine, these are on {', '.join(hosts)}; {advice}"
        )
    if ranks.device.type == "cuda":
        return _symmetric(count, dtype, ranks)
    return _mapped(count, dtype, ranks)


def _symmetric(count: int, dtype: torch.dtype, ranks: Ranks) -> PeerMemory:
    # Read at the first use of symmetric memory; nothing here needs NVLink's multicast.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric_memory

    mine = ranks.device.index
    others = [index for index in ranks.gather_objects(mine) if index != mine]
    with ranks.together():
        if not all(torch.cuda.can_device_access_peer(mine, other) for other in others):
            raise UserError("roles.gather: copies needs GPUs with access to each other; write collective")
        memory = symmetric_memory.empty(count, dtype=dtype, device=ranks.device)
    group = ranks.group or dist.group.WORLD
    assert group is not None
    handle = symmetric_memory.rendezvous(memory, group)
    of_ranks = [
        memory if rank == ranks.rank else handle.get_buffer(rank, (count,), dtype)
        for rank in range(ranks.world_size)
    ]
    return PeerMemory(of_ranks, handle)


def _mapped(count: int, dtype: torch.dtype, ranks: Ranks) -> PeerMemory:
    with tempfile.NamedTemporaryFile(prefix="rtdmd-shard-") as file:
        with ranks.together():
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
        paths = ranks.gather_objects(file.name)
        with ranks.together():
            return PeerMemory([torch.from_file(path, shared=True, size=count, dtype=dtype) for path in paths])
