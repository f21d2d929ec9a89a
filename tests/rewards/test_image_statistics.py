"""Picture statistics on pictures whose values are known, and diversity against the sum over pairs."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from rtdmd.recipe.checks_values import IMAGE_METRICS
from rtdmd.rewards.image_statistics import (
    STATISTICS,
    edge_energy,
    grey_entropy,
    group_diversity,
    saturation,
    thumbnails,
)


def flat(*colour: float) -> torch.Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 8, 8)


def test_flat_pictures() -> None:
    """No edges, one grey level. Saturation: grey and black 0, red 1, (0.8, 0.4, 0.6) 0.5."""
    images = torch.cat([flat(0.5, 0.5, 0.5), flat(0, 0, 0), flat(1, 0, 0), flat(0.8, 0.4, 0.6)])
    assert edge_energy(images).abs().max() < 1e-12
    assert grey_entropy(images).tolist() == [0.0] * 4
    assert saturation(images).tolist() == pytest.approx([0, 0, 1, 0.5])


def test_edges_and_entropy_by_hand() -> None:
    """Columns of 0 and 1 in turn: each of the steps across is 1, none down; two levels equally often, 1 bit.
    A ramp over all 256 levels has 8 bits and steps of 1/255."""
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(1, 3, 8, 8)
    assert edge_energy(stripes).item() == pytest.approx(1.0)
    assert grey_entropy(stripes).item() == pytest.approx(1.0)
    ramp = (torch.arange(256) / 255).expand(1, 3, 4, 256)
    assert grey_entropy(ramp).item() == pytest.approx(8.0)
    assert edge_energy(ramp).item() == pytest.approx(1 / 255**2, rel=1e-4)


def test_every_statistic_can_be_a_stop_rules_metric() -> None:
    assert {*IMAGE_METRICS} == {*STATISTICS, "diversity"}


def test_thumbnails_are_means() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small = thumbnails(images).view(2, 3, 16, 16)
    torch.testing.assert_close(small[1, 2, 0, 1], images[1, 2, 0:2, 2:4].mean())


def test_diversity_equals_the_root_mean_square_over_pairs() -> None:
    """Groups of 3, 2 and 1; the last has no pairs."""
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([7, 3, 7, 7, 3, 9])
    expected = []
    for group in (7, 3):
        pairs = list(combinations(features[ids == group].double(), 2))
        squares = [(a - b).square().mean() for a, b in pairs]
        expected.append(float(torch.stack(squares).mean().sqrt()))
    assert group_diversity(features, ids) == pytest.approx(sum(expected) / 2)
    assert group_diversity(features, torch.arange(6)) == 0.0
    assert group_diversity(features[:1].expand(4, 5), torch.zeros(4)) == pytest.approx(0, abs=1e-8)
