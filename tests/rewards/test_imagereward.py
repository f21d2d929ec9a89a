"""ImageReward on a small network, against its authors' definition in torch's own modules."""

import shutil
from pathlib import Path

import pytest
import torch
from originals import BERT_WORDS, OPENAI_MEAN, OPENAI_STD
from transformers import BlipTextModel, BlipVisionModel
from transformers.models.clip import CLIPImageProcessorPil

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import load_rewards
from rtdmd.rewards.imagereward import blip_states_from_image_reward, published_config

CPU = torch.device("cpu")
FILE = "ImageReward.pt"
PROMPTS = ["A red circle", "", "two cats, unknownword!", "big red cats on a red circle , " * 10]
# By hand, from the vocabulary's order; [UNK] for what it lacks.
IDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 5, "red": 6, "circle": 7, "two": 8, "cat": 9}
IDS |= {"##s": 10, ",": 11, "big": 12, "cats": 13, "on": 14}
LONG = ["big", "red", "cats", "on", "a", "red", "circle", ","] * 10
WORDS = [["a", "red", "circle"], [], ["two", "cats", ",", "[UNK]", "[UNK]"], LONG[:33]]


def _images(count, height=48, width=40, seed=0):
    levels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def _load(weights, dtype=torch.float32):
    return load_rewards([RewardSection("imagereward", weights=str(weights))], CPU, dtype)[0]


def _score(reward, images, prompts=PROMPTS):
    return reward.score(images, prompts[: len(images)], [{}] * len(images))


def _original_tokens():
    rows = torch.zeros(len(WORDS), 35, dtype=torch.long)
    for row, words in zip(rows, WORDS, strict=True):
        ids = [IDS[word] for word in ("[CLS]", *words, "[SEP]")]
        row[: len(ids)] = torch.tensor(ids)
    return rows, rows != 0


def _copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize(("height", "width"), [(48, 40), (32, 32), (20, 33)])
def test_score_is_the_original_networks(tiny_imagereward, image_reward_network, height, width):
    images = _images(len(PROMPTS), height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    levels = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in images]
    pixels = processor(levels, do_normalize=False, return_tensors="pt")["pixel_values"]
    reward = _load(tiny_imagereward)
    with torch.no_grad():
        expected = image_reward_network((pixels - OPENAI_MEAN) / OPENAI_STD, *_original_tokens())
    scores = _score(reward, images)
    assert reward.name == "imagereward" and reward.differentiable and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert scores.std() > 1e-2


def test_picture_and_prompt_both_matter(tiny_imagereward):
    reward = _load(tiny_imagereward)
    image = _images(1).expand(3, -1, -1, -1)
    assert len(set(_score(reward, image).tolist())) == 3
    scores = _score(reward, _images(3), ["a red circle"] * 3)
    assert len(set(scores.tolist())) == 3


def test_gradient_is_the_finite_difference(tiny_imagereward):
    reward = _load(tiny_imagereward, torch.float64)
    reward.quantise = False
    generator = torch.Generator().manual_seed(1)
    images = 0.4 + 0.2 * torch.rand(2, 3, 40, 32, generator=generator, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_score(reward, leaf).sum(), leaf)
    assert gradient.abs().sum() > 0
    for _ in range(3):
        step = 1e-4 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
        ahead, behind = (_score(reward, images + sign * step).sum() for sign in (1, -1))
        torch.testing.assert_close((ahead - behind) / 2, (gradient * step).sum(), rtol=1e-4, atol=1e-10)


def test_layers_are_recomputed_once_in_the_backward_pass(tiny_imagereward):
    reward = _load(tiny_imagereward)
    calls = []
    networks = (reward.vision, reward.text)
    for module in (module for network in networks for module in network.modules()):
        if type(module).__name__ in ("BlipEncoderLayer", "BlipTextLayer"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    scores = _score(reward, _images(2).requires_grad_())
    assert len(calls) == 4
    scores.sum().backward()
    assert len(calls) == 8
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())


def test_chunks_and_bfloat16(tiny_imagereward):
    images = _images(4)
    reward = _load(tiny_imagereward)
    whole = _score(reward, images)
    reward.chunk_size = 3
    torch.testing.assert_close(_score(reward, images), whole)
    reduced = _load(tiny_imagereward, torch.bfloat16)
    assert reduced.vision.dtype == reduced.text.dtype == torch.bfloat16
    assert next(reduced.head.parameters()).dtype == torch.float32
    scores = _score(reduced, images)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, whole, atol=0.1 * whole.abs().max().item(), rtol=0)


def test_the_published_architecture():
    """Parameters by hand: a text layer is 2,363,904 for attention to the text, 2,757,120 for attention to the
    picture and 4,723,968 for its feed-forward part, norms included."""
    config = published_config()
    with torch.device("meta"):
        vision = BlipVisionModel(config.vision_config)
        text = BlipTextModel(config.text_config, add_pooling_layer=False)
    assert sum(parameter.numel() for parameter in vision.parameters()) == 303_301_632
    assert (
        sum(parameter.numel() for parameter in text.parameters()) == (30_524 + 512 + 2) * 768 + 12 * 9_844_992
    )
    assert text.config.num_attention_heads == 12 and vision.config.layer_norm_eps == 1e-6


def test_conversion_uses_every_weight_but_blips_own_projection(image_reward_network):
    state = image_reward_network.state_dict()
    states = blip_states_from_image_reward(state)
    assert sum(len(part) for part in states) == len(state) - 2
    fused = state["blip.visual_encoder.blocks.1.attn.qkv.weight"]
    assert states.vision["encoder.layers.1.self_attn.qkv.weight"] is fused
    assert all("crossattention" in name for name in states.text if states.text[name].shape == (32, 48))
    other = {"blip.visual_encoder.blocks.0.x.weight": fused, "blip.visual_encoder.y": fused, "z": fused}
    assert blip_states_from_image_reward(other) == ({}, {}, {})


def test_blips_own_tokens_are_single_tokens(tiny_imagereward):
    tokenizer = _load(tiny_imagereward).tokenizer
    assert tokenizer("[DEC] a [ENC]")["input_ids"] == [2, len(BERT_WORDS), 5, len(BERT_WORDS) + 1, 3]


def test_missing_files_are_named_with_the_command_that_fetches_them(tiny_imagereward, tmp_path):
    fetch = f"hf download THUDM/ImageReward {FILE}"
    with pytest.raises(UserError, match=f"holds no {FILE}; fetch it with: {fetch}"):
        _load(tmp_path)
    with pytest.raises(UserError, match=f"{FILE} is not in the hub's cache .*{fetch}"):
        load_rewards([RewardSection("imagereward")], CPU, torch.float32)
    folder = _copy(tiny_imagereward, tmp_path / "imagereward")
    (folder / "vocab.txt").unlink()
    with pytest.raises(
        UserError, match=r"bert-base-uncased: no .*tokenizer.*hf download google-bert/bert-base"
    ):
        _load(folder)


def test_unfit_files_are_refused(tiny_imagereward, tmp_path):
    folder = _copy(tiny_imagereward, tmp_path / "imagereward")
    state = torch.load(folder / FILE, weights_only=True)
    for name, message in {
        "blip.visual_encoder.norm.bias": r"BlipVisionModel .* such as post_layernorm\.bias",
        "blip.text_encoder.embeddings.LayerNorm.bias": r"BlipTextModel .* such as embeddings\.LayerNorm",
        "mlp.layers.7.bias": r"the linear head .* such as layers\.7\.bias",
    }.items():
        torch.save({key: value for key, value in state.items() if key != name}, folder / FILE)
        with pytest.raises(UserError, match=f"1 of .* weights of {message}"):
            _load(folder)
    name = "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"
    torch.save({**state, name: torch.zeros(32, 32)}, folder / FILE)
    with pytest.raises(UserError, match=r"key\.weight .* has the shape \[32, 32\], expected \[32, 48\]"):
        _load(folder)
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:1000])
    with pytest.raises(
        UserError, match=rf"{FILE}: damaged.*hf download THUDM/ImageReward {FILE} --force-download"
    ):
        _load(folder)


def test_a_vocabulary_of_another_size_is_refused(tiny_imagereward, tmp_path):
    folder = _copy(tiny_imagereward, tmp_path / "imagereward")
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS[:-1]) + "\n")
    with pytest.raises(UserError, match=r"no tokenizer of this model: it has 16 tokens, the model 17"):
        _load(folder)


def test_a_score_that_is_not_finite_is_handed_on(tiny_imagereward):
    reward = _load(tiny_imagereward)
    with torch.no_grad():
        reward.text.embeddings.LayerNorm.weight.fill_(float("nan"))
    assert _score(reward, _images(1)).isnan().all()
