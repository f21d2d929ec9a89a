"""Image preprocessing of CLIP and the Qwen-VL family, equal to PIL's to the bit and differentiable.

Legend: B batch, H W picture, h w resized picture, S side of the crop.

PIL resizes 8-bit pictures in two passes, width then height, each with antialiasing, fixed-point
coefficients of 22 bits and rounding to 8 bits (Pillow, ``src/libImaging/Resample.c``). Here each pass is one
product with a constant matrix. In float64 the products of coefficients and levels are exact, in any order of
summation, and neither TF32 nor autocast applies; the backward pass is deterministic on a GPU too, which that
of ``torch.nn.functional.interpolate`` is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

_LEVELS = 255.0
_COEFFICIENT_SCALE = 2.0**22
_BICUBIC_A = -0.5

# What a pixel contributes by its distance, and beyond which distance it doesn't.
_Filter = Literal["bicubic", "bilinear"]
_SUPPORT: dict[_Filter, float] = {"bicubic": 2.0, "bilinear": 1.0}


def clip_preprocess(
    images: Tensor, size: int, mean: Sequence[float], std: Sequence[float], quantise: bool = True
) -> Tensor:
    """Shortest edge to ``size`` (bicubic, antialiased), centre crop, (x − mean) / std.

    The pictures are first rounded to 255 levels, since a saved PNG is what judges are made for and evaluated
    on. All roundings are straight-through: they change the value and leave the gradient as it is.

    Args:
        images: [B, 3, H, W] in [0, 1]; values outside are clamped.
        size: side S of the result in pixels.
        mean: per channel, of pictures in [0, 1].
        std: per channel.
        quantise: False leaves out every rounding, which makes the map piecewise linear.

    Returns:
        [B, 3, S, S] in float32, in float64 for float64 images.
    """
    height, width = shortest_edge_size(images.shape[-2], images.shape[-1], size)
    levels = resize_bicubic(_picture_levels(images, quantise), height, width, quantise)
    top, left = (height - size) // 2, (width - size) // 2
    levels = levels[..., top : top + size, left : left + size]  # (B, 3, S, S)
    return _normalise(levels, mean, std, images.dtype)


def pad_preprocess(
    images: Tensor, size: int, mean: Sequence[float], std: Sequence[float], quantise: bool = True
) -> Tensor:
    """Longest edge to ``size`` (bicubic, antialiased), black borders around the middle, (x − mean) / std.

    As the package hpsv2 1.2 does it: it turns the picture's levels into floating point *before* resizing, so
    the resized picture is neither rounded nor clamped. Nor are the borders normalised colour: they are black
    first, then normalised.

    Arguments and result as in ``clip_preprocess``; ``quantise`` is about the picture's own 255 levels.
    """
    height, width = longest_edge_size(images.shape[-2], images.shape[-1], size)
    levels = _resize(_picture_levels(images, quantise), height, width, lambda values: values)
    rows, columns = size - height, size - width
    borders = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return _normalise(torch.nn.functional.pad(levels, borders), mean, std, images.dtype)


def stretch_preprocess(
    images: Tensor,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    quantise: bool = True,
) -> Tensor:
    """Resize to ``height`` × ``width`` (bicubic, antialiased), (x − mean) / std: [B, 3, height, width].

    Arguments and result otherwise as in ``clip_preprocess``.
    """
    levels = resize_bicubic(_picture_levels(images, quantise), height, width, quantise)
    return _normalise(levels, mean, std, images.dtype)


def bilinear_preprocess(
    images: Tensor, size: int, mean: Sequence[float], std: Sequence[float], quantise: bool = True
) -> Tensor:
    """``clip_preprocess`` as torchvision's Resize and CenterCrop do it on a tensor in floating point.

    Bilinear, antialiased, neither rounded nor clamped after the resize; the crop's corner is rounded half to
    even. ``quantise`` is about the picture's own 255 levels.
    """
    height, width = shortest_edge_size(images.shape[-2], images.shape[-1], size)
    levels = _resize(_picture_levels(images, quantise), height, width, lambda values: values, "bilinear")
    top, left = round((height - size) / 2), round((width - size) / 2)
    levels = levels[..., top : top + size, left : left + size]  # (B, 3, S, S)
    return _normalise(levels, mean, std, images.dtype)


def _picture_levels(images: Tensor, quantise: bool) -> Tensor:
    """Pictures in [0, 1] as float64 in [0, 255]."""
    levels = images.double().clamp(0.0, 1.0) * _LEVELS
    return _round_straight_through(levels) if quantise else levels


def _normalise(levels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    shift = torch.tensor(mean, dtype=torch.float64, device=levels.device).view(3, 1, 1)
    scale = torch.tensor(std, dtype=torch.float64, device=levels.device).view(3, 1, 1)
    return ((levels / _LEVELS - shift) / scale).to(torch.promote_types(dtype, torch.float32))


def longest_edge_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(h, w) with the longest edge ``size`` and the shorter one rounded half to even, at least 1."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def shortest_edge_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(h, w) with the shortest edge ``size`` and the longer one rounded down, as CLIP's processors do it."""
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def resize_bicubic(levels: Tensor, height: int, width: int, quantise: bool = True) -> Tensor:
    """Resize as ``PIL.Image.resize((width, height), BICUBIC)`` does, width first, differentiable.

    (Pillow 13 begins with the height where that shrinks by more than twice as many pixels as the width does,
    older versions where a picture is a hundred times as high as wide. Aspect-preserving resizing of pictures
    up to 1:2 is the same in all of them.)

    Args:
        levels: float64 [B, 3, H, W] in [0, 255], whole numbers where the result shall equal PIL's.
        height: h.
        width: w.
        quantise: round to whole levels after each pass, straight-through.

    Returns:
        float64 [B, 3, h, w] in [0, 255].
    """
    return _resize(levels, height, width, lambda values: _to_levels(values, quantise))


def _resize(
    levels: Tensor,
    height: int,
    width: int,
    after_pass: Callable[[Tensor], Tensor],
    filter_name: _Filter = "bicubic",
) -> Tensor:
    if levels.shape[-1] != width:
        matrix = _resize_matrix(levels.shape[-1], width, filter_name, levels.device)  # (w, W)
        levels = after_pass(levels @ matrix.T)  # (B, 3, H, w)
    if levels.shape[-2] != height:
        matrix = _resize_matrix(levels.shape[-2], height, filter_name, levels.device)  # (h, H)
        levels = after_pass(matrix @ levels)  # (B, 3, h, w)
    return levels


def _to_levels(values: Tensor, quantise: bool) -> Tensor:
    # Bicubic weights are partly negative, so edges overshoot.
    values = values.clamp(0.0, _LEVELS)
    return _round_straight_through(values) if quantise else values


def _round_straight_through(values: Tensor) -> Tensor:
    """floor(x + ½) with the gradient of x; the sum's second term is exactly 0."""
    return (values + 0.5).floor().detach() + (values - values.detach())


@lru_cache(maxsize=32)
def _resize_matrix(size_in: int, size_out: int, filter_name: _Filter, device: torch.device) -> Tensor:
    """Coefficients [size_out, size_in] of one antialiased pass, float64, rounded to 22 bits as PIL's are."""
    scale = size_in / size_out
    filter_scale = max(scale, 1.0)
    support = _SUPPORT[filter_name] * filter_scale
    centre = (torch.arange(size_out, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(size_in, dtype=torch.float64)[None, :]
    inside = (pixel >= (centre - support + 0.5).trunc()) & (pixel < (centre + support + 0.5).trunc())
    kernel = _bicubic if filter_name == "bicubic" else _triangle
    weights = kernel((pixel - centre + 0.5) / filter_scale) * inside
    weights = weights / weights.sum(dim=1, keepdim=True) * _COEFFICIENT_SCALE
    rounded = (weights.abs() + 0.5).floor() * weights.sign()
    return (rounded / _COEFFICIENT_SCALE).to(device)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = −1/2, zero beyond 2 (Keys 1981)."""
    x, a = distance.abs(), _BICUBIC_A
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))


def _triangle(distance: Tensor) -> Tensor:
    """1 − |x|, zero beyond 1: linear interpolation."""
    return (1.0 - distance.abs()).clamp(min=0.0)
