"""Reward models: a registry of what there is, and loading of what a recipe names.

Importing this package imports neither torch nor transformers; a scorer's own imports wait until it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rtdmd.errors import UserError, nearest_hint
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards.sources import HubFiles

if TYPE_CHECKING:
    import torch

    from rtdmd.rewards.protocol import Reward


@dataclass(frozen=True)
class RewardSpec:
    """What is known of a reward model without loading it."""

    name: str
    differentiable: bool  # the score has a gradient to the images
    default_weights: str | None  # hub id of the published weights; None: the scorer has no weights
    licence: str
    modes: tuple[str, ...] = ("default",)
    needs_files: tuple[HubFiles, ...] = ()  # to load the published weights; the weights' own file comes first
    needs_packages: tuple[str, ...] = ()  # of the extra that is named as the scorer
    needs_cpu_alone: bool = False  # `reward_workers` can take it off the training process
    # Raises UserError for a prompt that the scorer would refuse, as far as prompt and row tell.
    check_prompt: Callable[[str, Mapping[str, Any]], object] | None = None


def _check_ocr_prompt(prompt: str, row: Mapping[str, Any]) -> None:
    from rtdmd.rewards.ocr import target_text

    target_text(prompt)


def _check_geneval_prompt(prompt: str, row: Mapping[str, Any]) -> None:
    from rtdmd.rewards.geneval_rules import Request

    Request.parse(prompt, row)


def _check_geneval2_prompt(prompt: str, row: Mapping[str, Any]) -> None:
    from rtdmd.rewards.geneval2_rules import questions

    questions(prompt, row)


def _check_shapes_prompt(prompt: str, row: Mapping[str, Any]) -> None:
    from rtdmd.shapes.captions import Caption

    Caption.from_metadata({**row, "prompt": prompt})


_CLIP_L = "openai/clip-vit-large-patch14"
_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
_QWEN2_VL = "Qwen/Qwen2-VL-7B-Instruct"
_QWEN3_VL = "Qwen/Qwen3-VL-8B-Instruct"
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
_CLIP_MODEL = ("model.safetensors", "config.json")

_SPECS = (
    RewardSpec(
        name="clipscore",
        differentiable=True,
        default_weights=_CLIP_L,
        licence="MIT (the code's; the weights state none)",
        modes=("default", "official"),
        needs_files=(HubFiles(_CLIP_L, (*_CLIP_MODEL, "preprocessor_config.json", *_TOKENIZER)),),
    ),
    RewardSpec(
        name="pickscore",
        differentiable=True,
        default_weights="yuvalkirstain/PickScore_v1",
        licence="none stated",
        needs_files=(
            HubFiles("yuvalkirstain/PickScore_v1", _CLIP_MODEL),
            HubFiles(_CLIP_H, ("config.json", "preprocessor_config.json", *_TOKENIZER)),
        ),
    ),
    RewardSpec(
        name="hpsv2",
        differentiable=True,
        default_weights="xswu/HPSv2",
        licence="Apache-2.0",
        needs_files=(
            HubFiles("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)),
            HubFiles(_CLIP_H, ("config.json", *_TOKENIZER)),
        ),
    ),
    RewardSpec(
        name="hpsv3",
        differentiable=True,
        default_weights="MizzenAI/HPSv3",
        licence="MIT (Qwen2-VL's is Apache-2.0)",
        needs_files=(
            HubFiles("MizzenAI/HPSv3", ("HPSv3.safetensors",)),
            HubFiles(_QWEN2_VL, _TOKENIZER),
        ),
    ),
    RewardSpec(
        name="aesthetic",
        differentiable=True,
        default_weights="camenduru/improved-aesthetic-predictor",
        licence="Apache-2.0 (the head's; CLIP's weights state none)",
        needs_files=(
            HubFiles("camenduru/improved-aesthetic-predictor", ("sac+logos+ava1-l14-linearMSE.pth",)),
            HubFiles(_CLIP_L, (*_CLIP_MODEL, "preprocessor_config.json")),
        ),
    ),
    RewardSpec(
        name="imagereward",
        differentiable=True,
        default_weights="THUDM/ImageReward",
        licence="Apache-2.0",
        needs_files=(
            HubFiles("THUDM/ImageReward", ("ImageReward.pt",)),
            HubFiles("google-bert/bert-base-uncased", _TOKENIZER),
        ),
    ),
    RewardSpec(
        name="compressibility",
        differentiable=False,
        default_weights=None,
        licence="no weights",
        needs_cpu_alone=True,
    ),
    RewardSpec(
        name="ocr",
        differentiable=False,
        default_weights=None,
        licence="Apache-2.0",
        modes=("default", "official"),
        needs_packages=("rapidocr", "onnxruntime"),
        needs_cpu_alone=True,
        check_prompt=_check_ocr_prompt,
    ),
    RewardSpec(
        name="geneval",
        differentiable=False,
        default_weights=_MASK2FORMER,
        licence="MIT (Mask2Former's code; weights and CLIP's state none)",
        modes=("default", "official"),
        needs_files=(
            HubFiles(_MASK2FORMER, (*_CLIP_MODEL, "preprocessor_config.json")),
            HubFiles(_CLIP_L, (*_CLIP_MODEL, "preprocessor_config.json", *_TOKENIZER)),
        ),
        check_prompt=_check_geneval_prompt,
    ),
    RewardSpec(
        name="geneval2",
        differentiable=True,
        default_weights=_QWEN3_VL,
        licence="Apache-2.0 (the benchmark's prompts are CC BY-NC 4.0)",
        modes=("default", "official"),
        needs_files=(
            HubFiles(
                _QWEN3_VL,
                (
                    "model.safetensors.index.json",
                    *(f"model-0000{part}-of-00004.safetensors" for part in range(1, 5)),
                    "config.json",
                    "preprocessor_config.json",
                    *_TOKENIZER,
                ),
            ),
        ),
        check_prompt=_check_geneval2_prompt,
    ),
    RewardSpec(
        name="shapes",
        differentiable=False,
        default_weights=None,
        licence="no weights",
        modes=("default", "official"),
        needs_cpu_alone=True,
        check_prompt=_check_shapes_prompt,
    ),
)

REWARDS: dict[str, RewardSpec] = {spec.name: spec for spec in _SPECS}


def load_rewards(
    sections: Sequence[RewardSection], device: torch.device, dtype: torch.dtype, workers: int = 0
) -> list[Reward]:
    """Load the reward models that the recipe names, in its order, frozen, on ``device`` in ``dtype``.

    Those with a url are asked there. Those that need the CPU alone run in ``workers`` processes each, or
    here if that is 0.

    Raises:
        UserError: names are unknown (all are named, before anything is loaded), a scorer without weights is
            given some, weights cannot be loaded, or nothing answers at a url; it names the reward.
    """
    faults = []
    for section in sections:
        spec = REWARDS.get(section.name)
        if spec is None:
            faults.append(f"unknown reward {section.name!r}{nearest_hint(section.name, list(REWARDS))}")
        elif spec.default_weights is None and section.weights is not None:
            faults.append(
                f"reward {section.name!r} has no weights, got {section.weights!r}; leave the key out"
            )
        if spec is not None and section.mode not in spec.modes:
            faults.append(f"reward {section.name!r} has no mode {section.mode!r}; leave the key out")
    if faults:
        raise UserError("\n".join(faults))
    return [_load_reward(section, device, dtype, workers) for section in sections]


def _load_reward(section: RewardSection, device: torch.device, dtype: torch.dtype, workers: int) -> Reward:
    try:
        if section.url is not None:
            from rtdmd.rewards.remote import RemoteReward

            return RemoteReward(section)
        if workers and REWARDS[section.name].needs_cpu_alone:
            from rtdmd.rewards.serving.pool import PooledReward

            return PooledReward(section, workers)
        # A scorer's module bears its name.
        return import_module(f"rtdmd.rewards.{section.name}").load(section, device, dtype)
    except UserError as error:
        raise UserError(f"reward {section.name}: {error}") from error
