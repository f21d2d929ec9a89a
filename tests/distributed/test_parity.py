"""The sharded system against one plain PyTorch process, and against itself.

Relative error ‖a − b‖/‖b‖ over all trained tensors together, of every update's gradient and of the
weights after all updates. AdamW's eps is 1e-4, or it would turn the rounding noise of exactly zero
gradients into whole steps. Rewards see unrounded pictures (reference.py says why).
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd.recipe import load_recipe
from tests.distributed.launch import run_ranks
from tests.distributed.reference import Outcome, reference_cold_start, reference_rtdmd

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One configuration of one stage; ``extra`` are recipe overrides."""

    stage: str
    family: str = "flux2"
    trains: str = "lora"
    engine: str = "tiny_zero3"
    steps: int = 2
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Also a file's, which has 255 letters at most."""
        extra = zlib.crc32(" ".join(self.extra).encode())
        return f"{self.stage}-{self.family}-{self.trains}-{self.engine}-{extra:08x}"

    @property
    def problem(self) -> tuple[str, str, str, int, tuple[str, ...]]:
        """What the mathematics depends on; cases that share it must agree."""
        layout = (
            "micro_batch",
            "checkpointing",
            "recompute_decoder",
            ".compile=",
            "teacher.engine",
            "roles.engines",
        )
        layout += ("text_encoder", "prompt_embeddings")
        problem = tuple(item for item in self.extra if not any(part in item for part in layout))
        return self.stage, self.family, self.trains, self.steps, problem


PLAIN_LAYOUT = (
    "model.text_encoder=once",
    "roles.generator.activation_checkpointing=none",
    "roles.fake_score.activation_checkpointing=auto",  # without a GPU the same
)
SELECTIVE = (
    "model.text_encoder=offload",
    "model.prompt_embeddings_gib=0",
    "roles.teacher.engine=ds_configs/frozen_zero3_offload.json",
    *(f"roles.{role}.activation_checkpointing=selective" for role in ("generator", "fake_score")),
)
COMPILED = (
    "roles.teacher.engine=ds_configs/zero0.json",
    *(f"roles.{role}.compile=blocks" for role in ("teacher", "generator", "fake_score")),
)
KEPT = ("roles.whole_blocks=2",)
TWO_BATCHES = ("rtdmd.num_sample_batches=2",)
ACCUMULATED = ("cold_start.micro_batch_size=1", "rtdmd.micro_batch_size=1")
# Policy, matching and hinge gradients differ by orders of magnitude; each has a case that it dominates.
MATCHING = ("rtdmd.distribution_matching_weight=1000", "rtdmd.reward_backprop.weight=0")
EVERYWHERE = (*MATCHING, "rtdmd.matched_steps=trained", "rtdmd.policy_weight=0")
HINGE = (
    "rtdmd.distribution_matching_weight=0",
    "rtdmd.reward_backprop.weight=1000",
    "rtdmd.reward_backprop.recompute_decoder=false",
)


def shared(stage: str, family: str = "flux2", engine: str = "zero0", **more: Any) -> Case:
    """All three roles on one base, which ``engine`` places."""
    extra = ("roles.engines=shared_base", f"roles.teacher.engine=ds_configs/{engine}.json")
    return Case(stage, family, engine=engine, extra=(*more.pop("extra", ()), *extra), **more)


CASES = [
    *(Case("cold_start", family, extra=ACCUMULATED) for family in ("flux2", "sd3")),
    *(Case("rtdmd", family, extra=(*ACCUMULATED, *TWO_BATCHES)) for family in ("flux2", "sd3")),
    Case("cold_start", "sd3", trains="full", extra=ACCUMULATED),
    Case("rtdmd", trains="full", extra=ACCUMULATED),
    Case("cold_start", engine="zero1", extra=PLAIN_LAYOUT),
    Case("rtdmd", engine="zero2", extra=PLAIN_LAYOUT),
    Case("cold_start", extra=SELECTIVE),
    shared("cold_start", extra=("cold_start.sub_interval=false", "seed=1")),  # it stops at 4, twice
    shared("rtdmd", steps=1, extra=MATCHING),
    Case("rtdmd", steps=1, extra=HINGE),
    Case("rtdmd", steps=1, extra=EVERYWHERE),
    shared("rtdmd", "sd3", steps=1, extra=("rtdmd.matched_steps=trained", *ACCUMULATED)),
    shared("rtdmd", steps=1, extra=("rtdmd.old_log_prob=rollout", "rtdmd.advantage_global_std=false")),
    *(Case("cold_start", engine=engine) for engine in ("zero0", "zero2")),
    shared("cold_start", extra=PLAIN_LAYOUT[:1]),
    shared("rtdmd", "sd3", extra=ACCUMULATED),
    shared("cold_start", "sd3", "frozen_zero3", extra=ACCUMULATED),
    shared("rtdmd", engine="frozen_zero3", extra=(*PLAIN_LAYOUT[1:], "roles.gather=collective", *KEPT)),
]
# Where a shared base may be.
PLACES = ("zero0", "frozen_zero3", "frozen_zero3_offload")
# The same in further combinations.
MORE_CASES = [
    *(Case("cold_start", family, steps=3, extra=ACCUMULATED) for family in ("flux2", "sd3")),
    Case("cold_start", trains="full", steps=3, extra=ACCUMULATED),
    Case("rtdmd", "sd3", trains="full", steps=3, extra=(*ACCUMULATED, *TWO_BATCHES)),
    Case("rtdmd", "sd3", extra=SELECTIVE),
    *(Case(stage, extra=PLAIN_LAYOUT) for stage in ("cold_start", "rtdmd")),
    Case("cold_start", engine="zero3_offload"),
    Case("rtdmd", engine="zero0"),
    Case("rtdmd", engine="zero1", steps=1),
    Case("rtdmd", steps=3, extra=(*ACCUMULATED, *TWO_BATCHES)),
    Case("rtdmd", "sd3", steps=1, extra=EVERYWHERE),
    Case("cold_start", trains="full", engine="zero2"),
    shared("rtdmd", "sd3", steps=3, extra=(*ACCUMULATED, *TWO_BATCHES)),
    *(shared("rtdmd", engine=engine, extra=SELECTIVE[1:]) for engine in PLACES),
]


def overrides(case: Case, pipelines: dict[str, Path], clip: Path, world_size: int) -> list[str]:
    """Recipe overrides; a rank takes half of a global batch of four, or all of it."""
    per_rank = 4 // world_size
    common = [
        f"model.family={case.family}",
        f"model.pipeline={pipelines[case.family]}",
        f"rewards=[{{name: clipscore, weights: {clip}}}]",
        f"cold_start.batch_size={per_rank}",
        "cold_start.generator_every=1",
        f"rtdmd.sample_batch_size={per_rank}",
        "rtdmd.num_sample_batches=1",
        f"cold_start.iterations={case.steps}",
        f"rtdmd.epochs={case.steps}",
        f"{case.stage}.generator.cooldown=0.9",
        f"{case.stage}.fake_score.cooldown=0.4",
    ]
    roles = ("generator", "fake_score")
    engines = [f"roles.{role}.engine=ds_configs/{case.engine}.json" for role in roles]
    trains = [f"roles.{role}.trains={case.trains}" for role in roles]
    eps = [f"{case.stage}.{role}.eps=1e-4" for role in roles]
    # Later gradients are taken at weights that rounding has moved apart, the more so the larger the steps.
    rates = [f"{case.stage}.{role}.learning_rate=1e-4" for role in roles] if case.trains == "full" else []
    return [*common, *engines, *trains, *eps, *rates, *case.extra]


Results = dict[tuple[str, int], dict[str, Any]]


def compute(
    cases: list[Case],
    world_size: int,
    folder: Path,
    pipelines: dict[str, Path],
    clip: Path,
    accelerator: str = "cpu",
) -> Results:
    """All cases in one launch of ``world_size`` ranks."""
    described = [
        {
            "name": case.name,
            "stage": case.stage,
            "steps": case.steps,
            "overrides": overrides(case, pipelines, clip, world_size),
        }
        for case in cases
    ]
    (folder / "cases.json").write_text(json.dumps(described))
    arguments = ["-m", "tests.distributed.worker", str(folder / "cases.json"), str(folder)]
    run_ranks(arguments, world_size, accelerator=accelerator)
    return {
        (case.name, world_size): torch.load(folder / f"{case.name}.pt", weights_only=True) for case in cases
    }


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, pipelines: dict[str, Path], tiny_clip: Path
) -> Results:
    return compute(CASES, 2, tmp_path_factory.mktemp("two"), pipelines, tiny_clip)


@pytest.fixture(scope="module")
def references() -> dict[Any, Outcome]:
    return {}


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    difference = sum(float((got[key].double() - expected[key].double()).square().sum()) for key in expected)
    size = sum(float(value.double().square().sum()) for value in expected.values())
    assert size > 0
    return (difference / size) ** 0.5


def assert_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    errors = [
        (role, relative_error(gradient, expected_gradient))
        for (role, gradient), (expected_role, expected_gradient) in zip(
            got["gradients"], expected["gradients"], strict=True
        )
        if role == expected_role
    ]
    assert len(errors) == len(expected["gradients"]), "updates in another order"
    errors += [
        (f"{role} weights", relative_error(got["weights"][role], weights))
        for role, weights in expected["weights"].items()
    ]
    errors += [
        (f"{role} reported norm", abs(reported - norm) / norm)
        for role in expected["weights"]
        for reported, norm in zip(
            [metrics[f"{role}/grad_norm"] for metrics in got["metrics"]],
            [whole_norm(gradient) for updated, gradient in expected["gradients"] if updated == role],
            strict=True,
        )
    ]
    assert all(error < TOLERANCE for _, error in errors), errors


def whole_norm(gradient: dict[str, Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in gradient.values()) ** 0.5


def assert_plain(
    case: Case,
    got: dict[str, Any],
    references: dict[Any, Outcome],
    pipelines: dict[str, Path],
    clip: Path,
) -> None:
    """``got``, of two ranks, equals one plain process, whose outcomes are kept in ``references``."""
    if case.problem not in references:
        recipe = load_recipe("recipes/dry_run.yaml", overrides(case, pipelines, clip, 2))
        compute_plainly = reference_cold_start if case.stage == "cold_start" else reference_rtdmd
        references[case.problem] = compute_plainly(recipe, 2, case.steps)
    expected = references[case.problem]
    assert_equal(got, {"gradients": expected.gradients, "weights": expected.weights})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_plain_pytorch(
    case: Case,
    two_ranks: Results,
    references: dict[Any, Outcome],
    pipelines: dict[str, Path],
    tiny_clip: Path,
) -> None:
    assert_plain(case, two_ranks[case.name, 2], references, pipelines, tiny_clip)


@pytest.mark.slow
def test_further_layouts_equal_plain_pytorch(
    tmp_path: Path, references: dict[Any, Outcome], pipelines: dict[str, Path], tiny_clip: Path
) -> None:
    got = compute(MORE_CASES, 2, tmp_path, pipelines, tiny_clip)
    for case in MORE_CASES:
        assert_plain(case, got[case.name, 2], references, pipelines, tiny_clip)
    # Where the base is changes no bit.
    first, *others = (got[case.name, 2]["gradients"] for case in MORE_CASES[-len(PLACES) :])
    for gradients in others:
        for (_, mine), (_, theirs) in zip(gradients, first, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


COMPILED_CASES = [
    Case("cold_start", family, engine=engine, extra=COMPILED)
    for family in ("flux2", "sd3")
    for engine in ("zero0", "zero2")
] + [
    shared("cold_start", family, engine, extra=COMPILED[1:])
    for family, engine in (("flux2", "zero0"), ("sd3", "zero0"), ("flux2", "frozen_zero3"))
]


@pytest.mark.slow
def test_compiled_blocks_equal_plain_pytorch(
    tmp_path: Path, pipelines: dict[str, Path], tiny_clip: Path
) -> None:
    """With recomputation; also a second update finds the graphs of the first."""
    for ranks in (1, 2):  # on one rank a base in shards is there as a whole
        cases = COMPILED_CASES if ranks == 1 else COMPILED_CASES[-1:]
        got = compute(cases, ranks, tmp_path, pipelines, tiny_clip)
        for case in cases:
            recipe = load_recipe("recipes/dry_run.yaml", overrides(case, pipelines, tiny_clip, ranks))
            expected = reference_cold_start(recipe, ranks, case.steps)
            assert_equal(
                got[case.name, ranks], {"gradients": expected.gradients, "weights": expected.weights}
            )


@pytest.mark.slow
def test_a_long_network_in_shards_equals_plain_pytorch(
    tmp_path: Path, pipelines: dict[str, Path], long_flux2: Path, tiny_clip: Path
) -> None:
    """Its ends are whole on both ranks, and blocks between them once they have been gathered."""
    pipelines = pipelines | {"flux2": long_flux2}
    cases = [
        shared(stage, engine="frozen_zero3", extra=(*ACCUMULATED, *KEPT, f"roles.gather={gather}"))
        for stage, gather in (("cold_start", "auto"), ("rtdmd", "collective"))
    ]
    got = compute(cases, 2, tmp_path, pipelines, tiny_clip)
    for case in cases:
        assert_plain(case, got[case.name, 2], {}, pipelines, tiny_clip)


def test_one_rank_equals_two(
    two_ranks: Results, tmp_path: Path, pipelines: dict[str, Path], tiny_clip: Path
) -> None:
    cases = [
        Case("cold_start", extra=ACCUMULATED),
        Case("rtdmd", engine="zero2", extra=PLAIN_LAYOUT),
        shared("cold_start", extra=PLAIN_LAYOUT[:1]),
    ]
    one_rank = compute(cases, 1, tmp_path, pipelines, tiny_clip)
    for case in cases:
        assert_equal(two_ranks[case.name, 2], one_rank[case.name, 1])
