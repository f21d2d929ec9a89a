"""HPSv3 on a small Qwen2-VL, against the published forward pass on transformers' own model and processor."""

import hashlib
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_qwen import qwen_vl_tokenizer
from transformers import Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import load_rewards
from rtdmd.rewards.hpsv3 import INSTRUCTION, published_config, states_from_hpsv3

CPU = torch.device("cpu")
FILE = "HPSv3.safetensors"
PROMPTS = ["a red circle", "", "two {cats} on Zürich's 漢字"]
PIXELS = 256 * 28 * 28


def _images(count, height=64, width=64, seed=0):
    levels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def _load(weights, dtype=torch.float32):
    return load_rewards([RewardSection("hpsv3", weights=str(weights))], CPU, dtype)[0]


def _score(reward, images, prompts=PROMPTS):
    return reward.score(images, prompts[: len(images)], [{}] * len(images))


def _published_inputs(images, prompts):
    """Pictures resized by PIL to 200,704 pixels, then transformers' processor; the chat, padded right."""
    pictures = []
    for image in images:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        height, width = smart_resize(picture.height, picture.width, 28, PIXELS, PIXELS)
        pictures.append(picture.resize((width, height)))
    inputs = dict(Qwen2VLImageProcessorPil()(pictures, return_tensors="pt"))
    tokenizer = qwen_vl_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    pads = "<|image_pad|>" * (int(inputs["image_grid_thw"][0].prod()) // 4)
    chats = [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{pads}<|vision_end|>{INSTRUCTION.format(prompt=prompt)}\n\nEND\n<|im_end|>\n"
        "<|im_start|>assistant\n"
        for prompt in prompts
    ]
    inputs |= tokenizer(chats, padding=True, padding_side="right", return_tensors="pt")
    return inputs, tokenizer.convert_tokens_to_ids("<|Reward|>")


@torch.no_grad()
def _published_scores(network, images, prompts):
    inputs, reward_id = _published_inputs(images, prompts)
    embeddings = network.get_input_embeddings()(inputs["input_ids"])
    seen = network.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    is_picture = (inputs["input_ids"] == network.config.image_token_id)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(is_picture, seen)
    hidden = network.model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])[0]
    return network.rm_head(hidden)[inputs["input_ids"] == reward_id].view(len(images), -1)[:, 0]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (512, 384)])
def test_score_is_the_published_networks(tiny_hpsv3, hpsv3_network, height, width):
    images = _images(len(PROMPTS), height, width)
    reward = _load(tiny_hpsv3)
    scores = _score(reward, images).detach()
    assert reward.name == "hpsv3" and reward.differentiable and scores.dtype == torch.float32
    expected = _published_scores(hpsv3_network, images, PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert scores.std() > 1e-2


def test_the_instruction_is_the_published_one():
    """The hash is of the published INSTRUCTION and prompt_with_special_token for the prompt "a {x} cat"."""
    text = INSTRUCTION.format(prompt="a {x} cat") + "\n\nEND\n"
    assert len(text) == 2586
    digest = "2ca386f4d4d0aa3cbdb3bb6441eedea7ca74e7ef3731c94788ffce21b53d3883"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_squares_become_448_pixels(tiny_hpsv3):
    sizes = _load(tiny_hpsv3).image_input.size
    assert sizes(512, 512) == sizes(1024, 1024) == sizes(64, 64) == (448, 448)
    assert sizes(512, 768) == (364, 532) == smart_resize(512, 768, 28, PIXELS, PIXELS)
    with pytest.raises(ValueError, match="over 200 times"):
        sizes(10, 2010)


def test_gradient_is_the_finite_difference(tiny_hpsv3):
    """In float64 without roundings; Qwen2-VL computes its norms and angles in float32 all the same, which
    leaves three digits of a difference. The steps follow the gradient, where it is largest."""
    reward = _load(tiny_hpsv3, torch.float64)
    reward.quantise = False
    generator = torch.Generator().manual_seed(1)
    images = 0.4 + 0.2 * torch.rand(1, 3, 40, 32, generator=generator, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_score(reward, leaf).sum(), leaf)
    for _ in range(2):
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        step = 1e-4 * (noise + gradient / gradient.std())
        ahead, behind = (_score(reward, images + sign * step).sum().detach() for sign in (1, -1))
        torch.testing.assert_close((ahead - behind) / 2, (gradient * step).sum(), rtol=1e-2, atol=0)


def test_layers_are_recomputed_once_in_the_backward_pass(tiny_hpsv3):
    reward = _load(tiny_hpsv3)
    calls = []
    for module in reward.model.modules():
        if type(module).__name__ in ("Qwen2VLVisionBlock", "Qwen2VLDecoderLayer"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    scores = _score(reward, _images(2).requires_grad_())
    assert len(calls) == 4
    scores.sum().backward()
    assert len(calls) == 8
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def test_chunks_and_bfloat16(tiny_hpsv3):
    images = _images(3)
    reward = _load(tiny_hpsv3)
    whole = _score(reward, images)
    reward.chunk_size = 2
    torch.testing.assert_close(_score(reward, images), whole)
    reduced = _load(tiny_hpsv3, torch.bfloat16)
    assert reduced.model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in reduced.head.parameters()} == {torch.float32}
    scores = _score(reduced, images)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, whole, atol=0.1 * whole.abs().max().item(), rtol=0)


def test_picture_and_prompt_both_matter(tiny_hpsv3):
    reward = _load(tiny_hpsv3)
    image = _images(1).expand(3, -1, -1, -1)
    assert len(set(_score(reward, image).tolist())) == 3
    assert len(set(_score(reward, _images(3), ["a red circle"] * 3).tolist())) == 3


def test_names_of_either_transformers_are_understood(hpsv3_network, tiny_hpsv3):
    older = states_from_hpsv3(load_file(tiny_hpsv3 / FILE))
    newer = states_from_hpsv3(hpsv3_network.state_dict())
    assert older.model.keys() == newer.model.keys() and older.head.keys() == newer.head.keys()
    assert len(newer.model) + len(newer.head) == len(hpsv3_network.state_dict()) - 1  # without lm_head
    assert sorted(newer.head) == ["0.bias", "0.weight", "3.bias", "3.weight", "5.bias", "5.weight"]


def test_the_published_architecture():
    """Parameters by hand: 28 text layers, 32 picture blocks of 12·1280² + 13·1280, patches and merger."""
    with torch.device("meta"):
        model = Qwen2VLModel(published_config())
    width, narrow = 3584, 4 * 128
    attention = 2 * width**2 + width + 2 * (width + 1) * narrow
    text = 151_658 * width + 28 * (attention + 3 * width * 18_944 + 2 * width) + width
    block = 12 * 1280**2 + 13 * 1280
    merger = 2 * 1280 + 5120 * 5121 + 5121 * width
    vision = 3 * 2 * 14**2 * 1280 + 32 * block + merger
    assert sum(parameter.numel() for parameter in model.parameters()) == text + vision
    assert math.isclose(text + vision, 7.75e9, rel_tol=0.01)


def test_missing_files_are_named_with_the_command_that_fetches_them(tiny_hpsv3, tmp_path):
    fetch = f"hf download MizzenAI/HPSv3 {FILE}"
    with pytest.raises(UserError, match=f"holds no {FILE}; fetch it with: {fetch}"):
        _load(tmp_path)
    with pytest.raises(UserError, match=f"{FILE} is not in the hub's cache .*{fetch}"):
        load_rewards([RewardSection("hpsv3")], CPU, torch.float32)
    folder = shutil.copytree(tiny_hpsv3, tmp_path / "hpsv3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"Qwen2-VL-7B-Instruct: no tokenizer.*hf download Qwen/Qwen2-VL-7B"):
        _load(folder)


def test_unfit_files_are_refused(tiny_hpsv3, tmp_path):
    folder = shutil.copytree(tiny_hpsv3, tmp_path / "hpsv3")
    state = load_file(folder / FILE)
    for name, message in {
        "visual.merger.mlp.2.bias": r"Qwen2VLModel .* such as visual\.merger\.mlp\.2\.bias",
        "model.norm.weight": r"Qwen2VLModel .* such as language_model\.norm\.weight",
        "rm_head.5.bias": r"the reward head .* such as 5\.bias",
    }.items():
        save_file({key: value for key, value in state.items() if key != name}, folder / FILE)
        with pytest.raises(UserError, match=f"1 of .* weights of {message}"):
            _load(folder)
    save_file({**state, "rm_head.0.weight": torch.zeros(1024, 8)}, folder / FILE)
    with pytest.raises(UserError, match=r"0\.weight .* has the shape \[1024, 8\], expected \[1024, 32\]"):
        _load(folder)
    shorter = state["model.embed_tokens.weight"][:-1].clone()
    save_file({**state, "model.embed_tokens.weight": shorter}, folder / FILE)
    with pytest.raises(UserError, match=rf"it has {len(shorter) + 1} tokens, the model {len(shorter)}"):
        _load(folder)
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{FILE}: damaged.*hf download MizzenAI/HPSv3 {FILE} --force"):
        _load(folder)


def test_a_tokenizer_of_another_model_is_refused(tiny_hpsv3, tmp_path):
    folder = shutil.copytree(tiny_hpsv3, tmp_path / "hpsv3")
    tokenizer = qwen_vl_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>", "<|Other|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"no tokenizer of this model: with <\|Reward\|> it has"):
        _load(folder)


def test_pictures_of_a_wrong_range_are_refused(tiny_hpsv3):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got values from"):
        _score(_load(tiny_hpsv3), _images(1) * 255)


def test_a_score_that_is_not_finite_is_handed_on(tiny_hpsv3):
    reward = _load(tiny_hpsv3)
    with torch.no_grad():
        reward.model.language_model.norm.weight.fill_(float("nan"))
    assert _score(reward, _images(1)).isnan().all()
