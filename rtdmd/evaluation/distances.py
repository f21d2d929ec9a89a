"""Distances between two sets of image features: Fréchet's (as in FID) and CLIP's MMD (CMMD).

Everything is computed in float64. Legend: N, M samples, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The published bandwidth and scale of CMMD.
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
_ROWS_AT_ONCE = 1024


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Fréchet distance of the normal distributions fitted to two sets of features.

    |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½), covariances with N − 1 (Dowson and Landau 1982; FID, arXiv
    1706.08500, is this on Inception's features). With Σ = RᵀR, R the triangular factor of the centred
    features over √(N − 1), the trace of the root is the sum of the singular values of R_a·R_bᵀ: there is no
    root of a matrix to take, and nothing that could turn negative or complex where covariances are singular.

    The estimate is biased upwards for few samples; compare only sets of the same sizes.

    Args:
        features_a: [N, D], N >= 2.
        features_b: [M, D], M >= 2.

    Raises:
        ValueError: shapes differ, there are fewer than 2 samples, or a number isn't finite.
    """
    a, b = _checked(features_a, features_b, at_least=2)
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    root_a, root_b = _covariance_root(a - mean_a), _covariance_root(b - mean_b)
    mixed = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum()
    return float((mean_a - mean_b).square().sum() + spread - 2 * mixed)


def _covariance_root(centred: Tensor) -> Tensor:
    """R [min(N, D), D] with RᵀR the covariance of centred features [N, D]."""
    return torch.linalg.qr(centred, mode="r").R / (len(centred) - 1) ** 0.5


def mmd_squared(features_a: Tensor, features_b: Tensor, sigma: float, *, unbiased: bool) -> float:
    """Squared maximum mean discrepancy under the kernel k(x, y) = exp(−|x − y|²/(2σ²)).

    mean k(a, a') + mean k(b, b') − 2·mean k(a, b) (Gretton et al. 2012). ``unbiased`` leaves the pairs of a
    sample with itself out of the first two means (their equation 3), and the estimate may fall below 0; with
    them (equation 5) it is never negative, and about (1 − mean k)·(1/N + 1/M) too large.

    Args:
        features_a: [N, D], N >= 2 if ``unbiased``, else N >= 1.
        features_b: [M, D], likewise.
        sigma: the kernel's bandwidth, above 0.
        unbiased: which estimate.

    Raises:
        ValueError: as :func:`frechet_distance`.
    """
    a, b = _checked(features_a, features_b, at_least=2 if unbiased else 1)
    gamma = 1 / (2 * sigma**2)
    within_a, within_b = (_mean_kernel(x, x, gamma, without_self=unbiased) for x in (a, b))
    return within_a + within_b - 2 * _mean_kernel(a, b, gamma)


def _mean_kernel(a: Tensor, b: Tensor, gamma: float, without_self: bool = False) -> float:
    """Mean of k − 1 over all pairs.

    The ones cancel between the three means; without them a wide kernel's small differences keep all their
    digits. ``without_self``: a and b are the same set; the pairs of a sample with itself (k − 1 = 0) aren't
    counted.
    """
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for rows in a.split(_ROWS_AT_ONCE):
        squares = rows.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * rows @ b.T
        total += torch.expm1(-gamma * squares.clamp(min=0)).sum()  # rounding can take |x − x|² below 0
    pairs = len(a) * (len(b) - 1) if without_self else len(a) * len(b)
    return float(total) / pairs


def cmmd(features_a: Tensor, features_b: Tensor, *, unbiased: bool = False) -> float:
    """CMMD, arXiv 2401.09603: 1000·MMD² with bandwidth 10 between CLIP features scaled to length 1.

    The published values are of the biased estimate, the default here, on features of
    openai/clip-vit-large-patch14-336.

    Raises:
        ValueError: as :func:`frechet_distance`, or a row has length 0.
    """
    a, b = _checked(features_a, features_b, at_least=2 if unbiased else 1)
    return CMMD_SCALE * mmd_squared(_unit_rows(a), _unit_rows(b), CMMD_SIGMA, unbiased=unbiased)


def _unit_rows(features: Tensor) -> Tensor:
    lengths = features.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise ValueError("a row of the features has length 0")
    return features / lengths


def _checked(features_a: Tensor, features_b: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    a, b = (torch.as_tensor(features).double() for features in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {list(a.shape)} and {list(b.shape)}")
    if min(len(a), len(b)) < at_least:
        raise ValueError(f"needs at least {at_least} samples on each side, got {len(a)} and {len(b)}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("a feature isn't finite")
    return a, b
