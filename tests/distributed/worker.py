"""One rank of a parity test: runs cases with the real stages and writes what they computed.

RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python worker.py CASES.json FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from rtdmd.distributed.collectives import Ranks, start_ranks, stop_ranks
from rtdmd.distributed.engine import Step, TrainedEngine
from rtdmd.distributed.guard import CallLog
from rtdmd.distributed.shared import AdapterEngine
from rtdmd.recipe import load_recipe
from rtdmd.stages.assemble import build_stage
from rtdmd.stages.networks import HandOver
from rtdmd.stages.rtdmd import Rtdmd
from tests.distributed.reference import without_rounding


def whole_gradients(engine: TrainedEngine) -> Iterator[tuple[str, Tensor | None]]:
    """Collective: the reduced gradient of everything that trains, between backward and step."""
    if isinstance(engine, AdapterEngine):
        yield from engine.adapter.views(engine.adapter.gradient).items()
        return
    for name, parameter in engine.network.module.named_parameters():
        if parameter.requires_grad:
            yield name, safe_get_full_grad(parameter)


def record_gradients(engine: TrainedEngine, into: list[Any]) -> None:
    """Note the whole gradient of every update, between backward and step."""
    step = engine.step

    def recording_step() -> Step:
        gradients = {}
        for name, gradient in whole_gradients(engine):
            shape = engine.shape(name)
            gradients[name] = torch.zeros(shape) if gradient is None else gradient.clone().view(shape)
        into.append((engine.name, gradients))
        return step()

    engine.step = recording_step  # type: ignore[method-assign]


def run_case(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    recipe = load_recipe("recipes/dry_run.yaml", case["overrides"])
    stage = build_stage(case["stage"], recipe, ranks, CallLog(ranks), HandOver())
    if isinstance(stage, Rtdmd):
        without_rounding(stage.panel.rewards)
    gradients: list[Any] = []
    engines = [stage.roles.generator.engine, stage.roles.fake_score.engine]
    for engine in engines:
        record_gradients(engine, gradients)
    metrics = [stage.step(step).metrics for step in range(case["steps"])]
    weights = {
        engine.name: {name: tensor.clone() for name, tensor in engine.gather(engine.masters.pieces("master"))}
        for engine in engines
    }
    stage.close()
    return {"gradients": gradients, "weights": weights, "metrics": metrics}


def main() -> None:
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    ranks = start_ranks(120)
    gc.freeze()  # engines collect garbage when they close; what has been imported is none
    for case in cases:
        result = run_case(case, ranks)
        if ranks.is_main:
            torch.save(result, folder / f"{case['name']}.pt")
            print(f"done {case['name']}", flush=True)
    stop_ranks()


if __name__ == "__main__":
    main()
