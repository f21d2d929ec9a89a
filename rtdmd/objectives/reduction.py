"""The one way in which per-sample losses become a scalar."""

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # added to every standard deviation that divides


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Σ w·values / Σ w over samples; the plain mean without weights, 0 if all weights are 0.

    Shapes: ``values`` [B], ``weights`` [B] with non-negative entries. Raises ValueError for other shapes,
    which would broadcast to a wrong mean.
    """
    if values.ndim != 1 or (weights is not None and weights.shape != values.shape):
        weighted = "" if weights is None else f" and weights of shape {tuple(weights.shape)}"
        raise ValueError(f"expected one value per sample, got shape {tuple(values.shape)}{weighted}")
    if weights is None:
        return values.mean()
    weights = weights.to(values)
    total = weights.sum()
    return (weights * values).sum() / torch.where(total > 0, total, torch.ones_like(total))
