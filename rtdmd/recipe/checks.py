"""Everything about a recipe that can be known before weights load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rtdmd.recipe.checks_arithmetic import FAMILY_SIGMAS, check_arithmetic
from rtdmd.recipe.checks_evaluation import check_evaluation
from rtdmd.recipe.checks_files import check_engines, check_models, check_output, check_starts
from rtdmd.recipe.checks_rewards import check_reward
from rtdmd.recipe.checks_values import (
    check_family,
    check_rewards,
    check_stages,
    check_stop_rules,
    check_text_encoder,
    check_values,
    reward_sections,
)
from rtdmd.recipe.loading import parse_recipe
from rtdmd.recipe.report import Report, value_at
from rtdmd.recipe.schema import EvaluationSection, Recipe
from rtdmd.recipe.tree import raise_faults


def load_checked(
    path: str, overrides: Sequence[str], *, world_size: int, stage: str | None = None
) -> tuple[Recipe, list[str]]:
    """A recipe that has passed every check, and the stages to run: ``stage``, else the recipe's.

    Raises one UserError with all faults, those of reading and those of checking together.
    """
    recipe, faults = parse_recipe(path, overrides)
    stages: list[str] = []
    if recipe is not None:
        stages = [stage] if stage else [*recipe.stages]
        faults = [*faults, *find_faults(recipe, path, world_size=world_size, stages=stages)]
    raise_faults(path, faults)
    assert recipe is not None
    return recipe, stages


def load_for_sampling(path: str, overrides: Sequence[str]) -> Recipe:
    """A recipe that has passed the checks of its values, resolution and models, which sampling needs.

    Engines, prompts and rewards may name files that are not there. Raises UserError with all faults.
    """
    recipe, faults = parse_recipe(path, overrides)
    if recipe is not None:
        faults = [*faults, *_sampling_faults(recipe, path).lines]
    raise_faults(path, faults)
    assert recipe is not None
    return recipe


def load_for_evaluation(
    path: str, overrides: Sequence[str], change: Callable[[Recipe], EvaluationSection]
) -> Recipe:
    """Like :func:`load_for_sampling`, and all of ``evaluation`` has passed its checks too.

    ``change`` returns the section that shall take the place of the recipe's own before it is checked: a
    command's options.
    """
    recipe, faults = parse_recipe(path, overrides)
    if recipe is not None:
        recipe = replace(recipe, evaluation=change(recipe))
        report = _sampling_faults(recipe, path)
        check_evaluation(report, recipe, is_due=True)
        faults = [*faults, *report.lines]
    raise_faults(path, faults)
    assert recipe is not None
    return recipe


def _sampling_faults(recipe: Recipe, source: str) -> Report:
    report = Report(source)
    check_values(report, recipe)
    check_family(report, recipe, FAMILY_SIGMAS)
    check_models(report, recipe)
    return report


def check_recipe(recipe: Recipe, source: str, *, world_size: int, stages: Sequence[str]) -> None:
    """Raise one UserError with everything that :func:`find_faults` finds."""
    raise_faults(source, find_faults(recipe, source, world_size=world_size, stages=stages))


def find_faults(recipe: Recipe, source: str, *, world_size: int, stages: Sequence[str]) -> list[str]:
    """Every fault of the recipe, one a line; ``source`` is its file's name.

    Values and engines are checked for both stages; what depends on ``world_size`` (the number of
    ranks), prompts and rewards only for the ``stages`` about to run.
    """
    report = Report(source)
    check_values(report, recipe)
    check_stages(report, recipe, stages)
    check_family(report, recipe, FAMILY_SIGMAS)
    check_text_encoder(report, recipe)
    check_arithmetic(report, recipe, world_size=world_size, stages=stages)
    _check_rewards(report, recipe, runs_rtdmd="rtdmd" in stages)
    check_stop_rules(report, recipe)
    check_engines(report, recipe, world_size)
    check_models(report, recipe)
    if "rtdmd" in stages:
        check_starts(report, recipe)
    _check_prompts(report, recipe, stages)
    check_evaluation(report, recipe, is_due=recipe.evaluation.every > 0)
    check_output(report, recipe)
    return report.lines


def _check_rewards(report: Report, recipe: Recipe, *, runs_rtdmd: bool) -> None:
    # Imported here: a recipe is read without the scorers' libraries.
    from rtdmd.rewards import REWARDS

    check_rewards(
        report, recipe, {name: spec.differentiable for name, spec in REWARDS.items()}, runs_rtdmd=runs_rtdmd
    )
    for section, reward in reward_sections(recipe).items():
        check_reward(report, section, reward, is_used=runs_rtdmd)


def _check_prompts(report: Report, recipe: Recipe, stages: Sequence[str]) -> None:
    from rtdmd.prompts import check_prompts
    from rtdmd.rewards import REWARDS

    scorers = {}
    for section, reward in reward_sections(recipe).items():
        spec = REWARDS.get(reward.name)
        if spec is not None and spec.check_prompt is not None:
            scorers[f"{section} ({reward.name})"] = spec.check_prompt
    for stage in dict.fromkeys(stages):
        if stage in ("cold_start", "rtdmd"):
            key = f"{stage}.prompts"
            accept = scorers if stage == "rtdmd" else {}
            lines = check_prompts(value_at(recipe, key), key, accept)
            report.lines += [f"{report.source}: {line}" for line in lines]
