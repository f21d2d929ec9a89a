"""The small world's CLIPs: a differentiable reward, and a monitor of another seed and width.

Legend: B batch, K wrong captions per picture, L text tokens, D width of the shared embedding.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from benchmarks.shapes.pictures import WORDS, Drawn, padded_tokens, to_unit
from benchmarks.shapes.training import Average, Clock, Schedule
from rtdmd.models.tiny_tokenizers import clip_tokenizer

LENGTH = 16  # text tokens
MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class ClipSettings:
    """Size and optimisation of a CLIP."""

    width: int
    vision_layers: int
    text_layers: int
    steps: int
    seed: int
    projection: int = 64
    batch_size: int = 768
    learning_rate: float = 1e-3
    num_wrong: int = 8
    compile: bool = True


def make_clip(settings: ClipSettings, tokenizer: Any) -> CLIPModel:
    shared = {"hidden_size": settings.width, "num_attention_heads": settings.width // 32}
    text = CLIPTextConfig(
        **shared,
        vocab_size=len(tokenizer),
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.text_layers,
        max_position_embeddings=LENGTH,
        projection_dim=settings.projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        **shared,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.vision_layers,
        image_size=64,
        patch_size=8,
        projection_dim=settings.projection,
    )
    return CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=settings.projection
        )
    )


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})


def distort(images: Tensor) -> Tensor:
    """A random blur and noise per batch, as pictures of a network have them; in [0, 1]."""
    if torch.rand(()) < 0.5:
        sigma = 0.3 + 0.7 * torch.rand(()).item()
        offsets = torch.arange(-2, 3, device=images.device, dtype=images.dtype)
        line = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 5, 5)
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
        images = torch.nn.functional.conv2d(padded, kernel, groups=3)
    noise = 0.04 * torch.rand(len(images), 1, 1, 1, device=images.device)
    return (images + noise * torch.randn_like(images)).clamp(0, 1)


def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Embeddings of length 1, [B, D], of pictures in [0, 1]."""
    processor = image_processor()
    mean = torch.tensor(processor.image_mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_std, device=images.device).view(1, 3, 1, 1)
    return _unit(model.get_image_features((images - mean) / std).pooler_output)


def embed_tokens(model: CLIPModel, tokens: Tensor) -> Tensor:
    """Embeddings of length 1, [B, D]."""
    return _unit(model.get_text_features(tokens).pooler_output)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


class _Contrast(torch.nn.Module):
    """Contrastive loss of pictures with their captions and with wrong ones."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor, wrong: Tensor, same: Tensor) -> Tensor:
        """images [B, 3, H, W], tokens [B, L], wrong [B, K, L]; ``same`` [B, B] marks equal captions."""
        pictures = embed_images(self.model, images)
        captions, others = embed_tokens(self.model, torch.cat([tokens, wrong.flatten(0, 1)])).split(
            [len(tokens), wrong.shape[0] * wrong.shape[1]]
        )
        scale = self.model.logit_scale.exp().clamp_max(MAX_LOGIT_SCALE)
        logits = (scale * pictures @ captions.T).masked_fill(same, float("-inf"))
        near = scale * torch.einsum("bd,bkd->bk", pictures, others.view(*wrong.shape[:2], -1))
        target = torch.arange(len(images), device=images.device)
        cross_entropy = torch.nn.functional.cross_entropy
        to_text = cross_entropy(torch.cat([logits, near], dim=1), target)
        # Among its own wrong captions alone as well: in a large batch the easy ones dominate.
        own = cross_entropy(torch.cat([logits.diagonal()[:, None], near], dim=1), torch.zeros_like(target))
        return to_text + cross_entropy(logits.T, target) + own


def train_clip(drawn: Drawn, device: torch.device, settings: ClipSettings) -> tuple[CLIPModel, CLIPProcessor]:
    """Contrastive training on ``drawn``, with its wrong captions; the averaged model, float32."""
    torch.manual_seed(settings.seed)
    tokenizer = clip_tokenizer(WORDS)
    model = make_clip(settings, tokenizer).to(device)
    images = drawn.images.to(device)
    tokens, ids = caption_tokens(tokenizer, drawn, device)
    wrong = padded_tokens(tokenizer, [text for texts in drawn.wrong for text in texts], LENGTH)
    wrong = wrong.view(len(drawn), -1, LENGTH).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        fused=device.type == "cuda",
    )
    schedule = Schedule(optimizer, settings.steps, warmup=min(500, settings.steps // 10 + 1))
    average = Average(model, 0.999)
    contrast = _Contrast(model)
    compiled = torch.compile(contrast) if settings.compile else contrast
    diagonal = torch.eye(settings.batch_size, dtype=torch.bool, device=device)
    clock = Clock(f"CLIP {settings.width}", settings.steps)
    for step in range(settings.steps):
        chosen = torch.randint(len(images), (settings.batch_size,), device=device)
        pictures = distort(to_unit(images[chosen]))
        same = (ids[chosen, None] == ids[chosen]) & ~diagonal
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = compiled(pictures, tokens[chosen], wrong[chosen], same)
        schedule.update(loss, model)
        average.update()
        clock.tick(step, loss)
    average.write()
    with torch.no_grad():
        model.logit_scale.clamp_(max=torch.tensor(MAX_LOGIT_SCALE).log().item())
    processor = CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer)
    return model.eval().requires_grad_(False), processor


def caption_tokens(tokenizer: Any, drawn: Drawn, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [N, L], and a number [N] that equal captions share."""
    numbers: dict[str, int] = {}
    texts = [caption.text for caption in drawn.captions]
    ids = [numbers.setdefault(text, len(numbers)) for text in texts]
    return padded_tokens(tokenizer, texts, LENGTH).to(device), torch.tensor(ids, device=device)


@torch.no_grad()
def choice_accuracy(folder: Path, drawn: Drawn, device: torch.device) -> dict[str, float]:
    """How often the right caption scores above all its wrong ones, by kind; of the saved CLIP."""
    from rtdmd.rewards.clip import ClipEncoder

    encoder = ClipEncoder.load(str(folder), device, torch.float32)
    right: dict[str, list[bool]] = defaultdict(list)
    model, tokenizer = encoder.model, encoder.tokenizer
    for part in range(0, len(drawn), 256):
        chosen = slice(part, part + 256)
        pictures = encoder.image_features(to_unit(drawn.images[chosen].to(device)))
        for picture, caption, wrong in zip(
            pictures, drawn.captions[chosen], drawn.wrong[chosen], strict=True
        ):
            tokens = padded_tokens(tokenizer, [caption.text, *wrong], LENGTH).to(device)
            scores = embed_tokens(model, tokens) @ picture
            right[caption.kind].append(bool(scores[0] > scores[1:].max()))
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}
