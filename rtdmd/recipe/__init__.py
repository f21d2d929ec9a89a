"""Recipes: their typed schema, strict loading, and the checks before anything heavy starts."""

from rtdmd.recipe.checks import check_recipe, load_checked, load_for_evaluation, load_for_sampling
from rtdmd.recipe.loading import dump_recipe, load_recipe
from rtdmd.recipe.schema import Recipe

__all__ = [
    "Recipe",
    "check_recipe",
    "dump_recipe",
    "load_checked",
    "load_for_evaluation",
    "load_for_sampling",
    "load_recipe",
]
