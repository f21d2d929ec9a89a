"""The scores of an epoch's pictures: of all ranks together, summarised, and fit to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rtdmd.distributed.collectives import Ranks
from rtdmd.errors import TrainingHalted

# Scores [B] by name.
Scores = Mapping[str, Tensor]


def of_all_ranks(parts: Sequence[Scores], ranks: Ranks) -> dict[str, Tensor]:
    """Collective: this rank's batches in their order, rank after rank, [N] by name."""
    return {name: ranks.all_gather(torch.cat([part[name] for part in parts])).flatten() for name in parts[0]}


def finite_mean(scores: Tensor) -> float | None:
    """Mean over the finite scores, in float64; None if there are none."""
    kept = scores[torch.isfinite(scores)]
    return float(kept.double().mean()) if len(kept) else None


def count_non_finite(scores: Tensor) -> int:
    """How many scores aren't finite."""
    return int((~torch.isfinite(scores)).sum())


def score_metrics(prefix: str, scores: Scores) -> dict[str, float]:
    """``prefix/NAME``, the mean over finite scores, and ``nonfinite/NAME``, how many others there are."""
    means = {f"{prefix}/{name}": finite_mean(values) for name, values in scores.items()}
    counts = {f"nonfinite/{name}": float(count_non_finite(values)) for name, values in scores.items()}
    return {name: mean for name, mean in means.items() if mean is not None} | counts


def check_usable(rewards: Scores, weights: Mapping[str, float]) -> None:
    """TrainingHalted if a reward that is trained on has no finite score, or no sample has all of them.

    ``rewards`` are those of all ranks, so that every rank decides alike.
    """
    trained = {name: torch.isfinite(values) for name, values in rewards.items() if weights[name] != 0}
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


def non_finite_notices(scores: Scores) -> list[str]:
    """What the user should know of scores that aren't finite; the same words each time."""
    return [
        f"reward {name!r} gave scores that aren't finite; such pictures are left out, and nonfinite/{name} "
        "counts them"
        for name, values in scores.items()
        if count_non_finite(values)
    ]
