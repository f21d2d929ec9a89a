"""One network under DeepSpeed, with the few operations that stages need."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor, nn

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.config import zero_stage
from rtdmd.distributed.guard import CallLog
from rtdmd.distributed.masters import MASTER, OPTIMIZER_STATES, Masters, Piece, gather_flat, masters_of
from rtdmd.errors import TrainingHalted
from rtdmd.recipe.schema import OptimizerSection


class FrozenEngine:
    """A network that only predicts."""

    def __init__(self, name: str, engine: Any, calls: CallLog) -> None:
        self.name = name
        self._engine = engine
        self._calls = calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls.record(f"{self.name}.forward")
        return self._engine(*args, **kwargs)

    def close(self) -> None:
        """Free the memory of weights, masters and optimizer; the engine can't be used afterwards.

        DeepSpeed's globals and hooks keep references to a destroyed engine, so waiting for the garbage
        collector frees nothing. The storages themselves are emptied.
        """
        module, optimizer = self._engine.module, self._engine.optimizer
        self._engine.destroy()
        for parameter in module.parameters():
            _release([parameter, parameter.grad, getattr(parameter, "ds_tensor", None)])
        for owner in (optimizer, getattr(optimizer, "optimizer", None)):
            _release(getattr(owner, "__dict__", {}))
        parameter_offload.FWD_MODULE_STACK.clear()
        # Whenever the engine is collected it destroys its optimizer once more. That would touch the emptied
        # tensors, and in the middle of a torch.compile, where they count as fake ones, crash the process.
        self._engine.optimizer = None
        del self._engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _release(held: Any, depth: int = 10) -> None:
    """Empty the storage of every tensor in nested containers."""
    if isinstance(held, Tensor):
        if held.device.type != "meta":
            held.untyped_storage().resize_(0)
    elif depth > 0 and isinstance(held, dict):
        _release([*held.keys(), *held.values()], depth - 1)
    elif depth > 0 and isinstance(held, list | tuple | set):
        for item in held:
            _release(item, depth - 1)


@dataclass(frozen=True)
class Step:
    """What an optimizer step reports."""

    grad_norm: float  # global, before clipping


class TrainedEngine(FrozenEngine):
    """A network that trains, its masters and AdamW in shards.

    Gradients accumulate over :meth:`backward` calls until :meth:`step`. Losses are averaged over
    ranks. ``parameters`` names what trains, as the network itself names it.
    """

    def __init__(
        self,
        name: str,
        engine: Any,
        calls: CallLog,
        ranks: Ranks,
        parameters: dict[str, nn.Parameter],
        stage: int,
    ) -> None:
        super().__init__(name, engine, calls)
        self._ranks = ranks
        self._shapes = {key: _true_shape(parameter) for key, parameter in parameters.items()}
        self.masters: Masters = masters_of(engine, stage, parameters, ranks)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of ``loss``; ``last`` says that :meth:`step` comes next."""
        self._calls.record(f"{self.name}.backward")
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)
        # Recomputed blocks stop before DeepSpeed's post-forward hook and would pile up here.
        parameter_offload.FWD_MODULE_STACK.clear()

    def step(self) -> Step:
        """Clip and update. Raises TrainingHalted on every rank, before the update, if ranks called
        engines in different orders or if a gradient isn't finite."""
        self._calls.record(f"{self.name}.step")
        # Read together: the host waits for the device once.
        differ, norm = torch.stack([self._calls.differ().double(), self._gradient_norm().double()]).tolist()
        if differ:
            self._calls.halt()
        if not math.isfinite(norm):
            raise TrainingHalted(self._non_finite_report())
        self._engine.step()
        return Step(norm)

    def _gradient_norm(self) -> Tensor:
        """Euclidean norm of the averaged gradient over all ranks and parameters, float32."""
        squares = torch.zeros((), dtype=torch.float32, device=self._ranks.device)
        gradients = [gradient.float() for gradient in self.masters.gradients()]
        for norm in torch._foreach_norm(gradients) if gradients else []:
            squares += norm.square().to(squares.device)
        # Exchanged even where it is not needed: ranks that are in different engines' steps, which the
        # comparison of their calls is about to find, exchange the same things until then.
        everywhere = self._ranks.sum(squares)
        return (squares if self.masters.replicated else everywhere).sqrt()

    def _non_finite_report(self) -> str:
        bad = sum(int((~torch.isfinite(gradient)).sum()) for gradient in self.masters.gradients())
        each = self._ranks.gather_objects(bad)
        counts = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(each))
        return (
            f"{self.name}: the gradient isn't finite (elements that aren't, {counts}); "
            "stopped before the update, the last checkpoint is intact"
        )

    def shape(self, name: str) -> torch.Size:
        """Full shape of a trained parameter."""
        return self._shapes[name]

    def gather(self, pieces: Sequence[Piece]) -> Iterator[tuple[str, Tensor]]:
        """Collective: (name, whole tensor) of each trained parameter in turn, float32, from ``pieces``."""
        mine = {piece.name: piece for piece in pieces}
        for name, shape in self._shapes.items():
            self._calls.record(f"{self.name}.gather")
            if self.masters.replicated:
                yield name, mine[name].value.view(shape)
            else:
                yield (
                    name,
                    gather_flat(mine.get(name), shape.numel(), self._ranks, self._ranks.device).view(shape),
                )

    @contextmanager
    def weights_from(self, pieces: list[Piece]) -> Iterator[None]:
        """Collective: compute with other weights (an EMA's, say) inside the block.

        Must not surround a backward or a step.
        """
        # Where the parameters are their own masters, publishing would overwrite them.
        kept = [Piece(p.name, p.start, p.value.clone()) for p in self.masters.pieces(MASTER)]
        self.masters.publish(pieces)
        try:
            yield
        finally:
            self.masters.publish(kept)

    def state(self) -> dict[str, list[Piece]]:
        """Views of masters and optimizer moments, by kind."""
        self.masters.ensure_optimizer_state()
        return {kind: self.masters.pieces(kind) for kind in (MASTER, *OPTIMIZER_STATES)}

    def restored(self, num_updates: int) -> None:
        """Collective: call after the views of :meth:`state` have been filled from a checkpoint."""
        for state in self._engine.basic_optimizer.state.values():
            state["step"].fill_(num_updates)
        self.masters.publish(self.masters.pieces(MASTER))

    @property
    def num_updates(self) -> int:
        """Optimizer steps taken so far."""
        states = list(self._engine.basic_optimizer.state.values())
        return int(states[0]["step"]) if states and "step" in states[0] else 0


def _true_shape(parameter: Any) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def start_frozen(name: str, network: nn.Module, config: dict[str, Any], calls: CallLog) -> FrozenEngine:
    """Put a network under an engine without optimizer; with ZeRO-3 it stays sharded."""
    network.requires_grad_(False).eval()
    engine, *_ = deepspeed.initialize(model=network, config=config)
    engine.eval()
    return FrozenEngine(name, engine, calls)


def start_trained(
    name: str,
    network: nn.Module,
    config: dict[str, Any],
    optimizer: OptimizerSection,
    calls: CallLog,
    ranks: Ranks,
) -> TrainedEngine:
    """Put a network under an engine with AdamW over the parameters that require gradient."""
    trained = {key: parameter for key, parameter in network.named_parameters() if parameter.requires_grad}
    adam = torch.optim.AdamW(
        list(trained.values()),
        lr=optimizer.learning_rate,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=ranks.device.type == "cuda",
    )
    engine, *_ = deepspeed.initialize(model=network, optimizer=adam, config=config)
    return TrainedEngine(name, engine, calls, ranks, trained, zero_stage(config))
