"""The scores of an epoch's pictures: of all ranks together, summarised, and fit to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rtdmd.distributed.collectives import Ranks
from rtdmd.errors import TrainingHalted
from rtdmd.objectives import weighted_mean
from rtdmd.rewards.image_statistics import group_diversity

# Scores [B] by name.
Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class RewardPull:
    """Where the rewards would have B pictures go: the hinge of each and its gradient at the final latents."""

    losses: Tensor  # relu(margin − Σ w_i·r_i), [B], 0 from the margin on
    gradient: Tensor  # of losses[b] with respect to picture b's latents, [B, C, H, W]

    def __getitem__(self, part: slice) -> RewardPull:
        return RewardPull(self.losses[part], self.gradient[part])

    @staticmethod
    def cat(parts: Sequence[RewardPull]) -> RewardPull:
        """Batches one after the other."""
        return RewardPull(
            torch.cat([part.losses for part in parts]), torch.cat([part.gradient for part in parts])
        )

    def on(self, x0: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reward hinge loss over the samples that weigh something, and its metrics.

        ``x0`` [B, C, H, W] are the same latents, computed once more with a graph, which the gradient goes on
        into; ``weights`` [B]. The value is the loss's. Samples of weight 0 are left out rather than
        multiplied: one of them may be there for want of a finite score, and 0·NaN is NaN.
        """
        counts = weights > 0
        losses = torch.where(counts, self.losses.to(x0.device), 0.0)
        gradient = torch.where(counts[:, None, None, None], self.gradient.to(x0.device), 0.0)
        loss = weighted_mean(losses, weights)
        carried = weighted_mean((x0 * gradient).flatten(1).sum(1), weights)
        active = (losses > 0).sum() / counts.sum().clamp(min=1)
        return loss + carried - carried.detach(), {"hinge": loss, "hinge_active": active}


@dataclass(frozen=True)
class Scored:
    """What is known of B pictures; of the rest what is there only if they were looked at closely."""

    rewards: Scores
    monitors: Scores = field(default_factory=dict)
    images: Scores = field(default_factory=dict)  # picture statistics
    thumbnails: Tensor | None = None  # [B, D]
    pull: RewardPull | None = None  # where rewards are back-propagated

    @staticmethod
    def cat(parts: Sequence[Scored]) -> Scored:
        """Batches one after the other."""

        def all_of(named: Sequence[Scores]) -> dict[str, Tensor]:
            return {name: torch.cat([part[name] for part in named]) for name in named[0]}

        pictures = [part.thumbnails for part in parts if part.thumbnails is not None]
        pulls = [part.pull for part in parts if part.pull is not None]
        return Scored(
            all_of([part.rewards for part in parts]),
            all_of([part.monitors for part in parts]),
            all_of([part.images for part in parts]),
            torch.cat(pictures) if pictures else None,
            RewardPull.cat(pulls) if pulls else None,
        )


@dataclass(frozen=True)
class EpochScores:
    """What is known of all N pictures of all ranks; ``prompt_ids`` [N] says which share a prompt."""

    prompt_ids: Tensor
    rewards: Scores
    monitors: Scores
    images: Scores
    diversity: float | None

    @staticmethod
    def of_all_ranks(prompt_ids: Sequence[int], mine: Scored, ranks: Ranks) -> EpochScores:
        """Collective: the ranks' pictures one after the other."""

        def gather(values: Tensor) -> Tensor:
            return ranks.all_gather(values.to(ranks.device)).flatten(0, 1)

        def gather_all(scores: Scores) -> dict[str, Tensor]:
            return {name: gather(values) for name, values in scores.items()}

        ids = gather(torch.tensor(prompt_ids))
        diversity = None if mine.thumbnails is None else group_diversity(gather(mine.thumbnails), ids)
        return EpochScores(
            ids, gather_all(mine.rewards), gather_all(mine.monitors), gather_all(mine.images), diversity
        )

    def metrics(self) -> dict[str, float]:
        """``reward/NAME``, ``monitor/NAME``, ``image/…``, and ``nonfinite/NAME``, how many scores aren't."""
        named = {f"{kind}/{name}": values for kind, name, values in self._named()}
        means = {metric: finite_mean(values) for metric, values in named.items()}
        counts = {f"nonfinite/{name}": float(count_non_finite(values)) for _, name, values in self._named()}
        return {k: mean for k, mean in means.items() if mean is not None} | self.image_metrics() | counts

    def image_metrics(self) -> dict[str, float]:
        """``image/NAME`` of every picture statistic, ``image/diversity`` within prompts."""
        means = {f"image/{name}": float(values.double().mean()) for name, values in self.images.items()}
        return means if self.diversity is None else means | {"image/diversity": self.diversity}

    def notices(self) -> list[str]:
        """What the user should know of scores that aren't finite; the same words each time."""
        return [
            f"{kind} {name!r} gave scores that aren't finite; such pictures are left out, and "
            f"nonfinite/{name} counts them"
            for kind, name, values in self._named()
            if count_non_finite(values)
        ]

    def _named(self) -> list[tuple[str, str, Tensor]]:
        kinds = {"reward": self.rewards, "monitor": self.monitors}
        return [(kind, name, values) for kind, scores in kinds.items() for name, values in scores.items()]

    def check_usable(self, weights: Mapping[str, float]) -> None:
        """TrainingHalted if a reward that is trained on has no finite score, or no picture has all of them.

        Every rank decides alike, these being the scores of all.
        """
        trained = {
            name: torch.isfinite(values) for name, values in self.rewards.items() if weights[name] != 0
        }
        for name, finite in trained.items():
            if not finite.any():
                raise TrainingHalted(
                    f"reward {name!r} gave no finite score for any of the epoch's {len(finite)} pictures; "
                    "look at samples/ and at the scorer, or take the reward out of the recipe"
                )
        if trained and not torch.stack(list(trained.values())).all(0).any():
            counts = ", ".join(f"{name} {int((~finite).sum())}" for name, finite in trained.items())
            raise TrainingHalted(
                f"no picture of the epoch has a finite score from every reward (not finite: {counts})"
            )


def finite_mean(scores: Tensor) -> float | None:
    """Mean over the finite scores, in float64; None if there are none."""
    kept = scores[torch.isfinite(scores)]
    return float(kept.double().mean()) if len(kept) else None


def finite_std(scores: Tensor) -> float:
    """The population's standard deviation over the finite scores, in float64; 0 if there are none."""
    kept = scores[torch.isfinite(scores)]
    return float(kept.double().std(correction=0)) if len(kept) else 0.0


def count_non_finite(scores: Tensor) -> int:
    """How many scores aren't finite."""
    return int((~torch.isfinite(scores)).sum())
