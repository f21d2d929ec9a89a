"""Made-up adapters under the names of the published files, on disk as a stage leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from rtdmd.models import get_family
from rtdmd.models.adapters import save_diffusers_lora
from rtdmd.models.lora import attach_adapter
from rtdmd.recipe.schema import LoraSection
from rtdmd.training.artifacts import GENERATOR_FILE

PUBLISHED = LoraSection(rank=32, alpha=64.0)


def load_transformer(pipeline: Path, family: str) -> nn.Module:
    network_class = get_family(family).transformer_class
    network = network_class.from_pretrained(pipeline, subfolder="transformer")  # type: ignore[attr-defined]
    return network.eval().requires_grad_(False)


def random_lora(pipeline: Path, family: str, seed: int, rank: int = 32) -> dict[str, Tensor]:
    """``….lora_A.default.weight`` and ``….lora_B.default.weight``; ΔW is about a third of W."""
    network = load_transformer(pipeline, family)
    attach_adapter(network, rank, 2.0 * rank, get_family(family).lora_targets)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            std = parameter.shape[1] ** -0.5 if ".lora_A." in name else 0.17 * rank**-0.5
            state[name] = std * torch.randn(parameter.shape, generator=generator)
    return state


def write_stage(
    folder: Path, state: Mapping[str, Tensor], family: str, lora: LoraSection = PUBLISHED
) -> Path:
    """A stage's folder with ``generator_ema.pt`` and ``pytorch_lora_weights.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), folder / GENERATOR_FILE)
    save_diffusers_lora(dict(state), folder, get_family(family), lora)
    return folder


def merged(network: nn.Module, *states: Mapping[str, Tensor], scale: float = 2.0) -> nn.Module:
    """W + scale·B·A of each state in turn, by the definition, in place."""
    weights = dict(network.named_parameters())
    for state in states:
        for name, a in state.items():
            if ".lora_A." in name:
                b = state[name.replace(".lora_A.", ".lora_B.")]
                weights[name.replace(".lora_A.default", "")].data += scale * b @ a
    return network


def open_pipeline(pipeline: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe
