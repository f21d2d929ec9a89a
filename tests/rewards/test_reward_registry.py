"""The registry, compressibility, and what every scorer demands of its inputs."""

import re
import shutil
import subprocess
import sys
from io import BytesIO

import pytest
import torch
from PIL import Image

from rtdmd.errors import TrainingHalted, UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import REWARDS, load_rewards
from rtdmd.rewards.validation import check_scores

CPU = torch.device("cpu")


def _compressibility():
    return load_rewards([RewardSection("compressibility")], CPU, torch.float32)[0]


def test_importing_the_registry_loads_no_framework():
    code = "import sys, rtdmd.rewards; assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_specs_agree_with_their_scorers(tiny_weights):
    assert set(tiny_weights) == {name for name, spec in REWARDS.items() if spec.default_weights is not None}
    # Has what ocr, geneval and geneval2 ask of a prompt.
    prompt = 'a dog below the word "dog"'
    row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": prompt}
    row["vqa_list"] = [["Are there any dogs in the image?", "Yes"]]
    rows = {"shapes": {"include": [{"class": "circle", "count": 1, "color": "red"}]}}
    for name, spec in REWARDS.items():
        weights = str(tiny_weights[name]) if name in tiny_weights else None
        (reward,) = load_rewards([RewardSection(name, weights=weights)], CPU, torch.float32)
        assert (spec.name, reward.name, reward.differentiable) == (name, name, spec.differentiable)
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        scores = reward.score(images, [prompt] * 2, [rows.get(name, row)] * 2)
        assert scores.shape == (2,) and scores.dtype == torch.float32
        assert scores.requires_grad == spec.differentiable
        with pytest.raises(ValueError, match=r"images must be in \[0, 1\], got values from"):
            reward.score(images * 255, [prompt] * 2, [row] * 2)


@pytest.mark.parametrize("name", [name for name, spec in REWARDS.items() if spec.default_weights is not None])
def test_a_damaged_checkpoint_is_named(tiny_weights, tmp_path, name):
    folder = shutil.copytree(tiny_weights[name], tmp_path / name)
    named = folder / REWARDS[name].needs_files[0].files[0]
    file = named if named.is_file() else folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    message = rf"{re.escape(str(folder))}.*: (damaged|no [A-Za-z0-9-]+( weights)?: )"
    with pytest.raises(UserError, match=message):
        load_rewards([RewardSection(name, weights=str(folder))], CPU, torch.float32)


def test_all_unknown_names_are_told_before_anything_loads():
    sections = [
        RewardSection("clipscor"),
        RewardSection("clipscore", weights="/absent"),
        RewardSection("xyz"),
    ]
    with pytest.raises(UserError) as error:
        load_rewards(sections, CPU, torch.float32)
    assert str(error.value).splitlines() == [
        "unknown reward 'clipscor'; did you mean 'clipscore'?",
        f"unknown reward 'xyz'; known: {', '.join(sorted(REWARDS))}",
    ]


def test_weights_for_a_scorer_without_weights():
    with pytest.raises(UserError, match="'compressibility' has no weights"):
        load_rewards([RewardSection("compressibility", weights="a/b")], CPU, torch.float32)


def test_a_mode_that_a_scorer_has_not():
    with pytest.raises(UserError, match="'compressibility' has no mode 'official'"):
        load_rewards([RewardSection("compressibility", mode="official")], CPU, torch.float32)


def test_rewards_come_in_the_order_of_the_recipe(tiny_clip):
    sections = [RewardSection("compressibility"), RewardSection("clipscore", weights=str(tiny_clip))]
    rewards = load_rewards(sections, CPU, torch.float32)
    assert [reward.name for reward in rewards] == ["compressibility", "clipscore"]


def test_compressibility_is_minus_the_kilobytes_of_the_jpeg():
    images = torch.rand(1, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    images = torch.cat([images, torch.full_like(images, 0.5)])
    scores = _compressibility().score(images, ["noise", "grey"], [{}, {}])
    for image, score in zip(images, scores, strict=True):
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        buffer = BytesIO()
        picture.save(buffer, format="JPEG", quality=95)
        assert score.item() == pytest.approx(-len(buffer.getvalue()) / 1000)
    assert scores[1] > scores[0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 8, 8), 1.5), "values from 1.5 to 1.5"),
        (torch.full((1, 3, 8, 8), -0.01), "values from -0.01"),
        (torch.full((1, 3, 8, 8), float("nan")), "values from nan"),
        (torch.full((1, 3, 8, 8), float("inf")), "to inf"),
        (torch.zeros(3, 8, 8), r"\[B, 3, H, W\], got \[3, 8, 8\]"),
        (torch.zeros(1, 8, 8, 3), r"got \[1, 8, 8, 3\]"),
        (torch.zeros(0, 3, 8, 8), r"got \[0, 3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(2, 3, 8, 8), "2 images, 1 prompts, 1 rows"),
    ],
)
def test_unfit_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        _compressibility().score(images, ["a"], [{}])


def test_metadata_must_match_too():
    with pytest.raises(ValueError, match="1 images, 1 prompts, 0 rows"):
        _compressibility().score(torch.zeros(1, 3, 8, 8), ["a"], [])


def test_scores_are_one_per_prompt_finite_or_not():
    scores = torch.tensor([0.5, float("nan")])
    assert check_scores("x", scores, ["a", "b"]) is scores
    for shape in ([3], [2, 1], []):
        with pytest.raises(TrainingHalted, match="'x' gave scores"):
            check_scores("x", torch.zeros(shape), ["a", "b"])


def test_a_thousandth_outside_is_tolerated():
    images = torch.tensor([-5e-4, 1.0005]).repeat(3 * 8 * 4).view(1, 3, 8, 8)
    exact = _compressibility().score(images.clamp(0, 1), ["a"], [{}])
    assert torch.equal(_compressibility().score(images, ["a"], [{}]), exact)
