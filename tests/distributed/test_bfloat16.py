"""In bfloat16 the system's gradients are no further from float32's than plain PyTorch's are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rtdmd.distributed.attention import mend_cudnn_backward
from rtdmd.recipe import load_recipe
from tests.distributed.reference import Outcome, reference_cold_start
from tests.distributed.test_parity import (
    COMPILED,
    Case,
    compute,
    overrides,
    relative_error,
    shared,
)

FACTOR = 1.5  # of plain PyTorch's error
BFLOAT16 = ("dtype=bfloat16",)
CASES = [
    Case("cold_start", engine="zero2", steps=1, extra=BFLOAT16),
    Case("cold_start", "sd3", steps=1, extra=BFLOAT16),
    shared("cold_start", steps=1, extra=BFLOAT16),
    shared("cold_start", "sd3", steps=1, extra=BFLOAT16),
]
COMPILED_CASES = [
    *(
        Case("cold_start", family, engine="zero2", steps=1, extra=(*BFLOAT16, *COMPILED))
        for family in ("flux2", "sd3")
    ),
    *(shared("cold_start", family, steps=1, extra=(*BFLOAT16, *COMPILED)) for family in ("flux2", "sd3")),
]


SHARDED_CASES = [
    shared(
        "cold_start",
        family,
        "frozen_zero3",
        steps=1,
        extra=(*BFLOAT16, *COMPILED[1:], f"roles.gather={gather}"),
    )
    for family in ("flux2", "sd3")
    for gather in ("collective", "copies")
]


def check(
    cases: list[Case],
    folder: Path,
    pipelines: dict[str, Path],
    clip: Path,
    accelerator: str,
    ranks: int = 1,
) -> None:
    """Of every update: ‖g − g32‖/‖g32‖ ≤ FACTOR·‖p − p32‖/‖p32‖, p plain PyTorch's gradient in bfloat16."""
    got = compute(cases, ranks, folder, pipelines, clip, accelerator)
    device = torch.device(accelerator)
    if accelerator == "cuda":
        mend_cudnn_backward()
    references: dict[str, tuple[Outcome, Outcome]] = {}
    for case in cases:
        if case.family not in references:
            given = overrides(case, pipelines, clip, ranks)
            exact, rounded = (
                reference_cold_start(
                    load_recipe("recipes/dry_run.yaml", [*given, f"dtype={dtype}"]), ranks, 1, device
                )
                for dtype in ("float32", "bfloat16")
            )
            references[case.family] = exact, rounded
        expected_of, plain_of = references[case.family]
        updates = zip(
            got[case.name, ranks]["gradients"], expected_of.gradients, plain_of.gradients, strict=True
        )
        for (role, ours), (_, expected), (_, plain) in updates:
            error = relative_error(on_host(ours), on_host(expected))
            limit = FACTOR * relative_error(on_host(plain), on_host(expected))
            assert 0 < error <= limit, (case.name, role, error, limit)


def on_host(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in gradient.items()}


def test_gradients_on_the_cpu(tmp_path: Path, pipelines: dict[str, Path], tiny_clip: Path) -> None:
    check(CASES, tmp_path, pipelines, tiny_clip, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *COMPILED_CASES], ids=lambda case: case.name)
def test_gradients_on_a_gpu(case: Case, tmp_path: Path, pipelines: dict[str, Path], tiny_clip: Path) -> None:
    check([case], tmp_path, pipelines, tiny_clip, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("cases", [CASES[:2] * 2, [CASES[0], COMPILED_CASES[0]]], ids=["eager", "compiled"])
def test_gradients_of_stages_one_after_the_other(
    cases: list[Case], tmp_path: Path, pipelines: dict[str, Path], tiny_clip: Path
) -> None:
    """As stage 2 follows stage 1 in a process, in memory that holds what the first has left."""
    check(cases, tmp_path, pipelines, tiny_clip, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHARDED_CASES, ids=lambda case: case.name)
def test_gradients_on_two_gpus(
    case: Case, tmp_path: Path, pipelines: dict[str, Path], tiny_clip: Path
) -> None:
    """Of compiled blocks on a base in shards."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check([case], tmp_path, pipelines, tiny_clip, "cuda", ranks=2)
