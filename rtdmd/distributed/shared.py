"""A frozen network that several roles compute with, each through adapters of its own.

The base is in memory once: replicated, in a DeepSpeed engine (ZeRO-0), or in shards (ZeRO-3). Adapters are
attached afterwards, as ordinary tensors that every rank holds whole. They train without DeepSpeed: plain
backward, one reduction of an adapter's flat gradient, AdamW over its flat float32 masters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.engine import TrainedEngine, adam_w, close_engine, collect_garbage, release
from rtdmd.distributed.guard import CallLog
from rtdmd.distributed.masters import MASTER, Piece, adam_state, sum_of_bits
from rtdmd.distributed.sharding import BlockShards
from rtdmd.recipe.schema import OptimizerSection


class SharedBase(ABC):
    """A frozen network for ``num_users`` roles; the last one that leaves frees its memory.

    ``placement`` says where it is, as in "the base is …".
    """

    def __init__(self, module: nn.Module, num_users: int, placement: str) -> None:
        self.module = module
        self.placement = placement
        self._num_users = num_users

    @abstractmethod
    def after_backward(self) -> None:
        """A backward through the network is over."""

    def leave(self) -> None:
        """One role less."""
        self._num_users -= 1
        if self._num_users == 0:
            self._close()
            collect_garbage()

    @abstractmethod
    def _close(self) -> None:
        """Free the memory."""


class ReplicatedBase(SharedBase):
    """Whole on every rank, in a DeepSpeed engine without optimizer.

    Roles compute past the engine, which refuses a backward that isn't its own.
    """

    def __init__(self, network: nn.Module, config: dict[str, Any], num_users: int) -> None:
        network.requires_grad_(False).eval()
        self._engine, *_ = deepspeed.initialize(model=network, config=config)
        self._engine.eval()
        super().__init__(self._engine.module, num_users, "whole on every rank")

    def after_backward(self) -> None:
        """Nothing has been gathered."""

    def _close(self) -> None:
        close_engine(self._engine)
        del self._engine


class ShardedBase(SharedBase):
    """In shards over the ranks, gathered block by block."""

    def __init__(self, network: nn.Module, shards: BlockShards, num_users: int, placement: str) -> None:
        super().__init__(network, num_users, placement)
        self.shards = shards

    def after_backward(self) -> None:
        self.shards.after_backward()

    def _close(self) -> None:
        self.shards.close()


class SharedNetwork:
    """The base as one role computes with it; ``using()`` selects the role's adapters."""

    def __init__(self, base: SharedBase, using: Callable[[], AbstractContextManager[None]]) -> None:
        self.base = base
        self._using = using

    @property
    def module(self) -> nn.Module:
        return self.base.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._using():
            return self.base.module(*args, **kwargs)

    def close(self) -> None:
        """Leave the base."""
        self.base.leave()


class AdapterMasters:
    """One flat float32 tensor each for masters, gradients and moments, on every rank.

    The network's own factors become views of a flat tensor in the network's dtype.
    """

    replicated = True

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        settings: OptimizerSection,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parameters = parameters
        factors = [parameter.detach().to(device, torch.float32) for parameter in parameters.values()]
        self.flat = nn.Parameter(torch.cat([factor.view(-1) for factor in factors]))
        self.flat.grad = torch.zeros_like(self.flat)
        self._computed = self.flat.detach().to(dtype, copy=True)
        for name, value in self.views(self._computed).items():
            parameters[name].data = value.view(parameters[name].shape)
        self.optimizer = adam_w([self.flat], settings, device)

    @property
    def gradient(self) -> Tensor:
        """The flat gradient so far."""
        assert self.flat.grad is not None
        return self.flat.grad

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's range of a flat tensor."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        return dict(zip(self.parameters, flat.split(sizes), strict=True))

    def take_gradients(self) -> None:
        """Add what a backward has left at the network's factors, in float32."""
        found = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.parameters.values()
        ]
        self.gradient.add_(torch.cat([gradient.flatten() for gradient in found]))
        for parameter in self.parameters.values():
            parameter.grad = None

    def update(self) -> None:
        """AdamW's step; the network follows, and gradients begin anew."""
        self.optimizer.step()
        self.gradient.zero_()
        self._computed.copy_(self.flat.detach())

    def pieces(self, kind: str) -> list[Piece]:
        flat = self.flat.detach() if kind == MASTER else self.optimizer.state[self.flat][kind]
        return [Piece(name, 0, value) for name, value in self.views(flat).items()]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.views(self.gradient).items()

    def publish(self, pieces: list[Piece]) -> None:
        views = self.views(self._computed)
        for piece in pieces:
            views[piece.name].copy_(piece.value)

    def ensure_optimizer_state(self) -> None:
        adam_state(self.optimizer, self.flat)

    def checksum(self) -> Tensor:
        return sum_of_bits([self.flat])

    def close(self) -> None:
        """Free the memory of all of it."""
        release([self.flat, self.gradient, self._computed, self.optimizer.state])


class AdapterEngine(TrainedEngine):
    """An adapter that trains on a shared base."""

    def __init__(
        self,
        name: str,
        network: SharedNetwork,
        calls: CallLog,
        ranks: Ranks,
        parameters: dict[str, nn.Parameter],
        settings: OptimizerSection,
        dtype: torch.dtype,
    ) -> None:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        shapes = {key: parameter.shape for key, parameter in parameters.items()}
        self.adapter = AdapterMasters(parameters, settings, dtype, ranks.device)
        self._base = network.base
        self._max_grad_norm = settings.max_grad_norm
        super().__init__(name, network, calls, ranks, shapes, self.adapter)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.adapter.optimizer

    def _accumulate(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        self._base.after_backward()
        self.adapter.take_gradients()
        if last:
            self._ranks.average_(self.adapter.gradient)

    def _update(self, norm: float) -> None:
        if norm > self._max_grad_norm:
            self.adapter.gradient.mul_(self._max_grad_norm / (norm + 1e-6))  # as DeepSpeed clips
        self.adapter.update()

    def close(self) -> None:
        """Free the memory of masters and optimizer, and the base's if no other role is left."""
        self.adapter.close()
        super().close()
