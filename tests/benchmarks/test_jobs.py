"""Jobs on GPUs: in order, each on its own, ended and stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import jobs
from benchmarks.gpus import visible_gpus


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_list_by_hand(tmp_path: Path) -> None:
    lines = "# a comment", "", "one 1 echo a b", "all 4  python -c 'print(1)'", "two 2~ true"
    path = write(tmp_path / "list.txt", *lines)
    assert jobs.read_list(path) == [
        jobs.Job("one", 1, "echo a b"),
        jobs.Job("all", 4, "python -c 'print(1)'"),
        jobs.Job("two", 2, "true", shares=True),
    ]


def test_lists_name_cases_that_there_are() -> None:
    lists = list(Path("benchmarks/lists").glob("*.txt"))
    assert len(lists) >= 2
    cases = re.findall(r"^    (\w+)\) run ", Path("benchmarks/full_size_runs.sh").read_text(), re.MULTILINE)
    for path in lists:
        for job in jobs.read_list(path):
            _, runs, named = job.command.partition("benchmarks/full_size_runs.sh ")
            assert not runs or set(named.partition(";")[0].split()[1:]) <= set(cases), job


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("two one echo", "line 2 is 'two one echo'; write a name, a number of GPUs, and a command"),
        ("two 1", "line 2 is 'two 1'"),
        ("one 1 echo", "'one' is no name, or another job's"),
        ("../one 1 echo", "'../one' is no name"),
        (".. 1 echo", "'..' is no name"),
    ],
)
def test_faults_name_the_line(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "list.txt", "one 1 echo", line)
    with pytest.raises(SystemExit) as caught:
        jobs.main(["start", str(path), "--out", str(tmp_path / "out")])
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_jobs_have_gpus_of_their_own_in_order(tmp_path: Path) -> None:
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
    scheduler = jobs.Scheduler(path, out, ["2", "3"], tmp_path)
    (out / "logs").mkdir(parents=True)
    while scheduler.turn():
        time.sleep(0.02)
    lines = (out / "notes").read_text().splitlines()
    assert sorted(lines[:2]) == ["1 gpus 2", "1 gpus 3"]
    assert lines[2:] == ["end 1", "end 1", "2 gpus 2,3", "end 2"]
    assert {name: code for name, (code, _) in scheduler.ended.items()} == dict(a=0, b=0, c=0, d=3, e=-1, f=0)
    assert (out / "logs" / "f.txt").read_text().strip() == str(tmp_path)
    assert jobs.last_words(out / "logs" / "d.txt") == "2 of 2"


def test_jobs_that_share_gpus_stand_still_while_others_measure_there(tmp_path: Path) -> None:
    """Each has a GPU of its own among themselves; only the one beside the measurement stands still."""
    count = "while :; do date +%s.%N >>$OUT/$CUDA_VISIBLE_DEVICES; sleep 0.05; done"
    measure = write(
        tmp_path / "measure.py",
        "import time",
        "from benchmarks.gpus import alone",
        "with alone():",
        "    for _ in range(2): print(time.time()); time.sleep(1)",
        "time.sleep(1)",
    )
    path = write(
        tmp_path / "list.txt",
        f"measuring 1 PYTHONPATH={Path.cwd()} {sys.executable} {measure}",
        "waiting 2 true",
        f"beside 1~ {count}",
        f"elsewhere 1~ {count}",
    )
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    scheduler = jobs.Scheduler(path, out, ["6", "7"], tmp_path)
    while scheduler.turn() and "measuring" not in scheduler.ended:
        assert {each.job.name for each in scheduler.running} >= {"beside", "elsewhere"}
        time.sleep(0.02)
    scheduler.stop()
    begin, end = map(float, (out / "logs" / "measuring.txt").read_text().split())
    counted = {gpu: [float(word) for word in (out / gpu).read_text().split()] for gpu in "67"}
    assert not [moment for moment in counted["6"] if begin < moment < end]
    assert [moment for moment in counted["6"] if moment < begin]
    assert [moment for moment in counted["6"] if moment > end]
    assert [moment for moment in counted["7"] if begin < moment < end]
    assert scheduler.ended["beside"][0] == scheduler.ended["elsewhere"][0] == -signal.SIGTERM
    assert not (out / "alone" / "measuring").exists()


def test_marks_of_killed_processes_do_not_count(tmp_path: Path) -> None:
    assert not jobs.has_marks(tmp_path / "none")
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / str(ended.pid)).touch()
    assert not jobs.has_marks(tmp_path)
    (tmp_path / str(os.getpid())).touch()
    assert jobs.has_marks(tmp_path)


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, names in (("2,3", ["2", "3"]), ("", []), ("GPU-7149f058", ["GPU-7149f058"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert visible_gpus() == names


def test_the_copy_of_the_tree(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("recipes/a.yaml", "rtdmd/recipes/b.yaml", "runs/big", "old/scheduler.pid", ".mypy_cache/c"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    out = source / "recipes" / "out"
    out.mkdir()
    jobs.copy_tree(source, out / "tree", out)
    found = [str(path.relative_to(out / "tree")) for path in (out / "tree").rglob("*") if path.is_file()]
    assert sorted(found) == ["recipes/a.yaml", "rtdmd/recipes/b.yaml"]


def said_by(words: str, out: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether ``wait`` says so within half a minute."""
    for _ in range(100):
        jobs.main(["wait", "--out", str(out), "--seconds", "0.3"])
        if words in capsys.readouterr().out:
            return True
    return False


def until_refused(out: Path) -> None:
    """Until the scheduler has looked at the list and gone on with what it knew."""
    deadline = time.monotonic() + 10
    while "line 4 is 'broken'" not in (out / "scheduler.txt").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_in_the_background_until_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "LEFT_OUT", (*jobs.LEFT_OUT, "data", "tests", "docs"))
    path = write(tmp_path / "list.txt", "short 0 exit 2", "long 1 echo begun; exec sleep 61.25")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="has no jobs"):
        jobs.main(["stop", "--out", str(out)])
    jobs.main(["start", str(path), "--out", str(out), "--gpus", "1"])
    try:
        assert said_by("running  long: begun", out, capsys)
        with pytest.raises(SystemExit, match="has jobs already"):
            jobs.main(["start", str(path), "--out", str(out)])
        with open(path, "a") as file:
            file.write("later 1 true\nbroken\n")
        until_refused(out)
        with open(path, "w") as file:
            file.write("short 0 exit 2\nlong 1 sleep 61\nlater 1 true\n")
        assert said_by("waiting  later", out, capsys)
    finally:
        jobs.main(["stop", "--out", str(out)])
    with pytest.raises(SystemExit, match="nothing runs any more"):
        jobs.main(["wait", "--out", str(out)])
    said = capsys.readouterr().out
    assert "ended    short: exit code 2" in said and "ended    long: exit code -15" in said
    assert "waiting  later" in said
    assert "write a name, a number of GPUs" in (out / "scheduler.txt").read_text()
    commands = [entry.read_bytes() for entry in Path("/proc").glob("[0-9]*/cmdline") if entry.exists()]
    assert not any(b"61.25" in command for command in commands)
