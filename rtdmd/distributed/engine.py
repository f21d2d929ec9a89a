"""One role's network, with the few operations that stages need."""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

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


class Network(Protocol):
    """What a role computes with: a module of its own in an engine, or a base that roles share."""

    @property
    def module(self) -> nn.Module: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def close(self) -> None:
        """Free the memory of its weights."""
        ...


class OwnNetwork:
    """A network in a DeepSpeed engine of its own."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def close(self) -> None:
        """Free the memory of weights, masters and optimizer."""
        close_engine(self.engine)
        del self.engine
        collect_garbage()


class FrozenEngine:
    """A network that only predicts."""

    def __init__(self, name: str, network: Network, calls: CallLog) -> None:
        self.name = name
        self.network = network
        self._calls = calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls.record(f"{self.name}.forward")
        return self.network(*args, **kwargs)

    def close(self) -> None:
        """Free the memory of weights, masters and optimizer; the engine can't be used afterwards."""
        self.network.close()


def close_engine(engine: Any) -> None:
    """Empty the storages of a DeepSpeed engine's weights, masters and optimizer.

    DeepSpeed's globals and hooks keep references to a destroyed engine, so waiting for the garbage
    collector frees nothing. The storages themselves are emptied.
    """
    module, optimizer = engine.module, engine.optimizer
    engine.destroy()
    for parameter in module.parameters():
        release([parameter, parameter.grad, getattr(parameter, "ds_tensor", None)])
    for owner in (optimizer, getattr(optimizer, "optimizer", None)):
        release(getattr(owner, "__dict__", {}))
    parameter_offload.FWD_MODULE_STACK.clear()
    # Whenever the engine is collected it destroys its optimizer once more. That would touch the emptied
    # tensors, and in the middle of a torch.compile, where they count as fake ones, crash the process.
    engine.optimizer = None


def collect_garbage() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release(held: Any, depth: int = 10) -> None:
    """Empty the storage of every tensor in nested containers."""
    if isinstance(held, Tensor):
        if held.device.type != "meta":
            held.untyped_storage().resize_(0)
    elif depth > 0 and isinstance(held, dict):
        release([*held.keys(), *held.values()], depth - 1)
    elif depth > 0 and isinstance(held, list | tuple | set):
        for item in held:
            release(item, depth - 1)


@dataclass(frozen=True)
class Step:
    """What an optimizer step reports."""

    grad_norm: float  # global, before clipping


class TrainedEngine(FrozenEngine, ABC):
    """A network that trains, with float32 masters and AdamW.

    Gradients accumulate over :meth:`backward` calls until :meth:`step`. Losses are averaged over
    ranks. ``shapes`` names what trains, as the network itself names it, with its full shape.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        calls: CallLog,
        ranks: Ranks,
        shapes: dict[str, torch.Size],
        masters: Masters,
    ) -> None:
        super().__init__(name, network, calls)
        self._ranks = ranks
        self._shapes = shapes
        self.masters = masters

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over the masters."""

    def set_learning_rate(self, rate: float) -> None:
        """Of the updates to come."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @abstractmethod
    def _accumulate(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of ``loss``; after the ``last`` one it is averaged over ranks."""

    @abstractmethod
    def _update(self, norm: float) -> None:
        """Clip the gradient, whose norm is ``norm``, and update masters and network."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of ``loss``; ``last`` says that :meth:`step` comes next."""
        self._calls.record(f"{self.name}.backward")
        self._accumulate(loss, last)
        # Recomputed blocks stop before DeepSpeed's post-forward hook and would pile up here.
        parameter_offload.FWD_MODULE_STACK.clear()

    def step(self) -> Step:
        """Clip and update. Raises TrainingHalted on every rank, before the update, if ranks called
        engines in different orders or have come to different weights, or if a gradient isn't finite."""
        self._calls.record(f"{self.name}.step")
        # Read together: the host waits for the device once.
        differ = self._calls.differ(self.masters.checksum())
        found = torch.cat([differ.double(), self._gradient_norm().double().view(1)])
        calls_differ, weights_differ, norm = found.tolist()
        if calls_differ:
            self._calls.halt()
        if weights_differ:
            raise TrainingHalted(self._different_weights_report())
        if not math.isfinite(norm):
            raise TrainingHalted(self._non_finite_report())
        self._update(norm)
        return Step(norm)

    def _gradient_norm(self) -> Tensor:
        """Euclidean norm of the averaged gradient over all ranks and parameters, float32."""
        squares = torch.zeros((), dtype=torch.float32, device=self._ranks.device)
        gradients = [gradient.float() for _, gradient in self.masters.gradients()]
        if gradients:
            squares = torch.stack(torch._foreach_norm(gradients)).square().sum().to(squares.device)
        # Exchanged even where it is not needed: ranks that are in different engines' steps, which the
        # comparison of their calls is about to find, exchange the same things until then.
        everywhere = self._ranks.sum(squares)
        return (squares if self.masters.replicated else everywhere).sqrt()

    def _different_weights_report(self) -> str:
        mine = torch.cat([piece.value for piece in self.masters.pieces(MASTER)])
        bits = mine.view(torch.int32)
        first = self._ranks.sum(bits if self._ranks.is_main else torch.zeros_like(bits))
        other, gap = int((bits != first).sum()), float((mine - first.view(torch.float32)).abs().max())
        each = self._ranks.gather_objects((other, gap))
        found = [f"rank {rank} in {n} by up to {by:.1e}" for rank, (n, by) in enumerate(each) if n]
        return (
            f"{self.name}: ranks have come to different weights (of {len(mine)} from rank 0's, "
            f"{', '.join(found)}), though they make the same updates: a device may compute wrongly; stopped "
            "before the next update. The last checkpoint has rank 0's weights"
        )

    def _non_finite_report(self) -> str:
        bad = {name: int((~torch.isfinite(grad)).sum()) for name, grad in self.masters.gradients()}
        mine = [f"{count} in {name}" for name, count in bad.items() if count]
        each = self._ranks.gather_objects((sum(bad.values()), mine[:2] + mine[2:][-1:]))
        counts = ", ".join(f"rank {rank}: {count}" for rank, (count, _) in enumerate(each))
        named: list[str] = next((some for _, some in each if some), [])
        return (
            f"{self.name}: the gradient isn't finite (elements that aren't, {counts}; "
            f"first and last of them: {', '.join(named)}); "
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
        for state in self.optimizer.state.values():
            state["step"].fill_(num_updates)
        self.masters.publish(self.masters.pieces(MASTER))

    @property
    def num_updates(self) -> int:
        """Optimizer steps taken so far."""
        states = list(self.optimizer.state.values())
        return int(states[0]["step"]) if states and "step" in states[0] else 0


class ShardedEngine(TrainedEngine):
    """A network of its own, its masters and AdamW in DeepSpeed's shards."""

    def __init__(
        self,
        name: str,
        engine: Any,
        calls: CallLog,
        ranks: Ranks,
        parameters: dict[str, nn.Parameter],
        stage: int,
    ) -> None:
        shapes = {key: _true_shape(parameter) for key, parameter in parameters.items()}
        masters = masters_of(engine, stage, parameters, ranks)
        self._own = OwnNetwork(engine)
        super().__init__(name, self._own, calls, ranks, shapes, masters)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._own.engine.basic_optimizer

    def _accumulate(self, loss: Tensor, last: bool) -> None:
        self._own.engine.set_gradient_accumulation_boundary(last)
        self._own.engine.backward(loss)

    def _update(self, norm: float) -> None:
        self._own.engine.step()  # clips by itself


def _true_shape(parameter: Any) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def start_frozen(name: str, network: nn.Module, config: dict[str, Any], calls: CallLog) -> FrozenEngine:
    """Put a network under an engine without optimizer; with ZeRO-3 it stays sharded."""
    network.requires_grad_(False).eval()
    engine, *_ = deepspeed.initialize(model=network, config=config)
    engine.eval()
    return FrozenEngine(name, OwnNetwork(engine), calls)


def adam_w(
    parameters: list[nn.Parameter], settings: OptimizerSection, device: torch.device
) -> torch.optim.AdamW:
    """torch's AdamW as the recipe sets it, fused on a GPU."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )


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
    adam = adam_w(list(trained.values()), optimizer, ranks.device)
    engine, *_ = deepspeed.initialize(model=network, optimizer=adam, config=config)
    return ShardedEngine(name, engine, calls, ranks, trained, zero_stage(config))
