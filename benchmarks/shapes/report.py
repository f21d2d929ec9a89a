"""What a run has made of the small world's teacher: a grid of pictures, the rewards' curves, a table.

  python -m benchmarks.shapes.report runs/demo [--captions 256] [--recompute]

writes grid.png, curves.png and table.md into RUN/report. The teacher's pictures and scores come from
data/shapes/teacher; ``--recompute`` paints them again (minutes on a CPU). All rows paint the same held-out
captions from the same noise.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.shapes.measure import WORLD, Judges, generator_sampler, paint
from benchmarks.shapes.outcomes import Sampler, euler
from rtdmd.errors import UserError
from rtdmd.evaluation.statistics import Column, Interval, Row, Table, bootstrap_interval
from rtdmd.images import to_pictures
from rtdmd.recipe import load_for_sampling
from rtdmd.recipe.schema import Recipe
from rtdmd.sample import Painter, SampleOptions, build_painter, pick_device

SHIPPED = WORLD / "teacher"
NUM_SHIPPED = 256
NUM_SHOWN = 8
ZOOM = 2
# Guidance is the best on validation captions at each number of steps: data/shapes/measures.json.
TEACHERS = {
    "teacher, 50 steps": euler(50, 3.0),
    "teacher, 4 steps": euler(4, 2.0),
    "teacher, 4 steps, unguided": euler(4, 1.0),  # as many network evaluations as a student's
}


@dataclass(frozen=True)
class Outcome:
    """A row of the report: scores of each caption, means over all, and the first pictures."""

    nfe: int  # network evaluations a picture
    scores: dict[str, list[float]]
    means: dict[str, float]


def measure(judges: Judges, painter: Painter, sampler: Sampler) -> tuple[Outcome, Tensor]:
    """Paint every caption; the outcome and the pictures to show."""
    images = paint(painter, judges.prompts, sampler)
    nfe = len(sampler.sigmas) * (1 if sampler.guidance_scale == 1 else 2)
    return Outcome(nfe, judges.score(images), judges.measure(images)), images[:NUM_SHOWN]


def write_teacher(recipe: Recipe, device: torch.device, folder: Path) -> None:
    """The teacher's scores as JSON and its first pictures as PNG strips, a row of the grid each."""
    folder.mkdir(parents=True, exist_ok=True)
    judges = Judges.load("test", NUM_SHIPPED, device)
    painter = build_painter(recipe, SampleOptions(teacher=True), device)
    found: dict[str, Any] = {}
    for name, sampler in TEACHERS.items():
        outcome, shown = measure(judges, painter, sampler)
        found[name] = asdict(outcome)
        strip(to_pictures(shown)).save(folder / f"{_file_name(name)}.png")
    found["captions"] = judges.prompts
    text = json.dumps(found, indent=1).replace(",\n   ", ",")
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row."""
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * width, 0))
    return row


def _file_name(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")


def read_teacher(folder: Path, prompts: Sequence[str]) -> dict[str, tuple[Outcome, Image.Image]]:
    """What :func:`write_teacher` wrote, cut to the first ``prompts``."""
    found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    if found.pop("captions")[: len(prompts)] != list(prompts):
        raise UserError(f"{folder}: holds scores of other captions; run the report with --recompute")
    rows = {}
    for name, row in found.items():
        scores = {key: values[: len(prompts)] for key, values in row["scores"].items()}
        picture = Image.open(folder / f"{_file_name(name)}.png").convert("RGB")
        rows[name] = (Outcome(row["nfe"], scores, row["means"]), picture)
    return rows


def stages_of(run: Path) -> list[str]:
    """The stages that the run has finished or is in, in order."""
    return [stage for stage in ("cold_start", "rtdmd") if (run / stage / "generator_ema.pt").is_file()]


def table(rows: dict[str, Outcome]) -> str:
    """Means with 95 % bootstrap intervals over captions, as Markdown."""
    columns = [
        Column("accuracy", decimals=3),
        Column("CLIP reward", decimals=3),
        Column("monitor CLIP", decimals=3),
        Column("FD", decimals=4, lower_is_better=True),
        Column("backgrounds, bits", decimals=2),
    ]
    keys = ("accuracy", "clip", "monitor_clip")
    lines = []
    for name, outcome in rows.items():
        cells: dict[tuple[str, str], Interval | float] = {
            ("", column.name): bootstrap_interval(outcome.scores[key])
            for column, key in zip(columns, keys, strict=False)
        }
        cells["", "FD"] = outcome.means["frechet"]
        cells["", "backgrounds, bits"] = outcome.means["background_entropy"]
        lines.append(Row(name, outcome.nfe, cells))
    return Table(columns, lines, intervals=True).markdown()


def grid(rows: dict[str, Image.Image], prompts: Sequence[str]) -> Image.Image:
    """A row of pictures for each model under the captions, with labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(prompts)
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(1.45 * count + 1.5, 1.45 * len(rows) + 0.8))
    for axis, (name, picture) in zip(axes, rows.items(), strict=True):
        axis.imshow(picture.crop((0, 0, picture.height * count, picture.height)), interpolation="nearest")
        axis.set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    side = next(iter(rows.values())).height
    axes[0].set_xticks([side * (place + 0.5) for place in range(count)])
    axes[0].xaxis.tick_top()
    axes[0].set_xticklabels([_wrapped(prompt) for prompt in prompts], fontsize=7)
    figure.tight_layout()
    return _rendered(figure, pyplot)


def _wrapped(prompt: str) -> str:
    words, lines = prompt.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 16:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def curves(run: Path) -> Image.Image | None:
    """Rewards over both stages' hours, from metrics.jsonl; None if no stage has recorded any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    minutes, series = 0.0, dict[str, tuple[list[float], list[float]]]()
    for record in records:
        minutes += record["seconds"] / 60
        for key, value in record.items():
            if key.startswith(("reward/", "evaluation/", "monitor/")):
                times, values = series.setdefault(key, ([], []))
                times.append(minutes)
                values.append(value)
    if not series:
        return None
    figure, axes = pyplot.subplots(1, len(series), figsize=(4.2 * len(series), 3), squeeze=False)
    for axis, (key, (times, values)) in zip(axes[0], sorted(series.items()), strict=True):
        axis.plot(times, values, marker="." if len(times) < 40 else None)
        axis.set_title(key, fontsize=9)
        axis.set_xlabel("minutes of training")
    figure.tight_layout()
    return _rendered(figure, pyplot)


def _rendered(figure: Any, pyplot: Any) -> Image.Image:
    data = io.BytesIO()
    figure.savefig(data, dpi=110)
    pyplot.close(figure)
    return Image.open(data)


def report(run: Path, captions: int, recompute: bool, say: Callable[[str], None]) -> None:
    """Write the report and say its table."""
    device = pick_device(None)
    stages = stages_of(run)
    if not stages:
        raise UserError(f"{run}: holds no generator_ema.pt of either stage")
    recipe = load_for_sampling(str(run / "recipe.yaml"), [])
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    if recompute:
        write_teacher(recipe, device, folder / "teacher")
    judges = Judges.load("test", captions, device)
    teachers = read_teacher(folder / "teacher" if recompute else SHIPPED, judges.prompts)
    rows = {name: outcome for name, (outcome, _) in teachers.items()}
    pictures = {name: picture for name, (_, picture) in teachers.items()}
    for stage, name in zip(("cold_start", "rtdmd"), ("cold start, 4 steps", "RTDMD, 4 steps"), strict=True):
        if stage in stages:
            files = [str(run / earlier / "generator_ema.pt") for earlier in stages[: stages.index(stage) + 1]]
            painter = build_painter(recipe, SampleOptions(loras=files), device)
            rows[name], shown = measure(judges, painter, generator_sampler(painter))
            pictures[name] = strip(to_pictures(shown))
    text = table(rows)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    grid(pictures, judges.prompts[:NUM_SHOWN]).save(folder / "grid.png")
    drawn = curves(run)
    if drawn is not None:
        drawn.save(folder / "curves.png")
    say(f"{text}\n\n{captions} held-out captions; pictures, curves and table are in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--captions", type=int, default=256, help=f"at most {NUM_SHIPPED} of the teacher's")
    parser.add_argument("--recompute", action="store_true", help="paint the teacher's pictures again")
    parser.add_argument(
        "--teacher-only", type=Path, metavar="FOLDER", help="write the teacher's part, no more"
    )
    options = parser.parse_args()
    try:
        if options.teacher_only:
            recipe = load_for_sampling(str(options.run), [])
            write_teacher(recipe, pick_device(None), options.teacher_only)
        else:
            report(options.run, options.captions, options.recompute, print)
    except UserError as error:
        raise SystemExit(f"report: {error}") from error


if __name__ == "__main__":
    main()
