"""One setting of a small world's recipe, measured on the way, as long as it says or a number of seconds.

  python -m benchmarks.shapes.sweep NAME [--recipe FILE] [--seconds 120 120] [key=value …] >> sweep.jsonl

Both stages run in this process, stage 2 from the average that stage 1 has reached; ``--stage rtdmd`` runs it
alone, from what the recipe's rtdmd.start_generator and start_fake_score name. Seconds that cut a stage short
cut off its cooldown, which goes by steps. ``--keep FOLDER`` keeps what the stages leave in FOLDER/NAME. A
line of JSON for each measurement: the judge's accuracy and CLIP's reward on validation captions, painted with
the average.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

from benchmarks.shapes import outcomes
from benchmarks.shapes.measure import Judges
from benchmarks.shapes.outcomes import Sampler
from rtdmd.distributed.collectives import Ranks, start_ranks, stop_ranks
from rtdmd.distributed.guard import CallLog
from rtdmd.distributed.masters import MASTER
from rtdmd.recipe import load_checked
from rtdmd.recipe.schema import Recipe
from rtdmd.stages.assemble import Stage, build_stage
from rtdmd.stages.networks import HandOver
from rtdmd.training.artifacts import FAKE_SCORE_FILE, GENERATOR_FILE, save_state_dict
from rtdmd.training.ema import Ema
from rtdmd.training.run import hand_over


class Sweep:
    """A setting's two stages, with a limit of seconds each."""

    def __init__(self, name: str, recipe: Recipe, ranks: Ranks, measuring: argparse.Namespace) -> None:
        self._name, self._recipe, self._ranks = name, recipe, ranks
        self._every, self._seeds = measuring.every, range(measuring.pictures)
        self._judges = Judges.load("validation", measuring.captions, ranks.device)

    def run(self, stage_name: str, hand_over: HandOver, seconds: float, folder: Path) -> HandOver:
        """Train for ``seconds``, or as long as the recipe says; what the stage leaves."""
        stage = build_stage(stage_name, self._recipe, self._ranks, CallLog(self._ranks), hand_over)
        ema = Ema(stage.roles.generator.engine, stage.settings.ema_decay, warmup=stage_name == "rtdmd")
        start = measured = time.monotonic()
        self._measure(stage, ema, 0, 0.0)
        spent = time.monotonic() - start  # measuring doesn't count
        step = 0
        while step < stage.num_steps and time.monotonic() - start - spent < seconds:
            report = stage.step(step)
            step += 1
            if report.generator_updated:
                ema.update()
            if time.monotonic() - measured > self._every:
                before = time.monotonic()
                self._measure(stage, ema, step, before - start - spent)
                measured = time.monotonic()
                spent += measured - before
        self._measure(stage, ema, step, time.monotonic() - start - spent)
        left = HandOver(folder / GENERATOR_FILE, folder / FAKE_SCORE_FILE)
        generator, fake = stage.roles.generator.engine, stage.roles.fake_score.engine
        assert left.generator is not None and left.fake_score is not None
        save_state_dict(generator.gather(ema.pieces), left.generator, self._ranks)
        save_state_dict(fake.gather(fake.masters.pieces(MASTER)), left.fake_score, self._ranks)
        stage.roles.close()
        return left

    def _measure(self, stage: Stage, ema: Ema, step: int, seconds: float) -> None:
        engine = stage.roles.generator.engine
        with engine.weights_from(ema.pieces):
            images = outcomes.paint_many(
                stage.family,
                engine,
                self._judges.prompts,
                Sampler(stage.few.sigmas, stage.few.eta),
                seeds=self._seeds,
            )
        found = {key: round(value, 4) for key, value in self._judges.measure(images).items()}
        record = {"name": self._name, "stage": stage.name, "step": step, "seconds": round(seconds, 1)} | found
        print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--recipe", default="recipes/shapes.yaml")
    parser.add_argument("--stage", choices=("cold_start", "rtdmd"), help="this one alone")
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=[math.inf, math.inf], help="of either stage"
    )
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=1, help="of each caption")
    parser.add_argument("--keep", type=Path, help="folder for the stages' state dicts")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between measurements")
    options = parser.parse_intermixed_args()
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    recipe, stages = load_checked(options.recipe, options.overrides, world_size=1, stage=options.stage)
    ranks = start_ranks(3600)
    sweep = Sweep(options.name, recipe, ranks, options)
    left = hand_over(stages[0], recipe, Path(recipe.output) / recipe.name)
    seconds = dict(zip(("cold_start", "rtdmd"), options.seconds, strict=True))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) if options.keep is None else options.keep / options.name
        for stage in stages:
            left = sweep.run(stage, left, seconds[stage], folder / stage)
    stop_ranks()


if __name__ == "__main__":
    main()
