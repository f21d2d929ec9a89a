"""ImageReward: BLIP's text encoder looking at the picture, trained on human preferences (arXiv 2304.05977).

score = (head(h_CLS) − 0.16717) / 1.03334, about −2 to 2, h_CLS the text encoder's first hidden state under
cross-attention to the picture's patches, head a row of linear layers. The text is read anew for every
picture, so nothing of it can be cached.

Legend: B batch, P patches and the class token, V width of the vision tower, T text tokens (35), D text width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipTextModel, BlipVisionModel

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import REWARDS
from rtdmd.rewards.checkpoints import build_model, config_beside, read_state_dict
from rtdmd.rewards.clip_vision import CLIP_MEAN, CLIP_STD, ClipInput
from rtdmd.rewards.linear_head import LinearHead
from rtdmd.rewards.protocol import Metadata
from rtdmd.rewards.recomputation import recompute_in_backward
from rtdmd.rewards.sources import HubFiles, fetch_hint, find_file, first_line, local_folder
from rtdmd.rewards.validation import check_batch, check_scores

_SCORE_MEAN = 0.16717362830052426
_SCORE_STD = 1.0333394966054072
_MAX_TOKENS = 35
# BLIP's additions to BERT's vocabulary, in its order.
_ADDED_TOKENS = ["[DEC]", "[ENC]"]

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_IN_BLOCK = {
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class ImageReward:
    """Picture tower, text encoder with cross-attention and head, frozen.

    Activations of both are recomputed in the backward pass.

    Args:
        vision: BLIP's picture tower.
        text: BLIP's text encoder, without pooling layer.
        head: on the first token's hidden state.
        tokenizer: BERT's, with BLIP's two tokens added.
        chunk_size: pictures scored at once.
        quantise: False leaves out the roundings of the preprocessing.
        checkpoint_layers: recompute activations in the backward pass.
    """

    name = "imagereward"
    differentiable = True

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        head: LinearHead,
        tokenizer: Any,
        *,
        chunk_size: int = 16,
        quantise: bool = True,
        checkpoint_layers: bool = True,
    ) -> None:
        self.vision = vision.requires_grad_(False).eval()
        self.text = text.requires_grad_(False).eval()
        self.head = head.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.image_input = ClipInput(vision.config.image_size, CLIP_MEAN, CLIP_STD)
        self.chunk_size = chunk_size
        self.quantise = quantise
        if checkpoint_layers:
            recompute_in_backward(vision.encoder.layers)
            recompute_in_backward(text.encoder.layer)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores [B], float32, differentiable with respect to ``images`` [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: the batch has another shape or range.
        """
        check_batch(images, prompts, metadata)
        starts = range(0, len(images), self.chunk_size)
        chunks = [slice(start, start + self.chunk_size) for start in starts]
        scores = torch.cat([self._chunk(images[chunk], prompts[chunk]) for chunk in chunks])
        return check_scores(self.name, scores, prompts)

    def _chunk(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self.image_input.prepare(images, self.quantise).to(self.vision.dtype)
        # Always 35 tokens: the padding is masked, and the shape doesn't depend on the chunk's other prompts.
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        ).to(pixels.device)
        patches = self.vision(pixels).last_hidden_state  # (B, P, V)
        # An encoder in spite of its configuration's is_decoder, which is there for the cross-attention.
        hidden = self.text(
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=patches,
            is_decoder=False,
        ).last_hidden_state  # (B, T, D)
        first = hidden[:, 0]
        logits = self.head(first.to(torch.promote_types(first.dtype, torch.float32)))
        return (logits - _SCORE_MEAN) / _SCORE_STD


def load(section: RewardSection, device: torch.device, dtype: torch.dtype) -> ImageReward:
    """Load ``section.weights``: a file, a folder that holds it, or a hub id, by default the published one.

    Files beside a local one take precedence: a tokenizer over BERT's, a config.json (BlipConfig, for a
    checkpoint of another size) over ViT-L/16 and BERT's base size. The head stays in float32.

    Raises:
        UserError: files are missing or damaged, or weights are absent from them or have another shape.
    """
    published, tokenizer_files = REWARDS["imagereward"].needs_files
    weights = section.weights or published.repo
    path, folder = find_file(weights, published, section.revision), local_folder(weights)
    config = config_beside(folder, published_config())
    states = blip_states_from_image_reward(read_state_dict(path, published))
    vision = build_model(BlipVisionModel, config.vision_config, states.vision, path)
    text = build_model(BlipTextModel, config.text_config, states.text, path, add_pooling_layer=False)
    head = LinearHead.load(config.text_config.hidden_size, states.head, path)
    tokenizer = _load_tokenizer(folder, tokenizer_files, config.text_config.vocab_size)
    reward = ImageReward(vision, text, head, tokenizer)
    vision.to(device=device, dtype=dtype)
    text.to(device=device, dtype=dtype)
    head.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
    return reward


def published_config() -> BlipConfig:
    """BLIP's ViT-L/16 at 224 pixels, and the text encoder of ImageReward's med_config.json."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }
    text = {
        "vocab_size": 30524,
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "is_decoder": True,
    }
    return BlipConfig(text_config=text, vision_config=vision)


class BlipStates(NamedTuple):
    """State dicts of the three parts."""

    vision: dict[str, Tensor]
    text: dict[str, Tensor]
    head: dict[str, Tensor]


def blip_states_from_image_reward(state: Mapping[str, Tensor]) -> BlipStates:
    """ImageReward's state dict with the names of BlipVisionModel, BlipTextModel and LinearHead.

    The layouts are the same, queries, keys and values of the picture tower stay fused. What the score doesn't
    need (BLIP's contrastive projections, buffers) is left out, or by whoever loads the result.
    """
    states = BlipStates({}, {}, {})
    for name, tensor in state.items():
        part, _, inner = name.removeprefix("blip.").partition(".")
        block = _BLOCK.fullmatch(inner)
        if part == "text_encoder":
            states.text[inner] = tensor
        elif part == "mlp":
            states.head[inner] = tensor
        elif part == "visual_encoder" and inner in _VISION:
            states.vision[_VISION[inner]] = tensor
        elif part == "visual_encoder" and block is not None and block[2] in _IN_BLOCK:
            states.vision[f"encoder.layers.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"] = tensor
    return states


def _load_tokenizer(folder: Path | None, published: HubFiles, vocabulary: int) -> BertTokenizer:
    names = ("tokenizer.json", "vocab.txt")
    is_local = folder is not None and any((folder / name).is_file() for name in names)
    source = str(folder) if is_local else published.repo
    hint = fetch_hint(source, published.files)
    try:
        tokenizer = BertTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no BERT tokenizer ({first_line(error)}){hint}") from error
    tokenizer.add_tokens(_ADDED_TOKENS, special_tokens=True)
    if len(tokenizer) != vocabulary:
        # Where the files are missing, transformers makes up a BertTokenizer of five special tokens.
        raise UserError(
            f"{source}: no tokenizer of this model: it has {len(tokenizer)} tokens, "
            f"the model {vocabulary}{hint}"
        )
    return tokenizer
