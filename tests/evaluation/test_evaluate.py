"""``rtdmd evaluate``: the same table whatever the batches, the processes and the interruptions."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rtdmd.cli import main
from rtdmd.recipe import load_recipe
from tests.lora_files import random_lora, write_stage

ROOT = Path(__file__).resolve().parent.parent.parent

RECIPE = """\
name: small
dtype: float32
model:
  family: flux2
  pipeline: {pipeline}
  height: 32
  width: 32
  guidance_scale: 3
  max_sequence_length: 32
roles:
  teacher: {{engine: nowhere.json}}
  generator: {{engine: nowhere.json}}
  fake_score: {{engine: nowhere.json}}
cold_start:
  generator: {{learning_rate: 1e-6}}
  fake_score: {{learning_rate: 1e-6}}
  prompts: {{source: nowhere.txt}}
rtdmd:
  generator: {{learning_rate: 3e-6}}
  fake_score: {{learning_rate: 1e-6}}
  prompts: {{source: nowhere.txt}}
rewards:
  - {{name: clipscore, weights: {clip}}}
  - {{name: compressibility}}
evaluation:
  batch_size: 2
  sets:
    - {{name: draw, prompts: {{source: {folder}/draw.csv}}, num_images_per_prompt: 2}}
    - {{name: words, prompts: {{source: {folder}/words.txt}}}}
  models:
    - {{name: base, model: base}}
    - {{name: teacher, model: "teacher:steps=2"}}
"""
DRAW = "Prompts,Category\na red cat,Colors\na blue dog,Colors\ntwo dogs,Counting\n"
WORDS = "a tree\na house\na river\n"
RESULTS = ("scores.parquet", "scores.jsonl", "results.json", "report.md", "table.tex")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_flux2: Path, tiny_clip: Path) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "draw.csv").write_text(DRAW)
    (folder / "words.txt").write_text(WORDS)
    path = folder / "small.yaml"
    path.write_text(RECIPE.format(pipeline=tiny_flux2, clip=tiny_clip, folder=folder))
    return path


def evaluate(recipe: Path, out: Path, *arguments: str) -> list[dict[str, object]]:
    """The rows of ``scores.jsonl``."""
    assert main(["evaluate", str(recipe), "--out", str(out), "--device", "cpu", *arguments]) == 0
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def same_results(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in RESULTS)


@pytest.fixture(scope="module")
def straight(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    evaluate(recipe, out, "--save-images")
    return out


def rows_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def test_what_it_leaves(straight: Path) -> None:
    rows = rows_of(straight)
    assert len(rows) == 2 * (3 * 2 + 3)
    keys = ("model", "set", "prompt_number", "image_number", "prompt", "category")
    assert [rows[3][key] for key in keys] == ["base", "draw", 1, 1, "a blue dog", "Colors"]
    assert rows[-1]["prompt"] == "a river" and rows[-1]["category"] is None
    assert pyarrow.parquet.read_table(straight / "scores.parquet").to_pylist() == rows
    results = json.loads((straight / "results.json").read_text())
    assert results["settings"]["height"] == 32 and results["settings"]["seed"] == 0
    assert results["settings"]["rewards"]["compressibility"] == {"weights": None, "mode": "default"}
    assert results["models"]["teacher"]["nfe"] == 4 and results["models"]["base"]["nfe"] == 4
    scores = {(each["model"], each["set"], each["reward"]): each for each in results["scores"]}
    one = scores["base", "draw", "clipscore"]
    values = np.array([row["clipscore"] for row in rows if (row["model"], row["set"]) == ("base", "draw")])
    assert one["mean"] == pytest.approx(values.mean()) and one["low"] < one["mean"] < one["high"]
    assert one["categories"]["Colors"]["mean"] == pytest.approx(values[:4].mean())
    assert len(results["win_rates"]) == 4
    report = (straight / "report.md").read_text()
    assert report.startswith(
        "# Evaluation\n\n| model | NFE | draw: clipscore | draw: compressibility | words: "
    )
    assert "## Categories of draw" in report and "base over teacher" in report
    assert (straight / "table.tex").read_text().startswith("\\begin{tabular}{lrrrrr}")


def test_pictures_that_are_kept_are_those_that_were_scored(straight: Path, tiny_clip: Path) -> None:
    """And the first picture of a prompt is ``rtdmd sample``'s; the second has noise of its own."""
    from rtdmd.recipe.schema import RewardSection
    from rtdmd.rewards import load_rewards

    folder = straight / "pictures" / "base" / "draw"
    assert len(list(folder.iterdir())) == 6
    pictures = [Image.open(folder / f"{number // 2:05d}-{number % 2}.png") for number in range(6)]
    assert pictures[3].text == {  # type: ignore[attr-defined]
        "prompt": "a blue dog", "image_number": "1", "seed": "0", "model": "base",
    }  # fmt: skip
    images = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) / 255 for each in pictures])
    (reward,) = load_rewards(
        [RewardSection("clipscore", weights=str(tiny_clip))], torch.device("cpu"), torch.float32
    )
    prompts = [str(each.text["prompt"]) for each in pictures]  # type: ignore[attr-defined]
    scores = reward.score(images, prompts, [{}] * 6)
    assert [row["clipscore"] for row in rows_of(straight)[:6]] == pytest.approx(scores.tolist(), abs=1e-6)
    assert (images[0] - images[1]).abs().mean() > 0.02


def test_first_pictures_are_those_of_sample(recipe: Path, straight: Path, tmp_path: Path) -> None:
    arguments = ["sample", str(recipe), "--prompt", "a blue dog", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    sampled = np.asarray(Image.open(tmp_path / "0000-a-blue-dog.png")).astype(int)
    kept = np.asarray(Image.open(straight / "pictures/base/draw/00001-0.png")).astype(int)
    assert np.abs(sampled - kept).max() <= 1


def test_batches_change_scores_by_rounding_alone(recipe: Path, straight: Path, tmp_path: Path) -> None:
    for size in ("1", "7"):
        rows = evaluate(recipe, tmp_path / size, "--batch-size", size)
        for row, expected in zip(rows, rows_of(straight), strict=True):
            scores = {name: row.pop(name) for name in ("clipscore", "compressibility")}
            assert scores == pytest.approx({name: expected.pop(name) for name in scores}, abs=2e-3)
            assert row == expected


def test_two_processes_give_the_same_table(recipe: Path, straight: Path, tmp_path: Path) -> None:
    evaluate(recipe, tmp_path, "--gpus", "2")
    assert same_results(tmp_path, straight)


def test_killed_and_resumed_gives_the_same_table(recipe: Path, straight: Path, tmp_path: Path) -> None:
    """Killed without a warning as soon as two batches are there; DeepSpeed isn't installed."""
    script = "import sys; sys.modules['deepspeed'] = None; import rtdmd.cli; sys.exit(rtdmd.cli.main())"
    command = [sys.executable, "-c", script, "evaluate", str(recipe), "--out", str(tmp_path)]
    with subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while len(list(tmp_path.glob("scores/*/*/0*.safetensors"))) < 2:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.glob("scores/*/*/0*.safetensors")}
    assert 2 <= len(stored) < 10
    assert not (tmp_path / "results.json").exists()
    evaluate(recipe, tmp_path)
    assert all(path.stat().st_mtime_ns == before for path, before in stored.items())
    assert same_results(tmp_path, straight)


def test_finished_work_is_not_done_again(recipe: Path, straight: Path, tmp_path: Path) -> None:
    """Another model joins; pictures that are missing are painted again; results are written anew."""
    shutil.copytree(straight, tmp_path / "out")
    for name in RESULTS:
        (tmp_path / "out" / name).unlink()
    lost = tmp_path / "out/pictures/base/words/00000-0.png"
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("0*.safetensors")}
    evaluate(recipe, tmp_path / "out", "--save-images")
    assert lost.is_file() and same_results(tmp_path / "out", straight)
    again = [path for path in before if path.stat().st_mtime_ns != before[path]]
    assert [path.relative_to(tmp_path / "out/scores") for path in again] == [
        Path("base/words/000000-000002.safetensors")
    ]
    models = ["--model", "base", "--model", "teacher:steps=2", "--model", "two=base:steps=2"]
    rows = evaluate(recipe, tmp_path / "out", *models)
    assert rows[:18] == rows_of(straight) and len(rows) == 27


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1"], "evaluation.seed was 0, is 1"),
        (["--limit", "2"], "prompts was"),
        (["--rewards", "clipscore"], "rewards.compressibility.mode is gone"),
        (["--num-images-per-prompt", "3"], "num_images_per_prompt was 2, is 3"),
        (["schedule.eta=0.5"], "schedule.eta was 0.9, is 0.5"),
        (["evaluation.height=48"], "model.height was 32, is 48"),
        (["dtype=bfloat16"], 'dtype was "float32", is "bfloat16"'),
        (["--model", "base:steps=3"], "steps was 4, is 3"),
    ],
)
def test_scores_of_something_else_are_refused(
    recipe: Path, straight: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["evaluate", str(recipe), "--out", str(straight), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "choose another --out, or remove" in error
    assert "scores/base/draw: holds scores of another evaluation" in error


def test_changed_weights_are_noticed(
    recipe: Path, tiny_flux2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that has trained on; the folder's name alone would say nothing."""
    run = tmp_path / "run"
    write_stage(run / "cold_start", random_lora(tiny_flux2, "flux2", 1), "flux2")
    arguments = ["--model", f"ours=run:{run}", "--limit", "1", "--num-images-per-prompt", "1"]
    evaluate(recipe, tmp_path / "out", *arguments)
    write_stage(run / "rtdmd", random_lora(tiny_flux2, "flux2", 2), "flux2")
    assert main(["evaluate", str(recipe), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert "trained was [" in capsys.readouterr().err


def test_what_a_run_trained(recipe: Path, tiny_flux2: Path, tmp_path: Path) -> None:
    """A run after each stage is its files, stacked."""
    run = tmp_path / "run"
    for number, stage in enumerate(("cold_start", "rtdmd")):
        write_stage(run / stage, random_lora(tiny_flux2, "flux2", number), "flux2")
    first, second = (run / stage / "generator_ema.pt" for stage in ("cold_start", "rtdmd"))
    specs = {
        "cold": f"run:{run}@cold_start", "first": f"lora:{first}", "last": f"run:{run}",
        "after": f"run:{run}@rtdmd", "both": f"lora:{first}+{second}", "base": "base",
    }  # fmt: skip
    models = [word for name, spec in specs.items() for word in ("--model", f"{name}={spec}")]
    rows = evaluate(recipe, tmp_path / "out", *models, "--limit", "1", "--rewards", "clipscore")
    scores = {row["model"]: row["clipscore"] for row in rows if row["set"] == "words"}
    assert scores["cold"] == scores["first"]
    assert scores["last"] == scores["after"] == scores["both"]
    assert len({scores[name] for name in ("cold", "last", "base")}) == 3


def test_a_reference_of_pictures_and_of_their_features(
    recipe: Path, straight: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """A model's own pictures are at distance 0; the features that a first run leaves serve a second."""
    pictures = straight / "pictures" / "base" / "draw"
    arguments = ["--model", "base", "--reference"]
    evaluate(recipe, tmp_path / "one", *arguments, str(pictures))
    results = json.loads((tmp_path / "one/results.json").read_text())
    own, other = results["distances"]
    assert (own["set"], other["set"]) == ("draw", "words")
    assert own["frechet_clip"] == pytest.approx(0, abs=1e-6) and own["cmmd"] == pytest.approx(0, abs=1e-9)
    assert other["frechet_clip"] > 1e-3 and other["cmmd"] > other["cmmd_unbiased"]
    assert "| draw: FD-CLIP | draw: CMMD |" in (tmp_path / "one/report.md").read_text()
    features = load_file(tmp_path / "one/reference.safetensors")["features"]
    assert len(features) == 6
    np.savez(tmp_path / "features.npz", features.numpy())
    arguments += [str(tmp_path / "features.npz"), "--features", str(tiny_clip)]
    evaluate(recipe, tmp_path / "two", *arguments)
    assert same_results(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.txt"], "evaluation.sets.0.prompts: none.txt: there is no such file"),
        (["--rewards", "clipscor"], "unknown reward; did you mean 'clipscore'?"),
        (["--rewards", "ocr"], "reward 'ocr' can score none of the sets: it refuses 3 of 3 prompts"),
        (["--model", "run:x"], "give it a name"),
        (["--model", "x=run:nowhere"], "nowhere: holds neither cold_start"),
        (["--model", "x=lora:no.pt"], "no.pt: there is no such file or folder"),
        (["--model", "base", "--model", "base:steps=2"], "also evaluation.models.0; give it another name"),
        (["--reference", "nowhere"], "nowhere: give a folder of pictures"),
        (["--features", "x"], "--features goes with --reference"),
        (["evaluation.height=30"], "evaluation.height = 30: write a multiple of 16"),
        (["evaluation.sets=[]"], "evaluation.sets = []: write at least one set"),
        (["--batch-size", "0"], "evaluation.batch_size = 0: write at least 1"),
        (["--limit", "0"], "limit = 0: must be at least 1"),
        (["--gpus", "0"], "--gpus 0: give at least 1"),
        (["other.yaml"], "name one recipe"),
    ],
)
def test_mistakes(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main(["evaluate", str(recipe), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reference_of_another_width(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"features": torch.zeros(4, 3)}, tmp_path / "ref.safetensors")
    arguments = ["--reference", str(tmp_path / "ref.safetensors"), "--limit", "2", "--model", "base"]
    assert main(["evaluate", str(recipe), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert "features are [4, 3], the model's [N, " in capsys.readouterr().err


def test_adapters_that_do_not_fit(
    recipe: Path, tiny_flux2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are noticed before the models that come first have painted."""
    write_stage(tmp_path / "four", random_lora(tiny_flux2, "flux2", 1, rank=4), "flux2")
    arguments = ["--model", "base", "--model", f"ours=lora:{tmp_path / 'four' / 'generator_ema.pt'}"]
    assert main(["evaluate", str(recipe), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert "its rank is 4, the recipe's lora.rank 32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


DOCS = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_documented_commands(
    recipe: Path, tiny_flux2: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of docs/evaluation.md, with few prompts and the rewards that there are here."""
    monkeypatch.chdir(tmp_path)
    for stage in ("cold_start", "rtdmd"):
        write_stage(Path("runs/flux2_4b") / stage, random_lora(tiny_flux2, "flux2", len(stage)), "flux2")
    Path("recipes").mkdir()
    Path("recipes/flux2_4b.yaml").symlink_to(recipe)
    Path("drawbench.csv").write_text(DRAW)
    Path("geneval.jsonl").write_text(
        '{"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "two cups"}\n'
    )
    Path("pictures").symlink_to(straight / "pictures" / "base" / "draw")
    lines = [line for line in DOCS.splitlines() if line.startswith("rtdmd evaluate recipes/")]
    assert len(lines) == 3
    for number, line in enumerate(lines):
        command = re.sub(r"--rewards \S+", "--rewards clipscore", line).replace("--gpus 8", "--gpus 1")
        command = command.replace("steps=50", "steps=2")
        arguments = ["--device", "cpu", "--limit", "1", "--num-images-per-prompt", "2"]
        assert main([*shlex.split(command)[1:], *arguments, "--out", f"out{number}"]) == 0
        assert Path(f"out{number}/report.md").is_file()
    assert [row["model"] for row in rows_of(Path("out0"))[::2]] == ["base", "teacher", "cold", "rtdmd"]


def test_documented_section(recipe: Path, tmp_path: Path) -> None:
    """The recipe's section in the docs is one."""
    (block,) = re.findall(r"```yaml\n(evaluation:.*?)```", DOCS, re.DOTALL)
    before, _, _ = recipe.read_text().partition("evaluation:")
    (tmp_path / "a.yaml").write_text(before + block)
    section = load_recipe(tmp_path / "a.yaml").evaluation
    assert [each.name for each in section.sets] == ["drawbench", "geneval"]
    assert section.models[1].model == "run:runs/flux2_4b"
