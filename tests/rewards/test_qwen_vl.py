"""Pictures for Qwen-VL models against transformers' own processor on PIL's resize."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from rtdmd.errors import UserError
from rtdmd.rewards.geneval2 import _positions
from rtdmd.rewards.hpsv3 import PIXELS
from rtdmd.rewards.qwen_vl import QwenInput, picture_grid, right_padded

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
LIMITS = {14: (PIXELS, PIXELS), 16: (65_536, 16_777_216)}


def _noise(width, height):
    generator = np.random.default_rng(width * height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _text(width, height):
    picture = Image.new("RGB", (width, height), "white")
    for row in range(0, height, 14):
        ImageDraw.Draw(picture).text((row % 9, row), "Quick brown foxes, 0123456789. " * 4, fill="black")
    return picture


def _tensor(*pictures):
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]) / 255


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize(
    "picture",
    [_noise(400, 300), _noise(301, 500), _noise(512, 512), _noise(64, 64), _text(640, 480), _text(512, 512)],
    ids=["landscape", "portrait", "square", "upscaled", "text landscape", "text square"],
)
def test_every_patch_equals_the_processors(picture, patch_size):
    """The processor's limits are HPSv3's (14) and Qwen3-VL's (16); a level is 1/255/std, about 1.5e-2."""
    low, high = LIMITS[patch_size]
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        image_mean=list(MEAN),
        image_std=list(STD),
        size={"shortest_edge": low, "longest_edge": high},
    )
    expected = processor([picture, picture.transpose(Image.Transpose.ROTATE_180)], return_tensors="pt")
    ours, (rows, columns) = QwenInput(patch_size, low, high, MEAN, STD).patches(
        _tensor(picture, picture.transpose(Image.Transpose.ROTATE_180))
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected["pixel_values"], atol=2e-5, rtol=0)
    assert torch.equal(picture_grid(2, rows, columns, ours.device), expected["image_grid_thw"])


@pytest.mark.parametrize(
    ("patch_size", "limits"), [(14, (56 * 56, 1_003_520)), (14, LIMITS[14]), (16, LIMITS[16])]
)
def test_sizes_are_smart_resizes(patch_size, limits):
    image_input = QwenInput(patch_size, *limits, MEAN, STD)
    step = 2 * patch_size
    for height in range(step, 2200, 97):
        for width in range(step, 2200, 131):
            assert image_input.size(height, width) == smart_resize(height, width, step, *limits)


def test_a_preprocessor_configuration_is_read_or_refused(tiny_geneval2, tmp_path):
    """The second layout is that of the published checkpoints."""
    half = (0.5, 0.5, 0.5)
    assert QwenInput.load(str(tiny_geneval2)) == QwenInput(16, *LIMITS[16], half, half)
    settings = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": half,
        "image_std": half,
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(settings))
    assert QwenInput.load(str(tmp_path)) == QwenInput(16, *LIMITS[16], half, half)
    file.write_text(json.dumps(settings | {"resample": 2}))
    with pytest.raises(UserError, match=r"needs a bicubic resize .* found resample 2"):
        QwenInput.load(str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match="no image preprocessor configuration"):
        QwenInput.load(str(tmp_path))


def test_right_padding():
    assert right_padded([[1, 2, 3], [4]], torch.device("cpu")).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_positions_are_qwen3_vls_own(tiny_geneval2):
    """Four tokens, a picture of 3 x 2 tokens, and questions of two and three tokens beside each other."""
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(tiny_geneval2).model
    ours = _positions(torch.tensor([[0, 1, 0, 1, 2]]), 4, 3, 2)[:, 0]
    for start, length in ((0, 2), (2, 3)):
        types = torch.tensor([[0] * 4 + [1] * 6 + [0] * length])
        ids = torch.full_like(types, 5)
        theirs, _ = model.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=torch.tensor([[1, 6, 4]])
        )
        behind = ours[:, 10 + start : 10 + start + length]
        assert torch.equal(torch.cat([ours[:, :10], behind], dim=1), theirs[:, 0])
