"""The study: every variant of recipes/shapes.yaml for several seeds, shared out over the GPUs.

  python -m benchmarks.shapes.study train --out runs/study --seeds 0 1 2 --parallel 6
  python -m benchmarks.shapes.study measure --out runs/study --seeds 0 1 2
  python -m benchmarks.shapes.study_report runs/study --to docs/shapes

``train`` goes on where it was stopped, ``measure`` with what it lacks; ``--only`` chooses variants. Runs are
``train_ds.py`` with overrides, one process each, ``--parallel`` of them at a time on each GPU (they are
small: the GPU waits for the host). Logs are beside the runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from benchmarks.gpus import visible_gpus
from benchmarks.shapes.report import TEACHERS
from rtdmd.processes import free_port

RECIPE = "recipes/shapes.yaml"
PICTURES = 4  # of each held-out caption
MEASUREMENTS = ("outcomes", "variance", "tracking")


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
)
TUNINGS = (
    Variant("rtdmd", start="ac_dmd"),
    Variant("backprop_only", ("rtdmd.policy_weight=0",), start="ac_dmd"),
    Variant("policy_only", ("rtdmd.reward_backprop.weight=0",), start="ac_dmd"),
    Variant("all_steps", ("rtdmd.num_policy_steps=3",), start="ac_dmd"),
    Variant("own_noise", ("rtdmd.shared_noise=false",), start="ac_dmd"),
)
VARIANTS = {variant.name: variant for variant in (*COLD_STARTS, *TUNINGS)}


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

    def command(self, extra: Sequence[str]) -> list[str]:
        stage = self.variant.stage
        overrides = [f"name={self.name}", f"output={self.out}", f"seed={self.seed}", *self.variant.overrides]
        overrides.append("preview.num_images=0")  # a network that is one graph is compiled for them once more
        if self.variant.start is not None:
            cold = self.out / f"{self.variant.start}-{self.seed}" / "cold_start"
            overrides += [
                f"rtdmd.start_generator={cold / 'generator_ema.pt'}",
                f"rtdmd.start_fake_score={cold / 'fake_score.pt'}",
            ]
        return [sys.executable, "train_ds.py", RECIPE, "--stage", stage, *overrides, *extra]


class Devices:
    """Places for processes: each is a GPU, or the CPU (None)."""

    def __init__(self, parallel: int) -> None:
        gpus: list[str | None] = [*visible_gpus()] or [None]
        self._free: Queue[str | None] = Queue()
        for gpu in gpus * parallel:
            self._free.put(gpu)
        self.count = parallel * len(gpus)

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
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w", encoding="utf-8") as file:
                code = subprocess.run(
                    command, env=environment, stdout=file, stderr=subprocess.STDOUT
                ).returncode
        finally:
            self._free.put(gpu)
        if code != 0:
            raise RuntimeError(f"{log}: exit code {code}")
        return time.perf_counter() - start


def launches(variants: Sequence[Variant], seeds: Sequence[int], out: Path) -> Iterator[Launch]:
    """All seeds of a variant, then of the next."""
    for variant in variants:
        for seed in seeds:
            yield Launch(variant, seed, out)


def chosen(variants: Sequence[Variant], options: argparse.Namespace) -> list[Variant]:
    """Those that ``--only`` names, or all."""
    return [variant for variant in variants if not options.only or variant.name in options.only]


def raise_failures(jobs: Sequence[Future[None]]) -> None:
    """SystemExit once all have ended, if any failed."""
    failures = [failure for failure in [job.exception() for job in jobs] if failure]
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        raise SystemExit(1)


def train(options: argparse.Namespace) -> None:
    """Cold starts, and what goes on from one as soon as it is there and a place is free."""
    devices = Devices(options.parallel)

    def run(launch: Launch, start: Future[None] | None) -> None:
        log = launch.out / "logs" / f"{launch.name}.txt"
        done = log.with_suffix(".done")
        if done.exists():
            return
        if start is not None and start.exception():
            raise RuntimeError(f"{launch.name} has no cold start to go on from")
        seconds = devices.run(launch.command(options.overrides), log)
        done.touch()
        print(f"{launch.name}: {seconds:.0f} s", flush=True)

    jobs: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(len(VARIANTS) * len(options.seeds)) as threads:
        for launch in launches(chosen(list(VARIANTS.values()), options), options.seeds, options.out):
            start = jobs.get(f"{launch.variant.start}-{launch.seed}")
            jobs[launch.name] = threads.submit(run, launch, start)
        raise_failures(list(jobs.values()))


def measure(options: argparse.Namespace) -> None:
    """Outcomes of the teacher and all runs, mechanisms of cold starts, a process each, into JSON files."""
    devices = Devices(options.parallel)
    jobs: dict[str, list[str]] = {}
    folder = options.out / ("measured" if options.split == "test" else f"measured_{options.split}")
    pictures = ["--pictures", str(PICTURES), "--split", options.split]
    for name, sampler in TEACHERS.items():
        setting = [str(len(sampler.sigmas)), str(sampler.guidance_scale)]
        jobs[f"outcomes-{name}"] = ["measure", RECIPE, "--teacher", *setting, *pictures]
    for launch in launches(chosen((*COLD_STARTS, *TUNINGS), options), options.seeds, options.out):
        jobs[f"outcomes-{launch.name}"] = ["measure", str(launch.folder), *pictures]
    for launch in launches(chosen(COLD_STARTS[:1], options), options.seeds, options.out):
        jobs[f"variance-{launch.name}"] = ["mechanisms", "variance", str(launch.folder)]
    for launch in launches(chosen(COLD_STARTS[:2], options), options.seeds, options.out):
        jobs[f"tracking-{launch.name}"] = ["mechanisms", "tracking", str(launch.folder)]

    def run(name: str, job: list[str]) -> None:
        target = folder / f"{name}.json"
        if target.exists() or name.partition("-")[0] not in options.measurements:
            return
        module, *arguments = job
        command = [sys.executable, "-m", f"benchmarks.shapes.{module}", *arguments, "--to", str(target)]
        seconds = devices.run(command, options.out / "logs" / f"{name}.txt")
        print(f"{target}: {seconds:.0f} s", flush=True)

    with ThreadPoolExecutor(devices.count) as threads:
        raise_failures([threads.submit(run, *job) for job in jobs.items()])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("train", "measure"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for every run")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=4, help="processes at a time on each GPU")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="these variants alone")
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="to choose by, or report"
    )
    options = parser.parse_intermixed_args()
    {"train": train, "measure": measure}[options.action](options)


if __name__ == "__main__":
    main()
