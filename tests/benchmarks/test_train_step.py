"""The benchmark of training steps runs on the CPU with small networks; its sizes are the true ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import full_size, model_flops, train_step
from benchmarks.measuring import Bench
from rtdmd.distributed.collectives import Ranks
from rtdmd.models import get_family
from rtdmd.models.protocol import TextEmbeddings
from rtdmd.recipe import load_recipe
from rtdmd.stages.device_memory import GIB
from rtdmd.stages.residency import AutomaticResidency
from tests.distributed.launch import run_ranks
from tests.stages.test_activations import Scripted

SHORT = ["--tiny", "--steps", "1", "--warmup", "1", "--phase-steps", "1"]


@pytest.mark.parametrize(
    ("recipe", "pixels", "tokens", "parameters", "tflop"),
    [  # parameters and FLOP of the published 4B at batch 9: measured once outside, 3.876 B and 91.6
        ("flux2_4b", 512, 512, 3_875_544_576, 91.6 / 9),
        ("flux2_9b", 512, 512, 9_078_581_248, 22.7),
        ("sd35m", 512, 205, 2_243_171_520, 2.22),
        ("sd3m", 512, 205, 2_028_328_000, 1.89),
    ],
)
def test_the_true_sizes(recipe: str, pixels: int, tokens: int, parameters: int, tflop: float) -> None:
    loaded = load_recipe(f"recipes/{recipe}.yaml")
    config = full_size.size_of(loaded, tiny=False).transformer
    family = get_family(loaded.model.family)
    with torch.device("meta"):
        network = family.transformer_class(**config)  # type: ignore[attr-defined]
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    embeddings = {"prompt_embeds": torch.empty(1, tokens, config["joint_attention_dim"], device="meta")}
    if loaded.model.family == "sd3":
        embeddings["pooled_prompt_embeds"] = torch.empty(1, config["pooled_projection_dim"], device="meta")
    tiny: Any = full_size.random_loaders(True).family(
        load_recipe(f"recipes/{recipe}.yaml", [*train_step.TINY_OVERRIDES]), torch.device("cpu")
    )
    shape = (
        (128, pixels // 16, pixels // 16)
        if loaded.model.family == "flux2"
        else (16, pixels // 8, pixels // 8)
    )
    count = model_flops.forward_flops(tiny, config, shape, TextEmbeddings(embeddings))
    assert count / 1e12 == pytest.approx(tflop, rel=0.01)


def test_evaluations_of_the_published_recipe() -> None:
    """8.5 and 15 forwards, averaged over the stop index."""
    recipe = load_recipe("recipes/flux2_4b.yaml")
    alone = [model_flops.cold_start_forwards(recipe, stop, False) for stop in (1, 2, 3, 4)]
    both = [model_flops.cold_start_forwards(recipe, stop, True) for stop in (1, 2, 3, 4)]
    assert sum(alone) / 4 == 8.5 and sum(both) / 4 == 15
    # 4 to roll out, 6 for the fake score, 2 for each drawn step, 2 + 2 + 1 for the last
    assert model_flops.rtdmd_forwards(recipe) == 4 + 6 + 4 + 5
    everywhere = load_recipe(
        "recipes/flux2_4b.yaml", ["rtdmd.matched_steps=trained", "rtdmd.policy_weight=0"]
    )
    assert model_flops.rtdmd_forwards(everywhere) == 4 + 3 * (6 + 5)


def test_numbers_of_iterations() -> None:
    assert [train_step.unmonitored(k, 3) for k in range(5)] == [1, 2, 4, 5, 7]
    assert [train_step.unmonitored(k, 1) for k in range(2)] == [0, 1]


def test_blended_is_nine_to_one() -> None:
    rows = [
        {"stop": stop, "seconds": seconds, "with_generator": both}
        for stop, seconds, both in ((1, 1.0, False), (4, 3.0, False), (1, 10.0, True))
    ]
    assert train_step.blended(rows) == pytest.approx(2.8)
    assert train_step.blended(rows[:2]) is None
    plain = [row | {"seconds": 2 * row["seconds"], "baseline": True} for row in rows]
    assert train_step.summarise([*plain, *rows, {"case": "save", "seconds": 5.0}]) == pytest.approx(
        {"blended_seconds": 2.8, "baseline_blended_seconds": 5.6, "times_faster": 2.0}
    )
    failed = {"stop": 4, "error": "out of memory", "with_generator": True}
    assert train_step.summarise([*rows, failed]) == {}


def test_random_weights_by_rows() -> None:
    recipe = load_recipe("recipes/flux2_4b.yaml", [*train_step.TINY_OVERRIDES])
    weights = full_size.role_weights(recipe, tiny=True)
    name = "transformer_blocks.0.attn.to_q.weight"
    whole = weights.read(name)
    assert tuple(whole.shape) == weights.shape(name) == (32, 32)
    assert float(whole.std()) == pytest.approx(32**-0.5, rel=0.1)
    assert torch.equal(whole, weights.read(name)) and weights.read(name, 8, 12).shape == (4, 32)


def run(arguments: list[str], world_size: int, folder: Path, code: int = 0) -> tuple[dict[str, Any], str]:
    """The JSON, and what rank 0 printed."""
    output = folder / "out.json"
    command = ["-m", "benchmarks.train_step", *SHORT, "--output", str(output), *arguments]
    done = run_ranks(command, world_size, codes=(code,))
    return json.loads(output.read_text()), done[0].stdout


def test_cold_start_and_its_baseline(tmp_path: Path) -> None:
    """No schedule has nine steps: that case is a row with its error, and the others go on."""
    options = ["--stops", "9", "4", "--baseline", "fsdp"]
    result, printed = run(["recipes/flux2_4b.yaml", *options], 1, tmp_path, code=1)
    cases = [row["case"] for row in result["rows"]]
    ours = [f"stop {stop}, {kind}" for stop in (9, 4) for kind in ("with generator", "fake score alone")]
    assert cases == [*(f"published fsdp: {case}" for case in ours), *ours, "save"]
    assert ["error" in row for row in result["rows"]] == [True, True, False, False] * 2 + [False]
    assert result["error"] == f"{cases[0]}: IndexError: list index out of range"
    assert "| case | seconds | utilisation | peak GiB | reserved GiB |" in printed
    assert all(f"| {case} | " in printed for case in cases)
    assert "| stop 9, with generator | error: IndexError: list index out of range |" in printed
    phases = next(row for row in result["rows"] if row["case"] == "stop 4, with generator")["phases"]
    expected = ["text encoding", "rollout", "EMA", "rest", "generator: teacher and fake score"]
    each = ("fake score: forward", "fake score: backward", "fake score: optimizer")
    assert {*expected, *each, "generator: backward", "generator: optimizer"} == set(phases)


@pytest.mark.slow
def test_an_epoch_on_two_ranks(tmp_path: Path) -> None:
    overrides = [
        "with=recipes/layouts/separate_zero3.yaml",
        "roles.generator.engine=ds_configs/tiny_zero3.json",
        "rewards=[{name: clipscore}]",
    ]
    result, _ = run(["recipes/sd3m.yaml", "--stage", "rtdmd", *overrides, "--warmup", "0"], 2, tmp_path)
    epoch, save = result["rows"]
    assert result["ranks"] == 2 and epoch["case"] == "epoch of 4 pictures a rank" and save["gib"] > 0
    assert {"decode", "reward: clipscore", "reward back-propagation"} < set(epoch["phases"])


def test_nothing_is_measured_before_blocks_were_chosen(tmp_path: Path, ranks: Ranks) -> None:
    """Epochs that are measured look at no monitors; without such a look nothing would be chosen."""
    offload = [
        f"roles.{role}.engine=ds_configs/frozen_zero3_offload.json"
        for role in ("teacher", "generator", "fake_score")
    ]
    overrides = [*offload, "rewards=[{name: clipscore}]", "--stage", "rtdmd"]
    options = train_step.parse([*SHORT, "--warmup", "0", "recipes/flux2_4b.yaml", *overrides])
    bench = Bench(options, train_step.prepare(options, tmp_path), ranks)
    built = train_step.build(bench)
    roles = built.stage.roles
    shards = {str(number): each for number, each in enumerate(train_step.all_shards(roles))}
    residency = AutomaticResidency(Scripted(iter(()), 100 * GIB), ranks, shards)
    built.stage.roles = replace(roles, residency=residency)
    assert shards and not built.stage.roles.is_settled
    row = train_step.bench_rtdmd(bench, built, samples=4)
    assert built.stage.roles.is_settled and len(bench.result["notices"]) == len(shards)
    assert row["kept_blocks"] == shards["0"].num_kept > 0
    built.stage.close()


def test_faults_are_told_before_anything_is_built(tmp_path: Path) -> None:
    separate = ["recipes/flux2_4b.yaml", "with=recipes/layouts/separate_zero3.yaml"]
    bad = [*separate, "dtype=bfloat16", "roles.generator.engine=ds_configs/zero0.json"]
    result, printed = run(bad, 1, tmp_path, code=2)
    assert "use ZeRO 1" in printed and "Traceback" not in printed
    assert result["rows"] == [] and result["error"].startswith("UserError")
