"""metrics.jsonl reads the same however often a run was stopped; notices are said once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rtdmd.distributed.collectives import Ranks
from rtdmd.recipe.schema import TrackingSection
from rtdmd.training.tracking import Tracker, forget_after

MAIN = Ranks(0, 2, torch.device("cpu"))


def steps(path: Path) -> list[tuple[str, int]]:
    return [(line["stage"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]


def test_records_beyond_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    """Steps that a crash came after have no checkpoint: they will be taken again."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"stage": "cold_start", "step": step} for step in (1, 2, 3)] + [{"stage": "rtdmd", "step": 1}]
    damaged = b'{"stage": "rtdmd"}\n\xff\xfe}\n{"stage": "rtdmd", "st'
    path.write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + damaged)
    forget_after(path, "cold_start", 2)
    assert steps(path) == [("cold_start", 1), ("cold_start", 2), ("rtdmd", 1)]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_record_of_an_earlier_launch_is_amended(tmp_path: Path, is_there: bool) -> None:
    """Or made, where the machine lost it; other stages' and steps' stay as they are."""
    path = tmp_path / "metrics.jsonl"
    others = [
        {"stage": stage, "step": step, "seconds": 9.0} for stage, step in (("cold_start", 2), ("rtdmd", 1))
    ]
    mine = [{"stage": "rtdmd", "step": 2, "seconds": 9.0, "fake_score/loss": 1.0}] if is_there else []
    path.write_text("".join(json.dumps(line) + "\n" for line in [*others, *mine]))
    tracker = Tracker(tmp_path, "rtdmd", 2, 3, TrackingSection(), MAIN)
    tracker.amend(2, {"evaluation/words/clipscore": 0.5})
    tracker.log(3, {"fake_score/loss": 2.0})
    tracker.close()
    *kept, amended, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == others
    seconds = amended.pop("seconds")
    assert (seconds >= 9) == is_there and last["seconds"] < 9
    loss = {"fake_score/loss": 1.0} if is_there else {}
    assert amended == {"stage": "rtdmd", "step": 2, "evaluation/words/clipscore": 0.5} | loss


def test_a_notice_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path, "rtdmd", 0, 3, TrackingSection(), MAIN)
    for step in (1, 2, 3):
        tracker.log(step, {"reward/clipscore": 0.5}, ["mind the margin"])
    tracker.close()
    assert capsys.readouterr().err.count("mind the margin") == 1
    assert steps(tmp_path / "metrics.jsonl") == [("rtdmd", 1), ("rtdmd", 2), ("rtdmd", 3)]


def test_a_board_that_fails_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file where TensorBoard wants a folder")
    tracker = Tracker(tmp_path, "rtdmd", 0, 2, TrackingSection(tensorboard=True), MAIN)
    for step in (1, 2):
        tracker.log(step, {"reward/clipscore": 0.5})
    tracker.close()
    said = capsys.readouterr().err
    assert said.count("TensorBoard failed (") == 1 and "the run goes on without it" in said
    assert steps(tmp_path / "metrics.jsonl") == [("rtdmd", 1), ("rtdmd", 2)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "rtdmd", 0, 3, TrackingSection(), Ranks(1, 2, torch.device("cpu")))
    tracker.log(1, {"reward/clipscore": 0.5})
    tracker.amend(1, {"evaluation/words/clipscore": 0.5})
    tracker.close()
    assert not any(tmp_path.iterdir())
