"""How long the host takes to launch a network's call, and how long it takes until the device has computed it.

  python -m benchmarks.launching recipes/flux2_4b.yaml [key=value …] [--batches 1 2 3 6] [--profile 30]
  python -m torch.distributed.run --standalone --nproc-per-node 4 -m benchmarks.launching \
    recipes/flux2_4b.yaml roles.whole_blocks=100

Calls of the cold start's roles, random weights of the true size, one after the other with the device waited
for in between. Where "launched" is nearly all of "done", the host sets the pace: a larger batch then costs
nothing. (A device's queue is finite: behind a long call the host waits, too.) All ranks measure at once;
medians, of the fastest and the slowest rank. ``--profile`` adds the functions that take the host most, of
calls of the first batch.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.full_size import random_loaders
from benchmarks.gpus import alone
from benchmarks.measuring import write_json
from benchmarks.reward_memory import synchronize
from benchmarks.train_step import prepare
from rtdmd.distributed.collectives import Ranks, start_ranks, stop_ranks
from rtdmd.distributed.guard import CallLog
from rtdmd.errors import UserError
from rtdmd.stages.assemble import Stage, build_stage
from rtdmd.stages.networks import HandOver

SIGMA = 0.5
PROFILED = 5


def calls(stage: Stage, batch: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and call of each, in the order in which they follow from each other."""
    text = stage.family.encode_prompts(["a red cube on a table"] * batch)
    x = torch.randn(batch, *stage.few.latent_shape, device=device)
    student = stage.roles.fake_score
    losses: list[torch.Tensor] = []

    @torch.no_grad()
    def without_gradient() -> None:
        student.velocity(text)(x, SIGMA)

    def forward() -> None:
        losses[:] = [student.velocity(text)(x, SIGMA).square().mean()]

    def backward() -> None:
        student.engine.backward(losses.pop(), last=False)

    yield "fake score, without a gradient", without_gradient
    yield "fake score, forward", forward
    yield "fake score, backward", backward
    yield "teacher with guidance", torch.no_grad()(lambda: stage.roles.teacher.velocity(text)(x, SIGMA))


def timed(run: Callable[[], Any], ranks: Ranks) -> tuple[float, float]:
    """Seconds until the host, and until the device, are done."""
    ranks.barrier()
    synchronize(ranks.device)
    start = time.perf_counter()
    run()
    launched = time.perf_counter() - start
    synchronize(ranks.device)
    return launched, time.perf_counter() - start


def measure(stage: Stage, batch: int, repeats: int, ranks: Ranks) -> list[dict[str, Any]]:
    """Each call's medians after three rounds of all of them."""
    runs = dict(calls(stage, batch, ranks.device))
    for _ in range(3):
        for run in runs.values():
            run()
    with alone():
        found = [{name: timed(run, ranks) for name, run in runs.items()} for _ in range(repeats)]
    rows = []
    for name in runs:
        mine = [median(round_[name][which] for round_ in found) for which in (0, 1)]
        launched, done = zip(*ranks.gather_objects(mine), strict=True)
        extremes = {"launched": [min(launched), max(launched)], "done": [min(done), max(done)]}
        rows.append({"case": name, "batch": batch, **extremes})
    return rows


def profile(stage: Stage, batch: int, top: int, device: torch.device) -> str:
    """The functions that take the host most by themselves, over all calls."""
    profiler = cProfile.Profile()
    runs = [run for _, run in calls(stage, batch, device)]
    for _ in range(PROFILED):
        for run in runs:
            profiler.enable()
            run()
            profiler.disable()
            synchronize(device)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(top)
    return text.getvalue()


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    cells = [" to ".join(f"{1e3 * value:.1f}" for value in row[key]) for key in ("launched", "done")]
    return f"| {row['case']} | {row['batch']} | {cells[0]} | {cells[1]} |"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, and return what the JSON holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe, dotted")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 3, 6])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", type=int, metavar="COUNT", help="functions to list")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script itself")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.set_defaults(stage="cold_start")
    options = parser.parse_intermixed_args(arguments)
    if min(*options.batches, options.repeats, options.profile or 1) < 1:
        parser.error("--batches, --repeats and --profile must be at least 1")
    with tempfile.TemporaryDirectory() as made:
        recipe = prepare(options, Path(made))
        ranks = start_ranks(600)
        loaders = random_loaders(options.tiny)
        stage = build_stage(options.stage, recipe, ranks, CallLog(ranks), HandOver(), loaders)
        name = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
        result = {"device": name, "ranks": ranks.world_size, "recipe": options.recipe, "rows": []}
        result |= {"overrides": options.overrides, "torch": torch.__version__}
        say = print if ranks.is_main else lambda *_, **__: None
        say(f"{name} x {ranks.world_size}, milliseconds, fastest to slowest rank")
        say("| call | batch | launched | done |\n|---|---:|---:|---:|")
        for batch in options.batches:
            for row in measure(stage, batch, options.repeats, ranks):
                result["rows"].append(row)
                say(line(row), flush=True)
            if ranks.is_main:
                write_json(options, result)
        if options.profile:
            say(profile(stage, options.batches[0], options.profile, ranks.device))
        stage.close()
    return result


if __name__ == "__main__":
    try:
        main()
    except UserError as failure:
        print(f"launching: {failure}", file=sys.stderr)
        sys.exit(2)
    stop_ranks()
