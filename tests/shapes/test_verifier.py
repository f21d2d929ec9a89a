"""The judge on scenes made by hand and on what no scene shows."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rtdmd.errors import UserError
from rtdmd.shapes.captions import COLORS, SHAPES, Caption, Group
from rtdmd.shapes.drawing import PALETTE, render
from rtdmd.shapes.reading import read_picture
from rtdmd.shapes.scenes import BACKGROUNDS, Scene, Thing
from rtdmd.shapes.verifier import verify

SMALL, LARGE = 12.0, 20.0
RED, BLUE, GREY = PALETTE["red"], PALETTE["blue"], BACKGROUNDS["grey"]


def thing(color, shape, x, y, extent=SMALL):
    return Thing(shape, color, "small" if extent < 16 else "large", x, y, extent)


def picture(*things, background="cream"):
    return render(Scene(background, things))


def one(count, color, shape, size=None):
    return Group(count, color, shape, size)


def parts(image, *groups, relation=None):
    """The parts that don't hold, and whether all is right."""
    verdict = verify(image, Caption(groups, relation))
    return {name for name, holds in verdict.parts.items() if not holds}, verdict.correct


def painted(paint, background=GREY):
    """A picture that ``paint`` draws at eight times the size, for outlines of any kind."""
    large = Image.new("RGB", (512, 512), background)
    paint(ImageDraw.Draw(large))
    return np.array(large.resize((64, 64), Image.Resampling.BOX))


def box(left, top, right, bottom):
    return [8 * left, 8 * top, 8 * right - 1, 8 * bottom - 1]


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_is_read_as_it_was_drawn(shape, background):
    for color in COLORS:
        for extent in (11.0, 13.0, 19.0, 22.0):
            reading = read_picture(picture(thing(color, shape, 30.3, 25.6, extent), background=background))
            (found,) = reading.things
            assert reading.background == background
            assert (found.color, found.shape) == (color, shape)
            assert found.size == ("small" if extent < 16 else "large")
            half = extent / 2
            assert found.box == pytest.approx((30.3 - half, 25.6 - half, 30.3 + half, 25.6 + half), abs=0.6)


def test_each_part_fails_by_itself():
    image = picture(thing("red", "circle", 15, 30), thing("blue", "square", 45, 32, LARGE))
    circle, square = one(1, "red", "circle", "small"), one(1, "blue", "square", "large")
    assert parts(image, circle, square, relation="left of") == (set(), True)
    assert parts(image, square, circle, relation="right of") == (set(), True)
    assert parts(image, square, circle) == (set(), True)
    assert parts(image, one(1, "green", "circle"), square) == ({"color"}, False)
    assert parts(image, one(1, "red", "cross"), square) == ({"shape"}, False)
    assert parts(image, one(1, "red", "circle", "large"), square) == ({"size"}, False)
    assert parts(image, one(2, "red", "circle"), square) == ({"count"}, False)
    for relation in ("right of", "above", "below"):
        assert parts(image, circle, square, relation=relation) == ({"relation"}, False)
    # Colours and shapes are all there, but belong together otherwise: one or the other is wrong.
    assert parts(image, one(1, "blue", "circle"), one(1, "red", "square")) in (
        ({"color"}, False),
        ({"shape"}, False),
    )


def test_only_the_parts_that_a_caption_names():
    image = picture(thing("red", "circle", 15, 30))
    named = verify(image, Caption((one(1, "red", "circle"),))).parts
    assert named == {"color": True, "shape": True, "count": True}
    assert verify(image, Caption((one(1, "red", "circle", "large"),))).credit == 3 / 4


def test_an_object_too_many_is_wrong():
    things = [thing("red", "circle", 15, 15), thing("red", "circle", 40, 15)]
    assert parts(picture(*things), one(1, "red", "circle")) == ({"count"}, False)
    assert parts(picture(*things), one(2, "red", "circle")) == (set(), True)
    another = picture(*things, thing("blue", "cross", 40, 45))
    assert parts(another, one(2, "red", "circle")) == ({"count"}, False)
    many = [thing("red", "circle", x, y) for x in (10, 25, 40, 55) for y in (10, 25, 40, 55)]
    assert parts(picture(*many), one(3, "red", "circle")) == ({"count"}, False)


def test_a_group_that_is_not_there_fails_all():
    circle, square = one(1, "red", "circle", "small"), one(1, "blue", "square")
    image = picture(thing("red", "circle", 15, 30))
    missing = {"color", "shape", "count", "size", "relation"}
    assert parts(image, circle, square, relation="above") == (missing, False)
    assert parts(picture(), circle) == (missing - {"relation"}, False)


def test_a_relation_is_one_of_all_objects():
    pair = [thing("red", "circle", 12, 20), thing("red", "circle", 50, 44)]
    square = thing("blue", "square", 31, 32)
    circles, other = one(2, "red", "circle"), one(1, "blue", "square")
    assert parts(picture(*pair, square), circles, other, relation="left of") == ({"relation"}, False)
    pair[1] = thing("red", "circle", 14, 44)
    assert parts(picture(*pair, square), circles, other, relation="left of") == (set(), True)
    assert parts(picture(*pair, square), other, circles, relation="right of") == (set(), True)


def test_metadata_serve_as_well_as_a_caption():
    image = picture(thing("red", "circle", 15, 30))
    assert verify(image, Caption((one(1, "red", "circle"),)).metadata).correct
    with pytest.raises(UserError, match="include"):
        verify(image, {"prompt": "a red circle"})


@pytest.mark.parametrize("image", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_what_is_no_picture(image):
    with pytest.raises(ValueError, match="of uint8"):
        read_picture(image)


def test_specks_are_noise_and_blobs_are_not():
    """Four pixels of blue beside a square are overlooked, nine are an object."""
    square = one(1, "red", "square")
    for side, right in ((2, True), (3, False)):
        image = painted(
            lambda d, side=side: (
                d.rectangle(box(10, 22, 28, 40), RED),
                d.rectangle(box(45, 30, 45 + side, 30 + side), BLUE),
            )
        )
        assert parts(image, square)[1] is right


@pytest.mark.parametrize(
    ("paint", "shape"),
    [
        (lambda d: d.ellipse(box(21, 24, 43, 40), RED), "circle"),  # 22 × 16, nearly round
        (lambda d: d.ellipse(box(16, 24, 48, 40), RED), None),  # twice as wide as high
        (lambda d: d.rectangle(box(16, 24, 48, 40), RED), None),
        (lambda d: (d.ellipse(box(22, 22, 42, 42), RED), d.ellipse(box(27, 27, 37, 37), GREY)), None),  # ring
        (lambda d: (d.rectangle(box(22, 22, 28, 42), RED), d.rectangle(box(22, 36, 42, 42), RED)), None),  # L
        (lambda d: d.polygon([(160, 160), (352, 160), (256, 352)], RED), None),  # a triangle on its tip
        (lambda d: (d.rectangle(box(8, 22, 28, 42), RED), d.rectangle(box(28, 22, 48, 42), RED)), None),
    ],
)
def test_malformed_shapes(paint, shape):
    (found,) = read_picture(painted(paint)).things
    assert (found.color, found.shape) == ("red", shape)


def test_colors_that_are_mixed_or_unknown():
    def halves(d):
        d.rectangle(box(22, 22, 42, 42), RED)
        d.rectangle(box(22, 22, 28, 42), BLUE)

    assert [found.color for found in read_picture(painted(halves)).things] == [None]
    for color in ((0, 200, 210), (255, 150, 190), (255, 255, 255), (0, 255, 0)):
        (found,) = read_picture(painted(lambda d, color=color: d.ellipse(box(20, 20, 40, 40), color))).things
        assert (found.color, found.shape) == (None, "circle")


def test_colors_slightly_off_are_read():
    for color, values in PALETTE.items():
        for shift in ((25, 0, -25), (-20, 20, 20), (-25, -25, -25)):
            off = tuple(int(value) for value in np.clip(np.add(values, shift), 0, 255))
            (found,) = read_picture(painted(lambda d, off=off: d.ellipse(box(20, 20, 40, 40), off))).things
            assert found.color == color


def test_backgrounds_of_no_kind_are_wrong():
    for color in (RED, (0, 0, 0), (120, 120, 120)):
        image = painted(lambda d: d.ellipse(box(20, 20, 40, 40), BLUE), background=color)
        assert read_picture(image).background is None
        assert not verify(image, Caption((one(1, "blue", "circle"),))).correct


def test_what_no_generator_should_paint_is_judged_all_the_same():
    """Noise, blocks, and an object of which no pixel resembles the median of its pixels."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    blocks = np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    mottled = np.full((64, 64, 3), GREY, np.uint8)
    colors = np.array([(220, 220, 100), (220, 100, 220), (100, 220, 220)], np.uint8)
    mottled[20:32, 20:32] = colors[np.add.outer(np.arange(12), np.arange(12)) % 3]
    for image in (noise, blocks, mottled):
        assert not verify(image, Caption((one(1, "blue", "circle"),))).correct
    (found,) = read_picture(mottled).things
    assert (found.color, found.shape, found.box) == (None, None, (20, 20, 32, 32))
