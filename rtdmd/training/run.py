"""A whole run: the recipe's stages one after the other, resumed where they were left."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from rtdmd.distributed.collectives import Ranks, start_ranks, stop_ranks
from rtdmd.distributed.guard import CallLog, Watchdog
from rtdmd.errors import UserError
from rtdmd.evaluation.identity import Digests, differences
from rtdmd.files import replace_file
from rtdmd.models.protocol import ModelFamily
from rtdmd.recipe import dump_recipe
from rtdmd.recipe.schema import Recipe, RewardSection
from rtdmd.rewards import load_rewards
from rtdmd.runs import METRICS_FILE, RECIPE_FILE, ended_early, latest_checkpoint, read_progress
from rtdmd.stages.assemble import build_stage, preview_prompts
from rtdmd.stages.networks import HandOver
from rtdmd.termination import EXIT_INTERRUPTED, signal_came
from rtdmd.training.artifacts import FAKE_SCORE_FILE, GENERATOR_FILE, copy_file
from rtdmd.training.checkpoint import CheckpointStore
from rtdmd.training.ema import Ema
from rtdmd.training.evaluations import Evaluations
from rtdmd.training.folder import occupy
from rtdmd.training.loop import BASES, StageRun, StopRequest, training_identity
from rtdmd.training.previews import Previews
from rtdmd.training.stopping import StopRules
from rtdmd.training.tracking import Tracker


def train(recipe: Recipe, stages: list[str], max_steps: int | None = None) -> int:
    """Run ``stages`` on all ranks of the launcher; the process's exit code.

    0: all stages complete, or ``max_steps`` steps taken. 75: a signal came, everything is saved.
    """
    ranks = start_ranks(1.5 * recipe.timeout_seconds)
    calls = CallLog(ranks)
    watchdog = Watchdog(ranks, calls, recipe.timeout_seconds)
    watchdog.start()
    run = Path(recipe.output) / recipe.name
    lock = occupy(run, ranks)
    code = _run_stages(recipe, stages, run, ranks, calls, StopRequest(max_steps))
    ranks.barrier()  # a launcher ends the others as soon as one has left
    if lock is not None:
        lock.close()
    # Not in a `finally`: where a rank fails, the others wait for it, and so would a tidy end.
    watchdog.stop()
    stop_ranks()
    return code


def _run_stages(
    recipe: Recipe, stages: list[str], run: Path, ranks: Ranks, calls: CallLog, stop: StopRequest
) -> int:
    ranks.on_main_first(lambda: _begin(stages, recipe, run))
    if stages == ["cold_start", "rtdmd"]:
        for section in (*recipe.rewards, *recipe.monitor_rewards):
            ranks.on_main_first(partial(_prove, section, run, getattr(torch, recipe.dtype)))
            calls.touch()
    digests = Digests()
    for name in stages:
        if stop.now(ranks) or not _run_stage(name, recipe, run, ranks, calls, stop, digests):
            saved = run / name / "checkpoints"
            where = f"saved in {saved}" if saved.exists() else "before its first step"
            how = "the same command" if recipe.resume == "auto" else "the same command with resume=auto"
            _say(ranks, f"stopped in {name}, {where}; {how} goes on")
            return EXIT_INTERRUPTED if ranks.any(signal_came()) else 0
    _say(ranks, f"done: weights, checkpoints, metrics.jsonl and samples are in {run}")
    return 0


def _prove(section: RewardSection, run: Path, dtype: torch.dtype) -> None:
    """Load a reward once before a cold start begins, so that what fails does so now, not days later.

    On the CPU, where nothing else is yet.
    """
    if latest_checkpoint(run / "cold_start" / "checkpoints") is None:
        load_rewards([section], torch.device("cpu"), dtype)


def _say(ranks: Ranks, text: str) -> None:
    ranks.on_main(lambda: print(f"rtdmd: {text}", file=sys.stderr, flush=True))


def by_ranks(said: Sequence[str]) -> str:
    """What all ranks say, or which of them says what: one machine may lack what another has."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(said):
        ranks.setdefault(text, []).append(rank)
    if len(ranks) == 1:
        return said[0]
    return "; ".join(f"{text} (ranks {', '.join(map(str, numbers))})" for text, numbers in ranks.items())


def _run_stage(
    name: str,
    recipe: Recipe,
    run: Path,
    ranks: Ranks,
    calls: CallLog,
    stop: StopRequest,
    digests: Digests,
) -> bool:
    """Whether the stage is complete."""
    store = CheckpointStore(run / name / "checkpoints", ranks, recipe.keep_checkpoints)
    given, identity, complete = HandOver(), dict[str, Any](), False
    with ranks.together():
        if ranks.is_main:  # whose view counts: another machine may see files of before, for a while
            given = hand_over(name, recipe, run)
            identity = training_identity(recipe, given, digests, calls.touch)
            check_same_training(store, identity)
            if name == "rtdmd" and recipe.rtdmd.start_generator is None:
                check_same_bases(run / "cold_start" / "checkpoints", identity)
            complete = is_complete(name, recipe, run)
    given = ranks.gather_objects(given)[0]
    if ranks.any(complete):
        _say(ranks, f"{name} is complete in {run / name}")
        return True
    stage = build_stage(name, recipe, ranks, calls, given)
    for base, names in stage.roles.bases.items():
        where = by_ranks(ranks.gather_objects(base.placement))
        _say(ranks, f"the base of {' and '.join(', '.join(names).rsplit(', ', 1))} is {where}")
    stage_run = StageRun(
        stage=stage,
        ema=Ema(stage.roles.generator.engine, stage.settings.ema_decay, warmup=name == "rtdmd"),
        store=store,
        previews=Previews(
            preview_prompts(recipe, stage.prompts),
            stage.texts,
            stage.family,
            stage.few,
            recipe.seed,
            ranks,
        ),
        evaluations=_evaluations(recipe, stage.family, ranks, calls),
        recipe=recipe,
        ranks=ranks,
        run=run,
        rules=_stop_rules(name, recipe),
        identity=identity,
    )
    torch.manual_seed(recipe.seed + ranks.rank)  # nothing of ours draws from it, reward models may
    first = stage_run.resume()
    ranks.on_main_first(lambda: replace_file(run / RECIPE_FILE, dump_recipe(recipe)))
    if first:
        _say(ranks, f"{name} goes on after step {first}")
    tracker = Tracker(run, name, first, stage.num_steps, recipe.tracking, ranks)
    finished = stage_run.execute(tracker, first, stop)
    # Not in a `finally`: closing waits for what is under way on the device, the others' calls included.
    tracker.close()
    stage.close()
    return finished


def _evaluations(recipe: Recipe, family: ModelFamily, ranks: Ranks, calls: CallLog) -> Evaluations | None:
    """What measures the EMA now and then, where the recipe asks for it."""
    if recipe.evaluation.every == 0:
        return None
    return Evaluations(recipe, family, ranks, calls.touch)


def _begin(stages: Sequence[str], recipe: Recipe, run: Path) -> None:
    """Check that the stages may train in the folder; with resume=never they find it as if they were new.

    A Slurm job that is started again goes on with what it has begun.
    """
    job, marker = os.environ.get("SLURM_JOB_ID"), run / ".started_over"
    begun = job is not None and marker.is_file() and marker.read_text(encoding="utf-8") == job
    starts_over = recipe.resume == "never" and not begun
    check_order(stages, recipe, run, starts_over)
    if starts_over:
        for stage in stages:
            _move_aside(run, stage)
        if job is not None:
            replace_file(marker, job)


def _move_aside(run: Path, stage: str) -> None:
    """Keep what an earlier run of the stage left, records and sample pictures included, in another folder."""
    folder = run / stage
    if not folder.exists():
        return
    number = next(n for n in count(1) if not folder.with_name(f"{stage}.before-{n}").exists())
    aside = folder.with_name(f"{stage}.before-{number}")
    folder.rename(aside)
    if (run / METRICS_FILE).is_file():
        copy_file(run / METRICS_FILE, aside / METRICS_FILE)
    for picture in sorted((run / "samples").glob(f"{stage}-*.png")):
        (aside / "samples").mkdir(exist_ok=True)
        picture.rename(aside / "samples" / picture.name)


def check_order(stages: Sequence[str], recipe: Recipe, run: Path, starts_over: bool) -> None:
    """UserError if a cold start would change from which this run's rtdmd has gone on."""
    if "cold_start" not in stages or recipe.rtdmd.start_generator is not None:
        return
    if latest_checkpoint(run / "rtdmd" / "checkpoints") is None:
        return
    changes = "rtdmd" not in stages if starts_over else not is_complete("cold_start", recipe, run)
    if changes:
        latest = latest_checkpoint(run / "cold_start" / "checkpoints")
        done = f" after {read_progress(latest)['step']} iterations" if latest else ""
        raise UserError(
            f"{run}: its rtdmd has gone on from the cold start that is there{done}; for another cold start "
            f"(cold_start.iterations is {recipe.cold_start.iterations}) choose another `name`, or move "
            f"{run / 'rtdmd'} away"
        )


def is_complete(name: str, recipe: Recipe, run: Path) -> bool:
    """Whether a stage has been finished, its files included (they are written before the checkpoint)."""
    folder = run / name
    if not all((folder / file).is_file() for file in (GENERATOR_FILE, FAKE_SCORE_FILE)):
        return False
    latest = latest_checkpoint(folder / "checkpoints")
    if latest is None:
        return False
    progress = read_progress(latest)
    rules = _stop_rules(name, recipe)
    rules.restore(progress["stopping"])
    if rules.reason is not None:  # the recipe's own rules ended it; under others it goes on
        return ended_early(folder, progress["step"])
    total = recipe.cold_start.iterations if name == "cold_start" else recipe.rtdmd.epochs
    return progress["step"] >= total


def _stop_rules(name: str, recipe: Recipe) -> StopRules:
    return StopRules(recipe.rtdmd.stop_when if name == "rtdmd" else [])


def check_same_training(store: CheckpointStore, now: dict[str, Any]) -> None:
    """UserError if the last checkpoint is of another training: other networks, other weights, other draws."""
    latest = store.latest()
    if latest is None:
        return
    told = differences(read_progress(latest)["training"], now)
    if told:
        raise UserError(
            f"{latest}: can't go on with another training: {'; '.join(told)}. "
            "Change it back, choose another `name`, or start over with resume=never"
        )


def check_same_bases(cold_start: Path, now: dict[str, Any]) -> None:
    """UserError if the run's own cold start was trained on other base weights."""
    latest = latest_checkpoint(cold_start)
    if latest is None:
        return
    before = read_progress(latest)["training"]
    told = differences({key: before.get(key) for key in BASES}, {key: now[key] for key in BASES})
    if told:
        raise UserError(f"{latest}: rtdmd can't go on from there on another base: {'; '.join(told)}")


def hand_over(name: str, recipe: Recipe, run: Path) -> HandOver:
    """What stage 2 starts from: given files, or this run's stage 1. UserError if there are neither."""
    if name == "cold_start":
        return HandOver()
    given = recipe.rtdmd.start_generator
    if given is not None:
        fake = recipe.rtdmd.start_fake_score
        return HandOver(Path(given), Path(fake) if fake else None)
    own = run / "cold_start"
    if not is_complete("cold_start", recipe, run):
        raise UserError(
            f"{own}: holds no finished cold start; run --stage cold_start first, or name the files to start "
            "from in rtdmd.start_generator and rtdmd.start_fake_score"
        )
    return HandOver(own / GENERATOR_FILE, own / FAKE_SCORE_FILE)
