"""Scores of the EMA's pictures during training, by the code of ``rtdmd evaluate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.masters import Piece
from rtdmd.evaluation.scoring import paint_numbers, score_numbers
from rtdmd.evaluation.sets import (
    EvaluationSet,
    at_evaluation_size,
    evaluation_rewards,
    load_sets,
    match_rewards,
)
from rtdmd.evaluation.statistics import overall_mean
from rtdmd.models.protocol import ModelFamily
from rtdmd.randomness import Draws
from rtdmd.recipe.schema import Recipe
from rtdmd.rewards import load_rewards
from rtdmd.rewards.protocol import Reward
from rtdmd.rollout import FewSteps
from rtdmd.sample import PICTURES, Painter
from rtdmd.stages.roles import Student


@dataclass(frozen=True)
class ScoredSet:
    """A set of prompts with the rewards that score it."""

    prompts: EvaluationSet
    rewards: list[Reward]


class Evaluations:
    """The recipe's sets, shared out over the ranks, painted from the same noise each time."""

    def __init__(
        self, recipe: Recipe, family: ModelFamily, ranks: Ranks, progress: Callable[[], None]
    ) -> None:
        """Load prompts and reward models; ``progress`` is called after each batch. Raises UserError."""
        self._recipe = at_evaluation_size(recipe)
        self._family = family
        self._ranks = ranks
        self._progress = progress
        sets, sections = load_sets(recipe.evaluation), evaluation_rewards(recipe)
        matched = match_rewards(sets, sections).rewards
        loaded = load_rewards(sections, ranks.device, getattr(torch, recipe.dtype))
        rewards = {reward.name: reward for reward in loaded}
        self._sets = [
            ScoredSet(each, [rewards[section.name] for section in matched[each.name]])
            for each in sets
            if matched[each.name]
        ]

    @torch.no_grad()
    def measure(self, generator: Student, weights: list[Piece]) -> dict[str, float]:
        """Collective: ``evaluation/SET/REWARD``, the mean over the set of what ``weights`` paint.

        A prompt with a score that isn't finite is left out and counted in
        ``evaluation/SET/nonfinite/REWARD``, which is there only then: a look at the model shall not end its
        training.
        """
        metrics: dict[str, float] = {}
        painter = self._painter(generator)
        with generator.engine.weights_from(weights):
            for each in self._sets:
                for name, scores in self._scores(painter, each).items():
                    metrics |= set_metrics(each.prompts, name, scores)
        return metrics

    def _painter(self, generator: Student) -> Painter:
        model, schedule, family = self._recipe.model, self._recipe.schedule, self._family
        few = FewSteps(
            family.sigmas(schedule.timesteps, model.height, model.width),
            schedule.eta,
            family.latent_shape(model.height, model.width),
        )
        draws = Draws(self._recipe.evaluation.seed, PICTURES)
        unconditional = family.encode_prompts([""])
        return Painter(family, generator.engine, few, 1.0, unconditional, draws, self._ranks.device)

    def _scores(self, painter: Painter, each: ScoredSet) -> dict[str, Tensor]:
        """Every reward's scores of all the set's pictures, in order, on every rank."""
        ranks, size, total = self._ranks, self._recipe.evaluation.batch_size, each.prompts.num_pictures
        mine = []
        for start in range(0, total, size * ranks.world_size):
            first = start + size * ranks.rank
            # Beyond the last picture it is painted again: every rank makes the same calls.
            numbers = [min(number, total - 1) for number in range(first, first + size)]
            pictures = paint_numbers(painter, each.prompts, numbers)
            with ranks.together():
                scores = score_numbers(each.rewards, each.prompts, numbers, pictures)
            mine.append(torch.stack([scores[reward.name] for reward in each.rewards]))
            self._progress()
        everyone = ranks.all_gather(torch.stack(mine).to(ranks.device))  # (ranks, batches, rewards, size)
        in_order = everyone.permute(2, 1, 0, 3).reshape(len(each.rewards), -1)[:, :total].cpu()
        return {reward.name: row for reward, row in zip(each.rewards, in_order, strict=True)}


def set_metrics(prompts: EvaluationSet, reward: str, scores: Tensor) -> dict[str, float]:
    """The mean of a reward's scores of all pictures of a set, over the prompts whose scores are finite."""
    by_prompt = scores.view(-1, prompts.images_per_prompt)
    finite = torch.isfinite(by_prompt).all(dim=1)
    metrics = {}
    if not finite.all():
        metrics[f"evaluation/{prompts.name}/nonfinite/{reward}"] = float((~finite).sum())
    if finite.any():
        strata = prompts.strata(reward)
        kept = None if strata is None else [name for name, fine in zip(strata, finite, strict=True) if fine]
        metrics[f"evaluation/{prompts.name}/{reward}"] = overall_mean(by_prompt[finite].numpy(), kept)
    return metrics
