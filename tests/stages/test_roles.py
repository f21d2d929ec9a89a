"""Learning rates of a stage's steps."""

from __future__ import annotations

import pytest

from rtdmd.recipe.schema import OptimizerSection
from rtdmd.stages.roles import learning_rate


@pytest.mark.parametrize(
    ("cooldown", "rates"),
    [
        (0.0, [1, 1, 1, 1, 1, 1]),
        (0.5, [1, 1, 1, 1, 2 / 3, 1 / 3]),
        (1.0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ],
)
def test_the_rate_falls_linearly_at_the_end(cooldown: float, rates: list[float]) -> None:
    """(N − k)/(c·N) of it where that is below 1, and nothing after the last step."""
    optimizer = OptimizerSection(2e-4, cooldown=cooldown)
    found = [learning_rate(optimizer, step, 6) for step in range(6)]
    assert found == [pytest.approx(2e-4 * rate) for rate in rates]
    assert learning_rate(optimizer, 6, 6) == (0.0 if cooldown else 2e-4)
