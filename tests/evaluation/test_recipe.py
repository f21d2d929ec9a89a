"""The recipe's section: defaults, faults, and what the command's options make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtdmd.errors import UserError
from rtdmd.evaluation.choices import Choices, set_name
from rtdmd.evaluation.sets import evaluation_rewards
from rtdmd.recipe import check_recipe, load_for_evaluation, load_recipe
from rtdmd.recipe.schema import EvaluationModelSection, Recipe, RewardSection

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = "recipes/dry_run.yaml"
SET = "evaluation.sets=[{name: a, prompts: {source: recipes/dry_run_prompts.txt}}]"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def check(*overrides: str) -> Recipe:
    """As training checks the recipe, which needs the recipe's models to be there."""
    recipe = load_recipe(DEMO, overrides)
    check_recipe(recipe, DEMO, world_size=1, stages=["rtdmd"])
    return recipe


def faults(*overrides: str) -> list[str]:
    """What training finds wrong with ``evaluation``."""
    with pytest.raises(UserError) as error:
        check(*overrides, "model.pipeline=none/none/none")
    return [line for line in str(error.value).splitlines() if "evaluation" in line]


def test_nothing_is_read_where_nothing_is_due() -> None:
    absent = "evaluation.sets=[{name: a, prompts: {source: nowhere.txt}}]"
    assert faults(absent) == []
    (line,) = faults(absent, "evaluation.every=5")
    assert "evaluation.sets.0.prompts: nowhere.txt: there is no such file" in line
    (line,) = faults("evaluation.every=5")
    assert "evaluation.sets = []: write at least one set" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.every=-1", "evaluation.every = -1: write 0 or more"),
        ("evaluation.height=100", "evaluation.height = 100: write a multiple of 16, such as 96 or 112"),
        ("evaluation.batch_size=0", "evaluation.batch_size = 0: write at least 1"),
        (
            "evaluation.sets=[{name: a/b, prompts: {source: x.txt}}]",
            "sets.0.name = 'a/b': write a folder name",
        ),
        (
            "evaluation.models=[{name: a, model: bse}]",
            "models.0.model = 'bse': model 'bse': unknown kind 'bse'",
        ),
        (
            "evaluation.models=[{name: a, model: base}, {name: a, model: teacher}]",
            "evaluation.models.1.name = 'a': also evaluation.models.0; give it another name",
        ),
        ("evaluation.rewards=[{name: clip}]", "evaluation.rewards.0.name = 'clip': unknown reward"),
        ("evaluation.rewards=[{name: pickscore, mode: official}]", "pickscore has no such mode"),
        (
            "evaluation.rewards=[{name: clipscore, url: here}]",
            "evaluation.rewards.0.url = 'here': write http://",
        ),
        (
            "evaluation.sets=[{name: a, prompts: {source: x.txt}, num_images_per_prompt: 0}]",
            "evaluation.sets.0.num_images_per_prompt = 0: write at least 1",
        ),
    ],
)
def test_faults_are_found_before_any_evaluation(override: str, message: str) -> None:
    (line,) = faults(override)
    assert message in line


def test_a_reward_that_can_score_nothing_is_a_fault() -> None:
    (line,) = faults(SET, "evaluation.every=5", "evaluation.rewards=[{name: geneval}]")
    assert "evaluation: reward 'geneval' can score none of the sets" in line


def test_the_recipes_own_rewards_are_checked_once() -> None:
    """They stand in where the section has none, also for a stage that doesn't train on them."""
    recipe = load_recipe(DEMO, [SET, "evaluation.every=5", "rewards.0.weights=no/such/folder"])
    for stage in ("cold_start", "rtdmd"):
        with pytest.raises(UserError) as error:
            check_recipe(recipe, DEMO, world_size=1, stages=[stage])
        assert str(error.value).count("rewards.0.weights = 'no/such/folder'") == 1
    with pytest.raises(UserError) as error:
        load_for_evaluation(DEMO, ["rewards.0.name=clipscor", SET], Choices().apply)
    assert str(error.value).count("unknown reward; did you mean 'clipscore'?") == 1


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(UserError, match="evry: unknown key; did you mean 'every'"):
        load_recipe(DEMO, ["evaluation.evry=5"])


def test_rewards_that_are_left_out_are_the_recipes_in_mode_default() -> None:
    """GenEval trains on partial credit; what is published is the verdict."""
    recipe = load_recipe("recipes/flux2_4b.yaml")
    assert [reward.mode for reward in recipe.rewards if reward.name == "geneval"] == ["official"]
    rewards = evaluation_rewards(recipe)
    assert [reward.name for reward in rewards] == [reward.name for reward in recipe.rewards]
    assert {reward.mode for reward in rewards} == {"default"}


def test_options_take_the_place_of_the_recipes() -> None:
    own = "evaluation.rewards=[{name: clipscore, weights: here}]"
    recipe = load_recipe(DEMO, [SET, own, "evaluation.seed=3"])
    kept = Choices().apply(recipe)
    assert kept == recipe.evaluation
    changed = Choices(
        prompts=["data/my prompts.jsonl"],
        models=["base", "ours=run:runs/a"],
        rewards=["compressibility", "clipscore", "hpsv2"],
        num_images_per_prompt=2,
        limit=5,
        batch_size=8,
        seed=0,
    ).apply(recipe)
    (only,) = changed.sets
    assert (only.name, only.prompts.source, only.prompts.limit) == ("my_prompts", "data/my prompts.jsonl", 5)
    assert changed.models == [
        EvaluationModelSection("base", "base"),
        EvaluationModelSection("ours", "run:runs/a"),
    ]
    assert changed.rewards == [
        RewardSection("compressibility"),
        RewardSection("clipscore", weights="here"),
        RewardSection("hpsv2"),
    ]
    assert (changed.num_images_per_prompt, changed.batch_size, changed.seed) == (2, 8, 0)


def test_names_of_sets() -> None:
    assert set_name("a/draw bench.v1.tsv") == "draw_bench.v1"
    assert set_name(".hidden.txt") == "hidden"


def test_shipped_recipes_evaluate_at_the_published_size() -> None:
    for path in sorted(ROOT.glob("recipes/flux2_*.yaml")) + sorted(ROOT.glob("recipes/sd3*.yaml")):
        recipe = load_recipe(path)
        assert (recipe.evaluation.height, recipe.evaluation.width) == (1024, 1024), path
    prompts = Choices(prompts=["data/geneval_train.jsonl"], limit=8)
    evaluation = load_for_evaluation("recipes/flux2_4b.yaml", [], prompts.apply).evaluation
    assert [each.name for each in evaluation.sets] == ["geneval_train"]
