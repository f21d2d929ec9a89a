"""HPSv3: a Qwen2-VL 7B trained on human preferences, unbounded (arXiv 2508.03789).

score = first output of head(h), h the last hidden state at the token <|Reward|>, which ends an instruction
that holds the prompt. The second output is the uncertainty that training estimates along. The head is
D-1024-16-2 with ReLU. Facts (input, token, picture size, head, base model) from
https://github.com/MizzenAI/HPSv3, MIT: hpsv3/inference.py, hpsv3/train.py, hpsv3/model/qwen2vl_trainer.py,
hpsv3/dataset/data_collator_qwen.py, hpsv3/config/HPSv3_7B.yaml.

The published network embeds pictures and text itself and hands Qwen2-VL embeddings alone, from which that
cannot tell rows and columns: all tokens, the picture's too, are numbered in order. It was trained so, and
here it is the same. The picture comes before the text, so nothing of a prompt's computation can be kept.

Legend: B batch, n tokens of a picture (256 of a square), T tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import REWARDS
from rtdmd.rewards.checkpoints import build_model, check_weights, config_beside, read_state_dict
from rtdmd.rewards.clip import has_tokenizer
from rtdmd.rewards.clip_vision import CLIP_MEAN, CLIP_STD
from rtdmd.rewards.hpsv3_instruction import INSTRUCTION, REWARD_TOKEN
from rtdmd.rewards.protocol import Metadata
from rtdmd.rewards.qwen_vl import (
    PICTURE_END,
    PICTURE_START,
    QwenInput,
    load_qwen_tokenizer,
    picture_grid,
    right_padded,
)
from rtdmd.rewards.recomputation import recompute_in_backward
from rtdmd.rewards.sources import find_file, local_folder
from rtdmd.rewards.validation import check_batch, check_scores

PIXELS = 256 * 28 * 28

_BEFORE = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{PICTURE_START}"

# Files written with transformers before 4.52, as the published one is, lack the model's own level.
_RENAMED = {
    re.compile(r"visual\.(.+)"): r"visual.\1",
    re.compile(r"model\.visual\.(.+)"): r"visual.\1",
    re.compile(r"model\.language_model\.(.+)"): r"language_model.\1",
    re.compile(r"model\.((?:embed_tokens|layers|norm)\..+)"): r"language_model.\1",
}


class Hpsv3Reward:
    """Qwen2-VL with the head, frozen. Activations of both towers are recomputed in the backward pass.

    Args:
        model: without the vocabulary's head.
        head: as ``reward_head`` makes it, in float32 at least.
        tokenizer: Qwen2-VL's with ``<|Reward|>``.
        chunk_size: pictures scored at once.
        quantise: False leaves out the roundings of the preprocessing.
        checkpoint_layers: recompute activations in the backward pass.
    """

    name = "hpsv3"
    differentiable = True

    def __init__(
        self,
        model: Qwen2VLModel,
        head: nn.Sequential,
        tokenizer: Any,
        *,
        chunk_size: int = 4,
        quantise: bool = True,
        checkpoint_layers: bool = True,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.head = head.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.chunk_size = chunk_size
        self.quantise = quantise
        vision = model.config.vision_config
        self.image_input = QwenInput(
            vision.patch_size, PIXELS, PIXELS, CLIP_MEAN, CLIP_STD, vision.spatial_merge_size
        )
        if checkpoint_layers:
            recompute_in_backward(model.visual.blocks)
            recompute_in_backward(model.language_model.layers)

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
        count, device = len(images), images.device
        patches, (rows, columns) = self.image_input.patches(images, self.quantise)
        grid = picture_grid(count, rows, columns, device)
        pictures = self.model.visual(patches.to(self.model.dtype), grid_thw=grid).pooler_output
        pictures = pictures.unflatten(0, (count, -1))  # (B, n, D)
        # What follows <|Reward|> in the published input comes too late to change its hidden state.
        endings = [self._ids(PICTURE_END + INSTRUCTION.format(prompt=prompt)) for prompt in prompts]
        embed = self.model.get_input_embeddings()
        before = embed(torch.tensor([self._ids(_BEFORE)], device=device)).expand(count, -1, -1)
        embeddings = torch.cat([before, pictures, embed(right_padded(endings, device))], dim=1)  # (B, T, D)
        hidden = self.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        skipped = before.shape[1] + pictures.shape[1] - 1
        last = torch.tensor([skipped + len(ending) for ending in endings], device=device)
        rewarded = hidden[torch.arange(count, device=device), last]
        return self.head(rewarded.to(torch.promote_types(rewarded.dtype, torch.float32)))[:, 0]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]


def load(section: RewardSection, device: torch.device, dtype: torch.dtype) -> Hpsv3Reward:
    """Load ``section.weights``: a file, a folder that holds it, or a hub id, by default the published one.

    Files beside a local one take precedence: a tokenizer over Qwen2-VL's, a config.json (Qwen2VLConfig, for a
    checkpoint of another size) over the 7B's. The head stays in float32.

    Raises:
        UserError: files are missing or damaged, or weights are absent from them or have another shape.
    """
    published, tokenizer_files = REWARDS["hpsv3"].needs_files
    weights = section.weights or published.repo
    path, folder = find_file(weights, published, section.revision), local_folder(weights)
    config = config_beside(folder, published_config())
    states = states_from_hpsv3(read_state_dict(path, published))
    embedding = states.model.get("language_model.embed_tokens.weight")
    if embedding is not None:
        config.text_config.vocab_size = len(embedding)  # as many as the tokenizer had, <|Reward|> included
    model = build_model(Qwen2VLModel, config, states.model, path, dtype)
    head = _load_head(config.text_config.hidden_size, states.head, path)
    source = str(folder) if folder is not None and has_tokenizer(folder) else tokenizer_files.repo
    tokenizer = load_qwen_tokenizer(source, config.image_token_id)
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    if len(tokenizer) != config.text_config.vocab_size:
        raise UserError(
            f"{source}: no tokenizer of this model: with {REWARD_TOKEN} it has {len(tokenizer)} tokens, "
            f"the model {config.text_config.vocab_size}"
        )
    model.to(device)
    head.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
    return Hpsv3Reward(model, head, tokenizer)


def published_config() -> Qwen2VLConfig:
    """Qwen2-VL 7B; ``load`` takes the size of the vocabulary from the checkpoint."""
    text = {
        "vocab_size": 151658,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    }
    return Qwen2VLConfig(text_config=text, vision_config=vision)


def reward_head(width: int) -> nn.Sequential:
    """D-1024-16-2 with ReLU; the dropout, inactive in evaluation mode, counts in the weights' names."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )


class Hpsv3States(NamedTuple):
    """State dicts of the two parts."""

    model: dict[str, Tensor]
    head: dict[str, Tensor]


def states_from_hpsv3(state: Mapping[str, Tensor]) -> Hpsv3States:
    """HPSv3's state dict with the names of Qwen2VLModel and ``reward_head``, without Qwen2-VL's lm_head."""
    states = Hpsv3States({}, {})
    for name, tensor in state.items():
        if name.startswith("rm_head."):
            states.head[name.removeprefix("rm_head.")] = tensor
            continue
        for pattern, renamed in _RENAMED.items():
            if pattern.fullmatch(name):
                states.model[pattern.sub(renamed, name)] = tensor
    return states


def _load_head(width: int, state: Mapping[str, Tensor], source: Path) -> nn.Sequential:
    with torch.device("meta"):
        head = reward_head(width)
    expected = head.state_dict()
    check_weights(expected, state, source, "the reward head")
    head.load_state_dict({name: state[name].float() for name in expected}, assign=True)
    return head
