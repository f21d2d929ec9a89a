"""Decoding at true size, random weights: by memory layout, eager and compiled, without and with a gradient.

  python -m benchmarks.decoding recipes/flux2_4b.yaml [--batch 2] [--output decoding.json]

Median seconds a picture over 10 runs after 3, the device waited for, and the most memory beyond the weights.
The gradient is of the pictures' sum in the latents, with and without recomputed activations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.full_size import random_loaders
from benchmarks.reward_memory import GIB, synchronize
from rtdmd.models.protocol import ModelFamily
from rtdmd.recipe import load_recipe

REPEATS, WARMUP = 10, 3
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def measure(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Median seconds of ``run`` and GiB at most beyond what was allocated before."""
    on_cuda = device.type == "cuda"
    for _ in range(WARMUP):
        run()
    before = torch.cuda.memory_allocated(device) if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) - before if on_cuda else 0
    return median(times), peak / GIB


def cases(family: ModelFamily, latents: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, of the decoder as it is."""

    def with_gradient() -> None:
        leaf = latents.detach().requires_grad_()
        torch.autograd.grad(family.decode(leaf).sum(), leaf)

    @torch.no_grad()
    def without() -> None:
        family.decode(latents)

    return {"decode": without, "decode and gradient": with_gradient}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a small decoder, to try the script itself")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, ["model.height=64", "model.width=64"] if options.tiny else [])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family: Any = random_loaders(options.tiny).family(recipe, device)
    shape = family.latent_shape(recipe.model.height, recipe.model.width)
    latents = torch.randn(options.batch, *shape, device=device)
    decoder, eager = family.vae.decoder, family.vae.decoder.forward
    rows = []
    for compiled, (layout, memory_format), recomputed in itertools.product(
        (False, True), LAYOUTS.items(), (True, False)
    ):
        family.vae.to(memory_format=memory_format)
        decoder.gradient_checkpointing = recomputed
        decoder.forward = torch.compile(eager, dynamic=False) if compiled else eager
        for name, run in cases(family, latents).items():
            if recomputed and name == "decode":
                continue
            seconds, peak = measure(run, device)
            row = {
                "case": name,
                "layout": layout,
                "compiled": compiled,
                "recomputed": recomputed,
                "seconds": seconds / options.batch,
                "peak_gib": round(peak, 2),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
