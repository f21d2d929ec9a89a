"""Launching and computing are told apart for every call and batch."""

from __future__ import annotations

import pytest

from benchmarks import launching
from rtdmd.distributed.collectives import stop_ranks


def test_a_row_for_each_call_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--batches", "1", "2", "--repeats", "1", "--profile", "3"]
    try:
        result = launching.main(["recipes/flux2_4b.yaml", *arguments])
    finally:
        stop_ranks()
    rows = result["rows"]
    assert [row["batch"] for row in rows] == [1] * 4 + [2] * 4
    assert {row["case"] for row in rows[:4]} == {row["case"] for row in rows[4:]} and len(rows) == 8
    for row in rows:
        assert 0 < row["launched"][0] == row["launched"][1] <= row["done"][0] == row["done"][1]
    printed = capsys.readouterr().out
    assert printed.count("| fake score, backward |") == 2 and "tottime" in printed


def test_no_batch_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        launching.main(["recipes/flux2_4b.yaml", "--batches", "0"])
    assert "at least 1" in capsys.readouterr().err
