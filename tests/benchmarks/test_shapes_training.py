"""What trains and measures the small world, in small."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from torch import nn

from benchmarks.shapes import study
from benchmarks.shapes.mechanisms import noise_to_signal
from benchmarks.shapes.pictures import WORDS, chat_tokens, draw, padded_tokens
from benchmarks.shapes.study import COLD_STARTS, TUNINGS, Launch, launches
from benchmarks.shapes.teacher import HalfCopy
from benchmarks.shapes.training import Average, Schedule
from rtdmd.models.tiny_tokenizers import qwen_tokenizer
from rtdmd.recipe import dump_recipe, load_checked
from rtdmd.termination import EXIT_INTERRUPTED


def test_noise_to_signal_by_hand() -> None:
    """Estimates (3, 1), (1, 1): mean (2, 1), variances (2, 0), so ‖E g‖² = 5 − 2/2 = 4."""
    found = noise_to_signal(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    assert found == {"noise": pytest.approx(2), "signal": pytest.approx(4), "ratio": pytest.approx(0.5)}


def test_noise_to_signal_is_unbiased() -> None:
    """Signal 0 on average for pure noise: without the correction it would be 4/8."""
    generator = torch.Generator().manual_seed(0)
    signals = [noise_to_signal(torch.randn(8, 4, generator=generator))["signal"] for _ in range(4000)]
    assert abs(sum(signals) / len(signals)) < 0.02


def test_the_schedule_warms_up_and_falls() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    schedule = Schedule(optimizer, 10, warmup=2, last=0.1)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.update(model(torch.zeros(1, 1)).sum(), model)
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates == pytest.approx([0.5 * expected[0], *expected[1:]])


def test_the_average_is_the_parameters_weighted_mean() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    average = Average(model, 0.5)
    for value in (4.0, 8.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
    average.write()
    # decay min(0.5, (1 + n)/(10 + n)): 2/11, then 3/12
    first = 4.0 * (1 - 2 / 11)
    assert model.weight.item() == pytest.approx(first * 3 / 12 + 8.0 * 9 / 12)


def test_the_half_copy_computes_and_the_master_learns() -> None:
    torch.manual_seed(0)
    master, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(master.state_dict())
    fast = HalfCopy(master)
    x = torch.randn(5, 3)
    for network, own in ((fast.model, master), (plain, plain)):
        network(x).square().sum().backward()
        if network is fast.model:
            fast.hand_over_gradients()
        torch.optim.SGD(own.parameters(), 0.1).step()
    fast.refresh()
    for one, other in zip(fast.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert all(parameter.grad is None for parameter in fast.model.parameters())


def test_chat_tokens_are_the_templates() -> None:
    tokenizer = qwen_tokenizer(WORDS)
    prompts = ["two small red circles left of a large blue square", "", "an orange cross"]
    ours = chat_tokens(tokenizer, prompts, 24)
    for row, prompt in zip(ours, prompts, strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        expected = tokenizer(text, padding="max_length", max_length=24)["input_ids"]
        assert row.tolist() == expected
    with pytest.raises(ValueError, match="more than 10"):
        padded_tokens(tokenizer, ["a red circle and " * 4], 10)


def test_drawing_is_shared_out_without_a_trace() -> None:
    first, again = draw(3, 40, "train", 2), draw(3, 24, "train", 2)
    assert torch.equal(first.images[:24], again.images)
    assert first.wrong[:24] == again.wrong
    assert len(first) == 40


def test_every_variant_of_the_study_is_a_sound_recipe(tmp_path) -> None:
    for launch in launches((*COLD_STARTS, *TUNINGS), [0], tmp_path):
        _, script, recipe, _, stage, *overrides = launch.command([])
        assert script == "train_ds.py"
        if launch.variant.start is not None:
            cold = tmp_path / f"{launch.variant.start}-0" / "cold_start"
            cold.mkdir(parents=True, exist_ok=True)
            for name in ("generator_ema.pt", "fake_score.pt"):
                torch.save({f"a.lora_{factor}.weight": torch.ones(32, 32) for factor in "AB"}, cold / name)
        _, stages = load_checked(recipe, overrides, world_size=1, stage=stage)
        assert stages == [launch.variant.stage]


def test_what_has_no_cold_start_to_go_on_from_says_so(tmp_path, monkeypatch, capsys) -> None:
    command = ["study", "all", "no.such_field=1", "--out", str(tmp_path), "--seeds", "0"]
    chosen = ["--only", "ac_dmd", "rtdmd", "--measurements", "sources", "tracking"]
    monkeypatch.setattr(sys, "argv", [*command, *chosen])
    with pytest.raises(SystemExit) as caught:
        study.main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}/logs/ac_dmd-0.txt: exit code 2" in said
    assert "rtdmd-0 has no cold start to go on from" in said
    assert "no.such_field" in (tmp_path / "logs" / "ac_dmd-0.txt").read_text()
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["ac_dmd-0.txt"]  # nothing is measured


def test_a_finished_run_is_not_mistaken_for_another_recipes(tmp_path, monkeypatch, capsys) -> None:
    launch = Launch(COLD_STARTS[0], 0, tmp_path)
    recipe, _ = load_checked(study.RECIPE, launch.overrides([]), world_size=1, stage="cold_start")
    for folder in (launch.folder, tmp_path / "logs"):
        folder.mkdir()
    (launch.folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "logs" / "ac_dmd-0.done").touch()
    options = ["--out", str(tmp_path), "--seeds", "0", "--only", "ac_dmd"]
    monkeypatch.setattr(sys, "argv", ["study", "train", *options])
    study.main()  # nothing is left to do
    monkeypatch.setattr(sys, "argv", ["study", "train", "cold_start.iterations=7", *options])
    with pytest.raises(SystemExit) as caught:
        study.main()
    assert caught.value.code == 1
    assert not (tmp_path / "logs" / "ac_dmd-0.txt").exists()
    assert f"{launch.folder}: was trained with another recipe" in capsys.readouterr().err


def test_ctrl_c_lets_nothing_more_begin(tmp_path) -> None:
    options = ["--only", "ac_dmd", "--seeds", "0", "1", "--parallel", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.shapes.study", "train", *options],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores it for what it starts in the background, tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("logs/*.txt")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in said
    assert len(list(tmp_path.glob("logs/*"))) == 1


def test_a_launch_says_where_it_goes(tmp_path) -> None:
    launch = Launch(TUNINGS[0], 3, tmp_path)
    assert launch.folder == tmp_path / "rtdmd-3"
    assert "seed=3" in launch.command([])
