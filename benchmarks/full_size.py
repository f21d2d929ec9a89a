"""Pipelines of true size with random weights, made on the device, behind the interfaces of loaded ones.

Speed and memory don't depend on values. Vocabularies are small: token ids are valid, every prompt is padded
to the published length. Nothing is downloaded and nothing goes through a disk.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from benchmarks.reward_memory import creating_on
from benchmarks.reward_models import BUILDERS
from rtdmd.errors import UserError
from rtdmd.models import get_family
from rtdmd.models.flux2 import DEFAULT_TEXT_TOKENS, Flux2Family, text_layers
from rtdmd.models.protocol import ModelFamily
from rtdmd.models.sd3 import DEFAULT_SHIFT, DEFAULT_T5_TOKENS, SD3Family, TextStack
from rtdmd.models.tiny_tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer
from rtdmd.recipe.schema import Recipe, RewardSection
from rtdmd.rewards.protocol import Metadata, Reward
from rtdmd.stages.assemble import Loaders


@dataclass(frozen=True)
class Size:
    """Configurations of a pipeline's parts, as their classes take them."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text: tuple[dict[str, Any], ...]  # FLUX.2: Qwen3; SD3: two CLIPs and T5


def _klein(double: int, single: int, heads: int, text: dict[str, Any]) -> Size:
    """transformer/config.json and text_encoder/config.json of FLUX.2-klein; its VAE is the default one."""
    qwen = {
        "vocab_size": 151936,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    return Size(
        transformer={
            "in_channels": 128,
            "num_layers": double,
            "num_single_layers": single,
            "attention_head_dim": 128,
            "num_attention_heads": heads,
            "joint_attention_dim": 3 * text["hidden_size"],
            "guidance_embeds": False,
        },
        vae={},
        text=({**qwen, "head_dim": 128, **text},),
    )


_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64}


def _sd3(**transformer: Any) -> Size:
    """transformer, text_encoder* and vae/config.json of Stable Diffusion 3 and 3.5 medium."""
    shape = {"sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24}
    heads = {"attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536}
    widths = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    return Size(
        transformer={**shape, **heads, **widths, **transformer},
        vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16},
        text=(
            {**_CLIP_L, "vocab_size": 49408, "projection_dim": 768, "hidden_act": "quick_gelu"},
            {**_CLIP_G, "vocab_size": 49408, "projection_dim": 1280, "hidden_act": "gelu"},
            _T5_XXL,
        ),
    )


# By the recipe's model.pipeline. The encoders of klein are Qwen3 4B and 8B.
SIZES: dict[str, Size] = {
    "black-forest-labs/FLUX.2-klein-base-4B": _klein(
        5, 20, 24, {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
    ),
    "black-forest-labs/FLUX.2-klein-base-9B": _klein(
        8, 24, 32, {"hidden_size": 4096, "intermediate_size": 12288}
    ),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(
        pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(pos_embed_max_size=192),
}

_TINY_CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_VAE = {
    "block_out_channels": (16, 16, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
_TINY_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}

# By family; for trying the benchmark itself.
TINY: dict[str, Size] = {
    "flux2": Size(
        transformer={
            **_TINY_HEADS,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 96,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
            "guidance_embeds": False,
        },
        vae=_TINY_VAE,
        text=(
            {
                "vocab_size": 1024,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
            },
        ),
    ),
    "sd3": Size(
        transformer={
            **_TINY_HEADS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 48,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 32,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        vae=_TINY_VAE,
        text=(
            {**_TINY_CLIP, "vocab_size": 1024, "projection_dim": 16},
            {**_TINY_CLIP, "vocab_size": 1024, "projection_dim": 16},
            {"vocab_size": 1024, "d_model": 48, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16},
        ),
    ),
}


def size_of(recipe: Recipe, tiny: bool) -> Size:
    """The configurations of the recipe's pipeline. UserError if none are known here."""
    if tiny:
        return TINY[recipe.model.family]
    if recipe.model.pipeline not in SIZES:
        raise UserError(
            f"model.pipeline = {recipe.model.pipeline!r}: the benchmark knows the sizes of "
            f"{', '.join(SIZES)}; or pass --tiny"
        )
    return SIZES[recipe.model.pipeline]


class RandomWeights:
    """A transformer's tensors, drawn where they are needed: matrices ~ N(0, 1/inputs), gains 1, biases 0.

    Values are a function of name and first row; ranks that keep other rows don't draw the same matrix.
    """

    def __init__(
        self, network_class: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = config
        self._device = device
        self._dtype = dtype
        with torch.device("meta"):
            network = network_class(**config)
        self._shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start…stop of the first dimension; all without ``stop``."""
        whole = self._shapes[name]
        shape = whole if stop is None else (stop - start, *whole[1:])
        if len(whole) < 2:
            fill = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, fill, device=self._device, dtype=self._dtype)
        seed = zlib.crc32(f"{name}/{start}".encode())
        generator = torch.Generator(self._device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)
        return values.mul_(values[0].numel() ** -0.5)

    def close(self) -> None:
        """Nothing is open."""


def _frozen(model: nn.Module) -> Any:
    return model.requires_grad_(False).eval()


def build_flux2(
    size: Size, tokens: int | None, shift: float | None, whole_encoder: bool = False
) -> Flux2Family:
    """FLUX.2; with ``whole_encoder`` all of the text encoder's layers and its vocabulary head run too."""
    config = Qwen3Config(**size.text[0])
    layers = text_layers(config.num_hidden_layers)
    if whole_encoder:
        encoder = Qwen3ForCausalLM(config)
    else:
        config.num_hidden_layers = layers[-1]
        config.layer_types = config.layer_types[: layers[-1]]
        encoder = Qwen3Model(config)
        encoder.norm = nn.Identity()
    vae = _frozen(AutoencoderKLFlux2(**_vae_levels(size.vae)))
    vae.enable_gradient_checkpointing()
    return Flux2Family(qwen_tokenizer(), _frozen(encoder), layers, vae, tokens or DEFAULT_TEXT_TOKENS, shift)


def build_sd3(size: Size, tokens: int | None, shift: float | None) -> SD3Family:
    """Stable Diffusion 3."""
    first, second, t5 = size.text
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # 2: the pooled row is the highest id's
    text = TextStack(
        (clip_tokenizer(), clip_tokenizer(pad_token="!")),
        (
            _frozen(CLIPTextModelWithProjection(CLIPTextConfig(**first, **ends))),
            _frozen(CLIPTextModelWithProjection(CLIPTextConfig(**second, **ends))),
        ),
        t5_tokenizer(),
        _frozen(T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))),
    )
    scale = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    vae = _frozen(AutoencoderKL(**_vae_levels(size.vae), **scale, **plain))
    vae.enable_gradient_checkpointing()
    return SD3Family(text, vae, tokens or DEFAULT_T5_TOKENS, DEFAULT_SHIFT if shift is None else shift)


def _vae_levels(config: dict[str, Any]) -> dict[str, Any]:
    """With as many up and down blocks as there are channels."""
    levels = len(config.get("block_out_channels", (0, 0, 0, 0)))
    types = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return {**config, **types}


class Spread:
    """A reward whose scores differ between pictures, whatever its random weights make of them.

    Equal scores give no advantages, and samples without advantage are left out of an epoch's updates.
    """

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.name = reward.name
        self.differentiable = reward.differentiable

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The reward's own scores plus 1e-3·N(0, 1), [B]."""
        scores = self._reward.score(images, prompts, metadata)
        return scores + 1e-3 * torch.randn_like(scores.detach())


def random_loaders(tiny: bool) -> Loaders:
    """What builds a stage without files."""

    def family(recipe: Recipe, device: torch.device) -> ModelFamily:
        size, model = size_of(recipe, tiny), recipe.model
        build = build_flux2 if model.family == "flux2" else build_sd3
        with creating_on(device, getattr(torch, recipe.dtype)):
            return build(size, model.max_sequence_length, recipe.schedule.shift)

    return Loaders(
        family, lambda recipe, role, start: role_weights(recipe, tiny), lambda *given: _rewards(tiny, *given)
    )


def role_weights(recipe: Recipe, tiny: bool) -> RandomWeights:
    """Of any role, on this rank's device."""
    network_class = get_family(recipe.model.family).transformer_class
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    return RandomWeights(
        network_class, size_of(recipe, tiny).transformer, device, getattr(torch, recipe.dtype)
    )


def _rewards(
    tiny: bool, sections: Sequence[RewardSection], device: torch.device, dtype: torch.dtype, workers: int
) -> list[Reward]:
    rewards: list[Reward] = []
    for section in sections:
        with creating_on(device, dtype):
            reward, modules = BUILDERS[section.name](tiny)
        for module in modules:
            _frozen(module)
        rewards.append(Spread(reward))
    return rewards
