"""How far the scorers' bfloat16 scores are from their float32 scores.

    python -m benchmarks.reward_precision
    python -m benchmarks.reward_precision --full --device cuda --output reward_precision.json

Each differentiable scorer with random weights (small networks, or with ``--full`` those of true size) scores
the same smooth random pictures in both. What matters to training is the error beside the spread of the scores
over pictures of one prompt, since advantages are differences over that spread.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.reward_models import BUILDERS
from rtdmd.rewards.linear_head import LinearHead

PROMPT = "two red circles on a green square"
METADATA = {"vqa_list": [["How many circles are in the image?", "two"], ["Are the circles red?", "Yes"]]}
CHUNK = 8


@dataclass(frozen=True)
class Row:
    """Scores of one scorer: float32's mean and spread, bfloat16's error, and their correlation."""

    name: str
    mean: float
    spread: float  # standard deviation over pictures
    error: float  # root mean square of the difference
    largest_error: float
    error_over_spread: float
    correlation: float


def pictures(count: int, size: int, device: torch.device) -> Tensor:
    """Smooth random pictures [count, 3, size, size] in [0, 1]."""
    generator = torch.Generator(device).manual_seed(0)
    coarse = torch.rand((count, 3, 8, 8), generator=generator, device=device)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def randomize(module: nn.Module, seed: int) -> None:
    """Weights large enough that pictures matter; norms about 1."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 0:  # CLIP's scale, which is read when the scorer is made
                continue
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


@torch.no_grad()
def compare(name: str, images: Tensor, full: bool) -> Row:
    """Score ``images`` in float32 and, heads apart, in bfloat16."""
    with torch.device(images.device):
        reward, modules = BUILDERS[name](not full)
    for seed, module in enumerate(modules):
        randomize(module, seed)
    reduced_reward, reduced_modules = copy.deepcopy((reward, modules))
    for module in reduced_modules:
        if not isinstance(module, LinearHead | nn.Sequential):  # heads stay in float32
            module.to(torch.bfloat16)

    def scores(scorer: object) -> Tensor:
        parts = [
            scorer.score(part, [PROMPT] * len(part), [METADATA] * len(part))  # type: ignore[attr-defined]
            for part in images.split(CHUNK)
        ]
        return torch.cat(parts).double()

    exact, reduced = scores(reward), scores(reduced_reward)
    difference, spread = reduced - exact, exact.std()
    error = difference.square().mean().sqrt()
    return Row(
        name=name,
        mean=exact.mean().item(),
        spread=spread.item(),
        error=error.item(),
        largest_error=difference.abs().max().item(),
        error_over_spread=(error / spread).item(),
        correlation=torch.corrcoef(torch.stack([exact, reduced]))[0, 1].item(),
    )


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Compare, print a table, and return its rows."""
    parser = argparse.ArgumentParser(description="bfloat16 scores against float32 scores.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="networks of true size")
    parser.add_argument("--scorers", nargs="+", choices=list(BUILDERS), default=list(BUILDERS))
    parser.add_argument("--count", type=int, default=32, help="pictures")
    parser.add_argument("--size", type=int, default=256, help="side of a picture in pixels")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    images = pictures(options.count, options.size, torch.device(options.device))
    print(
        f"{'':12}{'mean':>10}{'spread':>10}{'error':>10}{'largest':>10}{'error/spread':>14}{'correlation':>13}"
    )
    rows = []
    for name in options.scorers:
        row = compare(name, images, options.full)
        rows.append(row)
        numbers = f"{row.mean:10.4f}{row.spread:10.4f}{row.error:10.5f}{row.largest_error:10.5f}"
        print(f"{name:12}{numbers}{row.error_over_spread:14.4f}{row.correlation:13.5f}", flush=True)
    if options.output is not None:
        options.output.write_text(
            json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8"
        )
    return rows


if __name__ == "__main__":
    main()
