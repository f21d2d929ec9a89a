"""Outcomes of a network in the small world, on held-out captions.

  python -m benchmarks.shapes.measure runs/shapes [--to outcomes.json]
  python -m benchmarks.shapes.measure recipes/shapes.yaml --teacher 50 3

The first measures a run's generator, after the last stage that it finished; the second the recipe's teacher
at 50 Euler steps with a guidance scale of 3.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import outcomes
from benchmarks.shapes.outcomes import Sampler, euler
from benchmarks.shapes.pictures import to_unit
from rtdmd.evaluation.distances import frechet_distance
from rtdmd.evaluation.statistics import by_stratum
from rtdmd.files import replace_file
from rtdmd.recipe import load_for_sampling
from rtdmd.rewards.clip import ClipEncoder
from rtdmd.sample import Painter, SampleOptions, build_painter, pick_device
from rtdmd.shapes.captions import Caption
from rtdmd.shapes.drawing import render
from rtdmd.shapes.prompts import distinct_captions
from rtdmd.shapes.reading import read_picture
from rtdmd.shapes.scenes import BACKGROUNDS, draw_scene
from rtdmd.shapes.splits import Split

WORLD = Path("data/shapes")
COUNT = 1024  # held-out captions
REFERENCES = 4  # true pictures of each, for the distance


@dataclass(frozen=True)
class Judges:
    """Everything that a set of pictures is measured with."""

    captions: list[Caption]
    reward: ClipEncoder
    monitor: ClipEncoder
    references: Tensor  # features of true pictures [M, D]

    @classmethod
    def load(cls, split: Split, count: int, device: torch.device, seed: int = 0) -> Judges:
        captions = distinct_captions(split, count, seed)
        reward = ClipEncoder.load(str(WORLD / "clip"), device, torch.float32)
        monitor = ClipEncoder.load(str(WORLD / "monitor_clip"), device, torch.float32)
        rng = np.random.default_rng([seed, count])
        true = [render(draw_scene(rng, caption)) for caption in captions for _ in range(REFERENCES)]
        images = to_unit(torch.from_numpy(np.stack(true)).permute(0, 3, 1, 2))
        return cls(captions, reward, monitor, features(reward, images, device))

    @property
    def prompts(self) -> list[str]:
        return [caption.text for caption in self.captions]

    @torch.no_grad()
    def score(self, images: Tensor) -> dict[str, list[float]]:
        """The judge's verdict (0 or 1) and both CLIPs' rewards of pictures [S·N, 3, 64, 64].

        They show the N captions, in order, S times.
        """
        times = len(images) // len(self.captions)
        verdicts = outcomes.judge(images, self.captions * times)
        found = {"accuracy": [float(verdict.correct) for verdict in verdicts]}
        for name, encoder in (("clip", self.reward), ("monitor_clip", self.monitor)):
            pictures = features(encoder, images, self.references.device)
            texts = encoder.text_features(self.prompts).repeat(times, 1)
            found[name] = rewards(encoder, pictures, texts).tolist()
        return found

    def measure(self, images: Tensor) -> dict[str, float]:
        """Means of :meth:`score`, accuracy by kind, and how the pictures are distributed."""
        scores = self.score(images)
        found = {name: sum(values) / len(values) for name, values in scores.items()}
        kinds = [caption.kind for caption in self.captions] * (len(images) // len(self.captions))
        found |= {
            f"accuracy/{kind}": float(values.mean())
            for kind, values in sorted(by_stratum(scores["accuracy"], kinds).items())
        }
        pictures = features(self.reward, images, self.references.device)
        found["frechet"] = frechet_distance(pictures, self.references)
        found["background_entropy"] = background_entropy(images)
        return found


@torch.no_grad()
def features(encoder: ClipEncoder, images: Tensor, device: torch.device) -> Tensor:
    """CLIP's embeddings of pictures, [N, D]."""
    return torch.cat([encoder.image_features(part.to(device)) for part in images.split(256)])


def rewards(encoder: ClipEncoder, pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIP's rewards [N] from the embeddings of pictures and of their captions, [N, D] each."""
    return (pictures * texts).sum(-1) * encoder.logit_scale / 100


def background_entropy(images: Tensor) -> float:
    """Entropy in bits of the backgrounds' colours, which no caption names; at most log2 of their number."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    counts = Counter(read_picture(picture).background for picture in pixels)
    shares = np.array([counts[name] for name in BACKGROUNDS if counts[name]], dtype=np.float64)
    shares /= shares.sum()
    return float(-(shares * np.log2(shares)).sum())


def generator_sampler(painter: Painter) -> Sampler:
    """The few steps that the recipe's generator is trained for."""
    return Sampler(painter.few.sigmas, painter.few.eta)


def paint(painter: Painter, prompts: Sequence[str], sampler: Sampler, pictures: int = 1) -> Tensor:
    """So many pictures of each prompt, with seeds from 0: those of the first seed come first."""
    return outcomes.paint_many(painter.family, painter.network, prompts, sampler, seeds=range(pictures))


def tell(found: dict[str, float], to: Path | None) -> None:
    """Print numbers as JSON, and write them to a file, if one is named."""
    text = json.dumps(found, indent=2)
    print(text)
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        replace_file(to, text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a run's folder; a recipe for its teacher")
    parser.add_argument("--teacher", type=float, nargs=2, metavar=("STEPS", "GUIDANCE"))
    parser.add_argument("--to", type=Path, help="write the numbers here too")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="of the captions")
    parser.add_argument("--count", type=int, default=COUNT, help="held-out captions")
    parser.add_argument("--pictures", type=int, default=1, help="of each caption, from noise of their own")
    options = parser.parse_args()
    device = pick_device(None)
    if options.teacher:
        recipe = load_for_sampling(str(options.source), [])
        painter = build_painter(recipe, SampleOptions(teacher=True), device)
        sampler = euler(int(options.teacher[0]), options.teacher[1])
    else:
        recipe = load_for_sampling(str(options.source / "recipe.yaml"), [])
        painter = build_painter(recipe, SampleOptions(run=options.source), device)
        sampler = generator_sampler(painter)
    judges = Judges.load(options.split, options.count, device)
    found = judges.measure(paint(painter, judges.prompts, sampler, options.pictures))
    tell(found, options.to)


if __name__ == "__main__":
    main()
