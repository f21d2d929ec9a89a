"""FLUX.2-klein: Qwen3 text encoder, AutoencoderKLFlux2, Flux2Transformer2DModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model

from rtdmd.errors import UserError
from rtdmd.models.images import check_size, per_sample, to_unit_range
from rtdmd.models.loading import check_pipeline, load_config, load_frozen, load_tokenizer
from rtdmd.models.lora import JOINT_ATTENTION_TARGETS
from rtdmd.models.protocol import Network, TextEmbeddings
from rtdmd.schedules import flux2_sigmas, sd3_sigmas

PATCH = 2  # VAE latents are folded 2x2 into the transformer's channels
DEFAULT_TEXT_TOKENS = 512
KLEIN_LAYERS = (9, 18, 27)  # of the text encoder, Flux2KleinPipeline's default
# Single blocks of the largest FLUX.2; names beyond a model's depth match nothing.
MAX_SINGLE_BLOCKS = 48


class TruncatedQwen3(Qwen3Model):
    """The lower layers of a Qwen3ForCausalLM checkpoint; the rest of the file is left unread."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^lm_head\.", r"layers\.\d+\."]


def text_layers(depth: int) -> tuple[int, int, int]:
    """Hidden states of a ``depth``-layer Qwen3 that condition the transformer, concatenated in this order.

    (depth/4, depth/2, 3·depth/4), rounded down: 9, 18, 27 for klein's 36 layers, and something that
    exists for smaller encoders. Hidden state k is the output of the first k layers, 0 the embedding.
    """
    return depth // 4, depth // 2, 3 * depth // 4


class Flux2Family:
    """FLUX.2-klein behind :class:`rtdmd.models.protocol.ModelFamily`.

    Latents [B, 4·latent_channels, H/16, W/16] (for klein's VAE of scale 8): the VAE's latents folded
    2×2 into channels and normalised by the statistics of its batch norm, one token a position.
    """

    name: ClassVar[str] = "flux2"
    transformer_class: ClassVar[type] = Flux2Transformer2DModel
    pipeline_class: ClassVar[type] = Flux2KleinPipeline
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    # The single blocks' `to_out` is a Linear, the double blocks' a ModuleList that peft refuses; the
    # suffix "attn.to_out" would match both, hence the full names.
    lora_targets: ClassVar[tuple[str, ...]] = (
        *JOINT_ATTENTION_TARGETS,
        "attn.to_qkv_mlp_proj",
        *(f"single_transformer_blocks.{index}.attn.to_out" for index in range(MAX_SINGLE_BLOCKS)),
    )

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Qwen3Model,
        layers: tuple[int, int, int],
        vae: AutoencoderKLFlux2,
        max_sequence_length: int,
        schedule_shift: float | None,
    ) -> None:
        """Take loaded parts; ``vae`` in float32 or with float32 statistics. Use :meth:`load`."""
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.vae = vae
        self.max_sequence_length = max_sequence_length
        self.schedule_shift = schedule_shift
        self._layers = layers
        self._latent_channels = vae.config.latent_channels * PATCH**2
        self._pixels_per_token = 2 ** (len(vae.config.block_out_channels) - 1) * PATCH
        variance = vae.bn.running_var.float() + vae.config.batch_norm_eps
        self._latent_std = variance.sqrt().view(1, -1, 1, 1)
        self._latent_mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
        self._position_ids: dict[tuple[int, ...], Tensor] = {}

    @property
    def text_encoders(self) -> Sequence[nn.Module]:
        """Qwen3."""
        return (self.text_encoder,)

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
    ) -> Flux2Family:
        """Load text encoder, tokenizer and VAE, frozen, in ``dtype`` on ``device``; no transformer.

        ``max_sequence_length``: text tokens, 512 by default. ``schedule_shift``: s in
        sigma = s·u/(1 + (s − 1)·u); by default s = e^mu with FLUX.2's mu. Raises UserError.
        """
        check_pipeline(pipeline, revision, cls.pipeline_class, ("tokenizer", "text_encoder", "vae"))
        device = torch.device(device)
        tokenizer = load_tokenizer(Qwen2TokenizerFast, pipeline, "tokenizer", revision)
        if tokenizer.chat_template is None:
            raise UserError(f"component 'tokenizer' of pipeline {pipeline!r} has no chat template")
        config = load_config(Qwen3Config, pipeline, "text_encoder", revision)
        layers = text_layers(config.num_hidden_layers)
        config.num_hidden_layers = layers[-1]
        config.layer_types = config.layer_types[: layers[-1]]
        text_encoder = load_frozen(
            TruncatedQwen3,
            pipeline,
            "text_encoder",
            device=device,
            dtype=dtype,
            revision=revision,
            config=config,
        )
        # transformers normalises the last hidden state; in the whole model this one is not the last.
        text_encoder.norm = nn.Identity()
        # In float32 at first: the latents' statistics shall not be rounded.
        vae = load_frozen(
            AutoencoderKLFlux2, pipeline, "vae", device=device, dtype=torch.float32, revision=revision
        )
        vae.enable_gradient_checkpointing()
        tokens = max_sequence_length or DEFAULT_TEXT_TOKENS
        family = cls(tokenizer, text_encoder, layers, vae, tokens, schedule_shift)
        # Past diffusers' own `to`, which warns of modules to keep in float32 where there are none.
        nn.Module.to(vae, dtype)
        return family

    @classmethod
    def call_arguments(
        cls, pipeline: str, revision: str | None, max_sequence_length: int | None
    ) -> dict[str, Any]:
        """The number of text tokens, and the text encoder's layers where they aren't klein's."""
        config = load_config(Qwen3Config, pipeline, "text_encoder", revision)
        layers = text_layers(config.num_hidden_layers)
        arguments: dict[str, Any] = {"max_sequence_length": max_sequence_length or DEFAULT_TEXT_TOKENS}
        return arguments if layers == KLEIN_LAYERS else arguments | {"text_encoder_out_layers": layers}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(4·latent_channels, H/16, W/16). UserError unless both sides are multiples of 16 pixels."""
        check_size(height, width, self._pixels_per_token)
        return self._latent_channels, height // self._pixels_per_token, width // self._pixels_per_token

    def sigmas(self, steps: Sequence[float], height: int, width: int) -> list[float]:
        """Shifted noise levels in (0, 1] for timesteps ``steps`` in (0, 1000], without the final 0.

        The shift depends on the number of image tokens and of steps, unless one was given to load().
        """
        _, rows, columns = self.latent_shape(height, width)
        unshifted = [step / 1000 for step in steps]
        if self.schedule_shift is not None:
            return sd3_sigmas(unshifted, self.schedule_shift)
        return flux2_sigmas(unshifted, rows * columns)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeddings:
        """``prompt_embeds`` [B, L, 3·hidden size] as Flux2KleinPipeline.encode_prompt makes them.

        The prompt as a user's turn in Qwen3's chat template without thinking, padded to L tokens;
        three hidden states side by side, with nothing computed above the last of them.
        """
        chats = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for prompt in prompts
        ]
        tokens = self.tokenizer(
            chats,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.max_sequence_length,
        )
        device = self.text_encoder.device
        hidden_states = self.text_encoder(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return TextEmbeddings(
            {"prompt_embeds": torch.cat([hidden_states[layer] for layer in self._layers], dim=-1)}
        )

    def predict_velocity(
        self, network: Network, x: Tensor, sigma: float | Tensor, text: TextEmbeddings
    ) -> Tensor:
        """v(x, sigma | text) in float32, [B, C, H, W] like ``x``; the network runs in the text's dtype.

        The network is given sigma (it multiplies by 1000) and no guidance. As in Flux2KleinPipeline, and in
        the code that the published weights come from, it is 1000·sigma that is rounded to the network's
        dtype: bfloat16 makes 960 of 958, and 956 of 1000 times the rounded 0.958.
        """
        embeddings = text.tensors["prompt_embeds"]
        height, width = x.shape[2:]
        timestep = per_sample(sigma, x)
        if embeddings.dtype != torch.float32:
            timestep = (1000 * timestep).to(embeddings.dtype) / 1000
        velocity = network(
            hidden_states=x.to(embeddings.dtype).flatten(2).transpose(1, 2),  # (B, H*W, C)
            encoder_hidden_states=embeddings,
            timestep=timestep,
            img_ids=self._ids(height, width, 1, x.device),
            txt_ids=self._ids(1, 1, embeddings.shape[1], x.device),
            guidance=None,
            return_dict=False,
        )[0]
        return velocity.float().transpose(1, 2).unflatten(2, (height, width))

    def _ids(self, height: int, width: int, length: int, device: torch.device) -> Tensor:
        """Positions (time, row, column, text token) of a grid, [height·width·length, 4], built once."""
        key = (height, width, length)
        ids = self._position_ids.get(key)
        if ids is None or ids.device != device:
            axes = [torch.arange(size, device=device) for size in (1, height, width, length)]
            ids = self._position_ids[key] = torch.cartesian_prod(*axes)
        return ids

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32, from latents [B, C, H/16, W/16]; differentiable.

        z = latents·std + mean of the VAE's batch norm, unfolded 2×2, decoded, /2 + ½, clamped.
        Activations of the decoder's blocks are recomputed in backward.
        """
        normal = latents * self._latent_std + self._latent_mean
        return to_unit_range(self.vae.decode(unfold(normal).to(self.vae.dtype), return_dict=False)[0])


def unfold(latents: Tensor) -> Tensor:
    """[B, 4·C, H, W] to [B, C, 2H, 2W]; the folded channel is (C, row in patch, column in patch)."""
    return nn.functional.pixel_shuffle(latents, PATCH)
