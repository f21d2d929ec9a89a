"""Shapes: does a picture of the small world (``rtdmd.shapes``) show what its caption says, and nothing else?

An exact judge by colour segmentation; no weights, no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rtdmd.errors import UserError
from rtdmd.images import to_pictures
from rtdmd.recipe.schema import RewardMode, RewardSection
from rtdmd.rewards.protocol import Metadata
from rtdmd.rewards.validation import check_batch
from rtdmd.shapes.captions import Caption
from rtdmd.shapes.scenes import SIDE
from rtdmd.shapes.verifier import verify


class ShapesReward:
    """The verdict on a picture, in [0, 1], without gradient.

    Args:
        mode: ``default`` is 1 if everything is right, else 0. ``official`` is partial credit as GenEval's
            mode of that name gives it: the share of colour, shape, count, size and relation that is right,
            of those that the caption names.
    """

    name = "shapes"
    differentiable = False

    def __init__(self, mode: RewardMode = "default") -> None:
        self.mode = mode

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores [B] in [0, 1], float32, on the images' device; images [B, 3, 64, 64] in [0, 1].

        Raises:
            ValueError: the batch has another shape or range than [B, 3, H, W] in [0, 1].
            UserError: pictures of other sides; metadata are missing or not understood.
        """
        check_batch(images, prompts, metadata)
        if images.shape[2:] != (SIDE, SIDE):
            raise UserError(
                f"reward 'shapes' judges pictures of {SIDE}×{SIDE} pixels, got "
                f"{images.shape[2]}×{images.shape[3]}; set model.height and model.width"
            )
        captions = [
            Caption.from_metadata({**row, "prompt": prompt})
            for prompt, row in zip(prompts, metadata, strict=True)
        ]
        verdicts = map(verify, map(np.asarray, to_pictures(images)), captions)
        scores = [verdict.credit if self.mode == "official" else verdict.correct for verdict in verdicts]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def load(section: RewardSection, device: torch.device, dtype: torch.dtype) -> ShapesReward:
    """There is nothing to load."""
    return ShapesReward(section.mode)
