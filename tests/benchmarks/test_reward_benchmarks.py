"""The reward benchmarks run, with small networks on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, Qwen3VLForConditionalGeneration

from benchmarks import reward_memory, reward_models, reward_precision
from rtdmd.rewards import REWARDS

DIFFERENTIABLE = {name for name, spec in REWARDS.items() if spec.differentiable}


def test_memory_of_every_scorer_alone_and_together(tmp_path: Path) -> None:
    options = ["--tiny", "--device", "cpu", "--transformer", "--aesthetic", "--hpsv3", "--geneval2"]
    sizes = ["--size", "64", "--batch", "2", "--chunk", "1", "--repeats", "1"]
    result = reward_memory.main([*options, *sizes, "--output", str(tmp_path / "memory.json")])
    assert json.loads((tmp_path / "memory.json").read_text()) == result
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "decoder alone" and names[-1] == "together"
    assert set(names[1:-1]) == DIFFERENTIABLE
    assert all(row["seconds"] > 0 and row["error"] is None for row in result["rows"])
    assert result["settings"]["size"] == 64


def test_memory_without_a_generator(capsys: pytest.CaptureFixture[str]) -> None:
    reward_memory.main(["--tiny", "--device", "cpu", "--size", "64", "--batch", "1", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    table = lines[-6:]
    assert [line.split()[0] for line in table[1:]] == [*reward_memory.DEFAULT_SCORERS, "together"]


def test_the_true_sizes() -> None:
    """Of the generator, and of the judges whose configuration is stated in the benchmark alone."""
    with torch.device("meta"):
        generator = reward_memory.build_transformer(tiny=False)
        clip = CLIPModel(reward_models.vit_l_14())
        judge = Qwen3VLForConditionalGeneration(reward_models.qwen3_vl_8b())
    sizes = [reward_memory.count([model]) for model in (generator, clip, judge)]
    assert sizes == [3_875_544_576, 427_616_513, 8_767_123_696]


def test_an_inactive_or_infinite_gradient_is_no_measurement() -> None:
    device, dtype = torch.device("cpu"), torch.float32
    step = reward_memory.Step(reward_memory.build_family(tiny=True), None, 1, 1, 64, device, dtype)
    reward = reward_memory.Brightness()
    reward.score = lambda images, prompts, metadata: images.flatten(1).sum(1) * float("inf")
    row = reward_memory.measure("inf", step, [reward], 0, repeats=1)
    assert row.seconds is None
    assert row.error.startswith("RuntimeError: decoder alone: the gradient's squared norm is")
    assert "inf: RuntimeError" in reward_memory.table([row])


def test_precision(tmp_path: Path) -> None:
    output = tmp_path / "precision.json"
    names = ["clipscore", "imagereward"]
    rows = reward_precision.main(
        ["--scorers", *names, "--count", "8", "--size", "64", "--output", str(output)]
    )
    assert [row["name"] for row in json.loads(output.read_text())] == names
    assert all(0 < row.error < row.spread and row.correlation > 0.99 for row in rows)
