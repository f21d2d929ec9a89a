"""Jobs on GPUs: in order, each on its own, ended and stopped."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import jobs


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_list_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", "# a comment", "", "one 1 echo a b", "all 4  python -c 'print(1)'")
    assert jobs.read_list(path) == [
        jobs.Job("one", 1, "echo a b"),
        jobs.Job("all", 4, "python -c 'print(1)'"),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("two one echo", "line 2 is 'two one echo'; write a name, a number of GPUs, and a command"),
        ("two 1", "line 2 is 'two 1'"),
        ("one 1 echo", "'one' is no name, or another job's"),
        ("../one 1 echo", "'../one' is no name"),
    ],
)
def test_faults_name_the_line(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "list.txt", "one 1 echo", line)
    with pytest.raises(SystemExit) as caught:
        jobs.main(["start", str(path), "--out", str(tmp_path / "out")])
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_jobs_have_gpus_of_their_own_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The third needs both GPUs: it waits for the first two, and the fourth doesn't overtake it."""
    begun, ended = 'echo "$PROCESSES gpus $CUDA_VISIBLE_DEVICES"', 'echo "end $PROCESSES"'
    note = f"{begun} >>$OUT/notes; sleep 0.3; {ended} >>$OUT/notes"
    path = write(
        tmp_path / "list.txt",
        f"a 1 {note}",
        f"b 1 {note}",
        f"c 2 {note}",
        "d 1 printf '1 of 2\\r2 of 2'; exit 3",
        "e 3 true",
        "f 0 pwd",
    )
    out = tmp_path / "out"
    scheduler = jobs.Scheduler(path, out, 2, tmp_path)
    (out / "logs").mkdir(parents=True)
    while scheduler.turn():
        time.sleep(0.02)
    lines = (out / "notes").read_text().splitlines()
    assert sorted(lines[:2]) == ["1 gpus 0", "1 gpus 1"]
    assert lines[2:] == ["end 1", "end 1", "2 gpus 0,1", "end 2"]
    assert {name: code for name, (code, _) in scheduler.ended.items()} == dict(a=0, b=0, c=0, d=3, e=-1, f=0)
    assert (out / "logs" / "f.txt").read_text().strip() == str(tmp_path)
    assert jobs.last_words(out / "logs" / "d.txt") == "2 of 2"
    jobs.main(["wait", "--out", str(out)])
    said = capsys.readouterr().out
    assert "ended    d: exit code 3" in said and "waiting  none" in said


def test_in_the_background_until_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "LEFT_OUT", ("data", "tests", ".git", ".venv", "docs"))
    path = write(tmp_path / "list.txt", "long 1 echo begun; sleep 60")
    out = tmp_path / "out"
    jobs.main(["start", str(path), "--out", str(out), "--gpus", "1"])
    for _ in range(100):
        jobs.main(["wait", "--out", str(out), "--seconds", "0.3"])
        if "running  long: begun" in capsys.readouterr().out:
            break
    with pytest.raises(SystemExit, match="has jobs already"):
        jobs.main(["start", str(path), "--out", str(out)])
    with open(path, "a") as file:
        file.write("later 1 true\n")
    for _ in range(100):
        jobs.main(["wait", "--out", str(out), "--seconds", "0.3"])
        if "waiting  later" in capsys.readouterr().out:
            break
    else:
        pytest.fail("the added job isn't waiting")
    state = jobs.read_state(out)
    jobs.main(["stop", "--out", str(out)])
    running = state["running"]
    assert isinstance(running, dict)
    deadline = time.monotonic() + 10
    for process in (state["scheduler"], *running.values()):
        while is_alive(int(str(process))):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_alive(process: int) -> bool:
    """Running, and not waiting for its parent to hear of its end."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
