"""What a run shows: metrics.jsonl, a progress bar, and TensorBoard or W&B where asked for."""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from rtdmd.distributed.collectives import Ranks
from rtdmd.files import replace_file
from rtdmd.recipe.schema import TrackingSection
from rtdmd.runs import METRICS_FILE

_SHOWN = ("fake_score/loss", "generator/distribution_matching")

Sink = Callable[[str, int, dict[str, float]], None]


class Tracker:
    """Records the steps of one stage; on ranks other than 0 it does nothing."""

    def __init__(
        self, run: Path, stage: str, first: int, total: int, tracking: TrackingSection, ranks: Ranks
    ):
        self._active = ranks.is_main
        self._stage = stage
        if not self._active:
            return
        self._started = time.monotonic()
        self._path = run / METRICS_FILE
        forget_after(self._path, stage, first)
        self._file = self._open()
        self._bar = tqdm(total=total, initial=first, desc=stage, file=sys.stderr, mininterval=1.0)
        self._noticed: set[str] = set()
        self._sinks: dict[str, Sink] = {}
        for name, build in _external_sinks(run, tracking).items():
            self._guarded(name, lambda: self._sinks.update({name: build()}))  # noqa: B023 (called at once)

    def log(self, step: int, metrics: dict[str, float], notices: Sequence[str] = ()) -> None:
        """Record ``step`` finished steps (1, 2, …); a notice is shown above the bar, once."""
        if not self._active:
            return
        self._file.write(json.dumps(self._record(step) | metrics) + "\n")
        self._file.flush()
        self._send(step, metrics)
        shown = {name.split("/")[-1]: metrics[name] for name in _SHOWN if name in metrics}
        shown |= {name: value for name, value in metrics.items() if name.startswith("reward/")}
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self._bar.update(1)
        for notice in notices:
            self._notice(f"step {step}: {notice}", notice)

    def amend(self, step: int, metrics: dict[str, float]) -> None:
        """Add ``metrics`` and the time that they took to an earlier launch's record of ``step``."""
        if not self._active:
            return
        self._file.close()
        added = self._record(step)
        records = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        found = [each for each in records if (each["stage"], each["step"]) == (self._stage, step)]
        for record in found:
            record |= metrics | {"seconds": round(record["seconds"] + added["seconds"], 4)}
        if not found:  # a crash of the machine may have taken it
            records.append(added | metrics)
        replace_file(self._path, "".join(json.dumps(record) + "\n" for record in records))
        self._file = self._open()
        self._send(step, metrics)

    def _record(self, step: int) -> dict[str, Any]:
        seconds = time.monotonic() - self._started
        self._started = time.monotonic()
        return {"stage": self._stage, "step": step, "seconds": round(seconds, 4)}

    def _open(self) -> TextIO:
        return open(self._path, "a", encoding="utf-8")

    def _send(self, step: int, metrics: dict[str, float]) -> None:
        for name, sink in list(self._sinks.items()):
            self._guarded(name, lambda: sink(self._stage, step, metrics))  # noqa: B023

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        """What only shows a run mustn't end it: a service that fails is done without."""
        try:
            act()
        except Exception as error:
            self._sinks.pop(name, None)
            what = f"{name} failed ({type(error).__name__}: {error})"
            self._notice(f"{what}; the run goes on without it, see metrics.jsonl", name)

    def _notice(self, text: str, key: str) -> None:
        if key not in self._noticed:
            self._noticed.add(key)
            self._bar.write(f"rtdmd: {text}", file=sys.stderr)

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._file.close()


def forget_after(path: Path, stage: str, step: int) -> None:
    """Drop a stage's records beyond ``step``, so that a resumed run's file reads like a straight one's."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _is_kept(line, stage, step)]
    if len(kept) != len(lines):
        replace_file(path, "".join(line + "\n" for line in kept))


def _is_kept(line: str, stage: str, step: int) -> bool:
    """Not of later steps, nor what a crash has left of a record."""
    try:
        record = json.loads(line)
        return record["step"] <= step or record["stage"] != stage
    except (ValueError, KeyError, TypeError):
        return False


def _external_sinks(run: Path, tracking: TrackingSection) -> dict[str, Callable[[], Sink]]:
    """How to begin with each service that the recipe asks for."""
    sinks: dict[str, Callable[[], Sink]] = {}

    def tensorboard() -> Sink:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"))

        def to_tensorboard(stage: str, step: int, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(f"{stage}/{name}", value, step)

        return to_tensorboard

    def wandb() -> Sink:
        import wandb

        # The same id after a restart goes on with the same curves.
        number = zlib.crc32(str(run.resolve()).encode())
        board = wandb.init(
            project=tracking.wandb_project,
            name=run.name,
            id=f"{run.name[:100]}-{number:08x}",
            dir=str(run),
            resume="allow",
        )

        def to_wandb(stage: str, step: int, metrics: dict[str, float]) -> None:
            values = {f"{stage}/{name}": value for name, value in metrics.items()}
            board.log(values | {f"{stage}/step": step})

        return to_wandb

    if tracking.tensorboard:
        sinks["TensorBoard"] = tensorboard
    if tracking.wandb_project:
        sinks["Weights & Biases"] = wandb
    return sinks
