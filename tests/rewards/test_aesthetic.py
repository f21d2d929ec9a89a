"""The aesthetic predictor on a small CLIP, against transformers' CLIPModel and the head's own definition."""

import shutil

import pytest
import torch
from originals import score_head
from PIL import Image
from transformers import CLIPModel
from transformers.models.clip import CLIPImageProcessorPil

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import load_rewards
from rtdmd.rewards.aesthetic import AestheticReward
from rtdmd.rewards.clip_vision import ClipInput, ClipVision
from rtdmd.rewards.linear_head import LinearHead

CPU = torch.device("cpu")
FILE = "sac+logos+ava1-l14-linearMSE.pth"


def _images(count, height=48, width=40, seed=0):
    levels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def _load(weights, dtype=torch.float32):
    return load_rewards([RewardSection("aesthetic", weights=str(weights))], CPU, dtype)[0]


def _score(reward, images):
    return reward.score(images, [""] * len(images), [{}] * len(images))


def _copy(folder, target):
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize(("height", "width"), [(48, 40), (32, 32), (20, 33)])
def test_score_is_the_heads_opinion_of_the_normalised_embedding(tiny_aesthetic, height, width):
    images = _images(3, height, width)
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    processor = CLIPImageProcessorPil.from_pretrained(tiny_aesthetic)
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    head = score_head(16)
    state = torch.load(tiny_aesthetic / FILE, weights_only=True)
    head.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
    with torch.no_grad():
        features = CLIPModel.from_pretrained(tiny_aesthetic).get_image_features(pixels).pooler_output
        expected = head(features / features.norm(dim=-1, keepdim=True)).squeeze(-1)
    reward = _load(tiny_aesthetic)
    scores = _score(reward, images)
    assert reward.name == "aesthetic" and reward.differentiable and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert scores.std() > 1e-2


def test_gradient_is_the_finite_difference(tiny_aesthetic):
    loaded = _load(tiny_aesthetic, torch.float64)
    vision = ClipVision(loaded.vision.model, ClipInput.load(str(tiny_aesthetic)), quantise=False)
    reward = AestheticReward(vision, loaded.head)
    generator = torch.Generator().manual_seed(1)
    images = 0.4 + 0.2 * torch.rand(2, 3, 40, 32, generator=generator, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_score(reward, leaf).sum(), leaf)
    assert gradient.abs().sum() > 0
    for _ in range(3):
        step = 1e-4 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
        ahead, behind = (_score(reward, images + sign * step).sum() for sign in (1, -1))
        torch.testing.assert_close((ahead - behind) / 2, (gradient * step).sum(), rtol=1e-5, atol=1e-10)


def test_chunks_recomputation_and_bfloat16(tiny_aesthetic):
    images = _images(5)
    results = []
    for chunk_size, checkpoint_layers in ((5, True), (2, True), (5, False)):
        loaded = _load(tiny_aesthetic)
        # Loaded layers recompute already; the network is built anew for the case without.
        model = CLIPModel.from_pretrained(tiny_aesthetic)
        vision = ClipVision(
            model,
            loaded.vision.image_input,
            chunk_size=chunk_size,
            checkpoint_layers=checkpoint_layers,
        )
        leaf = images.clone().requires_grad_()
        scores = _score(AestheticReward(vision, loaded.head), leaf)
        results.append((scores.detach(), *torch.autograd.grad(scores.sum(), leaf)))
    for scores, gradient in results[1:]:
        torch.testing.assert_close(scores, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])
    reduced = _load(tiny_aesthetic, torch.bfloat16)
    assert reduced.vision.model.dtype == torch.bfloat16
    assert next(reduced.head.parameters()).dtype == torch.float32
    scores = _score(reduced, images)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, results[0][0], atol=0.05 * results[0][0].abs().max().item(), rtol=0)


def test_everything_is_frozen_and_no_text_tower_is_kept(tiny_aesthetic):
    reward = _load(tiny_aesthetic)
    assert not reward.vision.model.training and not reward.head.training
    parameters = [*reward.vision.model.named_parameters(), *reward.head.named_parameters()]
    assert not any(parameter.requires_grad for _, parameter in parameters)
    assert not any("text" in name for name, _ in parameters)


def test_the_published_head():
    """787,456 + 131,200 + 8,256 + 1,040 + 17 parameters."""
    with torch.device("meta"):
        head = LinearHead(768)
    assert sum(parameter.numel() for parameter in head.parameters()) == 927_969
    expected = [f"layers.{index}.{kind}" for index in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    assert list(head.state_dict()) == expected


def test_a_head_alone_takes_clip_from_the_hub(tiny_aesthetic, tmp_path):
    """There is no network in tests: the message shows where it looked."""
    shutil.copy(tiny_aesthetic / FILE, tmp_path / FILE)
    for weights in (tmp_path, tmp_path / FILE):
        fetch = "hf download openai/clip-vit-large-patch14 model.safetensors"
        with pytest.raises(UserError, match=rf"model\.safetensors is not in the hub's cache .*{fetch}"):
            _load(weights)


def test_a_path_to_the_head_finds_the_clip_beside_it(tiny_aesthetic, tmp_path):
    folder = _copy(tiny_aesthetic, tmp_path / "both")
    (folder / FILE).rename(folder / "mine.pth")
    assert torch.equal(
        _score(_load(folder / "mine.pth"), _images(2)), _score(_load(tiny_aesthetic), _images(2))
    )


def test_missing_and_damaged_files_are_refused(tiny_aesthetic, tmp_path):
    name = FILE.replace("+", r"\+")
    folder = _copy(tiny_aesthetic, tmp_path / "both")
    with pytest.raises(UserError, match=f"hf download camenduru/improved-aesthetic-predictor {name}"):
        load_rewards([RewardSection("aesthetic")], CPU, torch.float32)
    state = torch.load(folder / FILE, weights_only=True)
    torch.save({**state, "layers.4.weight": torch.zeros(64, 127)}, folder / FILE)
    with pytest.raises(UserError, match=r"layers\.4\.weight .* shape \[64, 127\], expected \[64, 128\]"):
        _load(folder)
    del state["layers.7.bias"]
    torch.save(state, folder / FILE)
    with pytest.raises(UserError, match=r"1 of 10 weights of the linear head .* such as layers\.7\.bias"):
        _load(folder)
    (folder / FILE).write_bytes(b"cut off")
    with pytest.raises(UserError, match=f"{name}: damaged.*--force-download"):
        _load(folder)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(
        UserError, match=r"model\.safetensors: damaged.*clip-vit-large-patch14 model\.safetens"
    ):
        _load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"holds no model\.safetensors; fetch it with: hf download openai/clip"
    ):
        _load(folder)


def test_a_score_that_is_not_finite_is_handed_on(tiny_aesthetic):
    reward = _load(tiny_aesthetic)
    with torch.no_grad():
        reward.head.layers[0].weight.fill_(float("nan"))
    assert _score(reward, _images(1)).isnan().all()
