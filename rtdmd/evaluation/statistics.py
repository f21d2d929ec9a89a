"""Means with bootstrap intervals, win rates, and tables of them in Markdown and LaTeX.

Scores come as [P] (one per prompt) or [P, n] (n pictures of each of P prompts). What is resampled are
prompts, never pictures: pictures of one prompt share its difficulty, and counting them as independent would
narrow the intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True)
class Interval:
    """An estimate, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: ArrayLike,
    strata: Sequence[str] | None = None,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean over prompts and its percentile bootstrap interval (Efron 1979).

    Each resample draws P of the P prompts with replacement; the interval's ends are the (1 ∓ confidence)/2
    quantiles of the resamples' means. With ``strata`` (a prompt's task, say) the estimate is the mean over
    strata of the mean within each, which is GenEval's overall score, and prompts are redrawn within their
    stratum.

    A function of its arguments alone.

    Args:
        values: [P] or [P, n], finite.
        strata: P names.
        confidence: in (0, 1).
        num_resamples: how many.
        seed: of the resamples.

    Raises:
        ValueError: there is no value, or one isn't finite, or counts differ.
    """
    per_prompt = _per_prompt(values)
    groups = [per_prompt] if strata is None else list(by_stratum(per_prompt, strata).values())
    rng = np.random.default_rng(seed)
    resampled = np.mean([_resampled_means(group, num_resamples, rng) for group in groups], axis=0)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(overall_mean(values, strata), float(low), float(high))


def overall_mean(values: ArrayLike, strata: Sequence[str] | None = None) -> float:
    """What :func:`bootstrap_interval` estimates. Raises ValueError as it does."""
    per_prompt = _per_prompt(values)
    groups = [per_prompt] if strata is None else list(by_stratum(per_prompt, strata).values())
    return float(np.mean([group.mean() for group in groups]))


def win_rate(
    first: ArrayLike,
    second: ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """How often ``first`` beats ``second`` on the same prompt and seed, ties counting half, in [0, 1].

    Mean of 1[a > b] + ½·1[a = b] over pictures, with the interval of :func:`bootstrap_interval`.

    Raises:
        ValueError: as there, or the shapes differ.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"scores of two models must pair up, got shapes {a.shape} and {b.shape}")
    for scores in (a, b):
        _per_prompt(scores)  # for its checks
    wins = (a > b) + 0.5 * (a == b)
    return bootstrap_interval(wins, confidence=confidence, num_resamples=num_resamples, seed=seed)


def by_stratum(values: ArrayLike, strata: Sequence[str]) -> dict[str, Floats]:
    """The values of each stratum, strata in the order in which they first occur."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) != len(strata):
        raise ValueError(f"{len(array)} values but {len(strata)} strata")
    names = np.asarray(strata)
    return {name: array[names == name] for name in dict.fromkeys(strata)}


def _per_prompt(values: ArrayLike) -> Floats:
    """Mean over each prompt's pictures, [P]."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"scores must be [P] or [P, n] and not empty, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("a score isn't finite")
    return array if array.ndim == 1 else array.mean(axis=1)


def _resampled_means(values: Floats, num_resamples: int, rng: np.random.Generator) -> Floats:
    count = len(values)
    parts = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        size = (min(_RESAMPLES_AT_ONCE, num_resamples - start), count)
        parts.append(values[rng.integers(count, size=size)].mean(axis=1))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Column:
    """A measure in a table."""

    name: str
    group: str = ""  # what the table writes above it: the set of prompts
    lower_is_better: bool = False
    decimals: int = 4


@dataclass(frozen=True)
class Row:
    """A model's line of a table; ``cells`` by the column's (group, name)."""

    name: str
    nfe: int | None  # network evaluations per picture
    cells: Mapping[tuple[str, str], Interval | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Models by measures, as the paper prints them: the best of each column stands out.

    ``intervals`` adds the confidence intervals. Models whose printed means are equal are best together;
    ``marks_best`` off leaves everything plain. The column NFE is there if a row has one.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    intervals: bool = True
    marks_best: bool = True

    @property
    def _has_nfe(self) -> bool:
        return any(row.nfe is not None for row in self.rows)

    def markdown(self) -> str:
        """A GitHub table; a column's head is ``group: name``."""
        heads = [f"{column.group}: {column.name}" if column.group else column.name for column in self.columns]
        if self._has_nfe:
            heads = ["NFE", *heads]
        lines = [["model", *heads], ["---", *["---:"] * len(heads)]]
        for row in self.rows:
            cells = [self._cell(row, column, "**{}**", " [{}, {}]", "–") for column in self.columns]
            nfe = [_nfe(row, "–")] if self._has_nfe else []
            lines.append([_markdown_text(row.name), *nfe, *cells])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"

    def latex(self) -> str:
        """A ``tabular`` with booktabs' rules; groups span their columns in a line of their own."""
        before = 2 if self._has_nfe else 1
        lines = [rf"\begin{{tabular}}{{l{'r' * (len(self.columns) + before - 1)}}}", r"\toprule"]
        spans = _spans(column.group for column in self.columns)
        if any(name for name, _, _ in spans):
            heads = [
                rf"\multicolumn{{{last - first + 1}}}{{c}}{{{latex_text(n)}}}" for n, first, last in spans
            ]
            lines.append(rf"{' &' * before} {' & '.join(heads)} \\")
            rules = [(first + before + 1, last + before + 1) for _, first, last in spans]
            lines.append("".join(rf"\cmidrule(lr){{{first}-{last}}}" for first, last in rules))
        names = [
            latex_text(column.name) + (r" $\downarrow$" if column.lower_is_better else r" $\uparrow$")
            for column in self.columns
        ]
        lines += [rf"{' & '.join(['Model', 'NFE'][:before] + names)} \\", r"\midrule"]
        for row in self.rows:
            cells = [
                self._cell(row, column, r"\textbf{{{}}}", r" {{\scriptsize [{}, {}]}}", "--")
                for column in self.columns
            ]
            cells = [latex_text(row.name), _nfe(row, "--")][:before] + cells
            lines.append(rf"{' & '.join(cells)} \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def _cell(self, row: Row, column: Column, bold: str, interval: str, absent: str) -> str:
        value = row.cells.get((column.group, column.name))
        if value is None:
            return absent
        text = f"{_mean(value):.{column.decimals}f}"
        if self.marks_best and len(self.rows) > 1 and text == self._best(column):
            text = bold.format(text)
        if self.intervals and isinstance(value, Interval):
            ends = [f"{end:.{column.decimals}f}" for end in (value.low, value.high)]
            text += interval.format(*ends)
        return text

    def _best(self, column: Column) -> str:
        cells = [row.cells.get((column.group, column.name)) for row in self.rows]
        means = [_mean(cell) for cell in cells if cell is not None]
        best = min(means) if column.lower_is_better else max(means)
        return f"{best:.{column.decimals}f}"


def _mean(value: Interval | float) -> float:
    return value.mean if isinstance(value, Interval) else value


def _nfe(row: Row, absent: str) -> str:
    return absent if row.nfe is None else str(row.nfe)


def _spans(groups: Iterable[str]) -> list[tuple[str, int, int]]:
    """(group, first column, last column) of each run of equal groups."""
    spans: list[tuple[str, int, int]] = []
    for index, group in enumerate(groups):
        if spans and spans[-1][0] == group:
            spans[-1] = (group, spans[-1][1], index)
        else:
            spans.append((group, index, index))
    return spans


def _markdown_text(text: str) -> str:
    return text.replace("|", r"\|")


def latex_text(text: str) -> str:
    """Plain text with TeX's special characters escaped."""
    special = {letter: f"\\{letter}" for letter in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, letter) for letter in text)
