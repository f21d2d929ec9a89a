"""Fréchet's distance and CMMD against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rtdmd.evaluation.distances import cmmd, frechet_distance, mmd_squared


def samples(mean: list[float], covariance: Tensor, count: int = 50, seed: int = 0) -> Tensor:
    """Points whose own mean and covariance (N − 1) are exactly these."""
    raw = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    raw = raw - raw.mean(dim=0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / (count - 1))).T
    return white @ torch.linalg.cholesky(covariance.double()).T + torch.tensor(mean, dtype=torch.float64)


def test_frechet_of_diagonal_covariances() -> None:
    """|μ_a − μ_b|² + Σ (√λ_a − √λ_b)² = (1 + 4) + (1 − 3)² + (2 − 2)² + (5 − 1)² = 25."""
    a = samples([0, 0, 0], torch.diag(torch.tensor([1.0, 4.0, 25.0])))
    b = samples([1, 2, 0], torch.diag(torch.tensor([9.0, 4.0, 1.0])), count=70, seed=1)
    assert frechet_distance(a, b) == pytest.approx(25, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(25, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    """In two dimensions Tr (Σ_a·Σ_b)^½ = √(Tr Σ_a·Σ_b + 2·√(det Σ_a·det Σ_b)).

    Σ_a = [[2, 1], [1, 2]], Σ_b = diag(1, 4): Tr = 2 + 8 = 10, dets 3 and 4, so Tr^½ = √(10 + 2·√12).
    """
    a = samples([0, 0], torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    b = samples([3, 0], torch.diag(torch.tensor([1.0, 4.0])), seed=1)
    expected = 9 + 4 + 5 - 2 * math.sqrt(10 + 2 * math.sqrt(12))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_fewer_samples_than_features() -> None:
    """±u/√2 has covariance u·uᵀ. Then the distance is |u|² + |v|² − 2·|u·v|: here 25 + 4 − 2·8 = 13."""
    u, v = torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0, 0.0])
    a, b = (torch.stack([x, -x]) / math.sqrt(2) for x in (u, v))
    assert frechet_distance(a, b) == pytest.approx(13, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_is_sound_where_covariances_are_nearly_singular() -> None:
    """Eigenvalues from 1 to 1e-16; the closed form for diagonal covariances still holds."""
    powers = torch.logspace(0, -16, 9, dtype=torch.float64)
    a, b = samples([0.0] * 9, torch.diag(powers)), samples([0.0] * 9, torch.diag(powers.flip(0)), seed=2)
    expected = (powers.sqrt() - powers.flip(0).sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_mmd_by_hand() -> None:
    """Points 0 and 1 against 0, σ² = ½, so k = exp(−d²) with e = exp(−1).

    Biased: (1 + e + e + 1)/4 + 1 − 2·(1 + e)/2 = (1 − e)/2. Unbiased, second set 0 and 0:
    e + 1 − 2·(1 + e)/2 = 0.
    """
    a, e, sigma = torch.tensor([[0.0], [1.0]]), math.exp(-1), math.sqrt(0.5)
    biased = mmd_squared(a, torch.tensor([[0.0]]), sigma, unbiased=False)
    assert biased == pytest.approx((1 - e) / 2, rel=1e-12)
    unbiased = mmd_squared(a, torch.tensor([[0.0], [0.0]]), sigma, unbiased=True)
    assert unbiased == pytest.approx(0, abs=1e-12)
    further = mmd_squared(a, torch.tensor([[2.0], [2.0]]), sigma, unbiased=True)
    assert further == pytest.approx(e + 1 - (math.exp(-4) + e), rel=1e-12)


def test_unbiased_mmd_is_zero_on_average() -> None:
    """Over sets of one distribution; the biased one is about (1 − mean k)·(1/N + 1/M) above it."""
    generator = torch.Generator().manual_seed(0)
    unbiased, biased = [], []
    for _ in range(300):
        a, b = (torch.randn(8, 2, generator=generator) for _ in range(2))
        unbiased.append(mmd_squared(a, b, 1.0, unbiased=True))
        biased.append(mmd_squared(a, b, 1.0, unbiased=False))
    # E k = 1/(1 + 2/σ²) for two dimensions and unit variances: a − b has variance 2.
    kernel = 1 / 3
    assert abs(sum(unbiased) / 300) < 0.01
    assert sum(biased) / 300 == pytest.approx((1 - kernel) * 2 / 8, abs=0.01)


def test_cmmd_scales_features_and_value() -> None:
    """e_1 against e_2, of any length: |x − y|² = 2, so 1000·(1 + 1 − 2·exp(−2/200))."""
    a, b = torch.tensor([[5.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.1], [0.0, 3.0]])
    expected = 2000 * (1 - math.exp(-0.01))
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-10)
    assert cmmd(a, b, unbiased=True) == pytest.approx(expected, rel=1e-10)
    assert cmmd(a, a) == 0


def test_cmmd_over_chunks_is_the_definition() -> None:
    """More rows than are taken at once."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(count, 4, dtype=torch.float64, generator=generator) for count in (1500, 20))
    x, y = (features / features.norm(dim=1, keepdim=True) for features in (a, b))
    kernels = [torch.exp(-torch.cdist(p, q).square() / 200) for p, q in ((x, x), (y, y), (x, y))]
    within = [(kernel.sum() - len(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in kernels[:2]]
    biased = kernels[0].mean() + kernels[1].mean() - 2 * kernels[2].mean()
    assert cmmd(a, b) == pytest.approx(1000 * float(biased), rel=1e-9)
    unbiased = within[0] + within[1] - 2 * kernels[2].mean()
    assert cmmd(a, b, unbiased=True) == pytest.approx(1000 * float(unbiased), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), r"got \[3, 2\] and \[3, 4\]"),
        (torch.zeros(1, 2), torch.ones(3, 2), "at least 2 samples on each side, got 1 and 3"),
        (torch.tensor([[1.0], [math.nan]]), torch.ones(2, 1), "isn't finite"),
    ],
)
def test_refused(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)
    with pytest.raises(ValueError, match=message):
        cmmd(a, b, unbiased=True)


def test_a_feature_of_length_zero_has_no_direction() -> None:
    with pytest.raises(ValueError, match="length 0"):
        cmmd(torch.zeros(2, 2), torch.ones(2, 2))
