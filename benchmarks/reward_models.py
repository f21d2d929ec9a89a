"""The differentiable scorers with random weights, at true size or tiny, without any file.

Call a builder where new modules have the wanted device and dtype. Vocabularies are made up: token ids are
valid, their number per prompt is about the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipTextModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from rtdmd.models.tiny_tokenizers import WORDS, clip_tokenizer, qwen_tokenizer
from rtdmd.rewards import hpsv2, hpsv3, imagereward
from rtdmd.rewards.aesthetic import AestheticReward
from rtdmd.rewards.clip import ClipEncoder, ClipReward
from rtdmd.rewards.clip_vision import CLIP_MEAN, CLIP_STD, ClipInput, ClipVision
from rtdmd.rewards.geneval2 import Geneval2Reward
from rtdmd.rewards.hpsv3 import REWARD_TOKEN, Hpsv3Reward, reward_head
from rtdmd.rewards.imagereward import ImageReward
from rtdmd.rewards.linear_head import LinearHead
from rtdmd.rewards.protocol import Reward
from rtdmd.rewards.qwen_vl import PICTURE_END, PICTURE_START, PICTURE_TOKEN, QwenInput

Built = tuple[Reward, list[nn.Module]]

DEFAULT_SCORERS = ("pickscore", "hpsv2", "clipscore", "imagereward")
OPTIONAL_SCORERS = ("aesthetic", "hpsv3", "geneval2")

_TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_TINY_VISION = {**_TINY_TEXT, "image_size": 224, "patch_size": 56}


def vit_l_14() -> CLIPConfig:
    """OpenAI's CLIP ViT-L/14."""
    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    }
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 768,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)


def qwen3_vl_8b() -> Qwen3VLConfig:
    """Qwen3-VL 8B."""
    text = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision)


def _clip(config: CLIPConfig, tiny: bool, fit: Any = "crop") -> ClipEncoder:
    if tiny:
        tower = {"projection_dim": 16}
        config = CLIPConfig(
            text_config=_TINY_TEXT | tower, vision_config=_TINY_VISION | tower, projection_dim=16
        )
    tokenizer = clip_tokenizer()
    return ClipEncoder(CLIPModel(config), tokenizer, ClipInput(224, CLIP_MEAN, CLIP_STD, fit))


def _pickscore(tiny: bool) -> Built:
    encoder = _clip(hpsv2.vit_h_14(), tiny)
    return ClipReward("pickscore", encoder, 26.0), [encoder.model]


def _hpsv2(tiny: bool) -> Built:
    encoder = _clip(hpsv2.vit_h_14(), tiny, "pad")
    return ClipReward("hpsv2", encoder), [encoder.model]


def _clipscore(tiny: bool) -> Built:
    encoder = _clip(vit_l_14(), tiny)
    return ClipReward("clipscore", encoder, 100.0), [encoder.model]


def _aesthetic(tiny: bool) -> Built:
    encoder = _clip(vit_l_14(), tiny)
    model = encoder.model
    del model.text_model, model.text_projection  # the scorer loads the vision tower alone
    head = LinearHead(model.config.projection_dim).float().requires_grad_(False).eval()
    vision = ClipVision(model, encoder.image_input, checkpoint_layers=False)  # its layers are wrapped already
    return AestheticReward(vision, head), [model, head]


def _imagereward(tiny: bool) -> Built:
    config = imagereward.published_config()
    if tiny:
        text = {**_TINY_TEXT, "encoder_hidden_size": 32, "vocab_size": 64, "is_decoder": True}
        config = BlipConfig(text_config=text, vision_config=_TINY_VISION)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[:40]]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    vision = BlipVisionModel(config.vision_config)
    text_model = BlipTextModel(config.text_config, add_pooling_layer=False)
    head = LinearHead(config.text_config.hidden_size).float()
    return ImageReward(vision, text_model, head, tokenizer), [vision, text_model, head]


def _qwen_tokenizer() -> Any:
    tokenizer = qwen_tokenizer((*WORDS, "Yes", "How", "many", "Are", "there", "image", "Answer", "word"))
    markers = ["<|im_start|>", "<|im_end|>", PICTURE_START, PICTURE_END, PICTURE_TOKEN, REWARD_TOKEN]
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    return tokenizer


def _hpsv3(tiny: bool) -> Built:
    config = hpsv3.published_config()
    if tiny:
        text = {**_TINY_TEXT, **_TINY_ROPE, "vocab_size": 1024, "num_key_value_heads": 1}
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision)
    model = Qwen2VLModel(config)
    head = reward_head(config.text_config.hidden_size).float()
    return Hpsv3Reward(model, head, _qwen_tokenizer()), [model, head]


def _geneval2(tiny: bool) -> Built:
    config = qwen3_vl_8b()
    if tiny:
        rope = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        }
        text = {
            **_TINY_TEXT,
            "vocab_size": 1024,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": rope,
        }
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
        vision = {**shape, "depth": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        config = Qwen3VLConfig(text_config=text, vision_config=vision)
    model = Qwen3VLForConditionalGeneration(config)
    half = (0.5, 0.5, 0.5)
    image_input = QwenInput(16, 65_536, 16_777_216, half, half)
    return Geneval2Reward(model, _qwen_tokenizer(), image_input), [model]


BUILDERS: dict[str, Callable[[bool], Built]] = {
    "pickscore": _pickscore,
    "hpsv2": _hpsv2,
    "clipscore": _clipscore,
    "imagereward": _imagereward,
    "aesthetic": _aesthetic,
    "hpsv3": _hpsv3,
    "geneval2": _geneval2,
}
