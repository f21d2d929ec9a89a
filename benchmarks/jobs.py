"""Runs a list of commands in the background, on as many of this machine's GPUs as each needs.

  python -m benchmarks.jobs start benchmarks/lists/scaling.txt --out OUT    # returns at once
  python -m benchmarks.jobs wait --out OUT --seconds 60                     # what has ended, runs, waits
  python -m benchmarks.jobs stop --out OUT

A line of the list is a job: its name, how many GPUs it needs, and a command for bash, which finds the latter
in PROCESSES and the folder in OUT. Jobs start in the list's order, each once its GPUs are free; one that
needs none starts when its turn comes and sees all. Lines may be added while others run. Commands run in a
copy of the working tree, so that it may change meanwhile; what they say is in OUT/logs.

With a ``~`` after its number a job shares its GPUs with others, for what these leave idle while they load and
compile. It starts at once, and those of its processes that see a single GPU are held still (SIGSTOP) while
another job, or one without GPUs, measures there (benchmarks/gpus.py, ``alone``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpus import ALONE, visible_gpus
from rtdmd.errors import UserError

LEFT_OUT = (".git", ".venv", ".whl", ".*_cache", "build", "runs", "__pycache__", "*.egg-info")  # of the copy
SCHEDULER = "scheduler.pid"
_PAUSE = 0.2  # seconds between looks at the list


@dataclass(frozen=True)
class Job:
    """A line of the list."""

    name: str
    gpus: int
    command: str
    shares: bool = False  # its GPUs, with jobs that don't and others that do


def read_list(path: Path) -> list[Job]:
    """Jobs of a list. UserError with the first line that is none, or has a name that an earlier one has."""
    jobs: dict[str, Job] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = line.split(maxsplit=2)
        if len(words) < 3 or not words[1].removesuffix("~").isdecimal():
            raise UserError(
                f"{path}: line {number} is {line!r}; write a name, a number of GPUs, and a command"
            )
        name, gpus, command = words
        if name in jobs or name == ".." or Path(name).name != name:
            raise UserError(f"{path}: line {number}: {name!r} is no name, or another job's; write another")
        jobs[name] = Job(name, int(gpus.removesuffix("~")), command, gpus.endswith("~"))
    return list(jobs.values())


@dataclass
class Running:
    """A job on its GPUs."""

    job: Job
    gpus: list[str]
    process: subprocess.Popen[bytes]
    since: float


@dataclass
class Scheduler:
    """Starts jobs in order and notes how they end, in ``out``/state.json."""

    list_path: Path
    out: Path
    gpus: list[str]
    tree: Path
    ended: dict[str, tuple[int, float]] = field(default_factory=dict)  # exit code, seconds
    running: list[Running] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    def turn(self) -> bool:
        """One look at everything; whether anything runs or waits."""
        for each in list(self.running):
            if each.process.poll() is not None:
                self._note_end(each)
        waiting: list[Job] = []
        for job in self._waiting():  # in order, but those that share wait for nobody
            if (waiting and not job.shares) or not self._start(job):
                waiting.append(job)
        self._hold_still()
        self._write(waiting)
        return bool(waiting or self.running)

    def stop(self) -> None:
        """End all that runs; what waits never starts."""
        for each in self.running:
            os.killpg(each.process.pid, signal.SIGTERM)
            os.killpg(each.process.pid, signal.SIGCONT)
        for each in list(self.running):
            self._note_end(each)
        self._write(self._waiting())

    def _note_end(self, each: Running) -> None:
        self.ended[each.job.name] = each.process.wait(), round(time.monotonic() - each.since, 1)
        self.running.remove(each)
        shutil.rmtree(self._alone(each.job), ignore_errors=True)

    def _alone(self, job: Job) -> Path:
        return self.out / "alone" / job.name

    def _hold_still(self) -> None:
        """Whatever shares a GPU that another job must have alone; let the rest go on."""
        alone = [each for each in self.running if has_marks(self._alone(each.job))]
        claimed = {gpu for each in alone for gpu in each.gpus or self.gpus}
        sharing = [each.process.pid for each in self.running if each.job.shares]
        if sharing:
            for process, gpus in offspring(sharing):
                held = len(gpus) == 1 and gpus[0] in claimed
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGSTOP if held else signal.SIGCONT)

    def _write(self, waiting: Sequence[Job]) -> None:
        state = {
            "ended": self.ended,
            "running": [each.job.name for each in self.running],
            "waiting": [job.name for job in waiting],
        }
        partial = self.out / "state.partial"
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.rename(self.out / "state.json")

    def _waiting(self) -> list[Job]:
        try:
            self.jobs = read_list(self.list_path)
        except (UserError, OSError) as error:  # as it was before, until it is mended
            print(error, file=sys.stderr, flush=True)
        known = {*self.ended, *(each.job.name for each in self.running)}
        return [job for job in self.jobs if job.name not in known]

    def _start(self, job: Job) -> bool:
        taken = Counter(gpu for each in self.running if each.job.shares == job.shares for gpu in each.gpus)
        free = sorted(self.gpus, key=lambda gpu: taken[gpu])  # stable
        if not job.shares:
            free = [gpu for gpu in free if not taken[gpu]]
        if job.gpus > len(self.gpus):
            self.ended[job.name] = -1, 0.0
            text = f"needs {job.gpus} GPUs, there are {len(self.gpus)}\n"
            self._log(job).write_text(text, encoding="utf-8")
            return True
        if len(free) < job.gpus:
            return False
        gpus = free[: job.gpus]
        environment = os.environ | {"PROCESSES": str(job.gpus), "OUT": str(self.out)}
        environment["PYTHONUNBUFFERED"] = "1"
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if not job.shares:
            environment[ALONE] = str(self._alone(job))
        with open(self._log(job), "wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", job.command],
                cwd=self.tree,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(Running(job, gpus, process, time.monotonic()))
        return True

    def _log(self, job: Job) -> Path:
        return self.out / "logs" / f"{job.name}.txt"


def has_marks(folder: Path) -> bool:
    """Whether a process that is still there has left one; those of killed ones stay."""
    return folder.exists() and any(Path("/proc", mark.name).exists() for mark in folder.iterdir())


def state_and_parent(process: int) -> tuple[str, int]:
    """As in ``ps``: Z for a process that has ended. OSError if it isn't there."""
    text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    state, parent, *_ = text.rsplit(")", 1)[1].split()  # its name, before that, may hold anything
    return state, int(parent)


def offspring(first: Sequence[int]) -> Iterator[tuple[int, list[str]]]:
    """Processes and all that they and these have started, with the GPUs that each of them sees."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            _, parent = state_and_parent(int(folder.name))
            children.setdefault(parent, []).append(int(folder.name))
    waiting = [*first]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        with suppress(OSError):
            variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            seen = [word for word in variables if word.startswith(b"CUDA_VISIBLE_DEVICES=")]
            yield process, seen[0].partition(b"=")[2].decode().split(",") if seen else []


def copy_tree(source: Path, target: Path, out: Path) -> None:
    """The working tree without what is built or made: LEFT_OUT, ``out`` and other folders of jobs."""
    patterns = shutil.ignore_patterns(*LEFT_OUT)

    def left_out(folder: str, names: list[str]) -> set[str]:
        paths = {name: Path(folder, name) for name in names}
        made = [name for name, path in paths.items() if path.resolve() == out or has_jobs(path)]
        return {*patterns(folder, names), *made}

    shutil.copytree(source, target, ignore=left_out, symlinks=True)


def has_jobs(folder: Path) -> bool:
    """Whether ``start`` was there."""
    return (folder / SCHEDULER).exists()


def start(options: argparse.Namespace) -> None:
    """A scheduler in a session of its own. UserError if the list is wrong or the folder is in use."""
    jobs = read_list(options.list)
    out: Path = options.out.resolve()
    if has_jobs(out):
        raise UserError(f"{out} has jobs already; name another folder, or remove it")
    (out / "logs").mkdir(parents=True)
    copy_tree(Path.cwd(), out / "tree", out)
    command = [sys.executable, "-m", "benchmarks.jobs", "run", str(options.list.resolve()), "--out", str(out)]
    if options.gpus is not None:
        command += ["--gpus", str(options.gpus)]
    with open(out / "scheduler.txt", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=out / "tree",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (out / SCHEDULER).write_text(f"{process.pid}\n", encoding="utf-8")
    print(f"{len(jobs)} jobs in {out}")


def run(options: argparse.Namespace) -> None:
    """The scheduler itself, until no job runs or waits, or it is stopped."""
    gpus = visible_gpus() if options.gpus is None else [str(number) for number in range(options.gpus)]
    scheduler = Scheduler(options.list, options.out, gpus, Path.cwd())
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    try:
        while scheduler.turn() and not stopped:
            time.sleep(_PAUSE)
    finally:
        scheduler.stop()


def scheduler_of(out: Path) -> int | None:
    """The process that looks after a folder's jobs, None if it has ended. UserError if there was none."""
    if not has_jobs(out):
        raise UserError(f"{out} has no jobs; name the folder that `start` was given")
    number = int((out / SCHEDULER).read_text(encoding="utf-8"))
    try:
        words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
        state, _ = state_and_parent(number)
    except OSError:
        return None
    is_ours = b"benchmarks.jobs" in words and str(out.resolve()).encode() in words
    return number if is_ours and state != "Z" else None


def last_words(log: Path) -> str:
    """The end of a job's last line, progress bars included."""
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - 2000, 0))
        text = file.read().decode(errors="replace")
    lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return lines[-1].strip()[-150:] if lines else ""


def wait(options: argparse.Namespace) -> None:
    """Report when all has ended, or after ``--seconds``."""
    deadline = time.monotonic() + options.seconds
    while scheduler_of(options.out) is not None and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    is_alive = scheduler_of(options.out) is not None
    path = options.out / "state.json"
    state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, (code, seconds) in state.get("ended", {}).items():
        print(f"ended    {name}: exit code {code} after {seconds:.0f} s")
    for name in state.get("running", []):
        print(f"running  {name}: {last_words(options.out / 'logs' / f'{name}.txt')}")
    for name in state.get("waiting", []):
        print(f"waiting  {name}")
    if not is_alive and (not state or state["running"] or state["waiting"]):
        raise UserError(f"nothing runs any more; {options.out / 'scheduler.txt'} may say why")


def stop(options: argparse.Namespace) -> None:
    """End the scheduler and all that it has started."""
    while (number := scheduler_of(options.out)) is not None:
        os.kill(number, signal.SIGTERM)
        time.sleep(_PAUSE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = {"start": start, "run": run, "wait": wait, "stop": stop}
    parser.add_argument("action", choices=actions)
    parser.add_argument("list", type=Path, nargs="?", help="of start")
    parser.add_argument("--out", type=Path, required=True, help="a folder for logs and results")
    parser.add_argument("--gpus", type=int, help="how many there are, if not all")
    parser.add_argument("--seconds", type=float, default=60, help="wait for so long at most")
    options = parser.parse_args(arguments)
    if options.action in ("start", "run") and options.list is None:
        parser.error(f"{options.action} needs a list of jobs")
    try:
        actions[options.action](options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
