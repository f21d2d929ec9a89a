"""What a step must compute, and how fast the device multiplies matrices.

F, one forward of the transformer for one sample, is 2·rows·inputs·outputs of every matrix product, attention
included (4·L²·width a layer over L tokens), counted on the module itself without memory. A backward costs
F, the gradient to the activations, and F more where the base trains too (a LoRA's own share is neglected).
Recomputation, decoder, rewards and text encoding don't count.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from rtdmd.models.protocol import ModelFamily, TextEmbeddings
from rtdmd.recipe.schema import ColdStartSection, Recipe, RtdmdSection, TrainedSection


def forward_flops(
    family: ModelFamily, config: dict[str, Any], shape: tuple[int, int, int], text: TextEmbeddings
) -> int:
    """F of one sample whose latent has ``shape``; ``text`` is any embedding with B = 1."""
    with torch.device("meta"):
        network = family.transformer_class(**config)
        latent = torch.empty(1, *shape)
        like = {name: torch.empty(1, *value.shape[1:]) for name, value in text.tensors.items()}
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        family.predict_velocity(network, latent, 0.5, TextEmbeddings(like))
    return counter.get_total_flops()


def _backward(role: TrainedSection) -> int:
    return 2 if role.trains == "full" else 1


def _teacher(recipe: Recipe) -> int:
    return 1 if recipe.model.guidance_scale == 1 else 2


def _fake_score(recipe: Recipe, settings: ColdStartSection | RtdmdSection) -> int:
    """One evaluation, and two more for the consistency regulariser, forward and backward."""
    evaluations = 1 if settings.consistency_weight == 0 else 3
    return evaluations * (1 + _backward(recipe.roles.fake_score))


def cold_start_forwards(recipe: Recipe, stop: int, with_generator: bool) -> int:
    """Network evaluations per sample, in F, of an iteration that stops its rollouts after ``stop`` steps."""
    fake = stop + _fake_score(recipe, recipe.cold_start)
    if not with_generator:
        return fake
    return fake + stop + _backward(recipe.roles.generator) + _teacher(recipe) + 1


def rtdmd_forwards(recipe: Recipe) -> int:
    """Network evaluations per sample, in F, of an epoch."""
    settings = recipe.rtdmd
    steps = len(recipe.schedule.timesteps)
    both = 1 + _backward(recipe.roles.generator)
    drawn = settings.num_policy_steps
    trained = 1 + (drawn if settings.trains_drawn else 0)
    matched = 1 + (drawn if settings.matches_drawn else 0)
    return steps + trained * both + matched * (_fake_score(recipe, settings) + _teacher(recipe) + 1)


def matrix_ceiling(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product of ``size``, the median of 20 after 5 to warm up."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(25):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times[5:])
