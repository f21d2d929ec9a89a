"""The training script's answers to a user's mistakes: one clear error, exit code 2, nothing loaded."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rtdmd.distributed.collectives import start_ranks
from rtdmd.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sound(tmp_path: Path, tiny_flux2: Path, tiny_clip: Path) -> list[str]:
    """Overrides under which the dry run's recipe has no fault."""
    return [f"model.pipeline={tiny_flux2}", f"rewards.0.weights={tiny_clip}", f"output={tmp_path / 'runs'}"]


def train(
    *arguments: str, launcher: tuple[str, ...] = (sys.executable,), **ranks: str
) -> subprocess.CompletedProcess[str]:
    left_out = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in left_out} | ranks
    return subprocess.run(
        [*launcher, "train_ds.py", "recipes/dry_run.yaml", *arguments],
        cwd=ROOT,
        env=environment | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def faulty_overrides(folder: Path) -> dict[str, tuple[str, str]]:
    """Per mistake: an override that makes it, and what the error must say."""
    empty, binary = write(folder / "empty.txt", b""), write(folder / "latin.txt", b"caf\xe9\n")
    occupied = write(folder / "file", b"")
    return {
        "no steps": ("--max-steps=0", "give at least 1"),
        "misspelt key": ("cold_start.iteratons=3", "did you mean 'iterations'"),
        "batch arithmetic": ("cold_start.micro_batch_size=3", "does not divide batch_size = 4"),
        "group arithmetic": ("rtdmd.images_per_prompt=3", "rtdmd.images_per_prompt"),
        "missing model": (f"model.pipeline={folder}/nowhere", "there is no such folder"),
        "empty prompts": (f"rtdmd.prompts.source={empty}", "there are no prompts in it"),
        "prompts not UTF-8": (f"cold_start.prompts.source={binary}", "UTF-8"),
        "unknown reward": ("rewards.0.name=clipscoer", "did you mean 'clipscore'"),
        "output not writable": (f"output={occupied}/runs", "output"),
    }


@pytest.mark.parametrize(
    "mistake",
    [
        "no steps",
        "misspelt key",
        "batch arithmetic",
        "group arithmetic",
        "missing model",
        "empty prompts",
        "prompts not UTF-8",
        "unknown reward",
        "output not writable",
    ],
)
def test_a_mistake_is_one_clear_error(mistake: str, sound: list[str], tmp_path: Path) -> None:
    override, words = faulty_overrides(tmp_path)[mistake]
    done = train(*sound, override)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("rtdmd:")]) == 1
    assert not (tmp_path / "runs" / "dry_run").exists()


def test_nothing_is_imported_that_loads_weights(sound: list[str]) -> None:
    """The error comes before diffusers or DeepSpeed are so much as imported."""
    code = (
        "import sys, runpy; sys.argv = ['train_ds.py', 'recipes/dry_run.yaml', 'lora.rnk=1', *sys.argv[1:]]\n"
        "try: runpy.run_path('train_ds.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert not {'diffusers', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *sound], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_through_the_launcher_the_error_is_said_once(sound: list[str]) -> None:
    launcher = (str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2")
    done = train(*sound, "lora.rnk=1", launcher=launcher)
    assert done.returncode == 2, done.stderr
    assert (done.stdout + done.stderr).count("did you mean 'rank'") == 1


def test_stage_two_without_stage_one_says_what_to_do(sound: list[str]) -> None:
    done = train(*sound, "rtdmd.sample_batch_size=4", "--stage", "rtdmd")
    assert done.returncode == 2, done.stderr
    assert "holds no finished cold start" in done.stderr and "Traceback" not in done.stderr


def test_a_reward_that_cannot_be_loaded_is_missed_before_stage_one(sound: list[str], tmp_path: Path) -> None:
    empty = tmp_path / "clip"
    empty.mkdir()
    done = train(*sound, "rtdmd.sample_batch_size=4", f"rewards.0.weights={empty}")
    assert done.returncode == 2, done.stderr
    assert f"reward clipscore: {empty}: no CLIP weights" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "dry_run" / "cold_start").exists()


def test_ranks_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"^WORLD_SIZE is 2, but MASTER_ADDR isn't set: start the ranks with"):
        start_ranks(60)


def test_a_port_that_is_taken(sound: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = train(*sound, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert done.returncode == 2, done.stderr
    assert f"--master_port {port + 1}" in done.stderr and "Traceback" not in done.stderr
