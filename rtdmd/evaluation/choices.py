"""What a command's options make of a recipe's ``evaluation``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rtdmd.evaluation.sets import evaluation_rewards
from rtdmd.evaluation.specs import parse_model
from rtdmd.recipe.schema import (
    EvaluationModelSection,
    EvaluationSection,
    EvaluationSetSection,
    PromptsSection,
    Recipe,
    RewardSection,
)


@dataclass(frozen=True)
class Choices:
    """Options of ``rtdmd evaluate``; empty or None leaves the recipe's."""

    prompts: Sequence[str] = ()  # files or hub ids
    models: Sequence[str] = ()  # NAME=SPEC
    rewards: Sequence[str] = ()  # names
    num_images_per_prompt: int | None = None
    limit: int | None = None  # the first so many prompts of each set
    batch_size: int | None = None
    seed: int | None = None

    def apply(self, recipe: Recipe) -> EvaluationSection:
        """The recipe's section under these options.

        A set is named after its file. A reward is as ``evaluation.rewards`` has it, else as ``rewards`` has
        it but in mode default, else with its published weights. Raises UserError for a model that isn't
        NAME=SPEC.
        """
        section = recipe.evaluation
        if self.prompts:
            sets = [EvaluationSetSection(set_name(file), PromptsSection(file)) for file in self.prompts]
            section = replace(section, sets=sets)
        if self.models:
            named = [parse_model(text) for text in self.models]
            section = replace(section, models=[EvaluationModelSection(name, spec) for name, spec in named])
        if self.rewards:
            known = [*section.rewards, *evaluation_rewards(replace(recipe, evaluation=EvaluationSection()))]
            found = [
                next((reward for reward in known if reward.name == name), RewardSection(name))
                for name in self.rewards
            ]
            section = replace(section, rewards=found)
        if self.limit is not None:
            cut = [replace(each, prompts=replace(each.prompts, limit=self.limit)) for each in section.sets]
            section = replace(section, sets=cut)
        if self.num_images_per_prompt is not None:
            same = [replace(each, num_images_per_prompt=None) for each in section.sets]
            section = replace(section, sets=same, num_images_per_prompt=self.num_images_per_prompt)
        return replace(
            section,
            batch_size=section.batch_size if self.batch_size is None else self.batch_size,
            seed=section.seed if self.seed is None else self.seed,
        )


def set_name(source: str) -> str:
    """A file's name without its ending, in the characters of a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", Path(source).stem, flags=re.ASCII).lstrip(".+-") or "prompts"
