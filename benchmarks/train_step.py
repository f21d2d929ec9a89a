"""Time, memory and utilisation of training steps at true size, with random weights, on any number of GPUs.

    python -m benchmarks.train_step recipes/flux2_4b.yaml roles.generator.compile=blocks --output step.json
    deepspeed --num_gpus 2 --module benchmarks.train_step recipes/flux2_4b.yaml --stage rtdmd
    torchrun --nproc-per-node 2 -m benchmarks.train_step recipes/sd35m.yaml
    python -m benchmarks.train_step recipes/flux2_4b.yaml --tiny --steps 1 --warmup 1

The stage and its engines are the project's own, built from the recipe and its key=value overrides; only
weights, prompts and rewards are made up. A step is measured as the loop runs it, text encoding and EMA
included, the device waited for before and after it: median over ``--steps``, the slowest rank's. Cold start:
for every stop index of the rollout, iterations without and with a generator update; "blended" is nine of
the former and one of the latter over ten, averaged over the stop indices. Its phases, and those of an epoch
of rtdmd, are timed in further steps in which the device is waited for between phases.

Utilisation is model FLOP (model_flops.py states what counts) over seconds and the matrix ceiling of the same
run. ``--baseline`` first measures cold start in plain eager PyTorch (published_style.py), one process alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.full_size import random_loaders, size_of
from benchmarks.model_flops import cold_start_forwards, forward_flops, matrix_ceiling, rtdmd_forwards
from benchmarks.phases import REST, PhaseClock, instrument
from benchmarks.published_style import PublishedStyle
from benchmarks.reward_models import BUILDERS
from rtdmd.distributed.collectives import Ranks, start_ranks, stop_ranks
from rtdmd.distributed.guard import CallLog
from rtdmd.errors import UserError
from rtdmd.models.blocks import num_compiled_graphs
from rtdmd.recipe import load_recipe
from rtdmd.recipe.checks import find_faults
from rtdmd.recipe.schema import PromptsSection, Recipe
from rtdmd.recipe.tree import raise_faults
from rtdmd.stages.assemble import build_stage
from rtdmd.stages.cold_start import ColdStart
from rtdmd.stages.networks import HandOver
from rtdmd.stages.rtdmd import Rtdmd
from rtdmd.training.checkpoint import CheckpointStore
from rtdmd.training.ema import Ema
from rtdmd.training.loop import StageRun
from rtdmd.training.previews import Previews
from rtdmd.training.stopping import StopRules

GIB = 2**30
COUNTS, COLOURS = ("one", "two", "three", "four"), ("red", "green", "blue", "black")
SHAPES = ("circles", "squares", "crosses", "stars")
PROMPTS = [f"{count} {colour} {shape}" for count in COUNTS for colour in COLOURS for shape in SHAPES]
TINY_OVERRIDES = (
    "model.height=64",
    "model.width=64",
    "model.max_sequence_length=32",
    "dtype=float32",
    "lora.rank=4",
    "cold_start.batch_size=2",
    "rtdmd.sample_batch_size=2",
)
BASELINE = "published style"


class StopAt:
    """A stage's draws with the rollouts' stop index fixed."""

    def __init__(self, draws: Any, stop: int) -> None:
        self._draws = draws
        self._stop = stop

    def integer(self, step: int, purpose: str, low: int, high: int) -> int:
        """The fixed index where a stop index is drawn."""
        return self._stop if purpose.endswith("/stop") else self._draws.integer(step, purpose, low, high)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._draws, name)


def prepare(options: argparse.Namespace, folder: Path) -> Recipe:
    """The recipe with everything that isn't measured made up. Raises UserError."""
    own = [
        "model.prompt_embeddings_gib=0",
        "rtdmd.num_sample_batches=2",
        *(TINY_OVERRIDES if options.tiny else ()),
    ]
    recipe = load_recipe(options.recipe, [*own, *options.overrides])
    size_of(recipe, options.tiny)
    source = folder / "prompts.txt"
    source.write_text("\n".join(PROMPTS), encoding="utf-8")
    prompts = PromptsSection(str(source))
    rewards = [reward for reward in recipe.rewards if reward.name in BUILDERS]
    if options.stage == "rtdmd" and not rewards:
        raise UserError(
            f"rewards: the benchmark has {', '.join(BUILDERS)}; name one with rewards=[{{name: clipscore}}]"
        )
    group = recipe.rtdmd.sample_batch_size
    # Groups that fill one rank's sampling batch suit any number of ranks; one picture has no advantage.
    images = group if group > 1 else recipe.rtdmd.num_sample_batches
    given = any(item.startswith("rtdmd.images_per_prompt=") for item in options.overrides)
    measured = replace(
        recipe,
        rewards=rewards,
        monitor_rewards=[],
        cold_start=replace(recipe.cold_start, prompts=prompts),
        rtdmd=replace(
            recipe.rtdmd,
            prompts=prompts,
            images_per_prompt=recipe.rtdmd.images_per_prompt if given else images,
        ),
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    faults = find_faults(measured, options.recipe, world_size=world_size, stages=[options.stage])
    raise_faults(options.recipe, faults)
    return measured


class Bench:
    """What all measurements share; rank 0 prints and writes each row as soon as it is there."""

    def __init__(self, options: argparse.Namespace, recipe: Recipe, ranks: Ranks) -> None:
        self.options = options
        self.recipe = recipe
        self.ranks = ranks
        self.rows: list[dict[str, Any]] = []
        dtype = getattr(torch, recipe.dtype)
        self.ceiling = matrix_ceiling(ranks.device, dtype, 256 if options.tiny else 8192)
        self.flops = 0  # F of one sample
        on_cuda = ranks.device.type == "cuda"
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(ranks.device) if on_cuda else "cpu",
            "ranks": ranks.world_size,
            "torch": torch.__version__,
            "recipe": options.recipe,
            "overrides": options.overrides,
            "stage": options.stage,
            "tiny": options.tiny,
            "ceiling_tflops": self.ceiling / 1e12,
            "rows": self.rows,
            "summary": {},
            "error": None,
        }

    def write(self) -> None:
        """The JSON file, on rank 0, if one was asked for."""
        output: Path | None = self.options.output
        if output is not None and self.ranks.is_main:
            output.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")

    def say(self, text: str) -> None:
        """A line on rank 0."""
        if self.ranks.is_main:
            print(text, flush=True)

    def report(self, row: dict[str, Any]) -> None:
        """Keep, print and write one measurement."""
        self.rows.append(row)
        self.say(json.dumps(row))
        self.write()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def slowest(self, values: Sequence[float]) -> list[float]:
        """Collective: element-wise maximum over ranks."""
        together = torch.tensor(list(values), dtype=torch.float64, device=self.ranks.device)
        return self.ranks.max(together).tolist()

    def memory(self) -> tuple[float, float]:
        """GiB allocated and reserved at most since the last reset, on the fullest rank; 0 without CUDA."""
        if self.ranks.device.type != "cuda":
            return 0.0, 0.0
        device = self.ranks.device
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        allocated, reserved = self.slowest(peaks)
        return round(allocated / GIB, 2), round(reserved / GIB, 2)

    def measure(self, name: str, run: Callable[[int], None], samples: int, forwards: int) -> dict[str, Any]:
        """``run(k)`` for k = 0, 1, …, of which the first ``--warmup`` don't count.

        ``forwards`` evaluations in F for each of this rank's ``samples`` are what a step must compute.
        """
        times = []
        graphs = 0
        for number in range(self.options.warmup + self.options.steps):
            if number == self.options.warmup:
                graphs = num_compiled_graphs()
                if self.ranks.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.ranks.device)
            self.ranks.barrier()
            self.synchronize()
            start = time.perf_counter()
            run(number)
            self.synchronize()
            times.append(time.perf_counter() - start)
        measured = self.slowest(times)[self.options.warmup :]
        allocated, reserved = self.memory()
        model_flop = forwards * samples * self.flops
        return {
            "case": name,
            "seconds": median(measured),
            "fastest": min(measured),
            "slowest": max(measured),
            "peak_gib": allocated,
            "reserved_gib": reserved,
            "model_tflop": model_flop / 1e12,
            "utilisation": model_flop / median(measured) / self.ceiling,
            "graphs_compiled_meanwhile": num_compiled_graphs() - graphs,
        }

    def phases(self, clock: PhaseClock, run: Callable[[int], None]) -> dict[str, dict[str, float]]:
        """Mean seconds and peak GiB of each phase of ``run``, this rank's, over ``--phase-steps``."""
        clock.phases.clear()
        clock.enabled = True
        count = self.options.phase_steps
        for number in range(count):
            with clock.phase(REST):
                run(number)
        clock.enabled = False
        return {
            name: {"seconds": phase.seconds / count, "peak_gib": round(phase.peak / GIB, 2)}
            for name, phase in sorted(clock.phases.items(), key=lambda item: -item[1].seconds)
        }


def cold_start_numbers(every: int, with_generator: bool) -> Callable[[int], int]:
    """The k-th iteration that does, or doesn't, update the generator."""
    if with_generator:
        return lambda k: every * k + every - 1
    return lambda k: every * (k // (every - 1)) + k % (every - 1)


def blended(rows: Sequence[dict[str, Any]], key: str = "seconds") -> float | None:
    """(9·fake score alone + with generator)/10, each averaged over the stop indices."""
    alone = [row[key] for row in rows if not row["with_generator"]]
    both = [row[key] for row in rows if row["with_generator"]]
    return 0.9 * mean(alone) + 0.1 * mean(both) if alone and both else None


def bench_cold_start(bench: Bench, stage: ColdStart, ema: Ema, clock: PhaseClock) -> None:
    """All stop indices, without and with a generator update."""
    every, recipe, draws = stage.settings.generator_every, bench.recipe, stage.draws
    samples = stage.settings.batch_size
    kinds = [True, False] if every > 1 else [True]
    for stop in bench.options.stops or range(1, len(stage.few.sigmas) + 1):
        stage.draws = StopAt(draws, stop)  # type: ignore[assignment]
        for with_generator in kinds:
            number = cold_start_numbers(every, with_generator)

            def run(k: int, number: Callable[[int], int] = number) -> None:
                if stage.step(number(k)).generator_updated:
                    ema.update()

            label = "with generator" if with_generator else "fake score alone"
            forwards = cold_start_forwards(recipe, stop, with_generator)
            row = bench.measure(f"stop {stop}, {label}", run, samples, forwards)
            row |= {"stop": stop, "with_generator": with_generator, "phases": bench.phases(clock, run)}
            bench.report(row)
    ours = [row for row in bench.rows if not row.get("baseline") and "stop" in row]
    bench.result["summary"]["blended_seconds"] = blended(ours)
    theirs = [row for row in bench.rows if row.get("baseline")]
    if theirs:
        before, after = blended(theirs), blended(ours)
        bench.result["summary"]["baseline_blended_seconds"] = before
        if before is not None and after is not None:
            bench.result["summary"]["times_faster"] = before / after


def bench_rtdmd(bench: Bench, stage: Rtdmd, ema: Ema, clock: PhaseClock) -> None:
    """Epochs without a look at the monitors."""
    every = stage.settings.monitor_every

    def run(k: int) -> None:
        stage.step(cold_start_numbers(every, False)(k) + 1 if every > 1 else k)
        ema.update()

    samples = stage.settings.sample_batch_size * stage.settings.num_sample_batches
    row = bench.measure(f"epoch of {samples} pictures a rank", run, samples, rtdmd_forwards(bench.recipe))
    bench.report(row | {"phases": bench.phases(clock, run)})


def bench_save(bench: Bench, stage: ColdStart | Rtdmd, ema: Ema, folder: Path) -> None:
    """One checkpoint with the state dicts beside it."""
    store = CheckpointStore(folder / "run" / stage.name / "checkpoints", bench.ranks, keep=1)
    previews = Previews([], stage.family, stage.few, 0, bench.ranks)
    run = StageRun(
        stage, ema, store, previews, None, bench.recipe, bench.ranks, folder / "run", StopRules([])
    )
    bench.ranks.barrier()
    bench.synchronize()
    start = time.perf_counter()
    run.save(1, is_due=True)
    (seconds,) = bench.slowest([time.perf_counter() - start])
    size = sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file())
    bench.report({"case": "save", "seconds": seconds, "gib": size / GIB})


def bench_baseline(bench: Bench) -> None:
    """Plain PyTorch's iterations; nothing of it stays."""
    baseline = PublishedStyle(bench.recipe, PROMPTS, bench.ranks.device, bench.options.tiny)
    count_flops(bench, baseline.family, baseline.unconditional)
    samples = bench.recipe.cold_start.batch_size
    for stop in bench.options.stops or range(1, len(bench.recipe.schedule.timesteps) + 1):
        for with_generator in (True, False):
            forwards = cold_start_forwards(bench.recipe, stop, with_generator)
            label = "with generator" if with_generator else "fake score alone"
            run = partial(baseline.iteration, stop=stop, with_generator=with_generator)
            row = bench.measure(f"{BASELINE}: stop {stop}, {label}", run, samples, forwards)
            bench.report(row | {"stop": stop, "with_generator": with_generator, "baseline": True})
    del baseline, run
    gc.collect()
    if bench.ranks.device.type == "cuda":
        torch.cuda.empty_cache()


def count_flops(bench: Bench, family: Any, text: Any) -> None:
    """F of one sample, from the transformer's configuration."""
    model = bench.recipe.model
    config = size_of(bench.recipe, bench.options.tiny).transformer
    bench.flops = forward_flops(family, config, family.latent_shape(model.height, model.width), text)
    bench.result["forward_tflop_per_sample"] = bench.flops / 1e12


def run_all(bench: Bench, folder: Path) -> None:
    """Every measurement that was asked for."""
    options = bench.options
    if options.baseline:
        bench_baseline(bench)
    start = time.perf_counter()
    stage = build_stage(
        options.stage,
        bench.recipe,
        bench.ranks,
        CallLog(bench.ranks),
        HandOver(),
        random_loaders(options.tiny),
    )
    ema = Ema(stage.roles.generator.engine, stage.settings.ema_decay, warmup=options.stage == "rtdmd")
    bench.result["build_seconds"] = time.perf_counter() - start
    count_flops(bench, stage.family, stage.roles.teacher.unconditional)
    clock = PhaseClock(bench.ranks.device)
    instrument(stage, ema, clock)
    if isinstance(stage, ColdStart):
        bench_cold_start(bench, stage, ema, clock)
    else:
        bench_rtdmd(bench, stage, ema, clock)
    if not options.no_save:
        bench_save(bench, stage, ema, folder)
    stage.close()


def table(result: dict[str, Any]) -> str:
    """The measurements for people to read."""
    lines = [
        f"{result['device']} x {result['ranks']}, ceiling {result['ceiling_tflops']:.1f} TFLOP/s, "
        f"F = {result.get('forward_tflop_per_sample', 0):.4g} TFLOP a sample",
        f"{'':44}{'seconds':>9}{'peak GiB':>10}{'reserved':>10}{'TFLOP':>9}{'used':>7}",
    ]
    for row in result["rows"]:
        if "utilisation" in row:
            numbers = f"{row['peak_gib']:10.2f}{row['reserved_gib']:10.2f}{row['model_tflop']:9.1f}"
            lines.append(f"{row['case']:44}{row['seconds']:9.3f}{numbers}{row['utilisation']:7.1%}")
        else:
            lines.append(f"{row['case']:44}{row['seconds']:9.3f}")
        for name, phase in row.get("phases", {}).items():
            lines.append(f"    {name:40}{phase['seconds']:9.3f}{phase['peak_gib']:10.2f}")
    lines += [f"{name}: {value:.3f}" for name, value in result["summary"].items() if value is not None]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Training steps at true size with random weights.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe, dotted")
    parser.add_argument("--stage", choices=["cold_start", "rtdmd"], default="cold_start")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each case")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each case before them")
    parser.add_argument("--phase-steps", type=int, default=2, help="steps whose phases are timed")
    parser.add_argument("--stops", type=int, nargs="+", help="stop indices of cold start (all)")
    parser.add_argument("--baseline", action="store_true", help="plain PyTorch's cold start too")
    parser.add_argument("--no-save", action="store_true", help="without the checkpoint")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script itself")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher sets it
    options = parser.parse_intermixed_args(arguments)
    if options.baseline and (options.stage != "cold_start" or os.environ.get("WORLD_SIZE", "1") != "1"):
        parser.error("--baseline is of cold_start, in one process")
    if min(options.steps, options.phase_steps) < 1 or options.warmup < 0:
        parser.error("--steps and --phase-steps must be at least 1, --warmup at least 0")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print table and JSON, and return what the JSON holds; a failure leaves what was measured."""
    options = parse(arguments)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    with tempfile.TemporaryDirectory() as made:
        recipe = prepare(options, Path(made))
        ranks = start_ranks(600)
        bench = Bench(options, recipe, ranks)
        shared = Path(ranks.gather_objects(made)[0])  # one folder for all ranks of this host
        try:
            run_all(bench, shared)
        except Exception as error:  # out of memory, say
            bench.result["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            raise
        finally:
            bench.write()
            bench.say(table(bench.result))
        ranks.barrier()  # before rank 0 removes the folder
    return bench.result


if __name__ == "__main__":
    try:
        main()
    except UserError as failure:
        print(f"train_step: {failure}", file=sys.stderr)
        os._exit(2)
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # at once: the other ranks may be waiting in a collective
    stop_ranks()
