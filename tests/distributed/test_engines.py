"""Engines on two ranks: shards, merged hand-over, guards, float32 masters.

All scenarios but the one that ends the process run in one launch of two ranks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd.distributed.guard import EXIT_STUCK
from rtdmd.models import get_family
from rtdmd.models.lora import attach_adapter
from rtdmd.randomness import Draws
from tests.distributed.launch import run_ranks

ENGINES = ("tiny_zero3", "zero2", "zero1")
STARTS = [(family, trains) for family in ("flux2", "sd3") for trains in ("lora", "full")]

# Results of both ranks, by scenario.
Results = dict[str, list[dict[str, Any]]]


def case(
    folder: Path, scenario: str, pipeline: Path, *overrides: str, stage: str = "cold_start"
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    return {
        "scenario": scenario,
        "folder": str(folder),
        "stage": stage,
        "overrides": [f"model.pipeline={pipeline}", *overrides],
    }


def shared(engine: str) -> list[str]:
    """Overrides for roles on a shared base, which ``engine`` places."""
    roles = ("teacher", "generator", "fake_score")
    return [
        "roles.engines=shared_base",
        *(f"roles.{role}.engine=ds_configs/{engine}.json" for role in roles),
    ]


def launch(cases: list[dict[str, Any]], folder: Path, codes: tuple[int, ...] = (0,)) -> list[str]:
    """Run cases on two ranks; what each rank printed."""
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = ["-m", "tests.distributed.scenarios", str(folder / "cases.json")]
    return [done.stdout for done in run_ranks(arguments, 2, timeout=400, codes=codes)]


def stage_one_files(family_name: str, trains: str, pipeline: Path, folder: Path) -> dict[str, Tensor]:
    """Write what stage 1 could have trained; the velocities that plain diffusers and peft give with it."""
    folder.mkdir()
    family = get_family(family_name).load(
        str(pipeline), device=torch.device("cpu"), dtype=torch.float32, max_sequence_length=32
    )
    text = family.encode_prompts(["a red cube", "two cats"])
    x = Draws(0, "rtdmd").normal(0, "probe", [0, 1], family.latent_shape(64, 64))
    expected = {}
    for seed, role in enumerate(("generator", "fake_score")):
        network: Any = family.transformer_class.from_pretrained(pipeline, subfolder="transformer")  # type: ignore[attr-defined]
        if trains == "lora":
            attach_adapter(network, 8, 16.0, family.lora_targets)
        for name, parameter in network.named_parameters():
            if trains == "full" or ".lora_" in name:
                noise = Draws(seed, "weights").normal(0, "noise", [name], parameter.shape)[0]
                parameter.data = 0.1 * noise if trains == "lora" else parameter.data + 0.01 * noise
        state = {n: p.data for n, p in network.named_parameters() if trains == "full" or ".lora_" in n}
        torch.save(state, folder / f"{role}.pt")
        with torch.no_grad():
            expected[role] = family.predict_velocity(network, x, 0.7, text)
    return expected


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, tiny_flux2: Path, tiny_sd3: Path
) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    pipelines = {"flux2": tiny_flux2, "sd3": tiny_sd3}
    root = tmp_path_factory.mktemp("starts")
    return {
        f"{family}-{trains}": (
            root / f"{family}-{trains}",
            stage_one_files(family, trains, pipelines[family], root / f"{family}-{trains}"),
        )
        for family, trains in STARTS
    }


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_flux2: Path,
    tiny_sd3: Path,
    tiny_clip: Path,
    expected: dict[str, tuple[Path, dict[str, Tensor]]],
) -> Results:
    root = tmp_path_factory.mktemp("scenarios")
    small = ("cold_start.generator_every=1", "cold_start.batch_size=1")
    cases = {
        "non_finite": case(root / "non_finite", "non_finite", tiny_flux2),
        **{
            f"other_weights_{name}": case(root / name, "other_weights", tiny_flux2, *overrides)
            for name, overrides in (
                ("separate", ["roles.generator.engine=ds_configs/zero0.json"]),
                ("shared", shared("frozen_zero3")),
            )
        },
        "shards": case(root / "shards", "shards", tiny_flux2),
        "pictures": case(
            root / "pictures",
            "pictures_in_between",
            tiny_flux2,
            *shared("frozen_zero3"),
            "roles.whole_blocks=2",
        ),
        "unequal_memory": case(
            root / "unequal_memory", "unequal_memory", tiny_flux2, *shared("frozen_zero3")
        ),
        "closed": case(root / "closed", "closed", tiny_flux2, *small),
    }
    for scenario in ("missing_scores", "failing_scorer", "all_missing"):
        cases[scenario] = case(
            root / scenario,
            scenario,
            tiny_flux2,
            f"rewards.0.weights={tiny_clip}",
            "rtdmd.sample_batch_size=2",
            stage="rtdmd",
        )
    for engine in ENGINES:
        overrides = (
            "dtype=bfloat16",
            "cold_start.generator.learning_rate=1e-5",
            f"roles.generator.engine=ds_configs/{engine}.json",
        )
        cases[engine] = case(root / engine, "small_steps", tiny_flux2, *overrides)
    cases["shared_zero0"] = case(
        root / "shared_zero0", "small_steps", tiny_flux2, *overrides, *shared("zero0")
    )
    cases["shared_closed"] = case(
        root / "shared_closed",
        "closed",
        tiny_flux2,
        *small,
        *shared("frozen_zero3"),
        "roles.gather=collective",
    )
    lora = {family: expected[f"{family}-lora"][0] for family in ("flux2", "sd3")}
    rewards = (f"rewards=[{{name: clipscore, weights: {tiny_clip}}}]", "rtdmd.sample_batch_size=2")
    separate = [
        "roles.teacher.engine=ds_configs/zero0.json",
        *(f"roles.{role}.engine=ds_configs/zero2.json" for role in ("generator", "fake_score")),
    ]
    own_base = f"roles.generator.weights={tiny_flux2}/."  # the same weights, but not the same base
    for name, scenario, family, pipeline, *more in (
        ("two_bases", "velocities", "flux2", tiny_flux2, own_base, *shared("frozen_zero3")),
        ("one_base", "velocities", "sd3", tiny_sd3, *shared("zero0")),
        ("alone_zero3", "one_role_alone", "flux2", tiny_flux2, *shared("frozen_zero3")),
        ("alone_zero0", "one_role_alone", "sd3", tiny_sd3, *shared("zero0")),
        ("moved", "to_and_from_a_shared_base", "sd3", tiny_sd3, *separate, "rtdmd.num_sample_batches=1"),
    ):
        folder = root / name
        shutil.copytree(lora[family], folder)
        cases[name] = case(
            folder, scenario, pipeline, f"model.family={family}", *rewards, *more, stage="rtdmd"
        )
    for family, trains in STARTS:
        name = f"{family}-{trains}"
        pipeline = tiny_flux2 if family == "flux2" else tiny_sd3
        roles = [f"roles.{role}.trains={trains}" for role in ("generator", "fake_score")]
        cases[name] = case(
            expected[name][0],
            "velocities",
            pipeline,
            f"model.family={family}",
            f"rewards.0.weights={tiny_clip}",
            *roles,
            stage="rtdmd",
        )
    # Last, because it leaves the ranks out of step.
    cases["other_order"] = case(root / "other_order", "other_order", tiny_flux2)
    launch(list(cases.values()), root)
    return {
        name: [torch.load(Path(each["folder"]) / f"{rank}.pt", weights_only=True) for rank in range(2)]
        for name, each in cases.items()
    }


def test_a_non_finite_gradient_stops_every_rank_before_the_update(results: Results) -> None:
    for result in results["non_finite"]:
        assert "generator: the gradient isn't finite" in result["message"]
        assert "first and last of them: " in result["message"] and ".lora_" in result["message"]
        assert result["unchanged"]


@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_ranks_that_have_come_to_different_weights_are_stopped(layout: str, results: Results) -> None:
    for result in results[f"other_weights_{layout}"]:
        assert "generator: ranks have come to different weights" in result["message"]
        assert "rank 0's, rank 1 in 1 by up to 1." in result["message"]
        assert result["unchanged"]


def test_ranks_that_call_in_another_order_are_stopped(results: Results) -> None:
    """The networks have equal shapes: without the guard this goes on with wrong numbers."""
    for result in results["other_order"]:
        assert "different orders" in result["message"]
        assert "generator.forward" in result["message"] and "fake_score.forward" in result["message"]


def test_a_rank_that_waits_forever_is_named(tmp_path: Path, tiny_flux2: Path) -> None:
    # The rank that leaves last may find its collective broken before its own time has come.
    waiting = case(tmp_path / "waiting", "one_call_more", tiny_flux2)
    outputs = launch([waiting], tmp_path, codes=(EXIT_STUCK, 1))
    for output in outputs:
        assert "no progress for" in output
        assert "rank 0: #2 fake_score.forward" in output, output


def test_closed_engines_hold_no_memory(results: Results) -> None:
    """DeepSpeed's globals keep references to engines; stage 2 would start beside all of stage 1."""
    for result in (*results["closed"], *results["shared_closed"]):
        assert result["before"] > 0 and result["after"] == 0


def test_each_rank_holds_half_of_every_network(results: Results) -> None:
    for result in results["shards"]:
        for role, (shard, whole, gathered) in result["held"].items():
            assert shard <= 0.51 * whole, role  # padding of odd sizes
            assert gathered == 0, role


def test_all_ranks_keep_what_the_fullest_has_room_for(results: Results) -> None:
    first, second = results["unequal_memory"]
    assert first == second and first["gathered"]
    assert first["kept"] == first["blocks"] - 1


def test_whole_blocks_give_way_to_pictures(results: Results) -> None:
    for result in results["pictures"]:
        first, *meanwhile, last = result["gathered"]
        assert first == last > 0 and meanwhile == [0, 0]
        assert result["kept"] == 2 and result["same"]


@pytest.mark.parametrize("start", [f"{family}-{trains}" for family, trains in STARTS])
def test_stage_two_starts_from_what_stage_one_trained(
    start: str, results: Results, expected: dict[str, tuple[Path, dict[str, Tensor]]]
) -> None:
    """Adapters are merged shard by shard while loading, peft computes them unmerged. Full weights replace."""
    for result in results[start]:
        for role, velocity in expected[start][1].items():
            torch.testing.assert_close(result[role], velocity, rtol=1e-4, atol=1e-5)
        assert torch.equal(result["restored"], result["generator"])
        if start.endswith("lora"):  # a fresh adapter starts at zero: without it nothing changes
            torch.testing.assert_close(result["zeroed"], result["generator"], rtol=1e-5, atol=1e-6)
        else:
            assert float(result["zeroed"].abs().max()) < 1e-6


@pytest.mark.parametrize(("case_name", "family"), [("two_bases", "flux2"), ("one_base", "sd3")])
def test_stage_two_on_shared_bases_starts_from_what_stage_one_trained(
    case_name: str, family: str, results: Results, expected: dict[str, tuple[Path, dict[str, Tensor]]]
) -> None:
    """On one base its adapters stay unmerged; a generator that is alone on its own has them merged."""
    for result in results[case_name]:
        for role, velocity in expected[f"{family}-lora"][1].items():
            torch.testing.assert_close(result[role], velocity, rtol=1e-4, atol=1e-5)
        assert torch.equal(result["restored"], result["generator"])
        torch.testing.assert_close(result["zeroed"], result["generator"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case_name", ["alone_zero0", "alone_zero3"])
def test_a_role_on_a_shared_base_moves_alone(case_name: str, results: Results) -> None:
    for result in results[case_name]:
        assert result["one_module"] and result["adapters_beneath"] > 0
        assert result["moved"] == result["predicts_otherwise"] == ["fake_score"]
        assert result["beneath_moved"] == []  # neither the base nor stage 1's adapters
        assert result["gathered"] == 0


def test_a_run_moves_to_a_shared_base_and_back(results: Results) -> None:
    """Stage 2 from stage 1's files: separate engines that merge them under ZeRO-2 and a shared base beneath
    which they stay differ by rounding, resumed and straight on the shared base by nothing."""
    for result in results["moved"]:
        straight = result["shared"]
        assert all(each["updates"] == [2, 2] for each in result.values())
        assert result["shared_resumed"]["metrics"] == straight["metrics"][1:]
        for role in ("generator", "fake_score"):
            for key, value in straight[role].items():
                assert torch.equal(result["shared_resumed"][role][key], value)
                for other in ("separate", "separate_resumed"):
                    torch.testing.assert_close(result[other][role][key], value, rtol=1e-3, atol=1e-5)
        for step, metrics in enumerate(straight["metrics"]):
            for key, value in metrics.items():
                assert result["separate"]["metrics"][step][key] == pytest.approx(value, rel=1e-3, abs=1e-6), (
                    key
                )


@pytest.mark.parametrize("engine", [*ENGINES, "shared_zero0"])
def test_masters_are_float32_where_networks_compute_in_bfloat16(engine: str, results: Results) -> None:
    """A's entries are about 1/8, where bfloat16 steps by 5e-4 or 1e-3. Ten steps of 1e-5 leave a bfloat16
    weight where it was; float32 masters have moved by about 1e-4. The reported
    gradient norm is the whole gradient's, over two backward passes."""
    for result in results[engine]:
        assert result["updates"] == 10
        for reported, whole in result["norms"]:
            assert reported == pytest.approx(whole, rel=1e-5)
        moved = torch.cat(
            [
                (result["after"][name] - before).flatten()
                for name, before in result["before"].items()
                if "lora_A" in name
            ]
        )
        assert moved.dtype == torch.float32
        assert 2e-5 < float(moved.abs().max()) < 1.1e-4


def test_a_sample_without_a_score_is_left_out_on_all_ranks(results: Results) -> None:
    """One of two pictures of each of rank 1's two batches."""
    one, other = results["missing_scores"]
    assert one["metrics"] == other["metrics"]
    assert one["metrics"]["nonfinite/compressibility"] == 2 and one["metrics"]["nonfinite/clipscore"] == 0
    assert one["metrics"]["advantage/zero_fraction"] >= 2 / 8
    assert "'compressibility' gave scores that aren't finite" in one["notices"][0]
    assert one["finite"] and other["finite"]


def test_a_failing_scorer_stops_all_ranks_with_its_words(results: Results) -> None:
    messages = [result["message"] for result in results["failing_scorer"]]
    assert messages == ["rank 1: reward 'x': the reader is broken", "reward 'x': the reader is broken"]


def test_a_reward_without_any_score_stops_all_ranks(results: Results) -> None:
    for result in results["all_missing"]:
        assert "'compressibility' gave no finite score for any of the epoch's 8 pictures" in result["message"]
