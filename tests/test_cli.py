"""The console command, through ``main`` and once as a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rtdmd.cli import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name files relative to the working directory."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_validate_prints_a_line_for_each_good_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """16 ranks x 6 = 96 samples a sampling batch, x 16 = 1,536 an epoch, / 24 = 64 prompts."""
    recipes = ["recipes/flux2_4b.yaml", "recipes/sd3m.yaml"]
    assert main(["validate", *recipes, "--world-size", "16"]) == 0
    printed = capsys.readouterr()
    first, second = printed.out.splitlines()
    assert first.startswith("recipes/flux2_4b.yaml: ok: flux2_4b on 16 GPUs: cold_start 15000 iterations")
    assert "global batch 144" in first
    assert "global sampling batch 96, 1536 samples and 64 prompts an epoch" in first
    assert second.startswith("recipes/sd3m.yaml: ok")
    assert printed.err == ""


def test_validate_goes_on_after_a_bad_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\n")
    assert main(["validate", str(bad), "recipes/sd35m.yaml"]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("recipes/sd35m.yaml: ok: sd35m on 1 GPU")
    assert f"{bad}:1: model: missing" in printed.err
    assert "Traceback" not in printed.err


def test_overrides_and_options_mix(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "validate",
        "seed=3",
        "recipes/sd35m.yaml",
        "--stage",
        "cold_start",
        "cold_start.batch_size=3",
    ]
    assert main([*arguments, "--world-size", "3"]) == 0
    printed = capsys.readouterr().out
    assert "on 3 GPUs" in printed and "global batch 9" in printed and "rtdmd" not in printed


def test_a_world_size_that_does_not_fit_lists_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "recipes/flux2_4b.yaml", "--world-size", "6"]) == 2
    assert "1-4, 8, 12, 16, 20" in capsys.readouterr().err


def test_world_size_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["validate", "recipes/sd35m.yaml"]) == 0
    assert "on 8 GPUs" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert main(["validate", "recipes/sd35m.yaml"]) == 2
    assert "WORLD_SIZE='many'" in capsys.readouterr().err


def test_no_recipe_and_no_such_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "seed=1"]) == 2
    assert "name at least one recipe" in capsys.readouterr().err
    assert main(["validate", "recipes/sd35.yaml"]) == 2
    assert "did you mean 'recipes/sd35m.yaml'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["--version"], 0), (["train"], 2), ([], 2)]
)
def test_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == code
    assert capsys.readouterr() != ("", "")


def test_as_a_process_without_heavy_imports() -> None:
    """Exit codes reach the shell, and neither diffusers nor DeepSpeed is imported."""
    script = (
        "import sys; from rtdmd.cli import main; code = main(sys.argv[1:]);"
        "print([name for name in ('diffusers', 'transformers', 'deepspeed') if name in sys.modules]);"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "validate", "recipes/flux2_9b.yaml"]
    good = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[-1] == "[]"
    bad = subprocess.run(
        [sys.executable, "-m", "rtdmd.cli", "validate", "recipes/flux2_9b.yaml", "seed=x"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert bad.returncode == 2
    assert bad.stderr.startswith("recipes/flux2_9b.yaml has 1 fault:")
