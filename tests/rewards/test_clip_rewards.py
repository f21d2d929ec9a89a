"""CLIPScore and PickScore on a small CLIPModel, against transformers' own processor and logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip import CLIPImageProcessorPil

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import load_rewards
from rtdmd.rewards.clip import ClipEncoder, ClipInput, ClipReward

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "", "Zürich, 漢字!", "two cats " * 60, "a red circle"]


def _images(count, height=48, width=40, seed=0):
    """Random pictures whose pixels are whole levels, so that PIL sees the very same."""
    levels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def _reference_logits(folder, images, prompts):
    model = CLIPModel.from_pretrained(folder).eval()
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")["pixel_values"]
    length = model.config.text_config.max_position_embeddings
    tokens = AutoTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**tokens, pixel_values=pixels).logits_per_image.diagonal()


def _load(name, folder, dtype=torch.float32):
    return load_rewards([RewardSection(name, weights=str(folder))], CPU, dtype)[0]


def _encoder(folder, dtype=torch.float32, **options):
    """An encoder with options that a recipe doesn't offer."""
    model = CLIPModel.from_pretrained(folder, dtype=dtype)
    return ClipEncoder(model, AutoTokenizer.from_pretrained(folder), ClipInput.load(str(folder)), **options)


def _score_and_gradient(encoder, images, prompts):
    images = images.clone().requires_grad_()
    logits = encoder.logits(images, prompts)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    return logits.detach(), gradient


@pytest.mark.parametrize(("name", "divisor"), [("clipscore", 100.0), ("pickscore", 26.0)])
@pytest.mark.parametrize(("height", "width"), [(48, 40), (32, 32), (20, 33)])
def test_score_is_the_diagonal_of_clips_own_logits(tiny_clip, name, divisor, height, width):
    images = _images(len(PROMPTS), height, width)
    reward = _load(name, tiny_clip)
    scores = reward.score(images, PROMPTS, [{}] * len(PROMPTS))
    assert reward.name == name and reward.differentiable
    assert scores.shape == (len(PROMPTS),) and scores.dtype == torch.float32
    torch.testing.assert_close(scores * divisor, _reference_logits(tiny_clip, images, PROMPTS))


@pytest.mark.parametrize(("height", "width"), [(48, 40), (32, 32), (20, 33), (75, 32)])
def test_official_clipscore_resizes_as_torchvision_does(tiny_clip, height, width):
    """On levels in floating point: torch's own bilinear antialiased resize, no rounding, a centre crop."""
    images = _images(3, height, width)
    scale = 32 / min(height, width)
    size = (int(height * scale), int(width * scale))
    pixels = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    top, left = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    pixels = pixels[..., top : top + 32, left : left + 32]
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    tokens = AutoTokenizer.from_pretrained(tiny_clip)(
        PROMPTS[:3], padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**tokens, pixel_values=(pixels - mean) / std).logits_per_image.diagonal() / 100
    section = RewardSection("clipscore", weights=str(tiny_clip), mode="official")
    official = load_rewards([section], CPU, torch.float32)[0].score(images, PROMPTS[:3], [{}] * 3)
    torch.testing.assert_close(official, expected, atol=1e-6, rtol=1e-5)
    default = _load("clipscore", tiny_clip).score(images, PROMPTS[:3], [{}] * 3)
    assert torch.allclose(official, default, atol=1e-6) == (height == width == 32)


def test_gradient_is_the_finite_difference(tiny_clip):
    """In float64 without roundings; pictures away from the clamps."""
    encoder = _encoder(tiny_clip, torch.float64, quantise=False)
    generator = torch.Generator().manual_seed(1)
    images = 0.4 + 0.2 * torch.rand(2, 3, 40, 32, generator=generator, dtype=torch.float64)
    _, gradient = _score_and_gradient(encoder, images, PROMPTS[:2])
    for _ in range(3):
        step = 1e-4 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
        ahead = encoder.logits(images + step, PROMPTS[:2]).sum()
        behind = encoder.logits(images - step, PROMPTS[:2]).sum()
        torch.testing.assert_close((ahead - behind) / 2, (gradient * step).sum(), rtol=1e-5, atol=1e-12)


def test_recomputation_changes_nothing(tiny_clip):
    images = _images(2)
    layer_calls = []
    results = []
    for checkpoint_layers in (True, False):
        encoder = _encoder(tiny_clip, checkpoint_layers=checkpoint_layers)
        calls: list[int] = []
        for module in encoder.model.vision_model.encoder.modules():
            if type(module).__name__ == "CLIPEncoderLayer":
                module.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append(_score_and_gradient(encoder, images, PROMPTS[:2]))
        layer_calls.append(len(calls))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().sum() > 0
    assert layer_calls[0] == 2 * layer_calls[1] > 0


def test_chunks_give_the_scores_of_the_whole_batch(tiny_clip):
    images = _images(5)
    whole = _score_and_gradient(_encoder(tiny_clip, chunk_size=5), images, PROMPTS)
    chunked = _score_and_gradient(_encoder(tiny_clip, chunk_size=2), images, PROMPTS)
    torch.testing.assert_close(chunked[0], whole[0])
    torch.testing.assert_close(chunked[1], whole[1])


def test_the_cache_is_bounded_and_changes_nothing(tiny_clip):
    encoder = _encoder(tiny_clip, max_cached_prompts=2)
    texts = ["a", "b", "a", "c", "b", "a"]
    first = encoder.text_features(texts)
    assert len(encoder._text_cache) == 2
    calls = []
    encoder.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    encoder.text_features(["a", "b", "a"])
    assert calls == []
    fresh = torch.cat([_encoder(tiny_clip).text_features([text]) for text in texts])
    assert torch.equal(first, fresh)
    assert not first.requires_grad


def test_the_scale_keeps_its_precision_in_bfloat16(tiny_clip):
    """exp(logit_scale) of 1/0.07; in bfloat16 it would be off by up to 1 %."""
    reward = _load("clipscore", tiny_clip, torch.bfloat16)
    exact = CLIPModel.from_pretrained(tiny_clip).logit_scale.detach().double().exp().item()
    assert reward.encoder.logit_scale == pytest.approx(exact, rel=1e-12)
    assert reward.encoder.model.dtype == torch.bfloat16
    scores = reward.score(_images(2), PROMPTS[:2], [{}] * 2)
    assert scores.dtype == torch.float32
    expected = _load("clipscore", tiny_clip).score(_images(2), PROMPTS[:2], [{}] * 2)
    torch.testing.assert_close(scores, expected, atol=5e-3, rtol=0)


def test_the_network_is_frozen(tiny_clip):
    model = _load("clipscore", tiny_clip).encoder.model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_score_that_is_not_finite_is_handed_on(tiny_clip):
    encoder = _encoder(tiny_clip)
    with torch.no_grad():
        encoder.model.visual_projection.weight.fill_(float("nan"))
    assert ClipReward("clipscore", encoder, 100.0).score(_images(1), PROMPTS[:1], [{}]).isnan().all()


def _copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_absent_weights_are_refused(tiny_clip, tmp_path):
    folder = _copy(tiny_clip, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights .* such as visual_projection\.weight"):
        _load("clipscore", folder)
    weights["visual_projection.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no CLIP weights"):
        _load("clipscore", folder)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="no CLIP weights"):
        _load("clipscore", folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no CLIP weights"):
        _load("clipscore", folder)


def test_absent_or_unfit_processor_is_refused(tiny_clip, tmp_path):
    folder = _copy(tiny_clip, tmp_path / "clip")
    configuration = folder / "processor_config.json"
    settings = json.loads(configuration.read_text())
    settings["image_processor"]["resample"] = 2
    configuration.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"bicubic.*found resample 2"):
        _load("clipscore", folder)
    configuration.unlink()
    with pytest.raises(UserError, match="image preprocessor"):
        _load("clipscore", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="no tokenizer of this model: it has 2 tokens"):
        _load("clipscore", folder)


def test_pickscore_without_a_processor_takes_the_published_one(tiny_clip, tmp_path):
    """There is no network in tests: the message shows where it looked."""
    folder = _copy(tiny_clip, tmp_path / "clip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="laion/CLIP-ViT-H-14-laion2B-s32B-b79K: no tokenizer"):
        _load("pickscore", folder)


def test_separate_preprocessor_files_are_read_too(tiny_clip, tmp_path):
    """The layout of the published checkpoints, sizes as plain numbers."""
    settings = {
        "crop_size": 24,
        "size": 24,
        "resample": 3,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert ClipInput.load(str(tmp_path)) == ClipInput(24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
