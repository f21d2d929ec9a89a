"""The reward benchmarks run, with small networks on the CPU."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel, Qwen3VLForConditionalGeneration

from rtdmd.rewards import REWARDS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DIFFERENTIABLE = {name for name, spec in REWARDS.items() if spec.differentiable}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of the folder, as running it would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module


def test_memory_of_every_scorer_alone_and_together(benchmark: Any, tmp_path: Path) -> None:
    main = benchmark("reward_memory").main
    options = ["--tiny", "--device", "cpu", "--transformer", "--aesthetic", "--hpsv3", "--geneval2"]
    sizes = ["--size", "64", "--batch", "2", "--chunk", "1", "--repeats", "1"]
    result = main([*options, *sizes, "--output", str(tmp_path / "memory.json")])
    assert json.loads((tmp_path / "memory.json").read_text()) == result
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "decoder alone" and names[-1] == "together"
    assert set(names[1:-1]) == DIFFERENTIABLE
    assert all(row["seconds"] > 0 and row["error"] is None for row in result["rows"])
    assert result["settings"]["size"] == 64


def test_memory_without_a_generator(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script = benchmark("reward_memory")
    script.main(["--tiny", "--device", "cpu", "--size", "64", "--batch", "1", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    table = lines[-6:]
    assert [line.split()[0] for line in table[1:]] == [*script.DEFAULT_SCORERS, "together"]


def test_the_true_sizes(benchmark: Any) -> None:
    """Of the generator, and of the judges whose configuration is stated in the benchmark alone."""
    script, models = benchmark("reward_memory"), benchmark("reward_models")
    with torch.device("meta"):
        assert script.count([script.build_transformer(tiny=False)]) == 3_875_544_576
        assert script.count([CLIPModel(models.vit_l_14())]) == 427_616_513
        assert script.count([Qwen3VLForConditionalGeneration(models.qwen3_vl_8b())]) == 8_767_123_696


def test_an_inactive_or_infinite_gradient_is_no_measurement(benchmark: Any) -> None:
    script = benchmark("reward_memory")
    device, dtype = torch.device("cpu"), torch.float32
    step = script.Step(script.build_family(tiny=True), None, 1, 1, 64, device, dtype)
    reward = script.Brightness()
    reward.score = lambda images, prompts, metadata: images.flatten(1).sum(1) * float("inf")
    row = script.measure("inf", step, [reward], 0, repeats=1)
    assert row.seconds is None
    assert row.error.startswith("RuntimeError: decoder alone: the gradient's squared norm is")
    assert "inf: RuntimeError" in script.table([row])


def test_precision(benchmark: Any, tmp_path: Path) -> None:
    output = tmp_path / "precision.json"
    names = ["clipscore", "imagereward"]
    rows = benchmark("reward_precision").main(
        ["--scorers", *names, "--count", "8", "--size", "64", "--output", str(output)]
    )
    assert [row["name"] for row in json.loads(output.read_text())] == names
    assert all(0 < row.error < row.spread and row.correlation > 0.99 for row in rows)
