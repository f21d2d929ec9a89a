"""What the rest of the system knows of a model family.

Latents are [B, C, H, W] in the layout that :meth:`ModelFamily.latent_shape` states, float32.
Sigma is the noise level in [0, 1], a float or one per sample [B].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rtdmd.transfer import to_device

# A transformer, or the DeepSpeed engine around it: called with the transformer's own arguments.
Network = Callable[..., Any]


@dataclass(frozen=True)
class TextEmbeddings:
    """Everything a network needs to know of a batch of prompts.

    ``tensors`` holds one entry per kind of embedding, each [B, ...], in the dtype in which the
    network computes (:meth:`ModelFamily.predict_velocity` casts latents to it).
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> TextEmbeddings:
        """Select samples: ``text[2:4]``, ``text[[0, 0, 1]]``."""
        if isinstance(index, list):
            index = to_device(torch.tensor(index), next(iter(self.tensors.values())).device)
        return TextEmbeddings({name: value[index] for name, value in self.tensors.items()})

    def expand(self, count: int) -> TextEmbeddings:
        """Repeat the embeddings of one prompt (B = 1) ``count`` times, without copying."""
        return TextEmbeddings(
            {name: value.expand(count, *value.shape[1:]) for name, value in self.tensors.items()}
        )

    @staticmethod
    def cat(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """Concatenate along the batch."""
        return TextEmbeddings(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        )


class ModelFamily(Protocol):
    """One architecture with its text encoders, decoder and schedule; no transformer inside.

    The transformers belong to the roles (teacher, generator, fake score) and live in engines;
    a family is handed the network on each call.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[type]
    pipeline_class: ClassVar[type]
    lora_targets: ClassVar[tuple[str, ...]]  # suffixes of module names, as peft's target_modules
    block_lists: ClassVar[tuple[str, ...]]  # the transformer's ModuleLists of blocks, in order of execution

    vae: Any  # of the pipeline's own class; its decoder's activations are recomputed in backward

    @property
    def text_encoders(self) -> Sequence[nn.Module]:
        """The networks that :meth:`encode_prompts` calls."""
        ...

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
    ) -> ModelFamily:
        """Load text encoders, tokenizers and VAE (frozen, eval) of a pipeline folder or hub id."""
        ...

    @classmethod
    def call_arguments(
        cls, pipeline: str, revision: str | None, max_sequence_length: int | None
    ) -> dict[str, Any]:
        """What the diffusers pipeline is called with to encode text as this family does."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a ``height`` × ``width`` image. UserError for sizes that don't fit."""
        ...

    def sigmas(self, steps: Sequence[float], height: int, width: int) -> list[float]:
        """The family's shifted noise levels for few-step timesteps in (0, 1000], without the final 0."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Embeddings exactly as the family's diffusers pipeline makes them, without gradient."""
        ...

    def predict_velocity(
        self, network: Network, x: Tensor, sigma: float | Tensor, text: TextEmbeddings
    ) -> Tensor:
        """v(x, sigma | text), float32, shape of ``x`` [B, C, H, W]; differentiable."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] (clamped), float32; differentiable, VAE activations checkpointed."""
        ...
