"""GenEval: does a picture show the objects, counts, colours and positions asked for (arXiv 2310.11513)?

Mask2Former (Swin-S, COCO) finds the objects, CLIP ViT-L/14 names their colours, ``geneval_rules`` judges. The
detector's weights are those of its authors, as transformers has them; the benchmark's are mmdetection's,
which were trained anew: calibrate before quoting scores as the benchmark's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rtdmd.recipe.schema import RewardMode, RewardSection
from rtdmd.rewards import REWARDS
from rtdmd.rewards.clip import ClipEncoder
from rtdmd.rewards.detection import Instance, InstanceDetector
from rtdmd.rewards.geneval_rules import (
    COLORS,
    Found,
    Request,
    benchmark_score,
    most_confident,
    partial_score,
)
from rtdmd.rewards.preprocessing import clip_preprocess
from rtdmd.rewards.protocol import Metadata
from rtdmd.rewards.validation import check_batch

_COLOR_WEIGHTS = "openai/clip-vit-large-patch14"
_COLOR_TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
_BACKGROUND = 0x99 / 0xFF


class ColorClassifier:
    """Names colours by CLIP, zero-shot: the nearest of ten captions, each the mean over three templates."""

    def __init__(self, encoder: ClipEncoder) -> None:
        self.encoder = encoder
        self._captions: dict[str, Tensor] = {}

    def classify(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        """The colours of objects of classes ``names`` in ``crops``, each [3, h, w] in [0, 1] of any size."""
        if not crops:
            return []
        return [COLORS[index] for index in self.cosines(crops, names).argmax(dim=-1).tolist()]

    @torch.no_grad()
    def cosines(self, crops: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """Cosines [n, colours] of n >= 1 crops with the ten colours' captions of their classes."""
        side = self.encoder.image_input.size
        unscaled = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        # Crops that are squares of that side already pass the encoder's own preprocessing unchanged.
        squares = torch.cat([clip_preprocess(crop[None], side, *unscaled) for crop in crops])
        features = self.encoder.image_features(squares)  # (n, D)
        captions = torch.stack([self._caption_features(name) for name in names])  # (n, colours, D)
        return (captions @ features[..., None]).squeeze(-1)

    def _caption_features(self, name: str) -> Tensor:
        if name not in self._captions:
            texts = [
                template.format(color=color, name=name) for color in COLORS for template in _COLOR_TEMPLATES
            ]
            features = self.encoder.text_features(texts)
            means = features.view(len(COLORS), len(_COLOR_TEMPLATES), -1).mean(dim=1)
            self._captions[name] = means / means.norm(dim=-1, keepdim=True)
        return self._captions[name]


class GenevalReward:
    """GenEval as a reward, without gradient.

    Args:
        detector: finds the objects.
        colors: names the colours of those whose colour is asked for.
        mode: ``default`` is the benchmark's verdict, 0 or 1, ``official`` the partial credit trained on.
    """

    name = "geneval"
    differentiable = False

    def __init__(
        self,
        detector: InstanceDetector,
        colors: ColorClassifier,
        mode: RewardMode = "default",
    ) -> None:
        self.detector = detector
        self.colors = colors
        self.mode = mode

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores [B], float32, on the images' device; ``metadata`` as the benchmark writes it.

        0 or 1, in mode ``official`` at most 1 (and below 0 where far too many objects are).

        Raises:
            ValueError: the batch has another shape or range than [B, 3, H, W] in [0, 1].
            UserError: metadata are missing or not understood; names prompt and key.
            TrainingHalted: the detector's output isn't finite.
        """
        check_batch(images, prompts, metadata)
        requests = [Request.parse(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        judge = partial_score if self.mode == "official" else benchmark_score
        objects = self.find(images, requests)
        scores = [judge(request, found) for request, found in zip(requests, objects, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    @torch.no_grad()
    def find(self, images: Tensor, requests: Sequence[Request]) -> list[dict[str, list[Found]]]:
        """Per image of [B, 3, H, W] in [0, 1] what the rules look at: objects by class, colours if asked."""
        instances = self.detector.detect(images, [request.min_confidence for request in requests])
        kept = [
            _by_class(found, request.min_confidence)
            for found, request in zip(instances, requests, strict=True)
        ]
        asked = [
            (picture, name, place)
            for picture, request in enumerate(requests)
            for name, count in request.colored.items()
            for place in range(min(count, len(kept[picture].get(name, ()))))
        ]
        crops = [cut_out(images[picture], kept[picture][name][place]) for picture, name, place in asked]
        colors = self.colors.classify(crops, [name for _, name, _ in asked])
        color_of = dict(zip(asked, colors, strict=True))
        return [
            {
                name: [
                    Found(item.box, item.confidence, color_of.get((picture, name, place)))
                    for place, item in enumerate(items)
                ]
                for name, items in classes.items()
            }
            for picture, classes in enumerate(kept)
        ]


def load(section: RewardSection, device: torch.device, dtype: torch.dtype) -> GenevalReward:
    """Load the detector from ``section.weights`` (folder or hub id), by default the published one.

    The colours' CLIP is the one in that folder's subfolder ``clip`` if there is one, else the published one.

    Raises:
        UserError: weights are missing, damaged, or of another kind of model.
    """
    weights = section.weights or REWARDS["geneval"].default_weights
    assert weights is not None
    beside = Path(weights).expanduser() / "clip"
    detector = InstanceDetector.load(weights, device, revision=section.revision)
    encoder = ClipEncoder.load(str(beside) if beside.is_dir() else _COLOR_WEIGHTS, device, dtype)
    return GenevalReward(detector, ColorClassifier(encoder), section.mode)


def _by_class(instances: Sequence[Instance], minimum: float) -> dict[str, list[Instance]]:
    classes: dict[str, list[Instance]] = {}
    for item in instances:
        classes.setdefault(item.name, []).append(item)
    return {
        name: [items[index] for index in most_confident([item.confidence for item in items], minimum)]
        for name, items in classes.items()
    }


def cut_out(image: Tensor, item: Instance) -> Tensor:
    """The object [3, h, w], cut out along its box, the rest of it grey as the benchmark has it."""
    left, top, right, bottom = (int(edge) for edge in item.box)
    masked = torch.where(item.mask, image.float(), _BACKGROUND)
    return masked[:, top:bottom, left:right]
