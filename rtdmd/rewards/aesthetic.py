"""LAION's aesthetic predictor v2: how much people like a picture, about 1 to 10, whatever its prompt.

score = head(e / |e|) with e the embedding of OpenAI's CLIP ViT-L/14 and a head of linear layers alone
(https://github.com/christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionModelWithProjection

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import REWARDS
from rtdmd.rewards.checkpoints import build_model, read_state_dict
from rtdmd.rewards.clip_vision import ClipInput, ClipVision
from rtdmd.rewards.linear_head import LinearHead
from rtdmd.rewards.protocol import Metadata
from rtdmd.rewards.sources import HubFiles, fetch_hint, find_file, first_line, local_folder
from rtdmd.rewards.validation import check_batch, check_scores


class AestheticReward:
    """The head's opinion of a picture's embedding; prompts are ignored."""

    name = "aesthetic"
    differentiable = True

    def __init__(self, vision: ClipVision, head: LinearHead) -> None:
        self.vision = vision
        self.head = head

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores [B], float32, differentiable with respect to ``images`` [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: the batch has another shape or range.
        """
        check_batch(images, prompts, metadata)
        return check_scores(self.name, self.head(self.vision.features(images)), prompts)


def load(section: RewardSection, device: torch.device, dtype: torch.dtype) -> AestheticReward:
    """Load the head from ``section.weights`` (file, folder or hub id) and CLIP's vision tower.

    A folder that holds the head and a CLIPModel (config.json, model.safetensors, preprocessor) is enough for
    both; otherwise CLIP comes from the hub. The head stays in float32: it is small, and its scores differ by
    less than bfloat16 resolves.

    Raises:
        UserError: files are missing or damaged, or weights are absent from them or have another shape.
    """
    head_files, clip_files = REWARDS["aesthetic"].needs_files
    weights = section.weights or head_files.repo
    head_path, folder = find_file(weights, head_files, section.revision), local_folder(weights)
    has_clip = folder is not None and (folder / "config.json").is_file()
    clip = str(folder) if has_clip else clip_files.repo
    model = _load_vision_tower(clip, clip_files)
    head = LinearHead.load(model.config.projection_dim, read_state_dict(head_path, head_files), head_path)
    vision = ClipVision(model, ClipInput.load(clip))
    model.to(device=device, dtype=dtype)
    head.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
    return AestheticReward(vision, head)


def _load_vision_tower(source: str, published: HubFiles) -> CLIPVisionModelWithProjection:
    """The vision half of a CLIPModel in a folder or on the hub; the text half stays in its file."""
    path = find_file(source, published)
    try:
        config = CLIPConfig.from_pretrained(source).vision_config
    except (OSError, ValueError) as error:
        hint = fetch_hint(source, ("config.json",))
        raise UserError(f"{source}: no configuration of a CLIP ({first_line(error)}){hint}") from error
    return build_model(CLIPVisionModelWithProjection, config, read_state_dict(path, published), path)
