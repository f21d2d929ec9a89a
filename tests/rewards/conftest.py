"""Small checkpoints of every reward, in the layouts of the published ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import BERT_WORDS, ImageRewardNetwork, OpenClip, randomize, score_head
from safetensors.torch import save_file
from tiny_qwen import qwen_ids, qwen_vl_tokenizer
from transformers import (
    AutoTokenizer,
    BlipConfig,
    CLIPConfig,
    CLIPModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


@pytest.fixture(scope="session")
def tiny_geneval(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """Folder of a tiny Mask2Former with random weights that finds things, with a CLIP in ``clip``."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former import Mask2FormerImageProcessorPil

    from rtdmd.rewards.geneval_rules import CLASSES

    backbone = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=40,
        id2label=dict(enumerate(CLASSES)),
    )
    folder = tmp_path_factory.mktemp("geneval")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
        # Sure of a few classes, and of different ones per query.
        model.requires_grad_(False)
        model.model.transformer_module.queries_features.weight.normal_(0, 4)
        model.class_predictor.weight.normal_(0, 1)
        model.class_predictor.weight[5:].mul_(0.2)
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder)
    shutil.copytree(tiny_clip, folder / "clip")
    return folder


@pytest.fixture(scope="session")
def open_clip(tiny_clip: Path) -> OpenClip:
    """An OpenCLIP network of random weights over the tiny CLIP's vocabulary."""
    network = OpenClip(len(AutoTokenizer.from_pretrained(tiny_clip))).eval()
    randomize(network, seed=1)
    return network


@pytest.fixture(scope="session")
def tiny_hpsv2(tiny_clip: Path, open_clip: OpenClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with HPSv2's file, its configuration and tokenizer."""
    folder = tmp_path_factory.mktemp("hpsv2")
    torch.save({"epoch": 1, "state_dict": open_clip.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    text = CLIPModel.from_pretrained(tiny_clip).config.text_config.to_dict()
    text |= {"hidden_act": "gelu", "intermediate_size": 128}
    vision = {
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "gelu",
        "projection_dim": 16,
    }
    CLIPConfig(text_config=text, vision_config=vision, projection_dim=16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_clip).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_aesthetic(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP and the aesthetic predictor's file."""
    folder = tmp_path_factory.mktemp("aesthetic") / "both"
    shutil.copytree(tiny_clip, folder)
    head = score_head(16)
    randomize(head, seed=2)
    state = {f"layers.{name}": value for name, value in head.state_dict().items()}
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


@pytest.fixture(scope="session")
def image_reward_network() -> ImageRewardNetwork:
    """ImageReward's network with random weights."""
    network = ImageRewardNetwork(len(BERT_WORDS) + 2).eval()
    randomize(network, seed=3)
    return network


@pytest.fixture(scope="session")
def tiny_imagereward(
    image_reward_network: ImageRewardNetwork, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with ImageReward's file, its configuration and vocabulary."""
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(image_reward_network.state_dict(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n", encoding="utf-8")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(BERT_WORDS) + 2, "hidden_size": 32, "intermediate_size": 128, **sizes}
    vision = {
        "hidden_size": 48,
        "intermediate_size": 192,
        "image_size": 32,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
        **sizes,
    }
    BlipConfig(text_config=text, vision_config=vision).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hpsv3_network() -> Any:
    """HPSv3's network as published: a Qwen2-VL with an ``rm_head``, of random weights."""
    tokenizer = qwen_vl_tokenizer()
    text = {
        "vocab_size": len(tokenizer) + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    network = Qwen2VLForConditionalGeneration(config).eval()
    network.rm_head = torch.nn.Sequential(
        torch.nn.Linear(32, 1024),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.05),
        torch.nn.Linear(1024, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 2),
    ).eval()
    randomize(network, seed=4)
    return network


@pytest.fixture(scope="session")
def tiny_hpsv3(hpsv3_network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with HPSv3's file, weights named as the published one's, its configuration and tokenizer."""
    folder = tmp_path_factory.mktemp("hpsv3")
    state = {
        name.replace("model.visual.", "visual.").replace(
            "model.language_model.", "model."
        ): value.contiguous()
        for name, value in hpsv3_network.state_dict().items()
    }
    save_file(state, folder / "HPSv3.safetensors")
    hpsv3_network.config.save_pretrained(folder)
    qwen_vl_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_geneval2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen3-VL of random weights with its tokenizer."""
    folder = tmp_path_factory.mktemp("geneval2")
    tokenizer = qwen_vl_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    model = Qwen3VLForConditionalGeneration(config)
    randomize(model, seed=5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    half = [0.5] * 3
    size = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
    processor = Qwen2VLImageProcessorPil(patch_size=16, image_mean=half, image_std=half, size=size)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_weights(
    tiny_clip: Path,
    tiny_hpsv2: Path,
    tiny_hpsv3: Path,
    tiny_aesthetic: Path,
    tiny_imagereward: Path,
    tiny_geneval: Path,
    tiny_geneval2: Path,
) -> dict[str, Path]:
    """Small weights for every reward that has some."""
    return {
        "aesthetic": tiny_aesthetic,
        "clipscore": tiny_clip,
        "geneval": tiny_geneval,
        "geneval2": tiny_geneval2,
        "hpsv2": tiny_hpsv2,
        "hpsv3": tiny_hpsv3,
        "imagereward": tiny_imagereward,
        "pickscore": tiny_clip,
    }
