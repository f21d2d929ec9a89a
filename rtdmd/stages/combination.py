"""How several rewards act together: clipped, weighted, and on request standardised for back-propagation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rtdmd.objectives import clip_scores, combine_rewards
from rtdmd.stages.scores import Scores


@dataclass
class RunningMoments:
    """Exponential means of a reward's mean and mean square over epochs.

    After n epochs with batch means b_1 … b_n: Σ d^(n−k)·b_k / Σ d^(n−k), so that the first epoch counts
    in full.
    """

    total_weight: float = 0.0
    mean: float = 0.0
    mean_square: float = 0.0

    def update(self, scores: Tensor, decay: float) -> None:
        """Take in an epoch's finite scores, any number above 0."""
        scores = scores.double()
        self.total_weight = decay * self.total_weight + 1
        self.mean += (float(scores.mean()) - self.mean) / self.total_weight
        self.mean_square += (float(scores.square().mean()) - self.mean_square) / self.total_weight

    @property
    def std(self) -> float:
        """The population's standard deviation."""
        return max(self.mean_square - self.mean**2, 0.0) ** 0.5


class Combination:
    """Weights, bounds and running statistics of a recipe's rewards.

    ``bounds`` has [low, high] of the rewards that are clipped. ``decay`` per epoch belongs to the statistics
    by which rewards are standardised before they are back-propagated; None doesn't standardise.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        bounds: Mapping[str, tuple[float, float]] | None = None,
        decay: float | None = None,
    ) -> None:
        self.weights = dict(weights)
        self._bounds = dict(bounds or {})
        self._decay = decay
        self._moments = {} if decay is None else {name: RunningMoments() for name in weights}

    def clip(self, rewards: Scores) -> dict[str, Tensor]:
        """The scores that are trained on."""
        return {
            name: clip_scores(scores, *self._bounds[name]) if name in self._bounds else scores
            for name, scores in rewards.items()
        }

    def observe(self, rewards: Scores) -> None:
        """Follow an epoch's clipped scores of all ranks; scores that aren't finite don't count."""
        for name, moments in self._moments.items():
            finite = rewards[name][torch.isfinite(rewards[name])]
            if self._decay is not None and len(finite):
                moments.update(finite, self._decay)

    def is_ready(self, names: Iterable[str]) -> bool:
        """Whether there is a :meth:`total` of these rewards: standardising takes an epoch's scores first."""
        return all(self._moments[name].total_weight > 0 for name in names if name in self._moments)

    def total(self, rewards: Scores) -> Tensor:
        """What the hinge sees of some rewards' raw scores, [B]; differentiable."""
        moments = {name: (self._moments[name].mean, self._moments[name].std) for name in self._moments}
        return combine_rewards(self.clip(rewards), self.weights, moments or None)

    def state(self) -> dict[str, Any]:
        """The statistics, for a checkpoint."""
        return {name: asdict(moments) for name, moments in self._moments.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the statistics up again; a reward without any there starts afresh."""
        for name in self._moments:
            if name in state:
                self._moments[name] = RunningMoments(**state[name])
