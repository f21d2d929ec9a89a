"""What a card says of the training."""

from __future__ import annotations

from rtdmd.export.card_tables import training_table
from rtdmd.recipe import load_recipe


def test_rates_and_how_they_fall() -> None:
    overrides = ["cold_start.generator.learning_rate=2e-4", "cold_start.fake_score.learning_rate=1e-3"]
    recipe = load_recipe("recipes/shapes.yaml", [*overrides, "cold_start.fake_score.cooldown=0"])
    table = training_table(recipe, ["cold_start"])
    assert (
        "learning rates 0.0002 falling to 0 over the last 40% (generator) and 0.001 (fake score) |" in table
    )
