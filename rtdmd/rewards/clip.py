"""What CLIPScore, PickScore and others share: a CLIP that scores each picture against its own prompt.

Legend: B batch, D width of the shared embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from rtdmd.errors import UserError
from rtdmd.rewards.clip_vision import ClipInput, ClipVision, Fit, unit_length
from rtdmd.rewards.protocol import Metadata
from rtdmd.rewards.sources import fetch_hint, first_line
from rtdmd.rewards.validation import check_batch, check_scores

_TOKENIZER_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


class ClipEncoder:
    """A frozen CLIPModel with its tokenizer, giving normalised embeddings of pictures and prompts.

    Activations of the vision tower are recomputed in the backward pass, so that a gradient to the pictures
    costs the memory of one layer.

    Args:
        model: in evaluation mode; its parameters are frozen here.
        tokenizer: of that model.
        image_input: how its vision tower wants pictures.
        chunk_size: pictures encoded at once.
        quantise: False leaves out the roundings of the preprocessing.
        max_cached_prompts: embeddings kept, the least recently used go first.
        checkpoint_layers: recompute activations in the backward pass.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: Any,
        image_input: ClipInput,
        *,
        chunk_size: int = 16,
        quantise: bool = True,
        max_cached_prompts: int = 8192,
        checkpoint_layers: bool = True,
    ) -> None:
        self.vision = ClipVision(
            model,
            image_input,
            chunk_size=chunk_size,
            quantise=quantise,
            checkpoint_layers=checkpoint_layers,
        )
        self.model = model
        self.image_input = image_input
        self.tokenizer = tokenizer
        self.max_cached_prompts = max_cached_prompts
        # Not from a bfloat16 model: rounding ln(100) to bfloat16 moves the scale by 1 %.
        self.logit_scale = float(model.logit_scale.detach().double().exp())
        self._text_cache: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def load(
        cls,
        weights: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        revision: str | None = None,
        processor: str | None = None,
        fit: Fit = "crop",
    ) -> ClipEncoder:
        """Load safetensors weights from a folder or hub id.

        Tokenizer and image input come from ``processor``, by default from ``weights`` as well. ``fit``: how
        a picture becomes a square.

        Raises:
            UserError: files are missing, some of the model's weights aren't in them, or the tokenizer isn't
                this model's.
        """
        try:
            # float32 first, for the sake of logit_scale.
            model, loaded = CLIPModel.from_pretrained(
                weights,
                revision=revision,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            hint = fetch_hint(weights, ("config.json", "model.safetensors"))
            raise UserError(f"{weights}: no CLIP weights: {first_line(error)}{hint}") from error
        absent = sorted(loaded["missing_keys"])
        if absent:
            # transformers would go on with random values in their place.
            raise UserError(
                f"{weights}: {len(absent)} weights of CLIPModel are not in it, such as {absent[0]}"
            )
        source, source_revision = (weights, revision) if processor is None else (processor, None)
        tokenizer = load_tokenizer(source, source_revision, model.config.text_config.vocab_size)
        encoder = cls(model, tokenizer, ClipInput.load(source, source_revision, fit))
        model.to(device=device, dtype=dtype)
        return encoder

    def logits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """exp(logit_scale) · cos(image_i, prompt_i), [B], float32: the diagonal of CLIP's logits alone.

        Differentiable with respect to ``images`` [B, 3, H, W] in [0, 1].
        """
        return self.logit_scale * self.cosines(images, prompts)

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """cos(image_i, prompt_i) in [−1, 1], [B], float32; differentiable as ``logits`` is."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Embeddings of length 1, [B, D], as ``ClipVision.features`` gives them."""
        return self.vision.features(images)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of length 1, [B, D], float32 (float64 from a float64 model), without gradient.

        Prompts longer than the text tower's positions are truncated. Each is encoded by itself: its embedding
        depends on it alone, not on batch or padding, so the cache cannot change a score.
        """
        return torch.stack([self._text_feature(prompt) for prompt in prompts])

    def _text_feature(self, prompt: str) -> Tensor:
        feature = self._text_cache.pop(prompt, None)
        if feature is None:
            tokens = self.tokenizer(
                prompt,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            token_ids = tokens["input_ids"].to(self.model.device)  # (1, tokens)
            feature = unit_length(self.model.get_text_features(token_ids).pooler_output)[0]
        self._text_cache[prompt] = feature
        if len(self._text_cache) > self.max_cached_prompts:
            self._text_cache.popitem(last=False)
        return feature


class ClipReward:
    """CLIP's logit of a picture and its prompt over ``divisor``; the cosine without one."""

    differentiable = True

    def __init__(self, name: str, encoder: ClipEncoder, divisor: float | None = None) -> None:
        self.name = name
        self.encoder = encoder
        self.divisor = divisor

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores [B], float32, differentiable with respect to ``images`` [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: the batch has another shape or range.
        """
        check_batch(images, prompts, metadata)
        if self.divisor is None:
            scores = self.encoder.cosines(images, prompts)
        else:
            scores = self.encoder.logits(images, prompts) / self.divisor
        return check_scores(self.name, scores, prompts)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, in either of transformers' layouts."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def load_tokenizer(source: str, revision: str | None, vocabulary: int) -> Any:
    """A tokenizer of ``vocabulary`` tokens from a folder or hub id; UserError if there is none."""
    hint = fetch_hint(source, _TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer: {first_line(error)}{hint}") from error
    if len(tokenizer) != vocabulary:
        # Where the files are missing, transformers makes up a CLIPTokenizer of a few special tokens.
        raise UserError(
            f"{source}: no tokenizer of this model: it has {len(tokenizer)} tokens, "
            f"the model {vocabulary}{hint}"
        )
    return tokenizer
