"""Ambient consistency distribution matching (AC-DMD): the two losses that both stages share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtdmd.flow import ambient_velocity_target, cps_step, predict_x0, renoise
from rtdmd.objectives import ambient_score_loss, consistency_loss, distribution_matching_loss
from rtdmd.randomness import Draws
from rtdmd.rollout import VelocityFn


@dataclass(frozen=True)
class AmbientSettings:
    """What the recipe says about sub-intervals and the regulariser; times in timesteps."""

    eta: float
    consistency_weight: float
    consistency_max_timesteps: int
    min_interval_timesteps: float
    timestep_range: tuple[float, float]


@dataclass(frozen=True)
class Samples:
    """States x_s [B, C, H, W] at noise level s, and which draws belong to them."""

    states: Tensor
    sigma: float
    step: int  # iteration or epoch
    indices: Sequence[int]  # global sample indices
    transition: int | None = None  # tells apart the draws for several states of the same samples

    def purpose(self, name: str) -> str:
        """Of a draw."""
        return name if self.transition is None else f"{name}/after{self.transition}"


class AmbientMatching:
    """The fake score's and the generator's loss on a sub-interval [s, t]."""

    def __init__(self, draws: Draws, settings: AmbientSettings) -> None:
        self._draws = draws
        self._settings = settings

    def _noise(self, samples: Samples, purpose: str) -> Tensor:
        states, purpose = samples.states, samples.purpose(purpose)
        return self._draws.normal(samples.step, purpose, samples.indices, states.shape[1:], states.device)

    def _sigma_t(self, samples: Samples, purpose: str) -> Tensor:
        """t ~ U[1000·s + interval, 1000] in timesteps, clamped to the range, as sigma [B]."""
        lowest = 1000 * samples.sigma + self._settings.min_interval_timesteps
        purpose, device = samples.purpose(purpose), samples.states.device
        uniform = self._draws.uniform(samples.step, purpose, samples.indices, device)
        timesteps = (lowest + uniform * (1000 - lowest)).clamp(*self._settings.timestep_range)
        return timesteps / 1000

    def fake_score_loss(self, fake: VelocityFn, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """Ambient denoising score matching plus the consistency regulariser.

        Two evaluations of ``fake`` carry gradient: one at x_t, one at both backward moves in a batch.
        """
        settings, s = self._settings, samples.sigma
        t = self._sigma_t(samples, "fake/t")
        noise = self._noise(samples, "fake/noise")
        x_t = renoise(samples.states, noise, s, t)
        target, scale = ambient_velocity_target(samples.states, noise, s, t)
        velocity = fake(x_t, t)
        ambient = ambient_score_loss(velocity, target, scale)
        metrics = {"ambient": ambient.detach()}
        if settings.consistency_weight == 0:
            return ambient, metrics

        purpose, longest = samples.purpose("fake/delta"), settings.consistency_max_timesteps
        back = self._draws.integers(samples.step, purpose, samples.indices, 1, longest, t.device)
        earlier = (t - back.to(t) / 1000).clamp_min(0.0)
        with torch.no_grad():
            moved = [
                cps_step(x_t, velocity, t, earlier, settings.eta, self._noise(samples, f"fake/move{i}"))
                for i in range(2)
            ]
        both, levels = torch.cat(moved), earlier.repeat(2)
        h_first, h_second = predict_x0(both, fake(both, levels), levels).chunk(2)
        consistency = consistency_loss(predict_x0(x_t, velocity, t), h_first, h_second)
        metrics["consistency"] = consistency.detach()
        return ambient + settings.consistency_weight * consistency, metrics

    def generator_loss(
        self, teacher: VelocityFn, fake: VelocityFn, samples: Samples, weights: Tensor | None = None
    ) -> Tensor:
        """Distribution matching at x_s, through ``samples.states``' own graph.

        Teacher and fake score both predict at x_t and both go back to s with the same noise.
        """
        eta, s = self._settings.eta, samples.sigma
        t = self._sigma_t(samples, "generator/t")
        noise, back = self._noise(samples, "generator/noise"), self._noise(samples, "generator/back")
        with torch.no_grad():
            x_t = renoise(samples.states, noise, s, t)
            real = cps_step(x_t, teacher(x_t, t), t, s, eta, back)
            imitated = cps_step(x_t, fake(x_t, t), t, s, eta, back)
        return distribution_matching_loss(samples.states, imitated, real, weights=weights)
