"""CLIPScore with OpenAI's ViT-L/14: logits_per_image / 100, which is the cosine (Radford et al. 2021).

The pictures are resized bicubically to 8-bit levels, as the checkpoint's own processor does. Mode
``official`` resizes them bilinearly in floating point, as the published training code does
(https://github.com/Harahan/RTDMD, rtdmd/rewards/clip_scorer.py: torchvision's Resize by its default filter).
"""

from __future__ import annotations

import torch

from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import REWARDS
from rtdmd.rewards.clip import ClipEncoder, ClipReward
from rtdmd.rewards.clip_vision import Fit

_DIVISOR = 100.0


def load(section: RewardSection, device: torch.device, dtype: torch.dtype) -> ClipReward:
    """Load ``section.weights`` (folder or hub id), by default the published ones; UserError if absent."""
    weights = section.weights or REWARDS["clipscore"].default_weights
    assert weights is not None
    fit: Fit = "bilinear crop" if section.mode == "official" else "crop"
    encoder = ClipEncoder.load(weights, device, dtype, revision=section.revision, fit=fit)
    return ClipReward("clipscore", encoder, _DIVISOR)
