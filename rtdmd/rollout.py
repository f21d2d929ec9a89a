"""Few-step trajectories of a velocity function under CPS transitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rtdmd.flow import cps_step
from rtdmd.models.protocol import ModelFamily


class VelocityFn(Protocol):
    """v(x, sigma) for prompts that are already bound; x [B, C, H, W], sigma a float or [B]."""

    def __call__(self, x: Tensor, sigma: float | Tensor) -> Tensor: ...


# Noise of the transition that leaves step i, [B, C, H, W].
StepNoise = Callable[[int], Tensor]


@dataclass(frozen=True)
class FewSteps:
    """The generator's schedule and the latents it paints."""

    sigmas: Sequence[float]  # without the final 0
    eta: float
    latent_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Trajectory:
    """States before, between and after steps, their noise levels, and the velocity at each step taken."""

    sigmas: list[float]
    states: list[Tensor]
    velocities: list[Tensor]

    @property
    def final(self) -> Tensor:
        return self.states[-1]

    @property
    def final_sigma(self) -> float:
        return self.sigmas[-1]


def rollout(
    velocity: VelocityFn,
    state: Tensor,
    sigmas: Sequence[float],
    eta: float,
    step_noise: StepNoise,
    *,
    first: int = 0,
    num_steps: int | None = None,
) -> Trajectory:
    """Run ``num_steps`` (all that are left) few-step transitions from ``state``, where step ``first`` begins.

    ``sigmas`` are the whole schedule's noise levels without the final 0; at step 0 the state is pure noise.
    Gradients are the caller's to switch off. The transition to sigma = 0 is deterministic.
    """
    levels = [*sigmas, 0.0]
    end = len(sigmas) if num_steps is None else first + num_steps
    states, velocities = [state.float()], []
    for i in range(first, end):
        v = velocity(states[-1], levels[i])
        # eta of a transition to 0 has no effect, its noise is multiplied by 0.
        drawn = step_noise(i) if levels[i + 1] > 0 else torch.zeros_like(states[-1])
        states.append(cps_step(states[-1], v, levels[i], levels[i + 1], eta, drawn))
        velocities.append(v.detach())
    return Trajectory(levels[first : end + 1], states, velocities)


@torch.no_grad()
def paint(family: ModelFamily, velocity: VelocityFn, few: FewSteps, noise: Callable[[str], Tensor]) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of a whole rollout, decoded one at a time.

    ``noise(purpose)`` gives standard normal latents [B, C, H, W]: ``"initial"``, and ``"transition0"``,
    ``"transition1"``, … for the transitions that leave those steps (none is drawn where eta is 0).
    """
    initial = noise("initial")

    def step_noise(step: int) -> Tensor:
        return noise(f"transition{step}") if few.eta > 0 else torch.zeros_like(initial)

    trajectory = rollout(velocity, initial, few.sigmas, few.eta, step_noise)
    return torch.cat([family.decode(latents[None]) for latents in trajectory.final])
