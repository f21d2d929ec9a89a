"""The vision tower of a CLIP, from pictures in [0, 1] to embeddings of length 1, with a gradient.

Legend: B batch, D width of the shared embedding, H W picture, S side of the tower's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModelWithProjection
from transformers.models.clip import CLIPImageProcessorPil

from rtdmd.errors import UserError
from rtdmd.rewards.preprocessing import bilinear_preprocess, clip_preprocess, pad_preprocess
from rtdmd.rewards.recomputation import recompute_in_backward
from rtdmd.rewards.sources import fetch_hint, first_line

# Of the pictures that OpenAI's CLIP was trained on; OpenCLIP and BLIP took them over.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PIL_BICUBIC = 3
Fit = Literal["crop", "pad", "bilinear crop"]
_PREPROCESS = {"crop": clip_preprocess, "pad": pad_preprocess, "bilinear crop": bilinear_preprocess}


@dataclass(frozen=True)
class ClipInput:
    """Side and normalisation of the vision tower's input, and how a picture is fitted into its square."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Fit = "crop"

    @classmethod
    def load(cls, source: str, revision: str | None = None, fit: Fit = "crop") -> ClipInput:
        """Read a checkpoint's preprocessor configuration; UserError unless bicubic with a centre crop."""
        try:
            processor = CLIPImageProcessorPil.from_pretrained(source, revision=revision)
        except (OSError, ValueError) as error:
            hint = fetch_hint(source, ("preprocessor_config.json",))
            raise UserError(
                f"{source}: no image preprocessor configuration: {first_line(error)}{hint}"
            ) from error
        side, crop = processor.size.shortest_edge, processor.crop_size
        if processor.resample != PIL_BICUBIC or not (side and side == crop.height == crop.width):
            raise UserError(
                f"{source}: needs a bicubic resize of the shortest edge and a centre crop of the same size, "
                f"found resample {processor.resample}, size {processor.size}, crop {crop}"
            )
        return cls(side, tuple(processor.image_mean), tuple(processor.image_std), fit)

    def prepare(self, images: Tensor, quantise: bool = True) -> Tensor:
        """[B, 3, S, S] in float32 (float64 from float64) of images [B, 3, H, W] in [0, 1]."""
        return _PREPROCESS[self.fit](images, self.size, self.mean, self.std, quantise)


class ClipVision:
    """A frozen vision tower with its projection.

    Activations are recomputed in the backward pass, so that a gradient to the pictures costs the memory of
    one layer.

    Args:
        model: a CLIPModel, whose text tower is left alone, or a vision tower with projection; it is frozen.
        image_input: how the tower wants pictures.
        chunk_size: pictures encoded at once.
        quantise: False leaves out the roundings of the preprocessing.
        checkpoint_layers: recompute activations in the backward pass.
    """

    def __init__(
        self,
        model: CLIPModel | CLIPVisionModelWithProjection,
        image_input: ClipInput,
        *,
        chunk_size: int = 16,
        quantise: bool = True,
        checkpoint_layers: bool = True,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.image_input = image_input
        self.chunk_size = chunk_size
        self.quantise = quantise
        if checkpoint_layers:
            recompute_in_backward(model.vision_model.encoder.layers)

    def features(self, images: Tensor) -> Tensor:
        """Embeddings of length 1, [B, D], float32 (float64 from a float64 model), chunk by chunk."""
        return torch.cat([self._chunk(chunk) for chunk in images.split(self.chunk_size)])

    def _chunk(self, images: Tensor) -> Tensor:
        pixels = self.image_input.prepare(images, self.quantise)
        pooled = self.model.vision_model(pixels.to(self.model.dtype)).pooler_output
        return unit_length(self.model.visual_projection(pooled))


def unit_length(features: Tensor) -> Tensor:
    """Rows over their length, in float32 at least."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features / features.norm(dim=-1, keepdim=True)
