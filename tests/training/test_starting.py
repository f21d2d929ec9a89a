"""How a run begins in a folder that is there, and what signals do to it before and after."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rtdmd.errors import UserError
from rtdmd.recipe import load_recipe
from rtdmd.recipe.schema import Recipe
from rtdmd.training.run import _begin, by_ranks, check_order

BOTH = ["cold_start", "rtdmd"]


def recipe(resume: str, *overrides: str) -> Recipe:
    return load_recipe("recipes/dry_run.yaml", [f"resume={resume}", "cold_start.iterations=4", *overrides])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder in which both stages have been, the cold start to its end."""
    run = tmp_path / "run"
    for stage, step in (("cold_start", 4), ("rtdmd", 2)):
        checkpoint = run / stage / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        stopping = {"rules": [], "courses": [], "best_value": None, "best_step": None, "reason": None}
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "stopping": stopping}))
        (checkpoint.parent / "latest").write_text(checkpoint.name)
        for name in ("generator_ema.pt", "fake_score.pt"):
            (run / stage / name).write_text(stage)
    (run / "samples").mkdir()
    for name in ("cold_start-000004.png", "rtdmd-000002.png"):
        (run / "samples" / name).touch()
    (run / "metrics.jsonl").write_text('{"stage": "cold_start", "step": 1}\n')
    return run


def test_starting_over_sets_everything_aside(run: Path) -> None:
    _begin(BOTH, recipe("never"), run)
    for stage, picture in (("cold_start", "cold_start-000004.png"), ("rtdmd", "rtdmd-000002.png")):
        aside = run / f"{stage}.before-1"
        assert (aside / "generator_ema.pt").read_text() == stage and not (run / stage).exists()
        assert (aside / "samples" / picture).is_file() and (aside / "metrics.jsonl").is_file()
    assert not list((run / "samples").iterdir())
    _begin(BOTH, recipe("auto"), run)  # stopped in its cold start, it may go on


def test_a_requeued_job_has_started_over_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    _begin(BOTH, recipe("never"), run)
    (run / "cold_start").mkdir()
    _begin(BOTH, recipe("never"), run)
    assert (run / "cold_start").is_dir() and not (run / "cold_start.before-2").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    _begin(BOTH, recipe("never"), run)
    assert not (run / "cold_start").exists() and (run / "cold_start.before-2").is_dir()


def test_a_cold_start_stays_beneath_its_rtdmd(run: Path) -> None:
    longer = recipe("auto", "cold_start.iterations=5")
    for stages, given, starts_over in ((BOTH, longer, False), (BOTH[:1], recipe("never"), True)):
        words = "its rtdmd has gone on from the cold start that is there after 4 iterations"
        with pytest.raises(UserError, match=words) as told:
            check_order(stages, given, run, starts_over)
        assert f"cold_start.iterations is {given.cold_start.iterations}" in str(told.value)
    check_order(BOTH, recipe("auto"), run, starts_over=False)
    check_order(BOTH, recipe("never"), run, starts_over=True)
    check_order(BOTH[1:], longer, run, starts_over=False)
    check_order(BOTH, recipe("auto", "cold_start.iterations=5", "rtdmd.start_generator=x.pt"), run, False)


def python(code: str) -> subprocess.CompletedProcess[str]:
    lines = "import os, signal\nfrom rtdmd.termination import *\nme = os.getpid()\n" + code
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_before_there_is_anything_to_save(name: str) -> None:
    done = python(f"leave_on_signals()\nos.kill(me, signal.{name})\nprint('still here')")
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")


def test_afterwards_signals_are_noted() -> None:
    """And the second Ctrl-C interrupts, whatever came before the first."""
    done = python(
        "leave_on_signals()\nnote_signals()\nassert not signal_came()\n"
        "os.kill(me, signal.SIGTERM)\nassert signal_came()\nos.kill(me, signal.SIGINT)\n"
        "try:\n    os.kill(me, signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_the_end_of_the_launcher_is_a_signal(tmp_path: Path) -> None:
    """The `deepspeed` command starts a process that starts the ranks; killed, it tells neither."""
    rank = "import time\nfrom rtdmd.termination import *\nleave_on_signals()\nend_with_launcher()\n"
    rank += f"open({str(tmp_path / 'begun')!r}, 'w').close()\ntime.sleep(100)"
    starter = f"import subprocess, sys\ncode = subprocess.call([sys.executable, '-c', {rank!r}])\n"
    starter += f"open({str(tmp_path / 'part')!r}, 'w').write(str(code))\n"
    starter += f"import os\nos.rename({str(tmp_path / 'part')!r}, {str(tmp_path / 'code')!r})"
    launcher = f"import subprocess, sys\nsubprocess.call([sys.executable, '-c', {starter!r}])"
    with subprocess.Popen([sys.executable, "-c", launcher]) as process:
        _wait_for(tmp_path / "begun")
        time.sleep(1.5)  # nothing happens while it lives
        assert not (tmp_path / "code").exists()
        process.kill()
    _wait_for(tmp_path / "code")
    assert (tmp_path / "code").read_text() == "75"


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_ranks_say_is_told_once_where_it_is_the_same() -> None:
    assert by_ranks(["copied"] * 3) == "copied"
    assert by_ranks(["copied", "copied", "gathered"]) == "copied (ranks 0, 1); gathered (ranks 2)"
