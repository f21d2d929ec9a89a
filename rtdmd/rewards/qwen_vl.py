"""What HPSv3 and GenEval2 share: how Qwen-VL models are given pictures and text, with a gradient.

Legend: B batch, N patches of a picture, n tokens of a picture (N over merge_size²), D width of the language
model, V length of a flattened patch (3 · 2 · patch_size²).

Facts from transformers' Qwen2VLImageProcessor and from qwen_vl_utils.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rtdmd.errors import UserError
from rtdmd.rewards.clip_vision import PIL_BICUBIC
from rtdmd.rewards.preprocessing import stretch_preprocess
from rtdmd.rewards.sources import fetch_hint, first_line

PICTURE_START = "<|vision_start|>"
PICTURE_END = "<|vision_end|>"
PICTURE_TOKEN = "<|image_pad|>"

_MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class QwenInput:
    """How a Qwen-VL's vision tower wants pictures.

    Args:
        patch_size: side of a patch in pixels.
        min_pixels: of a resized picture.
        max_pixels: of a resized picture.
        mean: per channel, of pictures in [0, 1].
        std: per channel.
        merge_size: patches that become one token, along each side.
        frames: a picture stands for that many equal frames.
    """

    patch_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    merge_size: int = 2
    frames: int = 2

    @classmethod
    def load(cls, source: str, revision: str | None = None) -> QwenInput:
        """Read a checkpoint's preprocessor configuration; UserError unless it resizes bicubically."""
        try:
            processor = Qwen2VLImageProcessorPil.from_pretrained(source, revision=revision)
        except (OSError, ValueError) as error:
            hint = fetch_hint(source, ("preprocessor_config.json",))
            raise UserError(
                f"{source}: no image preprocessor configuration: {first_line(error)}{hint}"
            ) from error
        low, high = processor.size.shortest_edge, processor.size.longest_edge
        if processor.resample != PIL_BICUBIC or not (low and high):
            raise UserError(
                f"{source}: needs a bicubic resize between two numbers of pixels, found resample "
                f"{processor.resample}, size {processor.size}"
            )
        return cls(
            patch_size=processor.patch_size,
            min_pixels=low,
            max_pixels=high,
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            merge_size=processor.merge_size,
            frames=processor.temporal_patch_size,
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the resized picture: multiples of a token's side, aspect and number of pixels about kept.

        Rounded to the nearest multiple; where that leaves [min_pixels, max_pixels], both sides are scaled by
        one factor into it and rounded down (above) or up (below).

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(f"{height} x {width} pixels: one side is over {_MAX_ASPECT_RATIO} times as long")
        step = self.patch_size * self.merge_size
        rows, columns = max(1, round(height / step)), max(1, round(width / step))
        if rows * columns * step**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / shrink / step))
            columns = max(1, math.floor(width / shrink / step))
        elif rows * columns * step**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * grow / step), math.ceil(width * grow / step)
        return rows * step, columns * step

    def patches(self, images: Tensor, quantise: bool = True) -> tuple[Tensor, tuple[int, int]]:
        """Flattened patches [B·N, V] of images [B, 3, H, W] in [0, 1], and their rows and columns.

        float32 (float64 from float64). Patches of one token follow each other; within a patch: channel,
        frame, row, column.
        """
        height, width = self.size(images.shape[-2], images.shape[-1])
        pixels = stretch_preprocess(images, height, width, self.mean, self.std, quantise)
        rows, columns = height // self.patch_size, width // self.patch_size
        blocks = pixels.unflatten(3, (columns // self.merge_size, self.merge_size, self.patch_size))
        blocks = blocks.unflatten(2, (rows // self.merge_size, self.merge_size, self.patch_size))
        # (B, 3, R, r, p, C, c, q) to (B, R, C, r, c, 3, p, q)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
        framed = blocks.unsqueeze(6).expand(*blocks.shape[:6], self.frames, *blocks.shape[6:])
        return framed.reshape(len(images) * rows * columns, -1), (rows, columns)


def picture_grid(count: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """The vision tower's ``grid_thw`` [count, 3] of equally large pictures."""
    return torch.tensor([[1, rows, columns]], device=device).expand(count, -1)


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [rows, longest], filled up with 0: no token sees those after it, so any will do."""
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)


def load_qwen_tokenizer(
    source: str, picture_token_id: int, revision: str | None = None
) -> Qwen2TokenizerFast:
    """A Qwen-VL's tokenizer from a folder or hub id; UserError unless it has its markers.

    ``picture_token_id`` is the model's. Where files are missing, transformers makes up a tokenizer.
    """
    hint = fetch_hint(source, ("tokenizer_config.json", "tokenizer.json"))
    try:
        # AutoTokenizer would ask for the model's configuration as well.
        tokenizer = Qwen2TokenizerFast.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer: {first_line(error)}{hint}") from error
    markers = ("<|im_start|>", "<|im_end|>", PICTURE_START, PICTURE_END, PICTURE_TOKEN)
    split = [marker for marker in markers if len(tokenizer(marker)["input_ids"]) != 1]
    if split or tokenizer(PICTURE_TOKEN)["input_ids"] != [picture_token_id]:
        found = f"it has no {split[0]}" if split else f"its {PICTURE_TOKEN} is not token {picture_token_id}"
        raise UserError(f"{source}: no tokenizer of this model: {found}{hint}")
    return tokenizer
