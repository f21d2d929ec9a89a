"""What pictures of the shapes world are worth: the judge's accuracy, and pictures in bulk to judge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtdmd.models.guidance import predict_guided_velocity
from rtdmd.models.protocol import ModelFamily, Network
from rtdmd.randomness import Draws
from rtdmd.rollout import rollout
from rtdmd.shapes.captions import Caption
from rtdmd.shapes.verifier import Verdict, verify

SIZE = 64


@dataclass(frozen=True)
class Sampler:
    """How a network paints: noise levels, stochasticity, guidance."""

    sigmas: Sequence[float]  # without the final 0
    eta: float  # 0 is Euler's step of the ODE
    guidance_scale: float = 1.0


def euler(num_steps: int, guidance_scale: float) -> Sampler:
    """Evenly spaced noise levels from 1, which suit the small world better than FLUX.2's shift."""
    return Sampler([1 - i / num_steps for i in range(num_steps)], 0.0, guidance_scale)


@torch.no_grad()
def paint_many(
    family: ModelFamily,
    network: Network,
    prompts: Sequence[str],
    sampler: Sampler,
    *,
    seeds: Sequence[int] = (0,),
    chunk: int = 256,
) -> Tensor:
    """Pictures [S·N, 3, 64, 64] in [0, 1], float32, of all prompts with each seed, ``chunk`` at a time.

    Noise is a function of (seed, prompt), the one that ``rtdmd sample`` and ``rtdmd evaluate`` draw, so that
    they paint the same pictures.
    """
    unconditional = family.encode_prompts([""])
    device = next(iter(unconditional.tensors.values())).device
    shape = family.latent_shape(SIZE, SIZE)

    def paint(chosen: Sequence[str], seed: int) -> Tensor:
        text, draws = family.encode_prompts(chosen), Draws(seed, "sample")
        initial = draws.normal(0, "initial", chosen, shape, device)

        def velocity(x: Tensor, sigma: float | Tensor) -> Tensor:
            scale = sampler.guidance_scale
            return predict_guided_velocity(family, network, x, sigma, text, unconditional, scale)

        def step_noise(step: int) -> Tensor:
            if sampler.eta == 0:
                return torch.zeros_like(initial)
            return draws.normal(0, f"transition{step}", chosen, shape, device)

        return family.decode(rollout(velocity, initial, sampler.sigmas, sampler.eta, step_noise).final)

    starts = range(0, len(prompts), chunk)
    return torch.cat([paint(prompts[start : start + chunk], seed) for seed in seeds for start in starts])


def judge(images: Tensor, captions: Sequence[Caption]) -> list[Verdict]:
    """The verifier's verdict of each picture [N, 3, 64, 64] in [0, 1]."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [verify(picture, caption) for picture, caption in zip(pixels, captions, strict=True)]


def accuracy(verdicts: Sequence[Verdict], captions: Sequence[Caption]) -> dict[str, float]:
    """Share of entirely right pictures: ``all``, and by the captions' kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    for verdict, caption in zip(verdicts, captions, strict=True):
        right["all"].append(verdict.correct)
        right[caption.kind].append(verdict.correct)
    return {kind: sum(values) / len(values) for kind, values in right.items()}
