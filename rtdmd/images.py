"""Tensors to pictures, and many pictures to one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor


def to_levels(images: Tensor) -> Tensor:
    """uint8 levels of 255 of images in [0, 1], rounded to the nearest; same shape."""
    return (images.float().clamp(0, 1) * 255).round().byte()


def to_pictures(images: Tensor) -> list[Image.Image]:
    """8-bit RGB pictures of images [N, 3, H, W] in [0, 1], rounded to the nearest level."""
    pixels = to_levels(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def picture_grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """One picture of many of the same size, row by row, black where there is none.

    ``columns``: by default as many as make the grid nearly square.
    """
    width, height = pictures[0].size
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    grid = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for i, picture in enumerate(pictures):
        grid.paste(picture, ((i % columns) * width, (i // columns) * height))
    return grid
