"""The table of rewards, through the console command and on its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtdmd.cli import main
from rtdmd.rewards import REWARDS, RewardSpec
from rtdmd.rewards.listing import fetch_commands, reward_table
from rtdmd.rewards.sources import HubFiles


def _spec(name: str, **options: object) -> RewardSpec:
    fields = {"differentiable": True, "default_weights": "owner/name", "licence": "MIT"}
    return RewardSpec(name, **(fields | options))  # type: ignore[arg-type]


def test_rewards_lists_every_scorer_with_what_fetches_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The machine's cache may hold anything: a process of its own looks into an empty one."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "rtdmd.cli", "rewards"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["name", "gradient", "found", "weights", "licence"]
    rows = {line.split()[0]: line.split() for line in lines[1:] if not line.startswith(" ")}
    assert list(rows) == sorted(REWARDS)
    for name, spec in REWARDS.items():
        weights = spec.default_weights or "none"
        assert rows[name][1] == ("yes" if spec.differentiable else "no")
        assert rows[name][3] == weights
        assert (rows[name][2] == "no") or not spec.needs_files
    assert "    hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in lines
    assert rows["compressibility"][2] == "yes"
    assert main(["rewards"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == lines[0]


def test_only_what_is_missing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder named as the repository counts, as transformers reads that before it asks the hub."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({}))
    spec = _spec("x", needs_files=(HubFiles("owner/name", ("model.pt", "config.json")),))
    assert fetch_commands(spec) == ["hf download owner/name model.pt"]
    (folder / "model.pt").write_bytes(b"")
    assert fetch_commands(spec) == []


def test_packages_count_too() -> None:
    assert fetch_commands(_spec("ocr", needs_packages=("json", "absent_package"))) == [
        "pip install 'rtdmd[ocr]'"
    ]
    assert fetch_commands(_spec("ocr", needs_packages=("json",))) == []


def test_the_table() -> None:
    specs = [
        _spec("bravo", differentiable=False, default_weights=None, needs_packages=("absent_package",)),
        _spec("alpha"),
    ]
    assert reward_table(specs).splitlines() == [
        "name   gradient  found  weights     licence",
        "alpha  yes       yes    owner/name  MIT",
        "bravo  no        no     none        MIT",
        "    pip install 'rtdmd[bravo]'",
    ]


def test_the_documentation_knows_every_reward_its_modes_and_its_files() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    judges = REWARDS.keys() - {"compressibility", "shapes"}  # these have pages or sentences of their own

    def rows(heading: str) -> set[str]:
        section = text.partition(heading)[2].partition("\n## ")[0]
        return {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}

    assert rows("## What they are") == judges
    assert rows("## Modes") == {name for name in judges if len(REWARDS[name].modes) > 1}
    assert rows("### bfloat16") == {name for name in judges if REWARDS[name].differentiable}
    for name in judges:
        for needed in REWARDS[name].needs_files:
            assert f"hf download {needed.repo}" in text
