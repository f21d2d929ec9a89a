"""What a run's records say of its training: steps, time, last losses and rewards, curves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtdmd.errors import UserError
from rtdmd.export.run import STAGES
from rtdmd.runs import METRICS_FILE, latest_checkpoint, read_progress

LAST = 0.1  # of a stage's records are averaged for its final values


@dataclass(frozen=True)
class StageFigures:
    """One stage's training in numbers."""

    stage: str
    steps: int
    seconds: float
    num_gpus: int | None  # None where no checkpoint is left to say it
    final: dict[str, float]  # means over the last tenth of the steps
    records: list[dict[str, Any]]

    @property
    def rewards(self) -> dict[str, float]:
        """Final rewards by name."""
        return {
            name.removeprefix("reward/"): value
            for name, value in self.final.items()
            if name.startswith("reward/")
        }

    @property
    def evaluation(self) -> dict[tuple[str, str], float]:
        """By (set, reward): the last of the evaluations during training, ``evaluation/SET/REWARD``."""
        found = {}
        for record in self.records:
            for name, value in record.items():
                kind, *names = name.split("/")
                if kind == "evaluation" and len(names) == 2:
                    found[names[0], names[1]] = value
        return found


def read_figures(run: Path) -> list[StageFigures]:
    """Figures of each stage that has records, in order. UserError for a damaged ``metrics.jsonl``."""
    path = run / METRICS_FILE
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is no record of a step ({error}); remove the line") from error
    stages = {stage: [record for record in records if record["stage"] == stage] for stage in STAGES}
    return [_figures(run, stage, found) for stage, found in stages.items() if found]


def _figures(run: Path, stage: str, records: list[dict[str, Any]]) -> StageFigures:
    latest = latest_checkpoint(run / stage / "checkpoints")
    return StageFigures(
        stage=stage,
        steps=records[-1]["step"],
        seconds=sum(record["seconds"] for record in records),
        num_gpus=read_progress(latest)["world_size"] if latest is not None else None,
        final=_means(records[-max(1, round(LAST * len(records))) :]),
        records=records,
    )


def _means(records: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of each metric over the records that have it (the generator's come every so many steps)."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("stage", "step", "seconds") and isinstance(value, int | float):
                values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def draw_curves(figures: Iterable[StageFigures], path: Path) -> bool:
    """A picture of losses and rewards over the steps of each stage; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = [
        (each, group)
        for each in figures
        for group in ("fake_score/loss", "generator/distribution_matching", "reward/", "monitor/")
        if _series(each, group)
    ]
    if not panels:
        return False
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for axes, (each, group) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in _series(each, group).items():
            axes.plot(*zip(*points, strict=True), linewidth=1, label=name)
        axes.set_title(each.stage)
        axes.set_xlabel("step")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _series(figures: StageFigures, prefix: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric whose name starts with ``prefix``."""
    names = {name for record in figures.records for name in record if name.startswith(prefix)}
    return {
        name: [(record["step"], record[name]) for record in figures.records if name in record]
        for name in sorted(names)
    }
