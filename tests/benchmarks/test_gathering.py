"""Every way of gathering is tried, and gathers what is right."""

from __future__ import annotations

import re

import pytest

from tests.distributed.launch import run_ranks


@pytest.mark.slow
def test_all_ways_on_two_ranks() -> None:
    command = ["-m", "benchmarks.gathering", "--mib", "1", "--size", "64", "--repeats", "2"]
    first, second = run_ranks(command, 2)
    assert re.findall(r"^\| (.*?) \| [\d.]+ \| [\d.]+ \|$", first.stdout, re.MULTILINE) == [
        "collective",
        "copies",
        "copies, streams",
    ]
    assert "|" not in second.stdout
