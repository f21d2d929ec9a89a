"""What an evaluation has found: rows per picture, means with intervals, win rates, tables, files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from torch import Tensor

from rtdmd.evaluation.distances import cmmd, frechet_distance
from rtdmd.evaluation.sets import EvaluationSet
from rtdmd.evaluation.specs import ModelSpec
from rtdmd.evaluation.statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Column,
    Floats,
    Interval,
    Row,
    Table,
    bootstrap_interval,
    by_stratum,
    win_rate,
)
from rtdmd.files import replace_file

_Key = tuple[str, str, str]

# In the order of the table.
_DISTANCES = {
    "frechet_clip": Column("FD-CLIP", lower_is_better=True),
    "cmmd": Column("CMMD", lower_is_better=True),
}


@dataclass(frozen=True)
class ModelLine:
    """A model, what it is, and its network evaluations per picture."""

    name: str
    spec: ModelSpec
    nfe: int


@dataclass(frozen=True)
class Measured:
    """One model on one set: each reward's scores [P, n], and distances to the reference if there is one."""

    model: str
    prompts: EvaluationSet
    scores: dict[str, Floats]
    distances: dict[str, float]


def distances_to(reference: Tensor, features: Tensor) -> dict[str, float]:
    """Distances of a set of features [N, D] to a reference [M, D]; ``cmmd`` is the published, biased one."""
    return {
        "frechet_clip": frechet_distance(features, reference),
        "cmmd": cmmd(features, reference),
        "cmmd_unbiased": cmmd(features, reference, unbiased=True),
    }


@dataclass(frozen=True)
class Results:
    """All models on all sets; everything here is a function of the scores."""

    models: Sequence[ModelLine]
    measured: Sequence[Measured]
    settings: dict[str, Any]  # what all models have in common, for the record

    @property
    def sets(self) -> list[EvaluationSet]:
        return list({each.prompts.name: each.prompts for each in self.measured}.values())

    def find(self, model: str, prompts: str) -> Measured:
        """What was measured of a model on a set."""
        return next(each for each in self.measured if (each.model, each.prompts.name) == (model, prompts))

    def rows(self) -> Iterator[dict[str, Any]]:
        """One record per picture; rewards that don't score its set are absent."""
        for each in self.measured:
            source, count = each.prompts, each.prompts.images_per_prompt
            for number in range(source.num_pictures):
                owner, image = divmod(number, count)
                yield {
                    "model": each.model,
                    "set": source.name,
                    "prompt_number": owner,
                    "image_number": image,
                    "prompt": source.prompts.prompts[owner],
                    "category": source.categories[owner] if source.categories else None,
                } | {name: float(scores[owner, image]) for name, scores in each.scores.items()}

    @cached_property
    def intervals(self) -> dict[_Key, Interval]:
        """By (model, set, reward): the mean over the set (over tasks for GenEval's), with its interval."""
        return {
            (each.model, each.prompts.name, reward): bootstrap_interval(scores, each.prompts.strata(reward))
            for each in self.measured
            for reward, scores in each.scores.items()
        }

    @cached_property
    def categories(self) -> dict[_Key, dict[str, Interval]]:
        """By (model, set, reward): the mean within each category; empty without categories."""
        return {
            (each.model, each.prompts.name, reward): {
                name: bootstrap_interval(values)
                for name, values in by_stratum(scores, each.prompts.categories).items()
            }
            if each.prompts.categories
            else {}
            for each in self.measured
            for reward, scores in each.scores.items()
        }

    @cached_property
    def win_rates(self) -> list[dict[str, Any]]:
        """For each set, reward and pair of models how often the first beats the second."""
        found = []
        for prompts in self.sets:
            for first, second in combinations([line.name for line in self.models], 2):
                ours, theirs = (self.find(name, prompts.name).scores for name in (first, second))
                for reward, scores in ours.items():
                    rate = win_rate(scores, theirs[reward])
                    named = {"set": prompts.name, "reward": reward, "first": first, "second": second}
                    found.append(named | {"rate": rate})
        return found

    def table(self, *, intervals: bool = True) -> Table:
        """Models by rewards per set, as the paper prints them, distances last."""
        columns, rows = [], []
        for prompts in self.sets:
            one = self.find(self.models[0].name, prompts.name)
            columns += [Column(reward, prompts.name) for reward in one.scores]
            columns += [
                Column(column.name, prompts.name, lower_is_better=True)
                for name, column in _DISTANCES.items()
                if name in one.distances
            ]
        for line in self.models:
            cells: dict[tuple[str, str], Interval | float] = {}
            for prompts in self.sets:
                measured = self.find(line.name, prompts.name)
                for reward in measured.scores:
                    cells[prompts.name, reward] = self.intervals[line.name, prompts.name, reward]
                for name, column in _DISTANCES.items():
                    if name in measured.distances:
                        cells[prompts.name, column.name] = measured.distances[name]
            rows.append(Row(line.name, line.nfe, cells))
        return Table(columns, rows, intervals=intervals)

    def category_table(self, prompts: EvaluationSet) -> Table:
        """Models by categories per reward of a set that has categories."""
        names = list(dict.fromkeys(prompts.categories or []))
        rewards = list(self.find(self.models[0].name, prompts.name).scores)
        columns = [Column(name, reward) for reward in rewards for name in names]
        rows = [
            Row(
                line.name,
                line.nfe,
                {
                    (reward, name): interval
                    for reward in rewards
                    for name, interval in self.categories[line.name, prompts.name, reward].items()
                },
            )
            for line in self.models
        ]
        return Table(columns, rows, intervals=False)

    def win_table(self) -> Table:
        """Pairs of models by rewards per set."""
        rates = self.win_rates
        keys = dict.fromkeys((rate["reward"], rate["set"]) for rate in rates)
        columns = [Column(*key, decimals=3) for key in keys]
        pairs = dict.fromkeys((rate["first"], rate["second"]) for rate in rates)
        rows = [
            Row(
                f"{first} over {second}",
                None,
                {
                    (rate["set"], rate["reward"]): rate["rate"]
                    for rate in rates
                    if (rate["first"], rate["second"]) == (first, second)
                },
            )
            for first, second in pairs
        ]
        return Table(columns, rows, marks_best=False)

    def summary(self) -> dict[str, Any]:
        """Everything but the pictures' own scores, as JSON has it."""
        return {
            "settings": self.settings | {"confidence": CONFIDENCE, "num_resamples": NUM_RESAMPLES},
            "models": {line.name: asdict(line.spec) | {"nfe": line.nfe} for line in self.models},
            "sets": {
                each.name: {
                    "style": each.style,
                    "num_prompts": len(each.prompts),
                    "num_images_per_prompt": each.images_per_prompt,
                    "prompts_sha256": each.digest(),
                }
                for each in self.sets
            },
            "scores": [
                {"model": each.model, "set": each.prompts.name, "reward": reward}
                | asdict(self.intervals[each.model, each.prompts.name, reward])
                | {"categories": _plain(self.categories[each.model, each.prompts.name, reward])}
                for each in self.measured
                for reward in each.scores
            ],
            "distances": [
                {"model": each.model, "set": each.prompts.name} | each.distances
                for each in self.measured
                if each.distances
            ],
            "win_rates": [{**rate, "rate": asdict(rate["rate"])} for rate in self.win_rates],
        }

    def report(self) -> str:
        """The tables in Markdown: means, categories, win rates."""
        parts = ["# Evaluation", self.table().markdown()]
        for prompts in self.sets:
            if prompts.categories is not None:
                parts += [f"## Categories of {prompts.name}", self.category_table(prompts).markdown()]
        if len(self.models) > 1:
            parts += ["## Win rates on the same prompts and seeds", self.win_table().markdown()]
        return "\n".join(f"{part.rstrip()}\n" for part in parts)

    def write(self, folder: Path) -> None:
        """Write scores.parquet, scores.jsonl, results.json, report.md and table.tex."""
        rows = list(self.rows())
        names = list(dict.fromkeys(name for row in rows for name in row))
        full = [{name: row.get(name) for name in names} for row in rows]
        stored = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(full, schema=_schema(names)), stored)
        replace_file(folder / "scores.parquet", stored.getvalue(), shared=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_file(folder / "scores.jsonl", lines, shared=True)
        summary = json.dumps(self.summary(), indent=2, ensure_ascii=False) + "\n"
        replace_file(folder / "results.json", summary, shared=True)
        replace_file(folder / "report.md", self.report(), shared=True)
        replace_file(folder / "table.tex", self.table(intervals=False).latex(), shared=True)


def _schema(names: Sequence[str]) -> pyarrow.Schema:
    text, whole = ("model", "set", "prompt", "category"), ("prompt_number", "image_number")
    kinds = dict.fromkeys(text, pyarrow.string()) | dict.fromkeys(whole, pyarrow.int64())
    return pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in names])


def _plain(intervals: dict[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: asdict(interval) for name, interval in intervals.items()}
