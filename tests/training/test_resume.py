"""A run that is stopped and resumed equals the straight run bit for bit, through the real script.

Two ranks, float32, all roles on one base in shards, as in the recipes for real models. Compared are the
masters, AdamW's moments and the EMA in the checkpoints, the state dicts for others, and every number of
metrics.jsonl but the time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rtdmd.cli import main
from rtdmd.processes import free_port
from rtdmd.recipe import load_recipe
from rtdmd.runs import read_progress
from rtdmd.training.run import is_complete
from tests.distributed.launch import ROOT, run_ranks

ITERATIONS, EPOCHS = 4, 2
ROLES = ("teacher", "generator", "fake_score")
SEPARATE = (  # as the dry run has them
    "roles.engines=separate",
    "roles.teacher.engine=ds_configs/tiny_frozen_zero3.json",
    *(f"roles.{role}.engine=ds_configs/tiny_zero3.json" for role in ROLES[1:]),
)


def arguments(run: Path, pipeline: Path, clip: Path, *extra: str) -> list[str]:
    return [
        "train_ds.py",
        "recipes/dry_run.yaml",
        f"output={run.parent}",
        f"name={run.name}",
        f"model.pipeline={pipeline}",
        f"rewards.0.weights={clip}",
        f"cold_start.iterations={ITERATIONS}",
        "cold_start.generator_every=2",
        "cold_start.batch_size=2",
        "cold_start.sample_every=3",
        "cold_start.checkpoint_every=100",
        f"rtdmd.epochs={EPOCHS}",
        "rtdmd.sample_batch_size=2",
        "rtdmd.checkpoint_every=100",
        "preview.num_images=2",
        "evaluation.every=3",
        "evaluation.sets=[{name: words, prompts: {source: recipes/dry_run_prompts.txt, limit: 3}}]",
        "evaluation.num_images_per_prompt=2",
        "evaluation.batch_size=2",
        "rtdmd.reward_backprop.standardize=true",
        f"monitor_rewards=[{{name: pickscore, weights: {clip}}}]",
        "rtdmd.monitor_every=1",
        "rtdmd.stop_when=[{metric: monitor/pickscore, drop: 100, window: 1}]",
        "cold_start.generator.cooldown=0.75",
        "rtdmd.fake_score.cooldown=1",
        "roles.engines=shared_base",
        *(f"roles.{role}.engine=ds_configs/frozen_zero3.json" for role in ROLES),
        *extra,
    ]


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            tensors |= {f"{file.name}/{key}": stored.get_tensor(key) for key in set(stored.keys())}
    assert tensors
    return tensors


def metrics(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    for stage in ("cold_start", "rtdmd"):
        latest = (one / stage / "checkpoints/latest").read_text()
        assert latest == (other / stage / "checkpoints/latest").read_text()
        first = checkpoint_tensors(one / stage / "checkpoints" / latest)
        second = checkpoint_tensors(other / stage / "checkpoints" / latest)
        assert first.keys() == second.keys()
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different, different[:5]
        for name in ("generator_ema.pt", "fake_score.pt"):
            files = [torch.load(run / stage / name, weights_only=True) for run in (one, other)]
            assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_flux2: Path, tiny_clip: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "straight"
    done = run_ranks(arguments(run, tiny_flux2, tiny_clip), 2)
    assert f"are in {run}" in done[0].stdout.splitlines()[-1]
    base = "the base of teacher, generator and fake_score is in shards over 2 ranks, copied from each other"
    assert f"rtdmd: {base}\n" in done[0].stdout and base not in done[1].stdout
    return run


def test_the_run_leaves_what_is_promised(straight: Path) -> None:
    stages = [record["stage"] for record in metrics(straight)]
    assert stages == ["cold_start"] * ITERATIONS + ["rtdmd"] * EPOCHS
    assert (straight / "recipe.yaml").is_file()
    evaluated = [record["step"] for record in metrics(straight) if "evaluation/words/clipscore" in record]
    assert evaluated == [3, 4, 2]
    pictures = {path.name for path in (straight / "samples").iterdir()}
    assert pictures == {"cold_start-000003.png", "cold_start-000004.png", "rtdmd-000002.png"}
    for stage in ("cold_start", "rtdmd"):
        assert (straight / stage / "pytorch_lora_weights.safetensors").is_file()
        state = torch.load(straight / stage / "generator_ema.pt", weights_only=True)
        assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in state)
        assert all(tensor.numel() > 0 and tensor.dtype == torch.float32 for tensor in state.values())


def test_scores_during_training_are_those_of_evaluate(straight: Path, tmp_path: Path) -> None:
    """Of the weights that each stage left; two ranks there, one process here."""
    models = [f"--model={stage}=run:{straight}@{stage}" for stage in ("cold_start", "rtdmd")]
    arguments = ["evaluate", str(straight / "recipe.yaml"), *models, "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["scores"]
    last = {record["stage"]: record for record in metrics(straight)}
    for score in found:
        logged = last[score["model"]][f"evaluation/words/{score['reward']}"]
        assert logged == pytest.approx(score["mean"], abs=2e-3)
    assert len(found) == 4


def leave_evaluation_out(run: Path, checkpoint: Path) -> None:
    """That of the last step, from its record; the checkpoint says so."""
    *lines, last = (run / "metrics.jsonl").read_text().splitlines()
    record = {name: value for name, value in json.loads(last).items() if not name.startswith("evaluation/")}
    assert len(record) < len(json.loads(last))
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["evaluation_left_out"] is False
    (checkpoint / "state.json").write_text(json.dumps(state | {"evaluation_left_out": True}))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, tiny_flux2: Path, tiny_clip: Path) -> Path:
    """Stops within stage 1 between two generator updates, and within stage 2; the middle launch crosses
    the hand-over. An evaluation is due at the first stop, and is left out as on a signal."""
    run = tmp_path_factory.mktemp("runs") / "resumed"
    for steps in ("3", "2"):
        done = run_ranks([*arguments(run, tiny_flux2, tiny_clip), "--max-steps", steps], 2)
        assert "the same command goes on" in done[0].stdout
        if steps == "3":
            leave_evaluation_out(run, run / "cold_start/checkpoints/step-000003")
    run_ranks(arguments(run, tiny_flux2, tiny_clip), 2)
    return run


def test_stopped_and_resumed_equals_straight(straight: Path, resumed: Path) -> None:
    assert_same_run(straight, resumed)


def test_statistics_and_rules_go_on_where_they_were(straight: Path, resumed: Path) -> None:
    states = [read_progress(run / f"rtdmd/checkpoints/step-{EPOCHS:06d}") for run in (straight, resumed)]
    assert states[0] == states[1]
    assert states[0]["stage"]["combination"]["clipscore"]["total_weight"] == pytest.approx(1.9)
    assert len(states[0]["stage"]["alarms"]["histories"]["monitor/pickscore"]) == EPOCHS
    assert states[0]["stopping"]["best_step"] == EPOCHS  # the only one that was due


def test_a_rule_ends_the_stage_with_the_best_generator(
    straight: Path, tmp_path: Path, tiny_flux2: Path, tiny_clip: Path
) -> None:
    """The run ends at the first epoch whose reward is below the best before it."""
    run = tmp_path / "ended"
    shutil.copytree(straight / "cold_start", run / "cold_start")
    rule = "rtdmd.stop_when=[{metric: reward/compressibility, drop: 0, patience: 0, window: 1}]"
    more = ("rtdmd.epochs=30", "rtdmd.checkpoint_every=1", "reward_workers=1")
    command = arguments(run, tiny_flux2, tiny_clip, rule, *more)
    run_ranks([*command, "--stage", "rtdmd"], 2)
    rewards = [record["reward/compressibility"] for record in metrics(run)]
    last, best = len(rewards), rewards.index(max(rewards)) + 1
    assert last < 30 and all(later > earlier for earlier, later in pairwise(rewards[:-1]))
    assert rewards[-1] < max(rewards)
    folder = run / "rtdmd"
    assert (folder / "checkpoints/latest").read_text() == f"step-{last:06d}"
    assert (folder / "checkpoints/best").read_text() == f"step-{best:06d}"
    ending = json.loads((folder / "ended.json").read_text())
    assert (ending["step"], ending["best_step"]) == (last, best)

    handed, kept, latest = (
        torch.load(folder / f"generator_ema{suffix}.pt", weights_only=True)
        for suffix in ("", ".best", ".last")
    )
    assert all(torch.equal(handed[key], kept[key]) for key in kept)
    assert any(not torch.equal(handed[key], latest[key]) for key in latest)
    lora = load_file(folder / "pytorch_lora_weights.safetensors")
    assert sum(float(value.sum()) for value in lora.values()) == pytest.approx(
        sum(float(value.sum()) for value in handed.values()), rel=1e-4
    )
    recipe = load_recipe("recipes/dry_run.yaml", command[2:])
    assert is_complete("rtdmd", recipe, run)
    (folder / "ended.json").unlink()
    assert not is_complete("rtdmd", recipe, run)
    goes_on = load_recipe("recipes/dry_run.yaml", [*command[2:], "rtdmd.stop_when=[]"])
    assert not is_complete("rtdmd", goes_on, run)


def test_files_that_are_missing_are_written_again(
    straight: Path, tmp_path: Path, tiny_flux2: Path, tiny_clip: Path
) -> None:
    """A run that died between its last checkpoint and its files; another number of ranks reads it, too."""
    run = tmp_path / "damaged"
    shutil.copytree(straight / "cold_start", run / "cold_start")
    (run / "cold_start/generator_ema.pt").unlink()
    command = arguments(run, tiny_flux2, tiny_clip, "cold_start.batch_size=4", "rtdmd.sample_batch_size=4")
    run_ranks([*command, "--stage", "cold_start"], 1)
    got, expected = (
        torch.load(folder / "cold_start/generator_ema.pt", weights_only=True) for folder in (run, straight)
    )
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_another_kind_of_training_is_refused(
    straight: Path, tmp_path: Path, tiny_flux2: Path, tiny_clip: Path
) -> None:
    run = tmp_path / "changed"
    shutil.copytree(straight / "cold_start", run / "cold_start")
    changed = [
        "cold_start.iterations=9",
        "lora.rank=4",
        "cold_start.batch_size=4",
        "rtdmd.sample_batch_size=4",
    ]
    done = run_ranks(arguments(run, tiny_flux2, tiny_clip, *changed), 1, codes=(2,))
    assert "lora.rank was 8, is 4" in done[0].stdout and "Traceback" not in done[0].stdout
    assert not (run / "recipe.yaml").exists()
    done = run_ranks(
        arguments(run, tiny_flux2, tiny_clip, *changed[:1], *changed[2:], "seed=3"), 1, codes=(2,)
    )
    assert "can't go on with another training: seed was 0, is 3" in done[0].stdout


def test_what_a_run_stands_on_stays(
    straight: Path, tmp_path: Path, tiny_flux2: Path, tiny_clip: Path
) -> None:
    """Neither its cold start nor its base is exchanged beneath an rtdmd."""
    run = tmp_path / "standing"
    shutil.copytree(straight, run)
    sizes = ("cold_start.batch_size=4", "rtdmd.sample_batch_size=4")
    longer = arguments(run, tiny_flux2, tiny_clip, *sizes, "cold_start.iterations=9")
    done = run_ranks(longer, 1, codes=(2,))
    assert "its rtdmd has gone on from the cold start that is there" in done[0].stdout
    state = torch.load(run / "cold_start/generator_ema.pt", weights_only=True)
    torch.save({key: value + 1 for key, value in state.items()}, run / "cold_start/generator_ema.pt")
    more = arguments(run, tiny_flux2, tiny_clip, *sizes, "rtdmd.epochs=9")
    done = run_ranks([*more, "--stage", "rtdmd"], 1, codes=(2,))
    assert "can't go on with another training: start_generator was " in done[0].stdout
    other = tmp_path / "pipeline"
    shutil.copytree(tiny_flux2, other)
    (weights,) = (other / "transformer").glob("*.safetensors")
    save_file({key: value * 2 for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    shutil.rmtree(run / "rtdmd")
    done = run_ranks([*longer, f"model.pipeline={other}"], 1, codes=(2,))
    assert "can't go on with another training: roles.fake_score.weights was " in done[0].stdout
    done = run_ranks([*more, f"model.pipeline={other}", "--stage", "rtdmd"], 1, codes=(2,))
    assert "rtdmd can't go on from there on another base: roles.fake_score.weights was " in done[0].stdout
    assert (run / "recipe.yaml").read_text() == (straight / "recipe.yaml").read_text()


def test_an_unfinished_cold_start_is_not_handed_over(
    straight: Path, tmp_path: Path, tiny_flux2: Path, tiny_clip: Path
) -> None:
    run = tmp_path / "unfinished"
    shutil.copytree(straight / "cold_start", run / "cold_start")
    longer = ["cold_start.iterations=9", "rtdmd.sample_batch_size=4", "--stage", "rtdmd"]
    done = run_ranks(arguments(run, tiny_flux2, tiny_clip, *longer), 1, codes=(2,))
    assert "holds no finished cold start" in done[0].stdout


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2, 4, 5])
def test_stopping_after_any_step(
    straight: Path, tmp_path: Path, tiny_flux2: Path, tiny_clip: Path, first: int
) -> None:
    run = tmp_path / "resumed"
    run_ranks([*arguments(run, tiny_flux2, tiny_clip), "--max-steps", str(first)], 2)
    run_ranks(arguments(run, tiny_flux2, tiny_clip), 2)
    assert_same_run(straight, run)


@pytest.mark.slow
def test_separate_engines_stopped_and_resumed_equal_straight_ones(
    tmp_path: Path, tiny_flux2: Path, tiny_clip: Path
) -> None:
    """DeepSpeed's ZeRO-3 for each role."""
    runs = tmp_path / "straight", tmp_path / "resumed"
    straight, resumed = (arguments(run, tiny_flux2, tiny_clip, *SEPARATE) for run in runs)
    run_ranks(straight, 2)
    for more in (["--max-steps", "3"], ["--max-steps", "2"], []):
        run_ranks([*resumed, *more], 2)
    assert_same_run(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("first", [(), SEPARATE], ids=["shared", "separate"])
def test_resuming_on_another_number_of_ranks_and_in_another_layout(
    straight: Path, tmp_path: Path, tiny_flux2: Path, tiny_clip: Path, first: tuple[str, ...]
) -> None:
    """Two ranks with ZeRO-3, then one rank with ZeRO-2 and twice the batch: equal to rounding."""
    run = tmp_path / "moved"
    run_ranks([*arguments(run, tiny_flux2, tiny_clip, *first), "--max-steps", "3"], 2)
    engines = [*SEPARATE[:2], *(f"roles.{role}.engine=ds_configs/zero2.json" for role in ROLES[1:])]
    sizes = ["cold_start.batch_size=4", "rtdmd.sample_batch_size=4"]
    run_ranks([*arguments(run, tiny_flux2, tiny_clip, *engines, *sizes), "--stage", "cold_start"], 1)
    for name in ("generator_ema.pt", "fake_score.pt"):
        got, expected = (
            torch.load(folder / "cold_start" / name, weights_only=True) for folder in (run, straight)
        )
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-5)


@contextmanager
def one_rank(command: list[str], output: Path) -> Iterator[subprocess.Popen[str]]:
    """The training script as the only rank; what it prints goes to a file."""
    environment = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
    }
    with open(output, "w+") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
        yield process
        process.kill()  # does nothing to one that has ended


def wait_for_a_step(run: Path, process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.2)


def test_sigterm_saves_and_says_that_it_was_interrupted(
    tmp_path: Path, tiny_flux2: Path, tiny_clip: Path
) -> None:
    run, output = tmp_path / "terminated", tmp_path / "output"
    endless = ("cold_start.iterations=10000", "rtdmd.sample_batch_size=4", "evaluation.every=1")
    with one_rank(arguments(run, tiny_flux2, tiny_clip, *endless), output) as process:
        wait_for_a_step(run, process, output)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75, output.read_text()
    records = metrics(run)
    latest = (run / "cold_start/checkpoints/latest").read_text()
    assert latest == f"step-{len(records):06d}"
    # Unless the signal came during an evaluation.
    left_out = read_progress(run / "cold_start/checkpoints" / latest)["evaluation_left_out"]
    assert left_out == ("evaluation/words/clipscore" not in records[-1])
    assert left_out == ("the evaluation that is due comes on resuming" in output.read_text())


def test_a_reward_server_that_is_killed_stops_the_run(
    straight: Path, tmp_path: Path, tiny_flux2: Path, tiny_clip: Path
) -> None:
    run, output = tmp_path / "remote", tmp_path / "output"
    shutil.copytree(straight / "cold_start", run / "cold_start")
    serve = [sys.executable, "-m", "rtdmd.cli", "serve-rewards", "--reward", "compressibility", "--port", "0"]
    with subprocess.Popen(serve, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        words = server.stdout.readline().split()
        assert words[:3] == ["serving", "compressibility", "at"]
        local = f"{{name: clipscore, weights: {tiny_clip}}}"
        remote = f"{{name: compressibility, url: '{words[3]}', retries: 1}}"
        endless = (
            f"rewards=[{local},{remote}]",
            "rtdmd.epochs=10000",
            "rtdmd.sample_every=10000",
            "rtdmd.checkpoint_every=10000",
            "rtdmd.sample_batch_size=4",
            "cold_start.batch_size=4",
        )
        command = [*arguments(run, tiny_flux2, tiny_clip, *endless), "--stage", "rtdmd"]
        with one_rank(command, output) as process:
            wait_for_a_step(run, process, output)
            server.kill()
            assert process.wait(120) == 3, output.read_text()
    said = output.read_text()
    assert f"reward 'compressibility' at {words[3]}: no answer after 2 tries" in said
    assert "rtdmd serve-rewards --reward compressibility" in said and "Traceback" not in said
    assert all(record["nonfinite/compressibility"] == 0 for record in metrics(run))
