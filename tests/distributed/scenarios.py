"""One rank of several scenarios: engines under circumstances that a run should survive, or stop at.

    RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python -m tests.distributed.scenarios CASES.json

A case is {"scenario", "folder", "stage", "overrides"}; each rank writes its result into the folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from rtdmd.distributed.collectives import Ranks, start_ranks, stop_ranks
from rtdmd.distributed.guard import CallLog, Watchdog
from rtdmd.distributed.masters import MASTER
from rtdmd.errors import TrainingHalted
from rtdmd.recipe import load_recipe
from rtdmd.stages.assemble import HandOver, Stage, build_stage

Built = Callable[..., Any]  # a Stage


def first_velocity(stage: Stage, role: str) -> Tensor:
    """The role's velocity for fixed inputs, differentiable."""
    text = stage.family.encode_prompts(["a red cube", "two cats"])
    x = torch.from_numpy(stage.draws.normal(0, "probe", [0, 1], stage.few.latent_shape).numpy())
    return getattr(stage.roles, role).velocity(text)(x, 0.7)


def masters(stage: Stage) -> dict[str, Tensor]:
    engine = stage.roles.generator.engine
    return {name: value.clone() for name, value in engine.gather(engine.masters.pieces(MASTER))}


def non_finite(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """Rank 1's loss is NaN; every rank must stop before the update."""
    stage = build()
    before = masters(stage)
    factor = float("nan") if ranks.rank == 1 else 1.0
    engine = stage.roles.generator.engine
    engine.backward(factor * first_velocity(stage, "generator").square().mean(), last=True)
    message = ""
    try:
        engine.step()
    except TrainingHalted as error:
        message = str(error)
    same = all(torch.equal(before[name], value) for name, value in masters(stage).items())
    return {"message": message, "unchanged": same}


def other_order(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """Rank 1 calls the fake score before the generator, rank 0 after it."""
    stage = build()
    roles = ("generator", "fake_score") if ranks.rank == 0 else ("fake_score", "generator")
    with torch.no_grad():
        for role in roles:
            first_velocity(stage, role)
    velocity = first_velocity(stage, "generator")
    engine = stage.roles.generator.engine
    engine.backward(velocity.square().mean(), last=True)
    try:
        engine.step()
    except TrainingHalted as error:
        return {"message": str(error)}
    return {"message": ""}


def one_call_more(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """Rank 0 makes a call that rank 1 doesn't; the watchdog must end both with a report."""
    stage = build()
    Watchdog(ranks, calls, 4.0).start()
    with torch.no_grad():
        first_velocity(stage, "generator")
        if ranks.rank == 0:
            first_velocity(stage, "fake_score")
    time.sleep(60)
    return {}


def shards(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """How many elements of each network this rank holds, and how many there are."""
    stage = build()
    held = {}
    for role in ("teacher", "generator", "fake_score"):
        module = getattr(stage.roles, role).engine._engine.module
        parameters = list(module.parameters())
        held[role] = (
            sum(p.ds_tensor.numel() for p in parameters),
            sum(p.ds_numel for p in parameters),
            sum(p.data.numel() for p in parameters),
        )
    return {"held": held}


def velocities(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """Velocities of generator and fake score as a stage starts, and the same under other weights."""
    files = [folder / name for name in ("generator.pt", "fake_score.pt")]
    stage = build(HandOver(*files) if files[0].exists() else HandOver())
    result: dict[str, Any] = {}
    with torch.no_grad():
        for role in ("generator", "fake_score"):
            result[role] = first_velocity(stage, role)
        engine = stage.roles.generator.engine
        zero = [type(p)(p.name, p.start, torch.zeros_like(p.value)) for p in engine.masters.pieces(MASTER)]
        with engine.weights_from(zero):
            result["zeroed"] = first_velocity(stage, "generator")
        result["restored"] = first_velocity(stage, "generator")
    return result


def small_steps(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """Ten updates in bfloat16, each too small for a bfloat16 weight to see."""
    stage = build()
    before = masters(stage)
    engine = stage.roles.generator.engine
    norms = []
    for _ in range(10):
        for last in (False, True):
            engine.backward(0.5 * first_velocity(stage, "generator").square().mean(), last=last)
        gradients = [safe_get_full_grad(p) for p in engine._engine.module.parameters() if p.requires_grad]
        whole = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        norms.append((engine.step().grad_norm, whole))
    return {"before": before, "after": masters(stage), "updates": engine.num_updates, "norms": norms}


def closed(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """How many bytes are left of shards, masters and moments once the engines are closed."""
    stage = build()
    stage.step(0)
    storages = []
    for role in ("teacher", "generator", "fake_score"):
        engine = getattr(stage.roles, role).engine
        storages += [p.ds_tensor.untyped_storage() for p in engine._engine.module.parameters()]
        if role != "teacher":
            storages += [
                piece.value.untyped_storage() for pieces in engine.state().values() for piece in pieces
            ]
    before = sum(storage.nbytes() for storage in storages)
    stage.close()
    return {"before": before, "after": sum(storage.nbytes() for storage in storages)}


class Doctored:
    """A scorer whose scores are changed before anyone sees them."""

    def __init__(self, scorer: Any, change: Callable[[Tensor], Tensor]) -> None:
        self.name, self.differentiable = scorer.name, scorer.differentiable
        self._scorer, self._change = scorer, change

    def score(self, *given: Any) -> Tensor:
        return self._change(self._scorer.score(*given))


def missing_scores(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """On rank 1 the second reward has no score for the first picture of each batch."""
    stage = build()

    def without_first(scores: Tensor) -> Tensor:
        return torch.cat([torch.full_like(scores[:1], float("nan")), scores[1:]])

    if ranks.rank == 1:
        stage.panel.rewards[1] = Doctored(stage.panel.rewards[1], without_first)
    report = stage.step(0)
    finite = all(torch.isfinite(value).all() for value in masters(stage).values())
    return {"metrics": report.metrics, "notices": list(report.notices), "finite": finite}


def failing_scorer(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """Rank 1's scorer raises in its thread; all ranks must stop with its words."""
    stage = build()

    def fail(scores: Tensor) -> Tensor:
        raise TrainingHalted("reward 'x': the reader is broken")

    if ranks.rank == 1:
        stage.panel.rewards[1] = Doctored(stage.panel.rewards[1], fail)
    try:
        stage.step(0)
    except TrainingHalted as error:
        return {"message": str(error)}
    return {"message": ""}


def all_missing(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """A reward without any score, on all ranks."""
    stage = build()
    stage.panel.rewards[1] = Doctored(stage.panel.rewards[1], lambda scores: scores * float("nan"))
    try:
        stage.step(0)
    except TrainingHalted as error:
        return {"message": str(error)}
    return {"message": ""}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        non_finite,
        other_order,
        one_call_more,
        shards,
        velocities,
        small_steps,
        closed,
        missing_scores,
        failing_scorer,
        all_missing,
    )
}


def run_case(case: dict[str, Any], ranks: Ranks) -> None:
    calls = CallLog(ranks)
    recipe = load_recipe("recipes/dry_run.yaml", case["overrides"])
    folder, built = Path(case["folder"]), []

    def build(hand_over: HandOver | None = None) -> Stage:
        built.append(build_stage(case["stage"], recipe, ranks, calls, hand_over or HandOver()))
        return built[0]

    result = SCENARIOS[case["scenario"]](build, ranks, calls, folder)
    torch.save(result, folder / f"{ranks.rank}.pt")
    if case["scenario"] != "closed":
        built[0].close()


def main() -> None:
    torch.set_num_threads(1)
    ranks = start_ranks(60)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case, ranks)
    stop_ranks()


if __name__ == "__main__":
    main()
