"""Memory of one rank that the other ranks of a machine read, without its taking part."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rtdmd.distributed.collectives import Ranks


def copied_pieces(whole: Tensor, peers: Sequence[Tensor], rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of ``whole`` and the peers' shards that belong there; each rank begins with its own."""
    size = whole.numel() // len(peers)
    for step in range(len(peers)):
        peer = (rank + step) % len(peers)
        yield whole[peer * size : (peer + 1) * size], peers[peer]


@dataclass(frozen=True)
class PeerMemory:
    """A flat tensor of every rank, as this rank sees them."""

    of_ranks: list[Tensor]
    mapping: Any = None  # what has to live as long as they


def ranks_of_a_machine(ranks: Ranks) -> int:
    """How many each machine has, if all have as many, more than one, consecutive ones; else all there are.

    Collective.
    """
    return consecutive_runs(ranks.gather_objects(socket.gethostname()))


def consecutive_runs(hosts: Sequence[str]) -> int:
    """Length of the runs of equal names, if they are equally long, longer than 1, and no name comes back."""
    runs = [len(list(run)) for _, run in groupby(hosts)]
    fit = len(runs) == len(set(hosts)) and len(set(runs)) == 1 and runs[0] > 1
    return runs[0] if fit else len(hosts)


def obstacle_to_copying(ranks: Ranks) -> str | None:
    """Why these ranks can't copy from each other, the end of a sentence; None if they can. Collective."""
    hosts = sorted(set(ranks.gather_objects(socket.gethostname())))
    if len(hosts) > 1:
        return f"is for ranks on one machine, these are on {', '.join(hosts)}"
    if ranks.device.type != "cuda":
        return None
    mine = ranks.device.index
    indices = ranks.gather_objects(mine)
    if len(set(indices)) < len(indices):
        return "needs processes that see each other's GPUs, each under a number of its own"
    seen = range(torch.cuda.device_count())
    others = [index for index in indices if index != mine]
    has_access = all(i in seen and torch.cuda.can_device_access_peer(mine, i) for i in others)
    if not all(ranks.gather_objects(has_access)):
        return "needs GPUs with access to each other"
    failure = None
    try:
        _symmetric(1, torch.uint8, ranks)
    except RuntimeError as error:  # a container without the permission, say
        failure = f"needs GPUs that can map each other's memory: {error}"
    return next((each for each in ranks.gather_objects(failure) if each is not None), None)


def share_memory(count: int, dtype: torch.dtype, ranks: Ranks) -> PeerMemory:
    """``count`` elements of every rank, without values; a rank's own are for it to fill.

    Collective. GPUs map each other's memory (torch's symmetric memory): copying from it needs NVLink or
    PCIe, but no multiprocessor of either. Processes on a CPU map files. Nobody may read what another rank
    has not filled yet. For ranks for which :func:`obstacle_to_copying` finds none.
    """
    if ranks.device.type == "cuda":
        return _symmetric(count, dtype, ranks)
    return _mapped(count, dtype, ranks)


def _symmetric(count: int, dtype: torch.dtype, ranks: Ranks) -> PeerMemory:
    # Read at the first use of symmetric memory; nothing here needs NVLink's multicast.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    # Nor a pool of torch's, which would keep what is given back.
    os.environ.setdefault("TORCH_SYMMMEM_IMPLICIT_POOL", "0")
    import torch.distributed._symmetric_memory as symmetric_memory

    with ranks.together():
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
