"""Work in several processes: order, reports, failures."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rtdmd.errors import UserError
from rtdmd.processes import Report, devices_for, run_processes, shares, unshare


def square(number: int, report: Report) -> tuple[int, int]:
    for _ in range(number):
        report(1)
    return number**2, os.getpid()


def fail(argument: tuple[str, Path], report: Report) -> None:
    """Fails in one way or another; ``wait`` would go on for long and then leave a file."""
    how, folder = argument
    if how == "user":
        raise UserError("give another file")
    if how == "bug":
        raise ZeroDivisionError("by hand")
    if how == "killed":
        os._exit(9)
    time.sleep(60)
    (folder / "went on").touch()


def test_results_come_in_order_from_processes_of_their_own() -> None:
    done: list[int] = []
    results = run_processes(square, [3, 1, 2], done.append)
    assert [result for result, _ in results] == [9, 1, 4]
    assert len({os.getpid(), *(process for _, process in results)}) == 4
    assert sum(done) == 6


def test_one_argument_stays_in_this_process() -> None:
    assert run_processes(square, [5]) == [(25, os.getpid())]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("user", UserError, "^give another file$"),
        ("bug", RuntimeError, "process 2 of 2 failed:\n.*ZeroDivisionError: by hand"),
        ("killed", RuntimeError, "process 2 of 2 ended with exit code 9"),
    ],
)
def test_a_failure_ends_all(tmp_path: Path, how: str, error: type[Exception], message: str) -> None:
    start = time.monotonic()
    with pytest.raises(error, match=f"(?s){message}"):
        run_processes(fail, [("wait", tmp_path), (how, tmp_path)])
    assert time.monotonic() - start < 50
    assert not list(tmp_path.iterdir())


def test_shares_hold_each_item_once() -> None:
    assert shares([0, 1, 2, 3, 4], 2) == [[0, 2, 4], [1, 3]]
    assert shares([0, 1], 3) == [[0], [1]]
    for count in range(1, 9):
        assert unshare(shares(list("abcdefg"), count)) == list("abcdefg")


def test_devices() -> None:
    assert devices_for(3, "cpu") == ["cpu"] * 3
    assert devices_for(1, "cuda:1") == ["cuda:1"]
    for count, name, message in [
        (0, None, "--gpus 0: give at least 1"),
        (2, "cuda:1", "--device cuda:1 is one device, --gpus 2 asks for 2"),
        (999, "cuda", "--gpus 999: there are [0-9]+ devices"),
        (2, "toaster", "there are 0 devices of kind 'toaster'"),
    ]:
        with pytest.raises(UserError, match=message):
            devices_for(count, name)
