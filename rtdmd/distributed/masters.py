"""This rank's part of what trains: float32 masters, optimizer state, gradients.

DeepSpeed keeps them in a different place for each ZeRO stage. Here they appear alike: as pieces, a
piece being a contiguous flat range of one parameter. EMA and checkpoints are made of pieces, so
that they never need a whole model, and move freely between stages and numbers of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from rtdmd.distributed.collectives import Ranks

MASTER = "master"
OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + value.numel()) of the flattened parameter ``name``; ``value`` is flat."""

    name: str
    start: int
    value: Tensor


class Masters(Protocol):
    """Access to one engine's masters; each ``pieces`` value is a writable view."""

    replicated: bool  # every rank holds everything, and updates it by itself

    def pieces(self, kind: str) -> list[Piece]:
        """Pieces of ``master``, ``exp_avg`` or ``exp_avg_sq``; together the ranks' cover all parameters."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the reduced gradients with its parameter's name, between backward and step."""
        ...

    def publish(self, pieces: list[Piece]) -> None:
        """Collective: set the weights the network computes with; masters stay as they are."""
        ...

    def ensure_optimizer_state(self) -> None:
        """Create AdamW's zero moments, which it otherwise creates at its first step."""
        ...

    def checksum(self) -> Tensor:
        """The masters' :func:`sum_of_bits` where they are replicated, else 0."""
        ...


def sum_of_bits(values: Iterable[Tensor]) -> Tensor:
    """Of float32 numbers, read as integers: an int64 where they are, exact in any order."""
    return torch.stack([value.detach().view(torch.int32).sum(dtype=torch.int64) for value in values]).sum()


def adam_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Any]:
    """AdamW's state of a tensor, created if it isn't there (``step`` lives where AdamW puts it)."""
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        fused = bool(optimizer.defaults.get("fused"))
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
        for key in OPTIMIZER_STATES:
            state[key] = torch.zeros_like(flat.data)
    return state


class ReplicatedMasters:
    """ZeRO-0 in float32: plain parameters, plain optimizer."""

    replicated = True

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
        self._optimizer = engine.basic_optimizer
        self._parameters = parameters

    def pieces(self, kind: str) -> list[Piece]:
        return [
            Piece(name, 0, (p.data if kind == MASTER else self._optimizer.state[p][kind]).view(-1))
            for name, p in self._parameters.items()
        ]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                yield name, parameter.grad

    def publish(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._parameters[piece.name].data.view(-1).copy_(piece.value)

    def ensure_optimizer_state(self) -> None:
        for parameter in self._parameters.values():
            adam_state(self._optimizer, parameter)

    def checksum(self) -> Tensor:
        return sum_of_bits(self._parameters.values())


class _ZeroMasters:
    """What the sharded stages share."""

    replicated = False

    def __init__(self, engine: Any, parameters: dict[str, Any], ranks: Ranks) -> None:
        self._zero = engine.optimizer
        self._optimizer = engine.basic_optimizer
        self._parameters = parameters
        self._ranks = ranks

    def checksum(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=self._ranks.device)


class FragmentMasters(_ZeroMasters):
    """ZeRO-1 and 2: flat partitions that cut across parameters."""

    def _flats(self) -> list[Tensor]:
        for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self._zero, attribute):
                return getattr(self._zero, attribute)
        raise RuntimeError(f"{type(self._zero).__name__}: unknown layout of master weights")

    def pieces(self, kind: str) -> list[Piece]:
        result = []
        flats = self._flats()
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            address = mapping.hp_fragment_address
            flat = flats[mapping.param_group_index]
            whole = flat.data if kind == MASTER else self._optimizer.state[flat][kind]
            value = whole.narrow(0, address.start, address.numel)
            result.append(Piece(name, mapping.lp_fragment_address.start, value))
        return result

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        if not hasattr(self._zero, "averaged_gradients"):  # ZeRO-1 in bfloat16: whole gradients everywhere
            for name, parameter in self._parameters.items():
                if parameter._hp_mapping is not None:
                    address = parameter._hp_mapping.lp_fragment_address
                    whole = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
                    yield name, whole.flatten().narrow(0, address.start, address.numel)
        elif self._zero.cpu_offload:
            yield from (("a flat partition", flat.grad) for flat in self._flats() if flat.grad is not None)
        else:
            names = {id(parameter): name for name, parameter in self._parameters.items()}
            for number, group in self._zero.averaged_gradients.items():
                # In the order of the partition's parameters; what is left over pads.
                owners = [names[id(parameter)] for parameter in self._zero.params_in_partition[number]]
                for owner, gradient in zip_longest(owners, group or [], fillvalue=None):
                    if gradient is not None:
                        yield owner or "padding", gradient

    def publish(self, pieces: list[Piece]) -> None:
        mine = {piece.name: piece for piece in pieces}
        for name, parameter in self._parameters.items():
            full = gather_flat(mine.get(name), parameter.numel(), self._ranks, parameter.device)
            parameter.data.view(-1).copy_(full)

    def ensure_optimizer_state(self) -> None:
        for flat in self._flats():
            adam_state(self._optimizer, flat)


class ShardMasters(_ZeroMasters):
    """ZeRO-3: every parameter is cut into equal shards, one a rank, the last ones padded."""

    def _extent(self, parameter: Any) -> tuple[int, int]:
        """(start, length) of this rank's shard without padding."""
        size = parameter.ds_tensor.numel()
        start = min(self._ranks.rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    def pieces(self, kind: str) -> list[Piece]:
        result = []
        for name, parameter in self._parameters.items():
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._zero.fp32_partitioned_groups_flat[group]
            whole = flat.data if kind == MASTER else self._optimizer.state[flat][kind]
            start, length = self._extent(parameter)
            if length > 0:
                result.append(Piece(name, start, whole.narrow(0, offset, length)))
        return result

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            yield name, safe_get_local_grad(parameter)

    def publish(self, pieces: list[Piece]) -> None:
        # As DeepSpeed's own step does: partition everything, write the shards, gather what persists.
        self._zero._partition_all_parameters()
        for piece in pieces:
            self._parameters[piece.name].ds_tensor.data[: piece.value.numel()].copy_(piece.value)
        persistent = self._zero.persistent_parameters
        if len(persistent) > 0:
            persistent[0].all_gather(persistent)

    def ensure_optimizer_state(self) -> None:
        for flat in self._zero.fp32_partitioned_groups_flat:
            adam_state(self._optimizer, flat)


def masters_of(engine: Any, stage: int, parameters: dict[str, nn.Parameter], ranks: Ranks) -> Masters:
    """The access that fits an initialised DeepSpeed engine."""
    if stage == 3:
        return ShardMasters(engine, parameters, ranks)
    if all(hasattr(parameter, "_hp_mapping") for parameter in parameters.values()):
        return FragmentMasters(engine, parameters, ranks)
    return ReplicatedMasters(engine, parameters, ranks)


def gather_flat(piece: Piece | None, numel: int, ranks: Ranks, device: torch.device) -> Tensor:
    """Collective: the whole flat parameter, float32, from the ranks' disjoint pieces of it."""
    flat = torch.zeros(numel, dtype=torch.float32, device=device)
    if piece is not None:
        flat.narrow(0, piece.start, piece.value.numel()).copy_(piece.value)
    return ranks.sum(flat)
