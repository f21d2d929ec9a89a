"""Painting and scoring of a set's pictures, the same for ``rtdmd evaluate`` and for training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rtdmd.errors import UserError
from rtdmd.evaluation.sets import EvaluationSet
from rtdmd.images import to_levels
from rtdmd.rewards.protocol import Reward
from rtdmd.sample import Painter


def paint_numbers(painter: Painter, prompts: EvaluationSet, numbers: Sequence[int]) -> Tensor:
    """Pictures of those numbers, [B, 3, H, W], the 8-bit levels of a PNG in [0, 1], float32.

    What is scored is what would be saved. The rounding also takes out most of what another batch size changes
    in a picture.
    """
    owners, images = zip(*(divmod(number, prompts.images_per_prompt) for number in numbers), strict=True)
    pictures = painter.paint([prompts.prompts.prompts[owner] for owner in owners], images)
    return to_levels(pictures).float() / 255


@torch.no_grad()
def score_numbers(
    rewards: Sequence[Reward], prompts: EvaluationSet, numbers: Sequence[int], pictures: Tensor
) -> dict[str, Tensor]:
    """Every reward's scores [B], float32, on the CPU, of the pictures of those numbers."""
    owners = [number // prompts.images_per_prompt for number in numbers]
    texts = [prompts.prompts.prompts[owner] for owner in owners]
    metadata = [prompts.prompts.metadata[owner] for owner in owners]
    return {
        reward.name: reward.score(pictures, texts, metadata).detach().to("cpu", torch.float32)
        for reward in rewards
    }


def check_finite(scores: dict[str, Tensor], prompts: EvaluationSet, numbers: Sequence[int]) -> None:
    """Raise UserError, naming reward and prompt, if a score isn't finite: there would be no mean."""
    for name, values in scores.items():
        for number, value in zip(numbers, values.tolist(), strict=True):
            if not math.isfinite(value):
                prompt = prompts.prompts.prompts[number // prompts.images_per_prompt]
                where = f"{prompts.name}: reward {name!r} gave {value} for the prompt {prompt!r}"
                raise UserError(f"{where}; leave out one of them")
