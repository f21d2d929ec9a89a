"""Strict loading: every kind of fault is named, all of them at once."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rtdmd.errors import UserError
from rtdmd.recipe import dump_recipe, load_recipe
from rtdmd.recipe.schema import PreviewSection

Write = Callable[..., Path]


def faults(path: Path, *overrides: str) -> list[str]:
    """The lines of the error's list, without its heading."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    heading, *lines = str(caught.value).splitlines()
    assert f"{len(lines)} fault" in heading
    return lines


def the_fault(path: Path, *overrides: str) -> str:
    (line,) = faults(path, *overrides)
    return line


def test_values_and_defaults(write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe())
    assert recipe.cold_start.generator.learning_rate == 1e-6  # PyYAML alone reads the text '1e-6'
    assert recipe.cold_start.generator_every == 10
    assert recipe.model.guidance_scale == 4.0 and type(recipe.model.guidance_scale) is float
    assert recipe.schedule.timesteps == [1000.0, 750.0, 500.0, 250.0]
    assert recipe.rewards[0].weight == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E+2", 100.0), ("2.5e3", 2500.0), (".5", 0.5), ("3", 3.0), ("1_000", 1e3)],
)
def test_numbers_as_people_write_them(write_recipe: Write, text: str, value: float) -> None:
    assert load_recipe(write_recipe(), [f"timeout_seconds={text}"]).timeout_seconds == value


def test_words_that_old_yaml_takes_for_switches_are_text(write_recipe: Write) -> None:
    assert load_recipe(write_recipe(("name: small", "name: on"))).name == "on"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("height: 512", "heigth: 512", ["model.heigth", "'height'"]),
        ("learning_rate: 1e-6", "lr: 1e-6", ["cold_start.generator.lr"]),
        ("rewards:", "rewardz:", ["rewardz", "'rewards'"]),
    ],
)
def test_a_misspelt_required_key(write_recipe: Write, old: str, new: str, words: list[str]) -> None:
    unknown, missing = sorted(faults(write_recipe((old, new))), key=lambda line: "missing" in line)
    assert "unknown key" in unknown and all(word in unknown for word in words)
    assert "missing" in missing


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cold_start.iteration=3", "did you mean 'iterations'?"),
        ("cold_start.eta=1", "did you mean 'schedule.eta'?"),
        ("learning_rate=1", "did you mean 'cold_start.generator.learning_rate' or "),
        ("rtdmd.learning_rate=1", "did you mean 'rtdmd.generator.learning_rate' or 'rtdmd.fake_score."),
        ("rtdmd.backprop.weight=1", "rtdmd.backprop: unknown key; did you mean"),
        ("lora.zzz=1", "known here: alpha, init_std, rank, targets"),
        ("rewards.0.nam=x", "rewards.0.nam: unknown key; did you mean 'name'?"),
    ],
)
def test_unknown_keys_and_the_nearest_known_one(write_recipe: Write, override: str, words: str) -> None:
    line = the_fault(write_recipe(), override)
    assert words in line
    assert f"override {override!r}" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=true", "expected a whole number, got true"),
        ("schedule.eta=false", "expected a number, got false"),
        ("seed=3.0", "expected a whole number, got 3.0; write 3"),
        ("seed=1.5", "expected a whole number, got 1.5"),
        ("seed='3'", "expected a whole number, got the text '3'; write 3 without quotes"),
        ('schedule.eta="0.5e-1"', "write 0.5e-1 without quotes"),
        ("name=3", "expected text, got 3; write '3' in quotes"),
        ("schedule.eta=high", "expected a number, got the text 'high'"),
        (
            "roles.generator.activation_checkpointing=true",
            "expected one of none, selective, full, auto, got true",
        ),
        (
            "roles.generator.trains=ful",
            "expected one of lora, full, got the text 'ful'; did you mean 'full'?",
        ),
        ("dtype=16", "expected one of float32, bfloat16, got 16"),
        ("stages=[cold_strat]", "stages.0: expected one of cold_start, rtdmd"),
        ("schedule.timesteps=1000", "expected a list, got 1000"),
        ("schedule.timesteps=[1000, x]", "schedule.timesteps.1: expected a number"),
        ("cold_start.generator=3", "expected a section"),
        ("cold_start.generator=[1]", "expected a section with keys such as 'learning_rate', got a list"),
        ("seed=null", "null is not allowed"),
        ("schedule.timesteps=null", "null is not allowed; write a list"),
        ("lora=null", "null is not allowed; write a section"),
        ("schedule.eta=.nan", "expected a finite number, got .nan"),
        ("timeout_seconds=.inf", "expected a finite number"),
        ("timeout_seconds=1e999", "expected a finite number"),
        ("timeout_seconds=1" + "0" * 400, "expected a finite number"),
        ("seed=" + "9" * 5000, "cannot be read"),
        ("seed=!!python/name:os.system x", "cannot be read"),
        ("seed=!!binary aGk=", "cannot be read"),
    ],
)
def test_types(write_recipe: Write, override: str, words: str) -> None:
    line = the_fault(write_recipe(), override)
    assert words in line
    assert override.partition("=")[0] in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "write key=value"),
        ("=3", "write key=value"),
        ("seed=", "write key=value"),
        ("a..b=3", "write key=value"),
        ("schedule.timesteps=[1000, 500", "the value is not YAML"),
        ("rewards.1.weight=2", "rewards is a list of 1; write an index from 0 to 0"),
        ("rewards.first.weight=2", "write an index from 0 to 0"),
        ("name.x=3", "not a section"),
        ("model={family: flux2, family: sd3}", "written twice"),
    ],
)
def test_malformed_overrides(write_recipe: Write, override: str, words: str) -> None:
    lines = faults(write_recipe(), override)
    assert all(f"override {override!r}" in line for line in lines)
    assert words in lines[0]


def test_overrides_reach_every_place(write_recipe: Write) -> None:
    recipe = load_recipe(
        write_recipe(),
        [
            "rewards.0.weight=2",
            "schedule.timesteps=[1000,500]",
            "schedule.timesteps.1=400",
            "rtdmd.reward_backprop.weight=0",
            "model.revision=null",
            "model.family = sd3",
            "name='12'",
            "seed=1",
            "seed=2",
        ],
    )
    assert recipe.rewards[0].weight == 2.0
    assert recipe.schedule.timesteps == [1000.0, 400.0]
    assert recipe.rtdmd.reward_backprop.weight == 0.0
    assert recipe.model.revision is None
    assert (recipe.model.family, recipe.name, recipe.seed) == ("sd3", "12", 2)


def test_a_files_sections_go_over_the_recipes(write_recipe: Write, tmp_path: Path) -> None:
    """In the order of the overrides; sections key by key, lists whole; faults name the file's line."""
    path = write_recipe()
    layer = tmp_path / "layer.yaml"
    layer.write_text("model:\n  height: 64\nschedule: {timesteps: [900, 300]}\n")
    recipe = load_recipe(path, ["model.height=128", f"with={layer}", "model.width=96"])
    assert (recipe.model.height, recipe.model.width) == (64, 96)
    assert recipe.model.family == load_recipe(path).model.family
    assert recipe.schedule.timesteps == [900.0, 300.0]
    layer.write_text("model:\n  hight: 64\n")
    (line,) = faults(path, f"with={layer}")
    assert f"{layer}:2: model.hight: unknown key; did you mean 'height'?" in line
    layer.write_text("- 1")
    with pytest.raises(UserError, match=r"layer.yaml holds a list; it is a mapping"):
        load_recipe(path, [f"with={layer}"])
    with pytest.raises(UserError, match="there is no such recipe; did you mean"):
        load_recipe(path, [f"with={tmp_path / 'layr.yaml'}"])
    with pytest.raises(UserError, match=r"demo: there is no such recipe; did you mean 'recipes/demo\.yaml'"):
        load_recipe("demo")
    with pytest.raises(UserError) as told:
        load_recipe("recipes/zqx")
    assert str(told.value).count("recipes/demo.yaml") == 1  # in the list of all


def test_an_override_mends_a_wrong_value(write_recipe: Write) -> None:
    path = write_recipe(("height: 512", "height: tall"))
    assert load_recipe(path, ["model.height=64"]).model.height == 64


def test_all_faults_at_once_with_file_and_line(write_recipe: Write) -> None:
    path = write_recipe(
        ("height: 512", "height: tall"),  # line 5
        ("  width: 512\n", "  widht: 512\n"),  # line 6, and width is missing
        ("guidance_scale: 4", "guidance_scale: true"),  # line 7
        ("  - name: clipscore", "  - name: clipscore\n    name: pickscore"),  # line 22
    )
    lines = faults(path, "sed=1")
    assert len(lines) == 6
    for number, line in zip((5, 6, 7, 22), [line for line in lines if "missing" not in line], strict=False):
        assert f"{path}:{number}: " in line
    assert "override 'sed=1'" in lines[-1]
    assert any("model.width: missing; add 'width: …' with a whole number" in line for line in lines)


def test_missing_sections(write_recipe: Write) -> None:
    path = write_recipe()
    path.write_text("name: x\n")
    text = "\n".join(faults(path))
    assert "add the section 'model:' with family, pipeline, height, width, guidance_scale" in text
    assert "add the list 'rewards: [{name: …}]'" in text


def test_a_key_written_twice(write_recipe: Write) -> None:
    line = the_fault(write_recipe(("name: small", "name: small\nname: large")))
    assert ":2: name: this key is written twice (first at" in line and ":1)" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n", "holds a list"),
        (b"hello", "holds the text 'hello'"),
        (b"name: x\nmodel: [1\n", ":3: not valid YAML"),
        (b"name: x\n\tmodel: 1\n", ":2: not valid YAML"),
        (b"name: a\n---\nname: b\n", "not valid YAML"),
        (b"name: *nowhere\n", ":1: not valid YAML"),
        (b"name: \xff\xfe\n", ":1 is not UTF-8"),
        (b"name: a\x00b\n", "not valid YAML"),
        (b"a: &a\n  b: *a\n", "refers to what contains it"),
        (b"[" * 1500, "nested too deeply"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.yaml") as caught:
        load_recipe(path)
    assert words in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match=r"no such recipe; did you mean '.*mine\.yaml'"):
        load_recipe(tmp_path / "mime.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "mine.yaml" / "below.yaml")


def test_keys_that_are_not_words(write_recipe: Write) -> None:
    assert "keys are plain words" in the_fault(write_recipe(("name: small", "name: small\n? [a]\n: 1")))


def test_anchors_can_be_reused(write_recipe: Write) -> None:
    path = write_recipe(
        ("generator: {learning_rate: 1e-6}", "generator: &adam {learning_rate: 2e-6}"),
        ("fake_score: {learning_rate: 1e-6}", "fake_score: *adam"),
    )
    recipe = load_recipe(path, ["cold_start.generator.learning_rate=1"])
    assert recipe.cold_start.generator.learning_rate == 1.0
    assert recipe.cold_start.fake_score.learning_rate == 2e-6  # an override changes one place


def test_the_home_folder(write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(write_recipe(), ["output=~/runs", "model.pipeline=~/models/x", "name=a"])
    assert (recipe.output, recipe.model.pipeline) == (f"{tmp_path}/runs", f"{tmp_path}/models/x")
    for override, words in (
        ("output=~nobody-here/x", "no such home folder"),
        ('output="a\\0b"', "zero byte"),
    ):
        with pytest.raises(UserError, match=words):
            load_recipe(write_recipe(), [override])


def test_dump_loads_back_equal(write_recipe: Write) -> None:
    path = write_recipe()
    recipe = load_recipe(
        path, ["schedule.shift=2.5", "preview.prompts=['1e-6', 'yes', 'null', '', 'a: b #c']"]
    )
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("seed", range(20))
def test_dump_loads_back_any_text_and_number(write_recipe: Write, seed: int) -> None:
    draw = random.Random(seed)
    letters = "a1.:-#'\"\\ \t\n{}[]&*!|>%@,?~=_eE+\x00\x85\u2028\ufeffé字😀"
    prompts = ["".join(draw.choices(letters, k=draw.randrange(12))) for _ in range(50)]
    rate = draw.uniform(-1, 1) * 10.0 ** draw.randrange(-300, 300)
    path = write_recipe()
    recipe = dataclasses.replace(
        load_recipe(path), preview=PreviewSection(prompts=prompts), timeout_seconds=rate
    )
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(path) == recipe
