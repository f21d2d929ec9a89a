"""What a picture shows, from its pixels alone.

Connected pixels unlike the plain background are an object. Its colour is the palette's nearest to that of its
inner pixels, its shape the one whose drawing of the same area and centre differs least from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rtdmd.shapes.captions import SHAPES
from rtdmd.shapes.drawing import FILL, PALETTE, Picture, coverage
from rtdmd.shapes.scenes import BACKGROUNDS, EXTENTS

_FRAME = 2  # pixels at the edge, of which most are background
_CONTRAST = 48.0  # distance in RGB from which on a pixel isn't background
_SPECK = 6  # pixels; fewer are noise
_BACKGROUND_REACH = 70.0  # distance in RGB to the nearest background; farther is none of them
_COLOR_REACH = 70.0  # likewise to the nearest colour,
_COLOR_ANGLE = 0.4  # and as a share of the contrast with the background
_LEAST_SHARE = 0.6  # of its true colour in an object's measured one; the rest is background
_GREATEST_SHARE = 1.3  # of the measured colour in a pixel
_FOREIGN_CONTRAST = 70.0  # distance in RGB from every mixture of an object's colour and the background
_FOREIGN_SHARE = 0.12  # of an object's pixels; with more it has no one colour
_MISFIT = 0.27  # area in which an object and its shape differ, in its area; with more it has no shape
_SOFTNESS = 1.6  # pixels in which outlines fade: between the drawings' and those of a mild blur
_SIZE_BOUND = (EXTENTS["small"][1] + EXTENTS["large"][0]) / 2
_BLOCK = np.ones((3, 3), dtype=bool)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """An object: its shape, None if malformed, its colour, None if mixed or unknown, its size and box."""

    shape: str | None
    color: str | None
    size: str
    box: Box  # left, top, right, bottom in pixels, y grows downwards
    area: float  # pixels
    misfit: float  # area in which it and the nearest shape differ, in its area


@dataclass(frozen=True)
class Reading:
    """What a picture shows, the largest object first; ``background`` is None if it is none of the world's."""

    background: str | None
    things: tuple[Found, ...]


def read_picture(image: Picture) -> Reading:
    """Read a picture [H, W, 3] of a scale at which it would have 64×64 pixels.

    Raises:
        ValueError: it has another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture is [H, W, 3] of uint8, got {list(image.shape)} of {image.dtype}")
    pixels = image.astype(np.float32)
    ground = _ground(pixels)
    offset = pixels - ground
    labels, count = ndimage.label((offset * offset).sum(axis=2) > _CONTRAST**2)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    things = [
        _read_thing(offset, ground, labels, index, area)
        for index, area in enumerate(ndimage.find_objects(labels), start=1)
        if sizes[index] >= _SPECK
    ]
    things.sort(key=lambda thing: -thing.area)
    return Reading(_nearest(ground, BACKGROUNDS, _BACKGROUND_REACH), tuple(things))


def _ground(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The background's colour [3]: the median along the frame, which objects seldom reach."""
    inner = pixels[_FRAME:-_FRAME]
    strips = pixels[:_FRAME], pixels[-_FRAME:], inner[:, :_FRAME], inner[:, -_FRAME:]
    return np.median(np.concatenate([strip.reshape(-1, 3) for strip in strips]), axis=0).astype(np.float32)


def _read_thing(
    offset: NDArray[np.float32],
    ground: NDArray[np.float32],
    labels: NDArray[np.int32],
    index: int,
    area: tuple[slice, slice],
) -> Found:
    """Read the object that ``labels`` [H, W] numbers ``index``; ``offset`` is from the background."""
    top, left = (max(part.start - 2, 0) for part in area)
    crop = slice(top, area[0].stop + 2), slice(left, area[1].stop + 2)
    nearby = offset[crop]
    own = labels[crop] == index
    soft = ndimage.binary_dilation(own, _BLOCK) & (own | (labels[crop] == 0))
    core = ndimage.binary_erosion(own)
    color = _main_color(nearby[core if core.any() else own])
    contrast = max(float(np.sqrt(color @ color)), _CONTRAST / 2)  # unlike pixels may have a median near zero
    share = nearby @ color / contrast**2
    alpha = np.clip(share, 0.0, 1.0) * soft
    foreign = nearby - np.clip(share, 0.0, _GREATEST_SHARE)[..., None] * color
    mixed = ((foreign * foreign).sum(axis=2)[own] > _FOREIGN_CONTRAST**2).mean() > _FOREIGN_SHARE
    reach = min(_COLOR_REACH, _COLOR_ANGLE * contrast)
    misfit, shape, box = _fit_shape(alpha, left, top)
    if misfit > _MISFIT:
        shape, box = None, (area[1].start, area[0].start, area[1].stop, area[0].stop)
    return Found(
        shape=shape,
        color=None if mixed else _nearest(ground + color, PALETTE, reach, ground),
        size="large" if max(box[2] - box[0], box[3] - box[1]) > _SIZE_BOUND else "small",
        box=box,
        area=float(alpha.sum()),
        misfit=misfit,
    )


def _main_color(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The median [3] of the half of ``pixels`` [n, 3] that is farthest from the background, (0, 0, 0)."""
    contrast = (pixels * pixels).sum(axis=1)
    return np.median(pixels[contrast >= np.median(contrast)], axis=0)


def _fit_shape(alpha: NDArray[np.float32], left: int, top: int) -> tuple[float, str | None, Box]:
    """The misfit, name and box of the shape nearest to a coverage [h, w] that begins at ``left, top``."""
    area = float(alpha.sum())
    if area < _SPECK:
        return math.inf, None, (0.0, 0.0, 0.0, 0.0)
    x, y = np.arange(alpha.shape[1]) + 0.5, np.arange(alpha.shape[0]) + 0.5
    middle_x, middle_y = float(alpha.sum(axis=0) @ x) / area, float(alpha.sum(axis=1) @ y) / area
    extents = [(area / FILL[shape]) ** 0.5 for shape in SHAPES]
    # A triangle's centroid lies a sixth of its height below the middle of its box.
    centers_y = [
        middle_y - extent / 6 if shape == "triangle" else middle_y
        for shape, extent in zip(SHAPES, extents, strict=True)
    ]
    drawn = np.stack(
        [
            coverage(shape, x - middle_x, y - center_y, extent, _SOFTNESS)
            for shape, center_y, extent in zip(SHAPES, centers_y, extents, strict=True)
        ]
    )
    # Outlines of another softness cancel in the mean over a block; what lies beyond the crop differs too.
    differences = np.abs(ndimage.uniform_filter(alpha - drawn, (1, 3, 3), mode="constant"))
    misfits = (differences.sum(axis=(1, 2)) + np.maximum(area - drawn.sum(axis=(1, 2)), 0.0)) / area
    best = int(misfits.argmin())
    half, column, row = extents[best] / 2, left + middle_x, top + centers_y[best]
    return float(misfits[best]), SHAPES[best], (column - half, row - half, column + half, row + half)


def _nearest(
    color: NDArray[np.floating],
    palette: Mapping[str, tuple[int, int, int]],
    reach: float,
    ground: NDArray[np.floating] | None = None,
) -> str | None:
    """The name of the nearest colour of ``palette`` within ``reach`` (in RGB), else None.

    With a ``ground``, mixtures of a colour with it count as that colour: a thin object with soft outlines
    has no unmixed pixels.
    """
    known = np.array(list(palette.values()), dtype=np.float32)  # (n, 3)
    if ground is not None:
        offsets = known - ground
        shares = offsets @ (color - ground) / np.maximum((offsets * offsets).sum(axis=1), 1.0)
        known = ground + np.clip(shares, _LEAST_SHARE, 1.0)[:, None] * offsets
    distances = np.sqrt(((known - color) ** 2).sum(axis=1))
    nearest = int(distances.argmin())
    return list(palette)[nearest] if distances[nearest] <= reach else None
