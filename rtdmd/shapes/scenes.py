"""Where the objects of a caption stand: scenes of which the caption is true beyond doubt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtdmd.shapes.captions import SIZES, Caption

SIDE = 64  # pixels

# Plain, light and of low saturation; captions never name them.
BACKGROUNDS = {
    "white": (248, 248, 248),
    "grey": (200, 200, 200),
    "rose": (246, 214, 214),
    "mint": (204, 240, 204),
    "sky": (206, 222, 246),
    "cream": (246, 234, 200),
}

# Sides of an object's box, in pixels; a reader takes what lies between as its side of the middle.
EXTENTS = {"small": (11.0, 13.0), "large": (19.0, 22.0)}

_BORDER = 2.0  # between an object's box and the frame
_GAP = 4.0  # between boxes, and of what a relation keeps apart
_OVERLAP = 3.0  # of boxes beside each other, so that neither is above the other too
_PROPOSALS = 96


@dataclass(frozen=True)
class Thing:
    """An object: its centre ``x, y`` (y grows downwards) and the side ``extent`` of its box, in pixels."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows; ``background`` is one of ``BACKGROUNDS``."""

    background: str
    things: tuple[Thing, ...]


def draw_scene(rng: np.random.Generator, caption: Caption) -> Scene:
    """A random scene that shows ``caption`` and nothing else.

    Boxes lie inside the frame with 2 pixels to spare and 4 between them. A relation holds between every pair
    with 4 pixels to spare, and no relation of the other axis holds as well. Sizes that the caption doesn't
    name are random, each object's by itself.
    """
    wanted = [(index, group) for index, group in enumerate(caption.groups) for _ in range(group.count)]
    sizes = [group.size or SIZES[int(rng.random() * 2)] for _, group in wanted]
    low, high = np.array([EXTENTS[size] for size in sizes]).T
    extents = low + (high - low) * rng.random(len(wanted))
    first = np.array([index == 0 for index, _ in wanted])
    centres = _place(rng, extents, first, caption.relation)
    things = tuple(
        Thing(group.shape, group.color, size, float(x), float(y), float(extent))
        for (_, group), size, (x, y), extent in zip(wanted, sizes, centres, extents, strict=True)
    )
    backgrounds = tuple(BACKGROUNDS)
    return Scene(backgrounds[int(rng.random() * len(backgrounds))], things)


def _place(
    rng: np.random.Generator, extents: NDArray[np.float64], first: NDArray[np.bool_], relation: str | None
) -> NDArray[np.float64]:
    """Centres [n, 2] of boxes of sides ``extents`` [n]: the first of many random proposals that fits."""
    count = len(extents)
    half = extents / 2
    axis = 0 if relation in ("left of", "right of") else 1
    before = first if relation in ("left of", "above") else ~first
    while True:
        low = np.broadcast_to(_BORDER + half, (_PROPOSALS, 2, count)).copy()
        high = SIDE - low
        if relation is not None:
            _divide(rng, low[:, axis], high[:, axis], extents, before)
        centres = low + (high - low) * rng.random(low.shape)
        good = np.ones(_PROPOSALS, dtype=bool)
        for one in range(count):
            for other in range(one):
                reach = half[one] + half[other] + _GAP
                good &= np.abs(centres[:, :, one] - centres[:, :, other]).max(axis=1) >= reach
        if relation is not None:
            across = centres[:, 1 - axis]
            reach = half[before][:, None] + half[~before] - _OVERLAP
            distances = np.abs(across[:, before][:, :, None] - across[:, ~before][:, None, :])
            good &= (distances <= reach).any(axis=(1, 2))
        found = int(good.argmax())
        if good[found]:
            return centres[found].T


def _divide(
    rng: np.random.Generator,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    extents: NDArray[np.float64],
    before: NDArray[np.bool_],
) -> None:
    """Narrow the ranges [proposals, n] of centres along an axis, in place, to the sides of a random line."""
    nearest = _BORDER + extents[before].max() + _GAP / 2
    farthest = SIDE - _BORDER - extents[~before].max() - _GAP / 2
    line = nearest + (farthest - nearest) * rng.random((len(low), 1))
    high[:, before] = line - _GAP / 2 - extents[before] / 2
    low[:, ~before] = line + _GAP / 2 + extents[~before] / 2
