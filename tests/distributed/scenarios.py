"""One rank of several scenarios: engines under circumstances that a run should survive, or stop at.

    RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python -m tests.distributed.scenarios CASES.json

A case is {"scenario", "folder", "stage", "overrides"}; each rank writes its result into the folder.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtdmd.distributed.collectives import Ranks, start_ranks, stop_ranks
from rtdmd.distributed.guard import CallLog, Watchdog
from rtdmd.distributed.masters import MASTER
from rtdmd.distributed.shared import ShardedBase
from rtdmd.errors import TrainingHalted
from rtdmd.recipe import load_recipe
from rtdmd.stages.assemble import Stage, build_stage
from rtdmd.stages.device_memory import GIB
from rtdmd.stages.networks import HandOver
from rtdmd.stages.residency import AutomaticResidency
from rtdmd.training.checkpoint import CheckpointStore
from tests.distributed.reference import without_rounding
from tests.distributed.worker import whole_gradients
from tests.stages.test_activations import Scripted

ROLES = ("teacher", "generator", "fake_score")
Built = Callable[..., Any]  # a Stage


def first_velocity(stage: Stage, role: str) -> Tensor:
    """The role's velocity for fixed inputs, differentiable."""
    text = stage.family.encode_prompts(["a red cube", "two cats"])
    x = torch.from_numpy(stage.draws.normal(0, "probe", [0, 1], stage.few.latent_shape).numpy())
    return getattr(stage.roles, role).velocity(text)(x, 0.7)


def held(network: Any) -> list[Tensor]:
    """What a rank keeps of a network while nothing is gathered; of a shared base without its adapters."""
    base = getattr(network, "base", None)
    if isinstance(base, ShardedBase):
        return base.shards.shards
    parameters = dict(network.module.named_parameters())
    if base is not None:
        parameters = {name: p for name, p in parameters.items() if ".lora_" not in name}
    return [getattr(parameter, "ds_tensor", parameter) for parameter in parameters.values()]


def as_bytes(tensor: Tensor) -> Tensor:
    """What is between parameters in a shard has no value, and may be NaN, which equals nothing."""
    return tensor.detach().contiguous().view(torch.uint8)


def masters(stage: Stage, role: str = "generator") -> dict[str, Tensor]:
    engine = getattr(stage.roles, role).engine
    return {name: value.clone() for name, value in engine.gather(engine.masters.pieces(MASTER))}


def update_that_halts(stage: Stage, factor: float = 1.0) -> dict[str, Any]:
    """What the generator's update halts with, and whether its masters are what they were."""
    before = masters(stage)
    engine = stage.roles.generator.engine
    engine.backward(factor * first_velocity(stage, "generator").square().mean(), last=True)
    message = ""
    try:
        engine.step()
    except TrainingHalted as error:
        message = str(error)
    same = all(torch.equal(before[name], value) for name, value in masters(stage).items())
    return {"message": message, "unchanged": same}


def non_finite(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """Rank 1's loss is NaN; every rank must stop before the update."""
    return update_that_halts(build(), float("nan") if ranks.rank == 1 else 1.0)


def other_weights(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """One of rank 1's weights has become the next larger number; every rank must stop before the update."""
    stage = build()
    if ranks.rank == 1:
        weight = stage.roles.generator.engine.masters.pieces(MASTER)[-1].value[-1:]
        weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    return update_that_halts(stage)


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
    for role in ROLES:
        module = getattr(stage.roles, role).engine.network.module
        parameters = list(module.parameters())
        held[role] = (
            sum(p.ds_tensor.numel() for p in parameters),
            sum(p.ds_numel for p in parameters),
            sum(p.data.numel() for p in parameters),
        )
    return {"held": held}


def pictures_in_between(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """Of blocks that stay whole none does while pictures are painted; all do afterwards."""
    stage = build()
    base = next(base for base, roles in stage.roles.bases.items() if "generator" in roles)
    assert isinstance(base, ShardedBase)

    def painted() -> tuple[Tensor, int]:
        with torch.no_grad():
            velocity = first_velocity(stage, "generator")
        base.after_backward()
        return velocity, base.shards.gathered_bytes

    before = painted()
    with stage.roles.room_for_pictures():
        meanwhile = base.shards.gathered_bytes, *painted()
    return {
        "gathered": [before[1], meanwhile[0], meanwhile[2], painted()[1]],
        "kept": base.shards.num_kept,
        "same": torch.equal(before[0], meanwhile[1]),
    }


def unequal_memory(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """Rank 1 has room for one block less than rank 0."""
    stage = build()
    base = next(iter(stage.roles.bases))
    assert isinstance(base, ShardedBase)
    sizes = base.shards.block_bytes
    memory = Scripted(iter(()), GIB + sum(sizes) - (0 if ranks.rank == 0 else 1))
    residency = AutomaticResidency(memory, ranks, {"all": base.shards})
    memory.reserved = GIB
    residency.after_step(True)
    residency.after_step(True)
    return {"kept": base.shards.num_kept, "blocks": len(sizes), "gathered": base.shards.gathered_bytes > 0}


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
        gradients = [gradient for _, gradient in whole_gradients(engine) if gradient is not None]
        whole = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        norms.append((engine.step().grad_norm, whole))
    return {"before": before, "after": masters(stage), "updates": engine.num_updates, "norms": norms}


def closed(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """How many bytes are left of shards, masters and moments once the engines are closed."""
    stage = build()
    stage.step(0)
    storages = []
    for role in ROLES:
        engine = getattr(stage.roles, role).engine
        storages += [tensor.untyped_storage() for tensor in held(engine.network)]
        if role != "teacher":
            storages += [
                piece.value.untyped_storage() for pieces in engine.state().values() for piece in pieces
            ]
    before = sum(storage.nbytes() for storage in storages)
    stage.close()
    return {"before": before, "after": sum(storage.nbytes() for storage in storages)}


def one_role_alone(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """What an update of the fake score changes where all roles share a base, and what stays gathered."""
    stage = build(HandOver(folder / "generator.pt", folder / "fake_score.pt"))
    roles = stage.roles
    module = roles.generator.engine.network.module
    one_module = all(getattr(roles, role).engine.network.module is module for role in ROLES)
    trained = {id(p) for role in ROLES[1:] for p in getattr(roles, role).engine.adapter.parameters.values()}
    network = roles.generator.engine.network
    adapters = {name: p for name, p in module.named_parameters() if ".lora_" in name}
    untrained = {name: p for name, p in adapters.items() if id(p) not in trained}
    untrained |= {f"base {index}": tensor for index, tensor in enumerate(held(network))}
    beneath = {name: tensor.detach().clone() for name, tensor in untrained.items()}
    before = {role: masters(stage, role) for role in ROLES[1:]}
    with torch.no_grad():
        velocities = {role: first_velocity(stage, role) for role in ROLES}
    engine = roles.fake_score.engine
    engine.backward(first_velocity(stage, "fake_score").square().mean(), last=True)
    is_sharded = isinstance(network.base, ShardedBase)
    gathered = network.base.shards.gathered_bytes if is_sharded else 0
    engine.step()
    with torch.no_grad():
        after = {role: first_velocity(stage, role) for role in ROLES}
    return {
        "one_module": one_module,
        "gathered": gathered,
        "moved": [
            role
            for role in ROLES[1:]
            if any(not torch.equal(before[role][key], value) for key, value in masters(stage, role).items())
        ],
        "predicts_otherwise": [role for role in ROLES if not torch.equal(velocities[role], after[role])],
        "beneath_moved": [
            name
            for name, tensor in untrained.items()
            if not torch.equal(as_bytes(beneath[name]), as_bytes(tensor))
        ],
        "adapters_beneath": sum("_start0" in name for name in beneath),
    }


def to_and_from_a_shared_base(build: Built, ranks: Ranks, calls: CallLog, folder: Path) -> dict[str, Any]:
    """Stage 2 from stage 1's files: separate engines, a shared base, and either resumed from the latter."""
    start = HandOver(folder / "generator.pt", folder / "fake_score.pt")
    store = CheckpointStore(folder / "checkpoints", ranks, keep=1)
    shared = [
        "roles.engines=shared_base",
        *(f"roles.{role}.engine=ds_configs/zero0.json" for role in ROLES),
    ]

    def run(overrides: list[str], save: bool = False, resume: bool = False) -> dict[str, Any]:
        stage = build(start, overrides)
        without_rounding(stage.panel.rewards)
        engines = {role: getattr(stage.roles, role).engine for role in ROLES[1:]}
        metrics = []
        if resume:
            store.load(store.latest(), {role: engine.state() for role, engine in engines.items()})
            for engine in engines.values():
                engine.restored(1)
        else:
            metrics.append(stage.step(0).metrics)
        if save:
            state = {role: engine.state() for role, engine in engines.items()}
            replicated = [role for role, engine in engines.items() if engine.masters.replicated]
            store.save(1, state, {}, replicated)
        metrics.append(stage.step(1).metrics)
        result = {"metrics": metrics, "updates": [engine.num_updates for engine in engines.values()]}
        result |= {role: masters(stage, role) for role in engines}
        stage.close()
        return result

    return {
        "separate": run([]),
        "shared": run(shared, save=True),
        "shared_resumed": run(shared, resume=True),
        "separate_resumed": run([], resume=True),
    }


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
        other_weights,
        other_order,
        one_call_more,
        shards,
        pictures_in_between,
        unequal_memory,
        velocities,
        small_steps,
        closed,
        one_role_alone,
        to_and_from_a_shared_base,
        missing_scores,
        failing_scorer,
        all_missing,
    )
}


def run_case(case: dict[str, Any], ranks: Ranks) -> None:
    calls = CallLog(ranks)
    folder, built = Path(case["folder"]), []

    def build(hand_over: HandOver | None = None, more: Sequence[str] = ()) -> Stage:
        recipe = load_recipe("recipes/dry_run.yaml", [*case["overrides"], *more])
        built.append(build_stage(case["stage"], recipe, ranks, calls, hand_over or HandOver()))
        return built[-1]

    result = SCENARIOS[case["scenario"]](build, ranks, calls, folder)
    torch.save(result, folder / f"{ranks.rank}.pt")
    if case["scenario"] not in ("closed", "to_and_from_a_shared_base"):
        built[0].close()


def main() -> None:
    torch.set_num_threads(1)
    ranks = start_ranks(60)
    gc.freeze()  # engines collect garbage when they close; what has been imported is none
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case, ranks)
    stop_ranks()


if __name__ == "__main__":
    main()
