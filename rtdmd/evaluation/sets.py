"""Sets of prompts to evaluate on, with their categories, and which rewards can score them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal

from rtdmd.errors import UserError, nearest_hint
from rtdmd.prompts import PromptSet
from rtdmd.recipe.schema import EvaluationSection, EvaluationSetSection, Recipe, RewardSection
from rtdmd.rewards import REWARDS

Style = Literal["geneval", "geneval2", "plain"]

GENEVAL_IMAGES_PER_PROMPT = 4  # as the benchmark has it
_CATEGORY_COLUMNS = ("category", "tag")


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts, and how many pictures each gets.

    Picture number k is image k mod n of prompt k div n.
    """

    name: str
    style: Style
    prompts: PromptSet
    categories: list[str] | None  # one a prompt
    images_per_prompt: int  # n

    @property
    def num_pictures(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def strata(self, reward: str) -> list[str] | None:
        """GenEval's score is the mean over its tasks; every other is the mean over prompts."""
        return self.categories if self.style == "geneval" and reward == "geneval" else None

    def digest(self) -> str:
        """SHA-256 of prompts and metadata, in their order."""
        content = [self.prompts.prompts, self.prompts.metadata]
        return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def load_set(section: EvaluationSetSection, images_per_prompt: int | None) -> EvaluationSet:
    """Read a set; its columns tell what it is.

    ``include`` and ``tag`` that the reward geneval accepts are GenEval's, ``vqa_list`` is GenEval2's.
    Categories are the column ``section.category``, else GenEval2's ``atom_count``, else ``category`` or
    ``tag`` (in upper or lower case) if every prompt has one. ``images_per_prompt`` is the recipe's, for sets
    that don't say; by default 4 on GenEval's prompts, 1 on others.

    Raises:
        UserError: the source can't be read, or a prompt lacks the category that ``section`` asks for.
    """
    prompts = PromptSet.load(section.prompts)
    columns = set(prompts.metadata[0])
    style: Style = "plain"
    if {"include", "tag"} <= columns and _refusal(prompts, "geneval") is None:
        style = "geneval"
    elif "vqa_list" in columns:
        style = "geneval2"
    default = GENEVAL_IMAGES_PER_PROMPT if style == "geneval" else 1
    count = section.num_images_per_prompt or images_per_prompt or default
    return EvaluationSet(section.name, style, prompts, _categories(section, prompts), count)


def _categories(section: EvaluationSetSection, prompts: PromptSet) -> list[str] | None:
    rows, column = prompts.metadata, section.category
    if column is not None:
        for number, row in enumerate(rows, start=1):
            if row.get(column) is None:
                hint = nearest_hint(column, list(row)) if row else "; there are no other columns"
                raise UserError(f"{section.prompts.source}: prompt {number} has no category {column!r}{hint}")
        return [str(row[column]) for row in rows]
    if all("vqa_list" in row and "atom_count" in row for row in rows):
        return [f"{row['atom_count']} atoms" for row in rows]
    found = [_detected_category(row) for row in rows]
    return None if None in found else [str(category) for category in found]


def _detected_category(row: dict[str, Any]) -> str | None:
    plain = {name.lower(): value for name, value in row.items()}
    values = [plain.get(name) for name in _CATEGORY_COLUMNS]
    return next((value for value in values if isinstance(value, str) and value.strip()), None)


def load_sets(section: EvaluationSection) -> list[EvaluationSet]:
    """All sets of a recipe. Raises UserError."""
    return [load_set(each, section.num_images_per_prompt) for each in section.sets]


def evaluation_rewards(recipe: Recipe) -> list[RewardSection]:
    """``evaluation.rewards``; without any, the recipe's in mode default: GenEval's verdict, not its partial
    credit."""
    return recipe.evaluation.rewards or [replace(reward, mode="default") for reward in recipe.rewards]


@dataclass(frozen=True)
class Scoring:
    """Which rewards score which set, and why others don't."""

    rewards: dict[str, list[RewardSection]]  # by set, in the recipe's order
    notices: list[str]


def match_rewards(sets: Sequence[EvaluationSet], rewards: Sequence[RewardSection]) -> Scoring:
    """Each reward scores the sets whose every prompt it accepts (geneval needs metadata, ocr quoted text).

    Raises UserError for a reward that accepts no set, naming a prompt that it refuses.
    """
    matched: dict[str, list[RewardSection]] = {each.name: [] for each in sets}
    notices, faults = [], []
    for reward in rewards:
        refusals = {each.name: _refusal(each.prompts, reward.name) for each in sets}
        for name, refusal in refusals.items():
            if refusal is None:
                matched[name].append(reward)
            else:
                notices.append(f"{reward.name} doesn't score {name}: {refusal}")
        if None not in refusals.values():
            faults.append(
                f"reward {reward.name!r} can score none of the sets: {next(iter(refusals.values()))}"
            )
    if faults:
        raise UserError("\n".join(faults))
    return Scoring(matched, notices)


def _refusal(prompts: PromptSet, reward: str) -> str | None:
    """Why a reward can't score these prompts; None if it can."""
    check = REWARDS[reward].check_prompt
    if check is None:
        return None
    refused = []
    for prompt, row in zip(prompts.prompts, prompts.metadata, strict=True):
        try:
            check(prompt, row)
        except UserError as error:
            refused.append(error)
    return f"it refuses {len(refused)} of {len(prompts)} prompts: {refused[0]}" if refused else None


def at_evaluation_size(recipe: Recipe) -> Recipe:
    """The recipe with ``evaluation.height`` and ``width`` in place of the model's, where they are given."""
    section, model = recipe.evaluation, recipe.model
    height, width = section.height or model.height, section.width or model.width
    return replace(recipe, model=replace(model, height=height, width=width))
