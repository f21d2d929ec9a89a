"""The folder for the hub: its card, whose code runs, its metadata, its pictures, its upload."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from torch.testing import assert_close

from rtdmd.cli import main
from rtdmd.export import hub
from rtdmd.export.figures import read_figures
from rtdmd.export.results import hub_results
from rtdmd.export.usage import CPS_CLASS
from rtdmd.models.adapters import read_adapter
from rtdmd.models.flux2 import KLEIN_LAYERS, Flux2Family
from rtdmd.recipe import load_recipe
from rtdmd.recipe.schema import LoraSection
from rtdmd.sample import Painter
from tests.export.conftest import BASES, PREVIEWS, PROMPT, complete_run, write_evaluation
from tests.export.test_weights import full_run
from tests.lora_files import write_stage
from tests.small_runs import ROOT, World, run_plain, save_noise


def export(run: Path, out: Path, *arguments: str) -> Path:
    assert main(["export", str(run), "--to", "hub-folder", "--out", str(out), *arguments]) == 0
    return out


@pytest.fixture(scope="module")
def folders(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's run, exported with its published base model's name and an evaluation."""
    at = tmp_path_factory.mktemp("hub")
    return {
        name: export(
            run,
            at / f"few-step-{name}",
            *(
                "--base-model",
                BASES[name],
                "--evaluation",
                str(write_evaluation(run, at / f"evaluation-{name}")),
            ),
        )
        for name, run in runs.items()
    }


def blocks(folder: Path, language: str) -> list[str]:
    return re.findall(
        rf"```{language}\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )


@pytest.mark.parametrize("with_rtdmd", [False, True])
def test_the_cards_code_runs_as_written(
    worlds: dict[str, World],
    folders: dict[str, Path],
    painters: dict[str, Painter],
    tmp_path: Path,
    with_rtdmd: bool,
) -> None:
    """From the folder's parent, with the base model's name alone replaced: the pictures of ``rtdmd sample``.

    Without rtdmd: the first block, from nothing to a picture, and the second, the stages' own files under
    names of their own. With it: the first and the third, rtdmd's scheduler.
    """
    jobs = []
    for name, folder in folders.items():
        save_noise(painters[name], name, PROMPT, tmp_path / f"{name}.pt")
        plain, separate, scheduler = blocks(folder, "python")
        chosen = [plain, scheduler if with_rtdmd else separate]
        code = [block.replace(BASES[name], str(worlds[name].pipeline)) for block in chosen]
        noise, out = str(tmp_path / f"{name}.pt"), str(tmp_path / f"{name}.npy")
        jobs.append({"noise": noise, "blocks": code, "out": out, "as_written": True})
        (tmp_path / folder.name).symlink_to(folder)
    run_plain(jobs, tmp_path, with_rtdmd=with_rtdmd)
    for name in folders:
        ours = painters[name].paint([PROMPT])[0].permute(1, 2, 0).numpy()
        pictures = np.load(tmp_path / f"{name}.npy")
        assert len(pictures) == 2
        worst = np.abs(np.round(ours * 255) - pictures * 255).max(axis=(1, 2, 3))
        assert worst.max() <= 1.001, (name, worst)
    assert np.asarray(Image.open(tmp_path / "picture.png")).shape == (64, 64, 3)


def test_the_cards_command_runs_as_written(
    world: World,
    folders: dict[str, Path],
    painters: dict[str, Painter],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """``rtdmd sample`` on the downloaded folder; the sample pictures are its pictures."""
    folder = folders[world.family]
    (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    (command,) = blocks(folder, "bash")
    program, *words = shlex.split(command)
    assert program == "rtdmd" and main(words) == 0
    (painted,) = (tmp_path / "samples").iterdir()
    ours = painters[world.family].paint([PROMPT])[0].permute(1, 2, 0).numpy()
    for path in (painted, folder / "samples" / painted.name):
        assert np.abs(np.asarray(Image.open(path)) - np.round(ours * 255)).max() <= 1
    assert Image.open(folder / "samples" / painted.name).text["prompt"] == PROMPT


def test_metadata(folders: dict[str, Path]) -> None:
    """Complete, as the hub's own classes read it, and unchanged by writing it once more."""
    card = ModelCard.load(folders["flux2"] / "README.md")
    data = card.data
    assert data.license == "other" and data.license_name == "flux-non-commercial-license"
    assert (
        data.license_link == "https://huggingface.co/black-forest-labs/FLUX.2-klein-9B/blob/main/LICENSE.md"
    )
    assert (data.base_model, data.get("base_model_relation")) == (BASES["flux2"], "adapter")
    assert (data.library_name, data.pipeline_tag, data.language) == ("diffusers", "text-to-image", "en")
    assert {"text-to-image", "lora", "diffusers", "rtdmd"} <= set(data.tags or [])
    widget = data.get("widget")
    assert [entry["text"] for entry in widget] == PREVIEWS
    assert all((folders["flux2"] / entry["output"]["url"]).is_file() for entry in widget)
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()
    assert ModelCard.load(folders["sd3"] / "README.md").data.license_name == "stabilityai-ai-community"


def test_evaluation_results(folders: dict[str, Path]) -> None:
    """The evaluated run's scores in the hub's form, and all models in a table."""
    card = ModelCard.load(folders["sd3"] / "README.md")
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "few-step-sd3"
    found = [(result.dataset_name, result.metric_type, result.metric_value) for result in results]
    values = {"clipscore": 0.3125, "hpsv2": 0.3125, "cmmd": 1.5}
    assert found == [("drawbench", name, value) for name, value in values.items()]
    assert "| base | 0.25 [0.15, 0.35] | 0.25 [0.15, 0.35] | 1.5 |" in card.text
    assert "| **ours** (this model) | 0.3125 [0.2125, 0.4125]" in card.text
    again = ModelCardData(eval_results=results, model_name=name).to_dict()["model-index"]
    assert again == card.data.to_dict()["model-index"]


def test_training_figures(runs: dict[str, Path], tmp_path: Path) -> None:
    """20 steps of 1.5 s are 30 s; the last tenth are two steps, whose rewards 0.5 and 0.7 mean 0.6.

    Without an evaluation they are the card's results. The pictures are cut from the last grid.
    """
    out = export(runs["flux2"], tmp_path / "out", "--no-paint", "--base-model", BASES["flux2"])
    card = ModelCard.load(out / "README.md")
    assert "| rtdmd | 20 | 8 | 0.01 | 1.5 |" in card.text
    assert "| rtdmd | reward/clipscore | 0.6 |" in card.text
    assert "| cold_start | fake_score/loss | 0.1026 |" in card.text  # (2/19 + 2/20)/2
    (result,) = card.data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("clipscore", 0.6)
    assert Image.open(out / "training.png").size[0] > 500
    levels = [np.unique(np.asarray(Image.open(path))) for path in sorted((out / "samples").iterdir())]
    assert [level.tolist() for level in levels] == [[0], [64], [128]]


def test_what_the_folder_holds(folders: dict[str, Path], runs: dict[str, Path]) -> None:
    folder = folders["flux2"]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for stage in ("cold_start", "rtdmd"):
        assert {f"{stage}/generator_ema.pt", f"{stage}/pytorch_lora_weights.safetensors"} <= files
        assert (folder / stage / "generator_ema.pt").read_bytes() == (
            runs["flux2"] / stage / "generator_ema.pt"
        ).read_bytes()
    assert {"README.md", "recipe.yaml", "pytorch_lora_weights.safetensors", "training.png"} <= files
    assert len(files) == 8 + len(PREVIEWS)
    assert load_recipe(folder / "recipe.yaml") == load_recipe(runs["flux2"] / "recipe.yaml")


def test_full_weights_are_a_fine_tuned_pipeline(worlds: dict[str, World], tmp_path: Path) -> None:
    """The folder opens as a pipeline, and the card's only block paints with it."""
    run = full_run(worlds["sd3"], tmp_path / "run")
    out = export(run, tmp_path / "out", "--base-model", BASES["sd3"], "--prompt", "a dog", "--license", "mit")
    card = ModelCard.load(out / "README.md")
    assert (card.data.get("base_model_relation"), card.data.license) == ("finetune", "mit")
    assert "lora" not in (card.data.tags or [])
    code, with_scheduler = blocks(out, "python")
    assert "load_lora_weights" not in code and 'from_pretrained("out"' in code
    assert "CPSScheduler" in with_scheduler
    assert (out / "model_index.json").is_file() and len(list((out / "samples").iterdir())) == 1


def test_a_base_without_a_name(runs: dict[str, Path], tmp_path: Path) -> None:
    """A local folder is no base model for the hub: the metadata leaves it out, the code names the folder."""
    out = export(runs["sd3"], tmp_path / "out", "--no-paint")
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data and data["license"] == "unknown"
    pipeline = load_recipe(runs["sd3"] / "recipe.yaml").model.pipeline
    assert f'from_pretrained("{pipeline}"' in blocks(out, "python")[0]


def test_klein_needs_no_layers(tmp_path: Path) -> None:
    """The published text encoder's 36 layers give the pipeline's default; others are named."""
    for depth, more in ((36, {}), (8, {"text_encoder_out_layers": (2, 4, 6)})):
        folder = tmp_path / str(depth) / "text_encoder"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": depth}))
        arguments = Flux2Family.call_arguments(str(folder.parent), None, None)
        assert arguments == {"max_sequence_length": 512} | more
    assert KLEIN_LAYERS == (9, 18, 27)


def test_the_documented_scheduler_is_the_cards() -> None:
    assert CPS_CLASS.format(eta="0.9") in (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")


class RecordingApi(HfApi):
    """The hub's client without the network: it keeps what it is asked to do, or refuses."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repo_id: str, **arguments: Any) -> Any:
        self.calls.append(("create", {"repo_id": repo_id} | arguments))

    def upload_folder(self, **arguments: Any) -> Any:
        self.calls.append(("upload", arguments))
        if arguments["repo_id"] == "someone/refused":
            raise OSError("no route to host\nand more")
        return type("Commit", (), {"commit_url": "https://hub/commit"})


def test_push(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "HfApi", RecordingApi)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    RecordingApi.calls.clear()
    export(runs["sd3"], tmp_path / "plain", "--no-paint")
    assert RecordingApi.calls == []
    out = export(runs["sd3"], tmp_path / "out", "--no-paint", "--push", "someone/few-step", "--private")
    (_, created), (_, uploaded) = RecordingApi.calls
    assert created == {"repo_id": "someone/few-step", "repo_type": "model", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("someone/few-step", out)
    assert 'load_lora_weights("someone/few-step")' in (out / "README.md").read_text(encoding="utf-8")
    fetch, paint = blocks(out, "bash")[0].splitlines()
    assert fetch == "hf download someone/few-step --local-dir few-step"
    assert paint.startswith("rtdmd sample few-step/recipe.yaml --run few-step --prompt ")
    assert "https://hub/commit" in capsys.readouterr().out
    arguments = [
        "export",
        str(runs["sd3"]),
        "--to",
        "hub-folder",
        "--no-paint",
        "--out",
        str(tmp_path / "kept"),
    ]
    assert main([*arguments, "--push", "someone/refused"]) == 2
    assert (
        "someone/refused: not uploaded (OSError: no route to host); the folder is whole: hf upload"
        in capsys.readouterr().err
    )
    assert (tmp_path / "kept" / "README.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push", "someone/x"], "--push: no token of the hub here; run `hf auth login`"),
        (["--push", "alone"], "--push alone: give owner and name"),
        (["--push", "some one/x"], "--push some one/x: "),
        (["--evaluation", "nowhere"], "nowhere: no results of rtdmd evaluate there"),
        (["--evaluation", "others"], "evaluates no model run:"),
        (["--evaluation", "odd"], "not the results of rtdmd evaluate"),
        (["--to", "peft", "--push", "someone/x"], "--push goes with --to hub-folder"),
    ],
)
def test_mistakes(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    write_evaluation(tmp_path, tmp_path / "others")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "results.json").write_text("[]")
    assert main(["export", str(runs["sd3"]), "--to", "hub-folder", "--out", "out", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("file", ["generator_ema.pt", "pytorch_lora_weights.safetensors"])
def test_a_stage_that_started_from_a_file(worlds: dict[str, World], tmp_path: Path, file: str) -> None:
    """Stage 1 lies elsewhere, under another alpha if it is a file that states its own.

    It is exported too, and the exported recipe finds it in its own folder as what it was.
    """
    run = complete_run(worlds["sd3"], tmp_path / "run")
    (run / "cold_start").rename(tmp_path / "elsewhere")
    write_stage(tmp_path / "elsewhere", worlds["sd3"].states[0], "sd3", LoraSection(rank=32, alpha=48.0))
    recipe = run / "recipe.yaml"
    start = f"rtdmd:\n  start_generator: {tmp_path}/elsewhere/{file}\n"
    recipe.write_text(recipe.read_text().replace("rtdmd:\n", start))
    out = export(run, tmp_path / "out", "--no-paint")
    assert load_recipe(out / "recipe.yaml").rtdmd.start_generator is None
    module = "transformer_blocks.0.attn.to_q"
    exported = read_adapter(out / "cold_start" / "generator_ema.pt", alpha=64.0).delta(module, 0, 4)
    started = read_adapter(tmp_path / "elsewhere" / file, alpha=64.0).delta(module, 0, 4)
    assert exported is not None and started is not None
    assert_close(exported, started)


def test_results_of_training(tmp_path: Path) -> None:
    """The last evaluation during training is preferred to the rewards; with neither there are no results."""
    records = [
        {"stage": "rtdmd", "step": step, "seconds": 1.0, "reward/ocr": 0.1, "evaluation/draw/ocr": step / 10}
        for step in (1, 2)
    ]
    records.append({"stage": "rtdmd", "step": 3, "seconds": 1.0, "reward/ocr": 0.1})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    (result,) = hub_results(None, read_figures(tmp_path))
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("draw", "ocr", 0.2)
    assert hub_results(None, []) == []


def test_a_run_without_records(worlds: dict[str, World], tmp_path: Path) -> None:
    run = complete_run(worlds["sd3"], tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    out = export(run, tmp_path / "out", "--no-paint")
    card = ModelCard.load(out / "README.md")
    assert "model-index" not in card.data.to_dict() and "model_name" not in card.data.to_dict()
    assert not (out / "training.png").exists() and "training.png" not in card.text


def test_documented_commands(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``rtdmd export`` of docs/publishing.md, in a folder like a person's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "HfApi", RecordingApi)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    Path("runs").mkdir()
    Path("runs/flux2_4b").symlink_to(runs["flux2"])
    docs = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    lines = [line for line in docs.splitlines() if line.startswith("rtdmd export runs")]
    assert len(lines) == 5
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
    written = sorted(path.name for path in Path("exports").iterdir())
    assert written == ["peft", "public", "small-diffusers", "small-hub-folder", "small-merged"]


def test_without_deepspeed(runs: dict[str, Path], tmp_path: Path) -> None:
    script = "import sys; sys.modules['deepspeed'] = None; import rtdmd.cli; sys.exit(rtdmd.cli.main())"
    arguments = ["export", str(runs["flux2"]), "--to", "hub-folder", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "README.md").is_file()
