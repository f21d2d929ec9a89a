"""Stable Diffusion 3 and 3.5 medium: two CLIPs and T5, AutoencoderKL, SD3Transformer2DModel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from rtdmd.models.images import check_size, per_sample, to_unit_range
from rtdmd.models.loading import check_pipeline, load_frozen, load_tokenizer
from rtdmd.models.lora import JOINT_ATTENTION_TARGETS
from rtdmd.models.protocol import Network, TextEmbeddings
from rtdmd.schedules import sd3_sigmas

PATCH = 2  # of every published SD3 transformer; its configuration belongs to the roles
DEFAULT_T5_TOKENS = 128
DEFAULT_SHIFT = 3.0
COMPONENTS = (
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "vae",
)


@dataclass(frozen=True)
class TextStack:
    """SD3's three text encoders with their tokenizers."""

    clip_tokenizers: tuple[Any, Any]
    clips: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]
    t5_tokenizer: Any
    t5: T5EncoderModel


class SD3Family:
    """SD3-M and SD3.5-M behind :class:`rtdmd.models.protocol.ModelFamily`.

    Latents [B, 16, H/8, W/8] for the published VAE: (VAE latents − shift_factor)·scaling_factor.
    """

    name: ClassVar[str] = "sd3"
    transformer_class: ClassVar[type] = SD3Transformer2DModel
    pipeline_class: ClassVar[type] = StableDiffusion3Pipeline
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    # As suffixes these leave out SD3.5's second attention, `attn2`.
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION_TARGETS

    def __init__(
        self, text: TextStack, vae: AutoencoderKL, max_sequence_length: int, schedule_shift: float
    ) -> None:
        """Take loaded parts; use :meth:`load`."""
        self.text = text
        self.vae = vae
        self.max_sequence_length = max_sequence_length
        self.schedule_shift = schedule_shift
        self._vae_scale = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def text_encoders(self) -> Sequence[nn.Module]:
        """Both CLIPs and T5."""
        return (*self.text.clips, self.text.t5)

    @classmethod
    def load(
        cls,
        pipeline: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        revision: str | None = None,
        max_sequence_length: int | None = None,
        schedule_shift: float | None = None,
    ) -> SD3Family:
        """Load the three text encoders, their tokenizers and the VAE, frozen, in ``dtype`` on ``device``.

        ``max_sequence_length``: T5 tokens, 128 by default (the CLIPs always take 77).
        ``schedule_shift``: s in sigma = s·u/(1 + (s − 1)·u), 3 by default. Raises UserError.
        """
        check_pipeline(pipeline, revision, cls.pipeline_class, COMPONENTS)
        place: dict[str, Any] = {"device": torch.device(device), "dtype": dtype, "revision": revision}
        text = TextStack(
            clip_tokenizers=(
                load_tokenizer(CLIPTokenizer, pipeline, "tokenizer", revision),
                load_tokenizer(CLIPTokenizer, pipeline, "tokenizer_2", revision),
            ),
            clips=(
                load_frozen(CLIPTextModelWithProjection, pipeline, "text_encoder", **place),
                load_frozen(CLIPTextModelWithProjection, pipeline, "text_encoder_2", **place),
            ),
            t5_tokenizer=load_tokenizer(T5TokenizerFast, pipeline, "tokenizer_3", revision),
            t5=load_frozen(T5EncoderModel, pipeline, "text_encoder_3", **place),
        )
        vae = load_frozen(AutoencoderKL, pipeline, "vae", **place)
        vae.enable_gradient_checkpointing()
        shift = DEFAULT_SHIFT if schedule_shift is None else schedule_shift
        return cls(text, vae, max_sequence_length or DEFAULT_T5_TOKENS, shift)

    @classmethod
    def call_arguments(
        cls, pipeline: str, revision: str | None, max_sequence_length: int | None
    ) -> dict[str, Any]:
        """The number of T5 tokens; the pipeline's own default is 256."""
        return {"max_sequence_length": max_sequence_length or DEFAULT_T5_TOKENS}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(latent_channels, H/8, W/8). UserError unless both sides are multiples of 16 pixels."""
        check_size(height, width, self._vae_scale * PATCH)
        return self.vae.config.latent_channels, height // self._vae_scale, width // self._vae_scale

    def sigmas(self, steps: Sequence[float], height: int, width: int) -> list[float]:
        """Shifted noise levels in (0, 1] for timesteps ``steps`` in (0, 1000], the same for every size."""
        return sd3_sigmas([step / 1000 for step in steps], self.schedule_shift)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Embeddings as StableDiffusion3Pipeline.encode_prompt makes them.

        ``prompt_embeds`` [B, 77 + L, D]: the CLIPs' penultimate hidden states side by side, padded with
        zeros to T5's width D, followed by T5's output on L tokens. ``pooled_prompt_embeds`` [B, P]: the
        CLIPs' projections side by side.
        """
        prompts = list(prompts)
        # Both CLIPs take as many tokens as the first one's tokenizer says.
        clip_tokens = self.text.clip_tokenizers[0].model_max_length
        clips = [
            clip(_token_ids(tokenizer, prompts, clip_tokens, clip.device), output_hidden_states=True)
            for tokenizer, clip in zip(self.text.clip_tokenizers, self.text.clips, strict=True)
        ]
        t5_ids = _token_ids(self.text.t5_tokenizer, prompts, self.max_sequence_length, self.text.t5.device)
        t5 = self.text.t5(t5_ids)[0]
        clip_hidden = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
        padding = (0, t5.shape[-1] - clip_hidden.shape[-1])
        return TextEmbeddings(
            {
                "prompt_embeds": torch.cat([torch.nn.functional.pad(clip_hidden, padding), t5], dim=1),
                "pooled_prompt_embeds": torch.cat([output.text_embeds for output in clips], dim=-1),
            }
        )

    def predict_velocity(
        self, network: Network, x: Tensor, sigma: float | Tensor, text: TextEmbeddings
    ) -> Tensor:
        """v(x, sigma | text) in float32, [B, C, H, W] like ``x``; the network runs in the text's dtype.

        The network is given timestep = 1000·sigma in float32.
        """
        embeddings = text.tensors["prompt_embeds"]
        return network(
            hidden_states=x.to(embeddings.dtype),
            encoder_hidden_states=embeddings,
            pooled_projections=text.tensors["pooled_prompt_embeds"],
            timestep=1000 * per_sample(sigma, x),
            return_dict=False,
        )[0].float()

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32, from latents [B, C, H/8, W/8]; differentiable.

        z = latents/scaling_factor + shift_factor, decoded, /2 + ½, clamped. Activations of the
        decoder's blocks are recomputed in backward.
        """
        config = self.vae.config
        normal = latents.float() / config.scaling_factor + config.shift_factor
        return to_unit_range(self.vae.decode(normal.to(self.vae.dtype), return_dict=False)[0])


def _token_ids(tokenizer: Any, prompts: list[str], length: int, device: torch.device) -> Tensor:
    """Token ids [B, length], padded or truncated."""
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)
