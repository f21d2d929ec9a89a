"""Sets of prompts, rewards and models of a recipe's ``evaluation``."""

from __future__ import annotations

from collections.abc import Sequence

from rtdmd.errors import UserError, nearest_hint
from rtdmd.recipe.checks_rewards import check_reward
from rtdmd.recipe.checks_values import check_remote
from rtdmd.recipe.report import Report
from rtdmd.recipe.schema import Recipe


def check_evaluation(report: Report, recipe: Recipe, *, is_due: bool) -> None:
    """Names, rewards and models; files and prompts only where an evaluation is about to run (``is_due``)."""
    from rtdmd.evaluation.sets import evaluation_rewards
    from rtdmd.rewards import REWARDS

    section = recipe.evaluation
    before = len(report.lines)
    _check_names(report, "evaluation.sets", [each.name for each in section.sets])
    _check_names(report, "evaluation.models", [each.name for each in section.models])
    _check_specs(report, recipe)
    if section.rewards or is_due:
        _check_rewards(report, recipe, is_due)
    for index, each in enumerate(section.sets):
        if each.num_images_per_prompt is not None and each.num_images_per_prompt < 1:
            where = f"evaluation.sets.{index}.num_images_per_prompt"
            report.fault(where, each.num_images_per_prompt, "write at least 1")
    if not is_due:
        return
    if not section.sets:
        report.fault("evaluation.sets", [], "write at least one set: {name: …, prompts: {source: …}}")
    if not evaluation_rewards(recipe):
        report.fault("evaluation.rewards", [], "write at least one reward: {name: clipscore}")
    known = all(reward.name in REWARDS for reward in evaluation_rewards(recipe))
    if known and len(report.lines) == before:
        _check_sets(report, recipe)


def _check_rewards(report: Report, recipe: Recipe, is_due: bool) -> None:
    """The section's own rewards, or the recipe's in their place, whose faults may have been noted already."""
    from rtdmd.rewards import REWARDS

    own = recipe.evaluation.rewards
    key, rewards = ("evaluation.rewards", own) if own else ("rewards", recipe.rewards)
    names = [reward.name for reward in rewards]
    found = Report(report.source)
    for index, reward in enumerate(rewards):
        if reward.name in names[:index]:
            first = f"{key}.{names.index(reward.name)}"
            found.fault(f"{key}.{index}.name", reward.name, f"also {first}; keep one")
        elif reward.name not in REWARDS:
            hint = nearest_hint(reward.name, sorted(REWARDS))
            found.fault(f"{key}.{index}.name", reward.name, f"unknown reward{hint}")
        check_remote(found, f"{key}.{index}", reward, recipe.timeout_seconds)
        check_reward(found, f"{key}.{index}", reward, is_used=is_due)
    report.lines += [line for line in found.lines if line not in report.lines]


def _check_names(report: Report, key: str, names: Sequence[str]) -> None:
    from rtdmd.evaluation.specs import NAME

    for index, name in enumerate(names):
        if not NAME.fullmatch(name):
            advice = "write a folder name of letters, digits, '_', '-', '+' and '.'"
            report.fault(f"{key}.{index}.name", name, advice)
        elif name in names[:index]:
            report.fault(f"{key}.{index}.name", name, f"also {key}.{names.index(name)}; give it another name")


def _check_specs(report: Report, recipe: Recipe) -> None:
    from rtdmd.evaluation.specs import parse_spec

    for index, each in enumerate(recipe.evaluation.models):
        try:
            parse_spec(each.model)
        except UserError as error:
            report.fault(f"evaluation.models.{index}.model", each.model, str(error))


def _check_sets(report: Report, recipe: Recipe) -> None:
    """Prompts can be read, and every reward can score some of them."""
    from rtdmd.evaluation.sets import evaluation_rewards, load_set, match_rewards
    from rtdmd.prompts import check_prompts

    sets = []
    for index, each in enumerate(recipe.evaluation.sets):
        key = f"evaluation.sets.{index}.prompts"
        lines = check_prompts(each.prompts, key)
        report.lines += [f"{report.source}: {line}" for line in lines]
        if not lines:
            try:
                sets.append(load_set(each, recipe.evaluation.num_images_per_prompt))
            except UserError as error:
                report.fault(f"evaluation.sets.{index}.category", each.category, str(error))
    if len(sets) == len(recipe.evaluation.sets):
        try:
            match_rewards(sets, evaluation_rewards(recipe))
        except UserError as error:
            report.lines += [f"{report.source}: evaluation: {line}" for line in str(error).splitlines()]
