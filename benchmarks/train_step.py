"""Time, memory and utilisation of training steps at true size, with random weights, on any number of GPUs.

    python -m benchmarks.train_step recipes/flux2_4b.yaml cold_start.micro_batch_size=1 --output step.json
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
run. ``--baseline ddp`` or ``fsdp`` first measures cold start in plain eager PyTorch (published_style.py), in
one process alone.

A case that fails, for want of memory say, is a row with an ``error``. A single process goes on with the next
case, on a stage built anew; several can't, since the others wait in a collective. The JSON is written after
every row, and the exit code is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.full_size import random_loaders, size_of
from benchmarks.measuring import GIB, Bench, one_line, table, write_json
from benchmarks.model_flops import cold_start_forwards, forward_flops, rtdmd_forwards
from benchmarks.phases import PhaseClock, instrument
from benchmarks.published_style import PublishedStyle
from benchmarks.reward_models import BUILDERS
from benchmarks.traffic import Sizes, cold_start_passes, communication, rtdmd_passes, traffic
from rtdmd.distributed.collectives import start_ranks, stop_ranks
from rtdmd.distributed.guard import CallLog
from rtdmd.distributed.sharding import BlockShards
from rtdmd.distributed.shared import ShardedBase
from rtdmd.errors import UserError
from rtdmd.recipe import load_recipe
from rtdmd.recipe.checks import find_faults
from rtdmd.recipe.schema import PromptsSection, Recipe
from rtdmd.recipe.tree import raise_faults
from rtdmd.stages.assemble import build_stage
from rtdmd.stages.cold_start import ColdStart
from rtdmd.stages.networks import HandOver
from rtdmd.stages.roles import Roles
from rtdmd.stages.rtdmd import Rtdmd
from rtdmd.training.checkpoint import CheckpointStore
from rtdmd.training.ema import Ema
from rtdmd.training.loop import StageRun
from rtdmd.training.previews import Previews
from rtdmd.training.stopping import StopRules

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
    "cold_start.micro_batch_size=null",
    "rtdmd.sample_batch_size=2",
    "rtdmd.micro_batch_size=null",
    "rtdmd.fake_score_micro_batch_size=null",
    "model.text_encoder_compile=none",
    *(f"roles.{role}.compile=none" for role in ("teacher", "generator", "fake_score")),
)


MOST_TO_SETTLE = 4  # two updates for what is recomputed, two for what stays whole


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


def unmonitored(k: int, every: int) -> int:
    """The k-th epoch that doesn't look at the monitors, which every ``every``-th does, from 0 on."""
    return every * (k // (every - 1)) + k % (every - 1) + 1 if every > 1 else k


def blended(rows: Sequence[dict[str, Any]]) -> float | None:
    """(9·fake score alone + with generator)/10 seconds, each averaged over the stop indices."""
    if any("error" in row for row in rows):
        return None
    alone = [row["seconds"] for row in rows if not row["with_generator"]]
    both = [row["seconds"] for row in rows if row["with_generator"]]
    return 0.9 * mean(alone) + 0.1 * mean(both) if alone and both else None


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What cold start's rows come to, as far as none of them failed."""
    theirs = [row for row in rows if row.get("baseline")]
    ours = [row for row in rows if "stop" in row and not row.get("baseline")]
    before, after = blended(theirs), blended(ours)
    summary = {"blended_seconds": after, "baseline_blended_seconds": before}
    if before is not None and after is not None:
        summary["times_faster"] = before / after
    return {name: value for name, value in summary.items() if value is not None}


@dataclass(frozen=True)
class Built:
    """A stage with what surrounds it."""

    stage: ColdStart | Rtdmd
    ema: Ema
    clock: PhaseClock
    draws: Any  # the stage's own
    sizes: Sizes


@dataclass(frozen=True)
class Case:
    """One measurement of a stage: its name, what else its row says, and what makes the rest of the row."""

    name: str
    run: Callable[[Built], dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


def build(bench: Bench) -> Built:
    """The stage that was asked for, with random weights."""
    start = time.perf_counter()
    recipe, ranks, options = bench.recipe, bench.ranks, bench.options
    loaders = random_loaders(options.tiny)
    stage = build_stage(options.stage, recipe, ranks, CallLog(ranks), HandOver(), loaders)
    ema = Ema(stage.roles.generator.engine, stage.settings.ema_decay, warmup=options.stage == "rtdmd")
    # Shards that other GPUs map; torch's allocator doesn't count them.
    bench.mapped = sum(shards.mapped_bytes for shards in all_shards(stage.roles))
    bench.result["build_seconds"] = time.perf_counter() - start
    count_flops(bench, stage.family, stage.roles.teacher.unconditional)
    clock = PhaseClock(ranks.device)
    instrument(stage, ema, clock)
    sizes = Sizes.of(recipe, stage.family, size_of(recipe, options.tiny).transformer)
    return Built(stage, ema, clock, stage.draws, sizes)


def all_shards(roles: Roles) -> list[BlockShards]:
    """Of shared bases."""
    return [base.shards for base in roles.bases if isinstance(base, ShardedBase)]


def step(bench: Bench, built: Built, number: int) -> None:
    """One step as the loop runs it."""
    report = built.stage.step(number)
    bench.result["notices"] += report.notices
    if report.generator_updated:
        built.ema.update()


def settle(bench: Bench, built: Built) -> None:
    """Steps until what is chosen by their use of memory has been chosen; epoch 0 looks at the monitors."""
    for _ in range(MOST_TO_SETTLE):
        if not built.stage.roles.is_settled:
            step(bench, built, 0)
    if not built.stage.roles.is_settled:
        raise RuntimeError(f"nothing was chosen by the use of memory in {MOST_TO_SETTLE} steps")


def cold_start_cases(bench: Bench) -> Iterator[Case]:
    """All stop indices, with and without a generator update."""
    settings = bench.recipe.cold_start
    kinds = [True, False] if settings.generator_every > 1 else [True]
    for stop in bench.options.stops or range(1, len(bench.recipe.schedule.timesteps) + 1):
        for with_generator in kinds:
            label = "with generator" if with_generator else "fake score alone"
            facts = {"stop": stop, "with_generator": with_generator}
            run = partial(bench_cold_start, bench, stop=stop, with_generator=with_generator)
            yield Case(f"stop {stop}, {label}", run, facts)


def bench_cold_start(bench: Bench, built: Built, *, stop: int, with_generator: bool) -> dict[str, Any]:
    """Iterations whose rollouts end after ``stop`` steps."""
    built.stage.draws = StopAt(built.draws, stop)  # type: ignore[assignment]
    built.stage.settings = replace(bench.recipe.cold_start, generator_every=1)
    settle(bench, built)
    # One iteration after the other, as in the loop: each encodes the next one's prompts.
    every = 1 if with_generator else sys.maxsize
    built.stage.settings = replace(bench.recipe.cold_start, generator_every=every)
    run = partial(step, bench, built)
    forwards = cold_start_forwards(bench.recipe, stop, with_generator)
    row = bench.measure(run, bench.recipe.cold_start.batch_size, forwards)
    updated = ["fake_score", "generator"] if with_generator else ["fake_score"]
    passes = cold_start_passes(bench.recipe, stop, with_generator)
    return row | exchange(bench, built, run, passes, updated) | {"phases": bench.phases(built.clock, run)}


def rtdmd_cases(bench: Bench) -> Iterator[Case]:
    """Epochs without a look at the monitors."""
    settings = bench.recipe.rtdmd
    samples = settings.sample_batch_size * settings.num_sample_batches
    yield Case(f"epoch of {samples} pictures a rank", partial(bench_rtdmd, bench, samples=samples))


def bench_rtdmd(bench: Bench, built: Built, *, samples: int) -> dict[str, Any]:
    """Epochs of ``samples`` pictures on each rank."""
    every = bench.recipe.rtdmd.monitor_every

    def run(k: int) -> None:
        step(bench, built, unmonitored(k, every))

    settle(bench, built)
    row = bench.measure(run, samples, rtdmd_forwards(bench.recipe))
    exchanged = exchange(bench, built, run, rtdmd_passes(bench.recipe), ["fake_score", "generator"])
    return row | exchanged | {"phases": bench.phases(built.clock, run)}


def exchange(
    bench: Bench,
    built: Built,
    run: Callable[[int], None],
    passes: Counter[str],
    updated: Sequence[str],
) -> dict[str, Any]:
    """What a step exchanges between ranks and, among several GPUs, how long one more step takes over it."""
    ranks = bench.ranks.world_size
    shards = all_shards(built.stage.roles)
    partition = shards[0].num_ranks if shards else None
    (kept,) = {each.num_kept for each in shards} or {0}  # bases are as deep as each other
    sent = traffic(bench.recipe, built.sizes, passes, updated, ranks, partition, kept)
    row: dict[str, Any] = {"traffic": asdict(sent), "kept_blocks": kept}
    if bench.ranks.world_size > 1 and bench.ranks.device.type == "cuda":
        spent = communication(partial(run, 0), bench.ranks)
        row["communication"] = dict(zip(spent, bench.slowest(list(spent.values())), strict=True))
    return row


def bench_save(bench: Bench, built: Built, *, folder: Path) -> dict[str, Any]:
    """One checkpoint with the state dicts beside it."""
    stage = built.stage
    store = CheckpointStore(folder / "run" / stage.name / "checkpoints", bench.ranks, keep=1)
    previews = Previews([], stage.texts, stage.family, stage.few, 0, bench.ranks)
    run = StageRun(
        stage, built.ema, store, previews, None, bench.recipe, bench.ranks, folder / "run", StopRules([]), {}
    )
    bench.ranks.barrier()
    bench.synchronize()
    start = time.perf_counter()
    run.save(1, is_due=True)
    (seconds,) = bench.slowest([time.perf_counter() - start])
    size = sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file())
    return {"seconds": seconds, "gib": size / GIB}


def bench_baseline(bench: Bench) -> None:
    """Plain PyTorch's iterations; nothing of it stays."""
    options = bench.options

    def make() -> PublishedStyle:
        made = PublishedStyle(bench.recipe, PROMPTS, bench.ranks.device, options.tiny, options.baseline)
        count_flops(bench, made.family, made.unconditional)
        return made

    baseline = None
    for case in cold_start_cases(bench):
        name, facts = (
            f"published {options.baseline}: {case.name}",
            case.facts | {"baseline": options.baseline},
        )
        baseline = baseline or bench.attempt(name, facts, make)
        if baseline is None:
            return
        forwards = cold_start_forwards(bench.recipe, **case.facts)
        run = partial(baseline.iteration, **case.facts)
        measure = partial(bench.measure, run, bench.recipe.cold_start.batch_size, forwards)
        row = bench.attempt(name, facts, measure)
        if row is None:
            baseline.close()
            baseline = None
            bench.free()
        else:
            bench.report({"case": name, **facts, **row})
    if baseline is not None:
        baseline.close()


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
        bench.free()
    cases = [*(cold_start_cases if options.stage == "cold_start" else rtdmd_cases)(bench)]
    if not options.no_save:
        cases.append(Case("save", partial(bench_save, bench, folder=folder)))
    built = None
    for case in cases:
        built = built or bench.attempt("build", {}, partial(build, bench))
        if built is None:
            break
        row = bench.attempt(case.name, case.facts, partial(case.run, built))
        if row is not None:
            bench.report({"case": case.name, **case.facts, **row})
            continue
        # Where a step broke off, gradients and gathered shards are in the middle of something.
        if bench.attempt("close", {}, partial(close, built)) is None:
            break
        built = None
        bench.free()
    if built is not None:
        built.stage.close()
    bench.result["summary"] = summarise(bench.rows)


def close(built: Built) -> bool:
    """Free the engines."""
    built.stage.close()
    return True


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
    parser.add_argument(
        "--baseline", nargs="?", const="ddp", choices=["ddp", "fsdp"], help="plain PyTorch's cold start too"
    )
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
    """Measure, print table and JSON, and return what the JSON holds."""
    options = parse(arguments)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    with tempfile.TemporaryDirectory() as made:
        try:
            recipe = prepare(options, Path(made))
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                write_json(options, {"recipe": options.recipe, "rows": [], "error": one_line(error)})
            raise
        ranks = start_ranks(600)
        bench = Bench(options, recipe, ranks)
        shared = Path(ranks.gather_objects(made)[0])  # one folder for all ranks of this host
        try:
            run_all(bench, shared)
        finally:
            bench.write()
            bench.say(table(bench.result))
        ranks.barrier()  # before rank 0 removes the folder
    return bench.result


if __name__ == "__main__":
    try:
        outcome = main()
    except UserError as failure:
        print(f"train_step: {failure}", file=sys.stderr)
        os._exit(2)
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # at once: the other ranks may be waiting in a collective
    stop_ranks()
    sys.exit(0 if outcome["error"] is None else 1)
