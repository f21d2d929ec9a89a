"""Pictures of scenes: plain colours, anti-aliased by each shape's coverage of the pixels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rtdmd.shapes.captions import Caption
from rtdmd.shapes.scenes import BACKGROUNDS, SIDE, Scene, draw_scene
from rtdmd.shapes.splits import PROPORTIONS, Split, draw_caption

# At least 100 apart in RGB, and 180 from every background.
PALETTE = {
    "red": (215, 30, 40),
    "orange": (245, 120, 10),
    "yellow": (250, 225, 40),
    "green": (30, 145, 60),
    "blue": (35, 70, 210),
    "purple": (135, 45, 175),
    "brown": (120, 70, 30),
    "black": (20, 20, 20),
}

# Share of its box that a shape fills.
FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 1 / 2, "cross": 5 / 9}

_ARM = 1 / 3  # width of a cross's arms in its extent

Picture = NDArray[np.uint8]


def coverage(
    shape: str, x: NDArray[np.floating], y: NDArray[np.floating], extent: float, softness: float = 1.0
) -> NDArray[np.floating]:
    """Share [len(y), len(x)] of each pixel that a shape centred on (0, 0) in a box of side ``extent`` covers.

    It falls from 1 to 0 along the distance to the outline, within ``softness`` pixels. Triangles point up.
    """
    half = extent / 2

    def inside(distance: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.clip(distance / softness + 0.5, 0.0, 1.0)

    across, down = np.abs(x), np.abs(y)
    if shape == "square":
        return inside(half - down)[:, None] * inside(half - across)
    if shape == "circle":
        return inside(half - np.hypot(down[:, None], across))
    if shape == "cross":
        arm = half * _ARM
        upright = inside(half - down)[:, None] * inside(arm - across)
        return np.maximum(upright, inside(arm - down)[:, None] * inside(half - across))
    if shape == "triangle":
        side = ((y[:, None] + half) / 2 - across) / np.hypot(1.0, 0.5)
        return inside(side) * inside(half - y)[:, None]
    raise ValueError(f"unknown shape {shape!r}")


def render(scene: Scene) -> Picture:
    """The picture [64, 64, 3] of ``scene``."""
    canvas = np.empty((SIDE, SIDE, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        reach = thing.extent / 2 + 1
        top, bottom = max(int(thing.y - reach), 0), min(int(thing.y + reach) + 1, SIDE)
        left, right = max(int(thing.x - reach), 0), min(int(thing.x + reach) + 1, SIDE)
        x = np.arange(left, right) + 0.5 - thing.x
        y = np.arange(top, bottom) + 0.5 - thing.y
        box = canvas[top:bottom, left:right]
        box += coverage(thing.shape, x, y, thing.extent)[..., None] * (np.array(PALETTE[thing.color]) - box)
    return np.rint(canvas).astype(np.uint8)


def draw_pictures(
    seed: int, start: int, count: int, split: Split = "train", proportions: Mapping[str, float] = PROPORTIONS
) -> tuple[Picture, list[Caption]]:
    """Pictures [count, 64, 64, 3] and their captions: the samples from ``start`` on of an endless sequence.

    Sample i depends on ``seed``, i, ``split`` and ``proportions`` alone.
    """
    pictures = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    captions = []
    for place in range(count):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(start + place,)))
        caption = draw_caption(rng, split, proportions=proportions)
        pictures[place] = render(draw_scene(rng, caption))
        captions.append(caption)
    return pictures, captions
