"""What a step has to exchange between ranks, and what a step spent on exchanging.

A network in shards (ZeRO-3) is gathered once each time that it is run through, forward or backward
(recomputation finds the layers there), a shared base of many blocks but for its ends, which stay whole. What
trains is reduced once an update, in float32. Both are counted as the size of the whole; over N ranks at a
bus bandwidth of b bytes a second a gather takes (N − 1)/N · size/b and a reduction 2·(N − 1)/N · size/b, as
NCCL's rings do. If every P ranks have the network once between them, a gather is among those.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpus import alone
from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.config import engine_config, partition_size, zero_stage
from rtdmd.distributed.sharding import ends_of
from rtdmd.models.blocks import blocks_of
from rtdmd.models.lora import adapter_parameters, attach_adapter
from rtdmd.models.protocol import ModelFamily
from rtdmd.models.recomputation import spread
from rtdmd.recipe.schema import Recipe

Interval = tuple[float, float]

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step, counted as the size of the whole: what is gathered, what is reduced."""

    gathered: int
    reduced: int
    partition: int  # ranks that have a network in shards once between them

    def seconds(self, ranks: int, bandwidth: float) -> float:
        """Spent if nothing else happened meanwhile; ``bandwidth`` in bytes a second."""
        sent = (self.partition - 1) / self.partition * self.gathered + 2 * (ranks - 1) / ranks * self.reduced
        return sent / bandwidth


def num_micro_batches(samples: int, size: int | None) -> int:
    """Of a batch in parts of ``size``; None is all at once."""
    return -(-samples // (size or samples))


def cold_start_passes(recipe: Recipe, stop: int, with_generator: bool) -> Counter[str]:
    """How often each role's network is run through in an iteration that stops its rollouts after ``stop``."""
    settings = recipe.cold_start
    parts = num_micro_batches(settings.batch_size, settings.micro_batch_size)
    forwards = 1 if settings.consistency_weight == 0 else 2  # the anchor, and both moves together
    passes = Counter(generator=stop, fake_score=2 * forwards * parts)
    if with_generator:
        passes.update(generator=stop - 1 + 2 * parts, teacher=parts, fake_score=parts)
    return passes


def rtdmd_passes(recipe: Recipe) -> Counter[str]:
    """The same of an epoch."""
    settings = recipe.rtdmd
    batches, size = settings.num_sample_batches, settings.sample_batch_size
    fake = batches * num_micro_batches(size, settings.fake_score_micro_batch_size)
    parts = batches * num_micro_batches(size, settings.micro_batch_size)
    forwards = 1 if settings.consistency_weight == 0 else 2
    drawn = settings.num_policy_steps
    trained = 1 + (drawn if settings.trains_drawn else 0)
    matched = 1 + (drawn if settings.matches_drawn else 0)
    return Counter(
        generator=batches * len(recipe.schedule.timesteps) + 2 * parts * trained,
        fake_score=matched * (2 * forwards * fake + parts),
        teacher=matched * parts,
    )


@dataclass(frozen=True)
class Sizes:
    """Elements of a transformer, of its parts that a shared base has in shards, and of an adapter on it."""

    whole: int
    rest: int  # what is in no block, where that is in shards, too
    blocks: tuple[int, ...]
    adapter: int

    def gathered(self, kept: int = 0) -> int:
        """In each pass, once so many of the blocks stay whole."""
        there = spread(min(kept, len(self.blocks)), len(self.blocks))
        return self.rest + sum(size for index, size in enumerate(self.blocks) if index not in there)

    @classmethod
    def of(cls, recipe: Recipe, family: ModelFamily, config: dict[str, Any]) -> Sizes:
        """``config`` is the transformer's."""
        lora = recipe.lora
        with torch.device("meta"):
            network = family.transformer_class(**config)
            whole = sum(parameter.numel() for parameter in network.parameters())
            modules = blocks_of(network, family.block_lists)
            blocks = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
            ends = ends_of(len(blocks))
            attach_adapter(network, lora.rank, lora.alpha, lora.targets or family.lora_targets)
            adapter = sum(parameter.numel() for parameter in adapter_parameters(network).values())
        rest = 0 if 0 in ends else whole - sum(blocks)
        in_shards = tuple(size for index, size in enumerate(blocks, 1) if index not in ends)
        return cls(whole, rest, in_shards, adapter)


def traffic(
    recipe: Recipe,
    sizes: Sizes,
    passes: Counter[str],
    updated: Iterable[str],
    ranks: int,
    partition: int | None = None,
    kept: int = 0,
) -> Traffic:
    """Of a step that runs through networks ``passes`` times and updates the roles ``updated``.

    ``partition`` is how many ranks have a network once between them, if that isn't the engines' to say;
    ``kept`` of a shared base's blocks stay whole.
    """
    engines = {role: engine_config(getattr(recipe.roles, role).engine, recipe.dtype, None) for role in passes}
    sharded = {role: config for role, config in engines.items() if zero_stage(config) == 3}

    def trained(role: str) -> int:
        return sizes.adapter if getattr(recipe.roles, role).trains == "lora" else sizes.whole

    element = getattr(torch, recipe.dtype).itemsize
    size = sizes.gathered(kept) if recipe.roles.engines == "shared_base" else sizes.whole
    return Traffic(
        gathered=sum(passes[role] * size * element for role in sharded),
        reduced=sum(4 * trained(role) for role in updated),
        partition=max(
            (partition or partition_size(config, ranks) or ranks for config in sharded.values()),
            default=ranks,
        ),
    )


def length(intervals: Sequence[Interval]) -> float:
    """Of the union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total


def exposed(communication: Sequence[Interval], computation: Sequence[Interval]) -> float:
    """How long there was communication and no computation."""
    return length([*communication, *computation]) - length(computation)


def device_intervals(trace: dict[str, Any]) -> tuple[list[Interval], list[Interval]]:
    """Communication and computation in a Chrome trace, in seconds.

    The former is NCCL's kernels, and copies on streams on which nothing is computed; the latter all else.
    """
    events = [event for event in trace["traceEvents"] if event.get("cat") in _ON_DEVICE]

    def stream(event: dict[str, Any]) -> Any:
        return event.get("args", {}).get("stream")

    def is_nccl(event: dict[str, Any]) -> bool:
        return "nccl" in event["name"].lower()

    computing = {stream(event) for event in events if event["cat"] == "kernel" and not is_nccl(event)}
    found: tuple[list[Interval], list[Interval]] = ([], [])
    for event in events:
        start, seconds = float(event["ts"]) / 1e6, float(event["dur"]) / 1e6
        travels = is_nccl(event) or (event["cat"] == "gpu_memcpy" and stream(event) not in computing)
        found[0 if travels else 1].append((start, start + seconds))
    return found


def after_barrier(
    communication: Sequence[Interval], computation: Sequence[Interval]
) -> tuple[list[Interval], list[Interval]]:
    """What begins after the first communication has ended."""
    _, end = min(communication)
    later, computed = ([each for each in some if each[0] >= end] for some in (communication, computation))
    return later, computed


def communication(run: Callable[[], None], ranks: Ranks) -> dict[str, float]:
    """Seconds of ``run`` in which the device communicates, and in which it does nothing else meanwhile.

    A rank that waits for another one communicates.
    """
    with alone(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        ranks.barrier()  # profilers start at different moments, which is no communication
        torch.cuda.synchronize(ranks.device)
        run()
        torch.cuda.synchronize(ranks.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    communicating, computing = after_barrier(*device_intervals(trace))
    return {"seconds": length(communicating), "exposed_seconds": exposed(communicating, computing)}
