"""How fast the GPUs of a machine gather shards: by collectives and by copies, alone and beside computation.

  python -m torch.distributed.run --standalone --nproc-per-node 4 -m benchmarks.gathering [--mib 300]

Gathers --mib in one piece, as a block of FLUX.2-klein 4B has. The rate counts what a rank receives. "copies"
is what ``roles.gather`` does, one stream for all peers; "copies, streams" has one a peer. Matrix products
beside a gather take longer by so much (on GPUs; a CPU only tries the script). Medians, the slowest rank's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpus import alone, device_seconds
from rtdmd.distributed.collectives import Ranks, start_ranks, stop_ranks
from rtdmd.distributed.peers import copied_pieces, obstacle_to_copying, share_memory

Gather = Callable[[], None]
PRODUCTS = 8


class Gathering:
    """A tensor in shards on all ranks, and the ways to have it whole."""

    def __init__(self, ranks: Ranks, mib: float) -> None:
        self._ranks = ranks
        size = int(mib * 2**20) // ranks.world_size
        self.whole = torch.zeros(size * ranks.world_size, dtype=torch.uint8, device=ranks.device)
        self._shard = torch.full((size,), ranks.rank + 1, dtype=torch.uint8, device=ranks.device)
        on_gpu = ranks.device.type == "cuda"
        self._streams = [torch.cuda.Stream() for _ in range(ranks.world_size)] if on_gpu else []

    def ways(self) -> dict[str, Gather]:
        """Collective."""
        found: dict[str, Gather] = {"collective": self._collective}
        if obstacle_to_copying(self._ranks) is None:
            self._memory = share_memory(self._shard.numel(), torch.uint8, self._ranks)
            self._memory.of_ranks[self._ranks.rank].copy_(self._shard)
            self._ranks.barrier()
            found |= {"copies": self._copies, "copies, streams": self._copies_on_streams}
        return found

    def _collective(self) -> None:
        dist.all_gather_into_tensor(self.whole, self._shard)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        return copied_pieces(self.whole, self._memory.of_ranks, self._ranks.rank)

    def _copies(self) -> None:
        for target, piece in self._pieces():
            target.copy_(piece, non_blocking=True)

    def _copies_on_streams(self) -> None:
        if not self._streams:
            self._copies()
            return
        for stream, (target, piece) in zip(self._streams, self._pieces(), strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                target.copy_(piece, non_blocking=True)
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)

    def check(self) -> None:
        """Every rank's shard has arrived."""
        rows = self.whole.view(self._ranks.world_size, -1)
        expected = torch.arange(1, self._ranks.world_size + 1, dtype=torch.uint8, device=self.whole.device)
        if not torch.equal(rows, expected[:, None].expand_as(rows)):
            raise RuntimeError("a gathered tensor is wrong")
        self.whole.zero_()


class Timer:
    """Medians over repeats, of the slowest rank."""

    def __init__(self, ranks: Ranks, repeats: int) -> None:
        self._ranks, self._repeats = ranks, repeats
        self._stream = torch.cuda.Stream() if ranks.device.type == "cuda" else None

    def _synchronize(self) -> None:
        if self._stream is not None:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], None], beside: Callable[[], None] | None = None) -> float:
        """Of what ``run`` has the device do, while it does ``beside``, too, on another stream."""
        times = []
        for _ in range(self._repeats + 2):
            self._ranks.barrier()
            self._synchronize()
            times.append(self._on_device(run, beside) if self._stream else self._on_host(run))
            self._synchronize()
        slowest = self._ranks.max(torch.tensor(times[2:], dtype=torch.float64, device=self._ranks.device))
        return median(slowest.tolist())

    def _on_device(self, run: Callable[[], None], beside: Callable[[], None] | None) -> float:
        if beside is not None:
            with torch.cuda.stream(self._stream):
                beside()
        return device_seconds(run)

    def _on_host(self, run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def measure(ranks: Ranks, options: argparse.Namespace) -> None:
    """Print the table on rank 0."""
    timer = Timer(ranks, options.repeats)
    gathering = Gathering(ranks, options.mib)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    a, b = (torch.randn(options.size, options.size, device=ranks.device, dtype=dtype) for _ in range(2))

    def compute() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b)

    ways = gathering.ways()
    undisturbed = timer.seconds(compute)
    received = gathering.whole.numel() * (ranks.world_size - 1) / ranks.world_size
    lines = []
    for name, gather in ways.items():
        seconds = timer.seconds(gather)
        gathering.check()
        count = max(1, round(2 * undisturbed / seconds))  # so that they outlast the products

        def gather_often(gather: Gather = gather, count: int = count) -> None:
            for _ in range(count):
                gather()

        slowed = timer.seconds(compute, beside=gather_often)
        lines.append(f"| {name} | {received / seconds / 1e9:.1f} | {slowed / undisturbed:.3f} |")
    if ranks.is_main:
        device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
        products = f"{PRODUCTS} products alone: {undisturbed:.4f} s"
        print(f"{device} x {ranks.world_size}, {options.mib:g} MiB, {products}")
        print("| way | GB/s | products beside it, of their time alone |\n|---|---:|---:|", *lines, sep="\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=float, default=300, help="of the whole tensor")
    parser.add_argument("--size", type=int, default=8192, help="of the matrices")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    ranks = start_ranks(600)
    with alone():
        measure(ranks, options)
    ranks.barrier()
    stop_ranks()


if __name__ == "__main__":
    main()
