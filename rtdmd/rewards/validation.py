"""What every scorer demands of its inputs and of its own scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rtdmd.errors import TrainingHalted
from rtdmd.rewards.protocol import Metadata

RANGE_TOLERANCE = 1e-3


def check_batch(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    """Refuse anything but images [B, 3, H, W] in [0, 1] with a prompt and a row of metadata each.

    Raises:
        ValueError: naming the shape, dtype, range or counts that were found.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}")
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} rows of metadata")
    low, high = (bound.item() for bound in torch.aminmax(images.detach()))
    # aminmax propagates NaN, and a comparison with NaN is false.
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(f"images must be in [0, 1], got values from {low:.4g} to {high:.4g}")


def check_scores(name: str, scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return ``scores`` [B] if they are one number per prompt.

    A number that isn't finite is handed on as it is: whoever uses scores leaves out such a sample and says
    so (training: ``objectives.group_advantages``), and never takes it for a 0.

    Raises:
        TrainingHalted: naming the scorer and the shape it gave.
    """
    if scores.shape != (len(prompts),):
        raise TrainingHalted(f"reward {name!r} gave scores {list(scores.shape)} for {len(prompts)} pictures")
    return scores
