"""How throughput grows with ranks, beside a simple model: a table in Markdown, and a figure.

  PROCESSES=1 bash benchmarks/full_size_runs.sh one cold_shared cold_sharded
  PROCESSES=2 bash benchmarks/full_size_runs.sh two cold_shared cold_sharded
  python -m benchmarks.scaling --bandwidth 329 --to docs/performance one/*.json two/*.json

The files are train_step's, of the same cases at several numbers of ranks and the same batch a rank. The model
has two bounds: computation hides all that is exchanged, T(1); or nothing, T(1) + what the exchange takes at
the bus bandwidth (traffic.py). Efficiency is T(1)/T(N). Writes scaling.md and scaling.png into ``--to``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.traffic import Traffic
from rtdmd.errors import UserError

# Rows of one measurement by number of ranks; a measurement is a file's name and a row's case.
Series = dict[tuple[str, str], dict[int, dict[str, Any]]]

COLUMNS = (
    "case", "", "ranks", "seconds", "efficiency", "model", "exchanging", "and nothing else", "peak GiB",
)  # fmt: skip


def read(paths: Sequence[Path]) -> Series:
    """Rows that succeeded, of measurements made on one rank too; names the others. UserError without any."""
    series: Series = defaultdict(dict)
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            if "utilisation" in row and "error" not in row and not row.get("baseline"):
                series[path.stem, row["case"]][result["ranks"]] = row
    for name, case in [key for key, by_ranks in series.items() if 1 not in by_ranks]:
        print(f"{name}: {case!r} is left out: no file has it on one rank", file=sys.stderr)
        del series[name, case]
    if not series:
        raise UserError("nothing was measured on one rank; add the files of those runs")
    return series


def nothing_hidden(one: dict[str, Any], many: dict[str, Any], ranks: int, bandwidth: float) -> float:
    """The model's lower bound of the efficiency; the upper one is 1."""
    exchange = Traffic(**many["traffic"]).seconds(ranks, bandwidth)
    return one["seconds"] / (one["seconds"] + exchange)


def table(series: Series, bandwidth: float) -> str:
    """Markdown; ``bandwidth`` in bytes a second."""
    lines = [COLUMNS, ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2)]
    for (name, case), by_ranks in series.items():
        for ranks, row in sorted(by_ranks.items()):
            low = nothing_hidden(by_ranks[1], row, ranks, bandwidth)
            spent = row.get("communication")
            shares = ["", ""]
            if spent:
                shares = [f"{spent[key] / row['seconds']:.0%}" for key in ("seconds", "exposed_seconds")]
            lines.append(
                [
                    f"`{name}`", case, str(ranks), f"{row['seconds']:.3f}",
                    f"{by_ranks[1]['seconds'] / row['seconds']:.1%}", f"{low:.1%} to 100%",
                    *shares, f"{row['peak_gib']:.1f}",
                ]
            )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(series: Series, bandwidth: float, path: Path) -> None:
    """Efficiency over ranks, with the model's lower bound dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes: Any
    drawing, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20")(range(20)))
    for (name, case), by_ranks in series.items():
        ranks = sorted(by_ranks)
        one = by_ranks[1]
        (line,) = axes.plot(
            ranks, [one["seconds"] / by_ranks[n]["seconds"] for n in ranks], "o-", label=f"{name}: {case}"
        )
        lower = [nothing_hidden(one, by_ranks[n], n, bandwidth) for n in ranks]
        axes.plot(ranks, lower, "--", color=line.get_color(), alpha=0.5)
    axes.set(xlabel="GPUs", ylabel="efficiency (dashed: nothing hidden)", xscale="log")
    axes.set_xticks(sorted({n for by_ranks in series.values() for n in by_ranks}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="JSON files of train_step")
    parser.add_argument("--bandwidth", type=float, required=True, help="bus bandwidth of a ring, GB/s")
    parser.add_argument("--to", type=Path, required=True, help="folder for scaling.md and scaling.png")
    options = parser.parse_args(arguments)
    try:
        series = read(options.files)
    except UserError as error:
        parser.error(str(error))
    options.to.mkdir(parents=True, exist_ok=True)
    text = table(series, 1e9 * options.bandwidth)
    (options.to / "scaling.md").write_text(text + "\n", encoding="utf-8")
    figure(series, 1e9 * options.bandwidth, options.to / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()
