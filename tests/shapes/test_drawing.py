"""Scenes show their captions and no more; pictures are the scenes' exact areas and colours."""

import subprocess
import sys
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest

from rtdmd.shapes.captions import KINDS, SHAPES
from rtdmd.shapes.drawing import FILL, PALETTE, coverage, draw_pictures, render
from rtdmd.shapes.scenes import BACKGROUNDS, EXTENTS, Scene, Thing, draw_scene
from rtdmd.shapes.splits import draw_caption


def scenes(kind, count=150):
    rng = np.random.default_rng(0)
    for _ in range(count):
        caption = draw_caption(rng, "all", kind)
        yield caption, draw_scene(rng, caption)


def gap(one, other, axis):
    """Pixels between two objects' boxes along an axis (0: x), negative where they overlap."""
    distance = abs((one.x, one.y)[axis] - (other.x, other.y)[axis])
    return distance - (one.extent + other.extent) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_those_of_the_caption(kind):
    for caption, scene in scenes(kind):
        wanted = [group for group in caption.groups for _ in range(group.count)]
        for thing, group in zip(scene.things, wanted, strict=True):
            assert (thing.color, thing.shape) == group.combination
            assert thing.size == (group.size or thing.size)
            low, high = EXTENTS[thing.size]
            assert low <= thing.extent <= high
            assert all(c - thing.extent / 2 >= 2 and c + thing.extent / 2 <= 62 for c in (thing.x, thing.y))
        assert all(
            max(gap(one, other, 0), gap(one, other, 1)) >= 4 for one, other in combinations(scene.things, 2)
        )


@pytest.mark.parametrize("kind", ["relation", "mix"])
def test_relations_hold_and_no_other_does(kind):
    signs = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    for caption, scene in scenes(kind):
        if caption.relation is None:
            continue
        axis, sign = signs[caption.relation]
        cut = caption.groups[0].count
        both = [(one, other) for one in scene.things[:cut] for other in scene.things[cut:]]
        for one, other in both:
            assert gap(one, other, axis) >= 4 - 1e-9
            assert ((one.x, one.y)[axis] - (other.x, other.y)[axis]) * sign > 0
        assert min(gap(one, other, 1 - axis) for one, other in both) <= -3 + 1e-9


def test_sizes_and_backgrounds_that_are_not_named_vary():
    found = [scene for caption, scene in scenes("single") if caption.groups[0].size is None]
    assert {scene.things[0].size for scene in found} == set(EXTENTS)
    assert {scene.background for scene in found} == set(BACKGROUNDS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extent", [11.0, 21.3])
def test_shapes_cover_their_area_around_their_middle(shape, extent):
    """Circle π/4 of the box, square 1, triangle 1/2, cross 5/9; left and right are alike."""
    axis = np.arange(-16, 16) + 0.5
    drawn = coverage(shape, axis, axis, extent)
    assert drawn.sum() / extent**2 == pytest.approx(FILL[shape], rel=0.02)
    assert drawn == pytest.approx(drawn[:, ::-1])
    middle = (drawn.sum(axis=1) @ axis) / drawn.sum()
    assert middle == pytest.approx(extent / 6 if shape == "triangle" else 0, abs=0.1)
    rows = np.flatnonzero(drawn.max(axis=1) > 0.4)
    assert rows[-1] - rows[0] + 1 == pytest.approx(extent, abs=2)


def test_softness_keeps_the_area_and_widens_the_outline():
    axis = np.arange(-16, 16) + 0.5
    sharp, soft = (coverage("square", axis, axis, 16.0, softness) for softness in (1.0, 4.0))
    assert sharp.sum() == pytest.approx(256)
    # Across an edge at 8 the coverage falls from 1 at 6 to 0 at 10.
    assert soft[16, 24:27] == pytest.approx([0.375, 0.125, 0])


def test_pixels_of_a_square_by_hand():
    """Side 12 around (20.25, 30): x from 14.25 to 26.25, y from 24 to 36."""
    picture = render(Scene("grey", (Thing("square", "black", "small", 20.25, 30.0, 12.0),)))
    black, grey = np.array(PALETTE["black"]), np.array(BACKGROUNDS["grey"])
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert (picture[24:36, 15:26] == black).all()
    assert (picture[24:36, 14] == np.rint(0.75 * black + 0.25 * grey)).all()
    assert (picture[24:36, 26] == np.rint(0.25 * black + 0.75 * grey)).all()
    assert (np.delete(picture.reshape(64, 64, 3), np.s_[24:36], axis=0) == grey).all()


def test_an_unknown_shape_is_not_drawn():
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        coverage("star", np.zeros(1), np.zeros(1), 3.0)


def test_samples_depend_on_seed_and_index_alone():
    pictures, captions = draw_pictures(5, 0, 12)
    later, their_captions = draw_pictures(5, 8, 4)
    assert (later == pictures[8:]).all() and their_captions == captions[8:]
    assert not (draw_pictures(6, 0, 12)[0] == pictures).all()
    code = (
        "from rtdmd.shapes.drawing import draw_pictures; from hashlib import sha256; import sys;"
        "assert 'torch' not in sys.modules; print(sha256(draw_pictures(5, 0, 12)[0].tobytes()).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == sha256(pictures.tobytes()).hexdigest()
