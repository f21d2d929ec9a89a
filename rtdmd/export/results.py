"""Evaluation results for the card: from ``rtdmd evaluate``, or from the rewards of training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from rtdmd.errors import UserError
from rtdmd.export.figures import StageFigures
from rtdmd.export.run import FinishedRun

RESULTS_FILE = "results.json"
DISTANCES = ("frechet_clip", "cmmd")  # to a reference set, where one was given; they have no interval


@dataclass(frozen=True)
class Evaluation:
    """What ``rtdmd evaluate`` has found, and which of its models is the one exported."""

    model: str
    models: Sequence[str]
    scores: Sequence[Mapping[str, Any]]  # model, set, reward, mean; low and high if there is an interval


def find_evaluation(run: FinishedRun, given: Path | None) -> Evaluation | None:
    """The evaluation in ``given`` (results.json or its folder); by default in the places where it may be.

    Those are ``RUN/evaluation`` and ``evaluations/NAME``. Raises UserError if ``given`` can't be read or has
    no model that is what this run trained last.
    """
    places = [run.folder / "evaluation", Path("evaluations") / run.recipe.name]
    for place in [given] if given is not None else places:
        file = place / RESULTS_FILE if place.is_dir() else place
        if file.is_file():
            found = _read(file, run)
            if found is not None:
                return found
            if given is not None:
                raise UserError(
                    f"{file}: evaluates no model run:{run.folder}; "
                    "evaluate that one, or leave out --evaluation"
                )
        elif given is not None:
            raise UserError(f"{given}: no results of rtdmd evaluate there ({RESULTS_FILE})")
    return None


def _read(file: Path, run: FinishedRun) -> Evaluation | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        models, scores = content["models"], [*content["scores"], *_distances(content.get("distances", []))]
        own = [name for name, spec in models.items() if _is_run(spec, run)]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not the results of rtdmd evaluate ({error!r})") from error
    return Evaluation(own[0], list(models), scores) if own else None


def _distances(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Distances of models on sets in the form of scores."""
    return [
        {"model": each["model"], "set": each["set"], "reward": name, "mean": each[name]}
        for name in DISTANCES
        for each in measured
        if name in each
    ]


def _is_run(spec: Mapping[str, Any], run: FinishedRun) -> bool:
    """Whether an evaluated model is what ``run`` trained last, at the recipe's own number of steps."""
    if spec["kind"] != "run" or Path(spec["run"]).resolve() != run.folder.resolve():
        return False
    steps = (None, len(run.recipe.schedule.timesteps))
    return spec["stage"] in (None, list(run.files)[-1]) and spec["num_steps"] in steps


def hub_results(evaluation: Evaluation | None, figures: Sequence[StageFigures]) -> list[EvalResult]:
    """The exported model's results in the hub's form.

    Without an evaluation they are the last one made during training, and without that the last rewards of
    training on its own prompts.
    """
    if evaluation is not None:
        own = [score for score in evaluation.scores if score["model"] == evaluation.model]
        return [_result(score["set"], score["set"], score["reward"], score["mean"]) for score in own]
    last = figures[-1] if figures else None
    if last is not None and last.evaluation:
        return [_result(name, name, reward, value) for (name, reward), value in last.evaluation.items()]
    title = "training prompts (mean over the last steps of training)"
    rewards = last.rewards if last is not None else {}
    return [_result("training-prompts", title, name, value) for name, value in rewards.items()]


def _result(dataset: str, title: str, reward: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-to-image",
        task_name="Text to image",
        dataset_type=dataset,
        dataset_name=title,
        metric_type=reward,
        metric_name=reward,
        metric_value=float(f"{value:.6g}"),
    )
