"""How often the judge errs, on pictures as drawn and distorted; ``pytest -s`` prints the rates."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from rtdmd.shapes.drawing import draw_pictures
from rtdmd.shapes.negatives import hard_negatives
from rtdmd.shapes.reading import read_picture
from rtdmd.shapes.verifier import judge


@pytest.fixture(scope="module")
def samples():
    pictures, captions = draw_pictures(2026, 0, 2000, "all")
    rng = np.random.default_rng(0)
    return pictures, captions, [hard_negatives(rng, caption) for caption in captions]


def blurred(pictures, sigma=0.6):
    smooth = ndimage.gaussian_filter(pictures.astype(np.float32), (0, sigma, sigma, 0))
    return np.rint(smooth).astype(np.uint8)


def noisy(pictures, deviation=8):
    noise = np.random.default_rng(1).normal(0, deviation, pictures.shape)
    return np.clip(np.rint(pictures + noise), 0, 255).astype(np.uint8)


def compressed(pictures):
    """JPEG of quality 75 with colour at half the resolution, as PIL writes it."""

    def there_and_back(one):
        buffer = BytesIO()
        Image.fromarray(one).save(buffer, format="JPEG", quality=75)
        return np.array(Image.open(buffer))

    return np.stack([there_and_back(one) for one in pictures])


@pytest.mark.parametrize(
    ("name", "distort", "count"),
    [
        ("as drawn", lambda pictures: pictures, 2000),
        ("blur of 0.6 pixels", blurred, 500),
        ("noise of 8/255", noisy, 500),
        ("blur of 0.6 pixels, then noise of 8/255", lambda pictures: noisy(blurred(pictures)), 2000),
        ("blur of 1.2 pixels", lambda pictures: blurred(pictures, 1.2), 500),
        ("JPEG of quality 75", compressed, 1000),
    ],
)
def test_rates(samples, name, distort, count):
    """Of true pairs, and of eight times as many with one attribute altered, at most 0.5 % are misjudged."""
    pictures, captions, negatives = (part[:count] for part in samples)
    readings = [read_picture(one) for one in distort(pictures)]
    rows = list(zip(readings, captions, negatives, strict=True))
    accepted = np.mean([judge(reading, caption).correct for reading, caption, _ in rows])
    rejected = np.mean(
        [not judge(reading, other).correct for reading, _, altered in rows for other in altered]
    )
    print(
        f"\n{name}: yes to {accepted:.2%} of {count} true pairs, no to {rejected:.3%} of {8 * count} altered"
    )
    assert accepted >= 0.995 and rejected >= 0.995
