"""The study: every variant of recipes/shapes.yaml for several seeds, shared out over the GPUs.

  python -m benchmarks.shapes.study all --out runs/study --seeds 0 1 2 --parallel 3
  python -m benchmarks.shapes.study_report runs/study --to docs/shapes

``all`` trains, and measures each run as soon as it is there; ``train`` and ``measure`` are its halves. They
go on where they were stopped; ``--only`` chooses variants. Runs are ``train_ds.py`` with overrides, one
process each, ``--parallel`` of them at a time on each GPU (they are small: the GPU waits for the host), and
as many measurements. Logs are beside the runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Lock

from benchmarks.gpus import visible_gpus
from benchmarks.shapes.outcomes import euler
from benchmarks.shapes.report import TEACHERS
from rtdmd.processes import free_port
from rtdmd.recipe import dump_recipe, load_checked
from rtdmd.runs import RECIPE_FILE
from rtdmd.termination import EXIT_INTERRUPTED

RECIPE = "recipes/shapes.yaml"
PICTURES = 4  # of each held-out caption
STARTING = 2.0  # seconds in which a process imports and has nothing to lose
# Guidance is the best on validation captions, as in the report; it takes two network evaluations a step.
SAMPLERS = {
    "teacher, 50 steps": TEACHERS["teacher, 50 steps"],
    "teacher, 25 steps": euler(25, 4.0),
} | TEACHERS


@dataclass(frozen=True)
class Variant:
    """What a run changes of the recipe, and which cold start it goes on from (none: it is one)."""

    name: str
    overrides: tuple[str, ...] = ()
    start: str | None = None

    @property
    def stage(self) -> str:
        return "cold_start" if self.start is None else "rtdmd"


COLD_STARTS = (
    Variant("ac_dmd"),
    Variant("ac_dmd_no_consistency", ("cold_start.consistency_weight=0",)),
    Variant("dmd", ("cold_start.consistency_weight=0", "cold_start.sub_interval=false")),
    # The fake score has one update for each of the generator's instead of two.
    Variant("one_update", ("cold_start.generator_every=1",)),
    Variant("one_update_no_consistency", ("cold_start.generator_every=1", "cold_start.consistency_weight=0")),
)
TUNINGS = (
    Variant("rtdmd", start="ac_dmd"),
    Variant("backprop_only", ("rtdmd.policy_weight=0",), start="ac_dmd"),
    Variant("policy_only", ("rtdmd.reward_backprop.weight=0",), start="ac_dmd"),
    Variant("all_steps", ("rtdmd.num_policy_steps=3",), start="ac_dmd"),
    Variant("own_noise", ("rtdmd.shared_noise=false",), start="ac_dmd"),
    Variant("match_trained", ("rtdmd.matched_steps=trained",), start="ac_dmd"),
)
VARIANTS = {variant.name: variant for variant in (*COLD_STARTS, *TUNINGS)}
MECHANISMS = {  # and whose they are
    "variance": ("ac_dmd",),
    "sources": ("ac_dmd",),
    "tracking": ("ac_dmd", "ac_dmd_no_consistency", "one_update", "one_update_no_consistency"),
}
MEASUREMENTS = ("outcomes", *MECHANISMS)


@dataclass(frozen=True)
class Launch:
    """One process: a variant with a seed."""

    variant: Variant
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    def overrides(self, extra: Sequence[str]) -> list[str]:
        """Of the recipe, ``extra`` ones last."""
        overrides = [f"name={self.name}", f"output={self.out}", f"seed={self.seed}", *self.variant.overrides]
        overrides.append("preview.num_images=0")  # a network that is one graph is compiled for them once more
        if self.variant.start is not None:
            cold = self.out / f"{self.variant.start}-{self.seed}" / "cold_start"
            overrides += [
                f"rtdmd.start_generator={cold / 'generator_ema.pt'}",
                f"rtdmd.start_fake_score={cold / 'fake_score.pt'}",
            ]
        return [*overrides, *extra]

    def command(self, extra: Sequence[str]) -> list[str]:
        stage = self.variant.stage
        return [sys.executable, "train_ds.py", RECIPE, "--stage", stage, *self.overrides(extra)]

    def check_recipe(self, extra: Sequence[str]) -> None:
        """RuntimeError if the run that is there is another recipe's."""
        recipe, _ = load_checked(RECIPE, self.overrides(extra), world_size=1, stage=self.variant.stage)
        if (self.folder / RECIPE_FILE).read_text(encoding="utf-8") != dump_recipe(recipe):
            raise RuntimeError(
                f"{self.folder}: was trained with another recipe ({RECIPE_FILE} there); "
                "choose another --out, or remove it and its log's .done"
            )


class Devices:
    """Places for processes: each is a GPU, or the CPU (None)."""

    def __init__(self, parallel: int) -> None:
        gpus: list[str | None] = [*visible_gpus()] or [None]
        self._free: Queue[str | None] = Queue()
        for gpu in gpus * parallel:
            self._free.put(gpu)
        self._closed = False
        self._lock = Lock()  # of what follows, and of the moment in which a process begins
        self._begun: dict[subprocess.Popen[bytes], float] = {}

    def close(self) -> None:
        """Let nothing more begin after Ctrl-C, which processes of the last moments may have missed."""
        with self._lock:
            self._closed = True
            for process, since in self._begun.items():
                if time.monotonic() - since < STARTING:
                    process.send_signal(signal.SIGINT)

    def run(self, command: Sequence[str], log: Path) -> float:
        """Run a command on a free place, waiting for one; the seconds it took. RuntimeError if it fails."""
        gpu = self._free.get()
        environment = os.environ | {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
            "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
        }  # fmt: skip
        environment |= {"DS_ACCELERATOR": "cpu"} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        start = time.perf_counter()
        try:
            process = self._begin(command, environment, log)
            code = process.wait()
            with self._lock:
                del self._begun[process]
        finally:
            self._free.put(gpu)  # to the next that waits
        if code != 0:
            raise RuntimeError(f"{log}: exit code {code}")
        return time.perf_counter() - start

    def _begin(
        self, command: Sequence[str], environment: dict[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{log}: was not begun")
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w", encoding="utf-8") as file:
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            self._begun[process] = time.monotonic()
        return process


def launches(variants: Sequence[Variant], seeds: Sequence[int], out: Path) -> Iterator[Launch]:
    """All seeds of a variant, then of the next."""
    for variant in variants:
        for seed in seeds:
            yield Launch(variant, seed, out)


def chosen(names: Iterable[str], options: argparse.Namespace) -> Iterator[Launch]:
    """Launches of those variants that ``--only`` names, or of all."""
    named = [VARIANTS[name] for name in names if not options.only or name in options.only]
    return launches(named, options.seeds, options.out)


def raise_failures(jobs: Sequence[Future[None]]) -> None:
    """SystemExit once all have ended, if any failed."""
    failures = [failure for failure in [job.exception() for job in jobs] if failure]
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        raise SystemExit(1)


@dataclass(frozen=True)
class Measurement:
    """One process that measures into ``NAME.json``, a run or (None) the teacher."""

    name: str
    module: str
    arguments: tuple[str, ...]
    launch: Launch | None = None

    def command(self, target: Path) -> list[str]:
        return [
            sys.executable, "-m", f"benchmarks.shapes.{self.module}", *self.arguments, "--to", str(target),
        ]  # fmt: skip


def measurements(options: argparse.Namespace) -> list[Measurement]:
    """Outcomes of the teacher and all runs, mechanisms of cold starts: of those, what the options choose."""
    pictures = ("--pictures", str(PICTURES), "--split", options.split)
    found = []
    for name, sampler in SAMPLERS.items():
        setting = (str(len(sampler.sigmas)), str(sampler.guidance_scale))
        found.append(Measurement(f"outcomes-{name}", "measure", (RECIPE, "--teacher", *setting, *pictures)))
    for launch in chosen(VARIANTS, options):
        found.append(
            Measurement(f"outcomes-{launch.name}", "measure", (str(launch.folder), *pictures), launch)
        )
    for kind, names in MECHANISMS.items():
        for launch in chosen(names, options):
            found.append(
                Measurement(f"{kind}-{launch.name}", "mechanisms", (kind, str(launch.folder)), launch)
            )
    return [each for each in found if each.name.partition("-")[0] in options.measurements]


def study(options: argparse.Namespace) -> None:
    """Train, measure, or both: each job as soon as the run that it needs and a place are there."""
    runs = [] if options.action == "measure" else list(chosen(VARIANTS, options))
    measured = [] if options.action == "train" else measurements(options)
    folder = options.out / ("measured" if options.split == "test" else f"measured_{options.split}")
    places, others = Devices(options.parallel), Devices(options.parallel)

    def train(launch: Launch, start: Future[None] | None) -> None:
        log = launch.out / "logs" / f"{launch.name}.txt"
        done = log.with_suffix(".done")
        if start is not None and start.exception():
            raise RuntimeError(f"{launch.name} has no cold start to go on from")
        if done.exists():
            launch.check_recipe(options.overrides)
            return
        for measured_before in launch.out.glob(f"measured*/*-{launch.name}.json"):
            measured_before.unlink()
        seconds = places.run(launch.command(options.overrides), log)
        done.touch()
        print(f"{launch.name}: {seconds:.0f} s", flush=True)

    def measure(measurement: Measurement, run: Future[None] | None) -> None:
        target = folder / f"{measurement.name}.json"
        if target.exists() or (run is not None and run.exception()):
            return
        seconds = others.run(measurement.command(target), options.out / "logs" / f"{measurement.name}.txt")
        print(f"{target}: {seconds:.0f} s", flush=True)

    jobs: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(max(1, len(runs) + len(measured))) as threads:
        for launch in runs:
            start = jobs.get(f"{launch.variant.start}-{launch.seed}")
            jobs[launch.name] = threads.submit(train, launch, start)
        for each in measured:
            needed = jobs.get(each.launch.name) if each.launch else None
            jobs[each.name] = threads.submit(measure, each, needed)
        try:
            raise_failures(list(jobs.values()))
        except KeyboardInterrupt:  # what runs has had it, too
            places.close()
            others.close()
            raise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("train", "measure", "all"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for every run")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=4, help="processes at a time on each GPU")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="these variants alone")
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="to choose by, or report"
    )
    try:
        study(parser.parse_intermixed_args())
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
