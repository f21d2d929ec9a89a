"""The study's table and figures: mean and standard deviation over seeds.

  python -m benchmarks.shapes.study_report runs/study --to docs/shapes

writes study.md, study_outcomes.png and study_curves.png into ``--to``, from what ``study measure`` has
measured and the runs' metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.shapes.study import SAMPLERS, TUNINGS, VARIANTS

Values = dict[str, list[float]]  # a metric's values, one a seed

COLUMNS = {
    "accuracy": ("accuracy, %", 100.0, 1),
    "clip": ("CLIP reward", 1.0, 4),
    "monitor_clip": ("monitor CLIP", 1.0, 4),
    "background_entropy": ("backgrounds, bits", 1.0, 2),
    "frechet": ("FD", 1.0, 4),
}


def read(measured: Path, kind: str) -> dict[str, Values]:
    """Values by variant and metric, of ``KIND-VARIANT-SEED.json`` and, without a seed, ``KIND-NAME.json``."""
    found: dict[str, Values] = defaultdict(lambda: defaultdict(list))
    for path in sorted(measured.glob(f"{kind}-*.json")):
        name = path.stem.removeprefix(f"{kind}-")
        variant, _, seed = name.rpartition("-")
        values = json.loads(path.read_text(encoding="utf-8"))
        for key, value in values.items():
            found[variant if seed.isdigit() else name][key].append(value)
    return found


def spread(values: Sequence[float], scale: float, decimals: int) -> str:
    """``mean ± standard deviation`` (n − 1); the value alone if there is one."""
    scaled = [value * scale for value in values]
    text = f"{mean(scaled):.{decimals}f}"
    return text if len(scaled) == 1 else f"{text} ± {stdev(scaled):.{decimals}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def outcomes_table(outcomes: dict[str, Values]) -> str:
    """A row for the teacher's samplers and each variant, in the study's order."""
    order = [*SAMPLERS, *VARIANTS]
    rows = []
    for name in order:
        if name in outcomes:
            cells = [spread(outcomes[name][key], *COLUMNS[key][1:]) for key in COLUMNS]
            rows.append([name, str(len(outcomes[name]["accuracy"])), *cells])
    return table(["", "runs", *(title for title, _, _ in COLUMNS.values())], rows)


def mechanisms_tables(
    tracking: dict[str, Values], variance: dict[str, Values], sources: dict[str, Values]
) -> str:
    """The fake score's tracking error, the policy gradient's noise and signal, where rewards vary from."""
    errors = [[name, spread(values["tracking_error"], 1.0, 4)] for name, values in tracking.items()]
    rows = []
    for values in variance.values():
        settings = list(dict.fromkeys(key.rpartition("/")[0] for key in values))
        for setting in settings:
            parts = {key: values[f"{setting}/{key}"] for key in ("noise", "signal")}
            # Signals are unbiased estimates and may come out negative: their mean over seeds is what counts.
            signal = mean(parts["signal"])
            ratio = f"{mean(parts['noise']) / signal:.0f}" if signal > 0 else "–"
            rows.append([setting, f"{mean(parts['noise']):.2e}", f"{signal:.2e}", ratio])
    shares = []
    for values in sources.values():
        whole = mean(values["all"])
        for noise, variances in values.items():
            shares.append([noise, f"{mean(variances):.2e}", f"{mean(variances) / whole:.0%}"])
    tables = [
        (["cold start", "tracking error"], errors),
        (["policy gradient", "noise", "signal", "noise / signal"], rows),
        (["noise that varies", "variance of rewards", "of all"], shares),
    ]
    return "\n\n".join(table(header, found) for header, found in tables if found)


def outcomes_figure(outcomes: dict[str, Values], path: Path) -> None:
    """Accuracy, CLIP reward and backgrounds of every variant, a dot a seed; lines are the slow teachers."""
    from matplotlib import pyplot

    names = [name for name in VARIANTS if name in outcomes]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.4))
    for axis, key in zip(axes, ("accuracy", "clip", "background_entropy"), strict=True):
        title, scale, _ = COLUMNS[key]
        for place, name in enumerate(names):
            values = [value * scale for value in outcomes[name][key]]
            axis.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.5)
            axis.plot([place - 0.25, place + 0.25], [mean(values)] * 2, color="tab:blue")
        for name, style in {"teacher, 50 steps": "-", "teacher, 25 steps": "--"}.items():
            if name in outcomes:
                axis.axhline(mean(outcomes[name][key]) * scale, color="gray", linestyle=style, label=name)
        axis.set_xticks(range(len(names)))
        axis.set_xticklabels([name.replace("_", "\n") for name in names], fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def curves_figure(runs: Path, path: Path) -> None:
    """The training reward by epoch, mean over seeds of running means over 30 epochs."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.4))
    for variant in TUNINGS:
        curves = [
            rewards_of(metrics) for metrics in sorted(runs.glob(f"{variant.name}-[0-9]*/metrics.jsonl"))
        ]
        if curves:
            length = min(map(len, curves))
            axis.plot(
                [mean(values) for values in zip(*(c[:length] for c in curves), strict=True)],
                label=variant.name,
            )
    axis.set_xlabel("epoch")
    axis.set_ylabel("CLIP reward of training prompts")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def rewards_of(metrics: Path, window: int = 30) -> list[float]:
    """Running means of ``reward/clipscore``."""
    records: list[dict[str, Any]] = [
        json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()
    ]
    values = [record["reward/clipscore"] for record in records if "reward/clipscore" in record]
    return [mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="folder for the table and the figures")
    options = parser.parse_args()
    measured = options.runs / "measured"
    outcomes = read(measured, "outcomes")
    options.to.mkdir(parents=True, exist_ok=True)
    text = outcomes_table(outcomes)
    kinds = ("tracking", "variance", "sources")
    text += "\n\n" + mechanisms_tables(*(read(measured, kind) for kind in kinds))
    (options.to / "study.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    outcomes_figure(outcomes, options.to / "study_outcomes.png")
    curves_figure(options.runs, options.to / "study_curves.png")
    print(text)


if __name__ == "__main__":
    main()
