"""A run's folder is one launch's, and the same on all machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rtdmd.distributed.collectives import Ranks
from rtdmd.errors import UserError
from rtdmd.runs import latest_checkpoint, read_progress
from rtdmd.training import folder
from rtdmd.training.folder import LOCK_FILE, occupy


def test_a_folder_is_one_launchs_until_it_ends(tmp_path: Path, ranks: Ranks) -> None:
    run = tmp_path / "runs" / "mine"
    first = occupy(run, ranks)
    assert first is not None
    with pytest.raises(UserError, match=r"runs/mine: process \d+ on .* trains there; end it or wait"):
        occupy(run, ranks)
    before = (run / LOCK_FILE).read_text()
    first.close()
    second = occupy(run, ranks)  # whatever the first has left in the file
    assert second is not None and (run / LOCK_FILE).read_text() != before
    second.close()


def test_a_machine_with_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PATIENCE", 0.2)
    with pytest.raises(UserError, match="choose an `output` on a file system that all machines share"):
        folder._wait_for(tmp_path, "process 1 on another machine\n")
    (tmp_path / LOCK_FILE).write_text("process 1 on another machine\n")
    folder._wait_for(tmp_path, "process 1 on another machine\n")


def test_a_lost_pointer_costs_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 3, 2):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / "state.json").write_text(json.dumps({"step": step}))
    (tmp_path / "step-000004").mkdir()  # never completed
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-000003"
    (tmp_path / "latest").write_text("")
    with pytest.raises(UserError, match=r"names '', which is no complete .*step-000001, step-000002"):
        latest_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("step-000002\n")
    older = latest_checkpoint(tmp_path)
    assert older is not None and older.name == "step-000002"
    (older / "state.json").write_text('{"step": ')
    with pytest.raises(
        UserError, match=r"state.json: missing or damaged \(.*\); name an older step in 'latest'"
    ):
        read_progress(older)
