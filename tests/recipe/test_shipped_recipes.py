"""The recipes and engine files that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtdmd.recipe import Recipe, check_recipe, dump_recipe, load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ENGINES = sorted((RECIPES.parent / "ds_configs").glob("*.json"))

# Pixels, guidance, rates (cold start; rtdmd's generator, fake score), sample batch, K, GPUs of rtdmd.
PUBLISHED = {
    "flux2_4b": (512, 4.0, 1e-6, 3e-6, 1e-6, 6, 24, 16),
    "flux2_9b": (512, 4.0, 1e-6, 3e-6, 1e-6, 3, 24, 32),
    "sd35m": (512, 4.5, 3e-5, 3e-6, 3e-5, 9, 24, 8),
    "sd3m": (1024, 7.0, 3e-5, 3e-6, 3e-5, 2, 16, 16),
}


SMALL = ("demo", "shapes")  # the small world's, whose models are in data/shapes


def dry_run(folder_of: dict[str, Path], *overrides: str) -> Recipe:
    """The dry run with its models elsewhere than in build/tiny."""
    return load_recipe(
        RECIPES / "dry_run.yaml",
        [f"model.pipeline={folder_of['flux2']}", f"rewards.0.weights={folder_of['clip']}", *overrides],
    )


@pytest.fixture
def tiny(tiny_flux2: Path, tiny_sd3: Path, tiny_clip: Path) -> dict[str, Path]:
    """Folders of the tiny models by what they are."""
    return {"flux2": tiny_flux2, "sd3": tiny_sd3, "clip": tiny_clip}


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*PUBLISHED, *SMALL, "dry_run"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    pixels, guidance, cold_rate, generator_rate, fake_rate, batch, group, gpus = PUBLISHED[name]
    check_recipe(recipe, name, world_size=8, stages=["cold_start"])
    check_recipe(recipe, name, world_size=gpus, stages=["rtdmd"])
    for fewer in (1, 8):
        check_recipe(recipe, name, world_size=fewer, stages=recipe.stages)
        for layout in (RECIPES / "layouts").glob("*.yaml"):
            placed = load_recipe(RECIPES / f"{name}.yaml", [f"with={layout}"])
            check_recipe(placed, name, world_size=fewer, stages=placed.stages)
    assert recipe.name == name
    assert (recipe.model.height, recipe.model.width, recipe.model.guidance_scale) == (
        pixels,
        pixels,
        guidance,
    )
    assert (
        recipe.cold_start.generator.learning_rate == recipe.cold_start.fake_score.learning_rate == cold_rate
    )
    assert (recipe.cold_start.batch_size, recipe.cold_start.iterations) == (9, 15_000)
    rtdmd = recipe.rtdmd
    assert (rtdmd.generator.learning_rate, rtdmd.fake_score.learning_rate) == (generator_rate, fake_rate)
    assert (rtdmd.generator.weight_decay, rtdmd.fake_score.weight_decay) == (1e-4, 0.0)
    assert (rtdmd.sample_batch_size, rtdmd.images_per_prompt, rtdmd.num_sample_batches) == (batch, group, 16)
    assert rtdmd.epochs == 1_000
    assert rtdmd.consistency_weight == (0.0 if name == "flux2_9b" else 0.01)
    assert recipe.cold_start.consistency_weight == 0.01
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.init_std.rtdmd) == (32, 64.0, 1.0)
    assert recipe.schedule.eta == 0.9
    # The fake score starts from the base, as does the generator of Stable Diffusion.
    assert recipe.roles.teacher.weights is recipe.roles.fake_score.weights is None
    assert (recipe.roles.generator.weights is None) == name.startswith("sd")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_dry_run(tiny: dict[str, Path], world_size: int) -> None:
    recipe = dry_run(tiny)
    check_recipe(recipe, "dry_run", world_size=world_size, stages=recipe.stages)
    recipe = dry_run(tiny, "model.family=sd3", f"model.pipeline={tiny['sd3']}")
    check_recipe(recipe, "dry_run", world_size=world_size, stages=recipe.stages)


@pytest.mark.parametrize(("name", "world_size"), [("demo", 1), ("demo", 2), ("shapes", 1), ("shapes", 2)])
def test_small_world(name: str, world_size: int) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    check_recipe(recipe, name, world_size=world_size, stages=recipe.stages)
    assert recipe.name == name


def test_dry_run_without_its_models_says_how_to_build_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("recipes", "ds_configs"):
        (tmp_path / name).symlink_to(RECIPES.parent / name)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/dry_run.yaml")
    with pytest.raises(Exception, match="has 2 faults") as caught:
        check_recipe(recipe, "recipes/dry_run.yaml", world_size=2, stages=recipe.stages)
    assert str(caught.value).count("python -m rtdmd.models.tiny build/tiny") == 2


@pytest.mark.parametrize("name", [*PUBLISHED, *SMALL, "dry_run"])
def test_the_header_says_what_and_how(name: str) -> None:
    header = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"train_ds.py recipes/{name}.yaml" in header
    assert f"rtdmd validate recipes/{name}.yaml" in header
    assert "GPU" in header


@pytest.mark.parametrize("name", [*PUBLISHED, *SMALL, "dry_run"])
def test_dump_loads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_engine_files(path: Path) -> None:
    role = "teacher" if "frozen" in path.stem else "generator"
    dtype = "float32" if path.stem == "zero0" else "bfloat16"
    separate = "with=recipes/layouts/separate_zero3.yaml"
    overrides = [separate, f"roles.{role}.engine=ds_configs/{path.name}", f"dtype={dtype}"]
    recipe = load_recipe(RECIPES / "flux2_4b.yaml", overrides)
    check_recipe(recipe, "flux2_4b", world_size=8, stages=["cold_start"])


def test_engine_files_are_what_deepspeed_reads() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    import json

    for path in ENGINES:
        zero = json.loads(path.read_text())["zero_optimization"]
        config.DeepSpeedZeroConfig(**zero)  # pydantic refuses unknown keys and wrong types
