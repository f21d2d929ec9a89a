"""A frozen network in shards over all ranks, gathered block by block while it runs.

DeepSpeed's ZeRO-3 gathers layer by layer, from hooks on every layer. Adapters that train on a frozen base
are ordinary tensors, so nothing of the base is ever reduced or updated, and a whole block can be gathered at
once: two hooks a block leave its code to torch.compile, and the next block travels while this one computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.config import offloads_parameters, partition_size
from rtdmd.distributed.loading import TensorSource, check_shape, copy_flat, load_buffers, make_empty
from rtdmd.distributed.peers import (
    PeerMemory,
    copied_pieces,
    obstacle_to_copying,
    ranks_of_a_machine,
    share_memory,
)
from rtdmd.errors import UserError
from rtdmd.recipe.schema import Gather

_ALIGNMENT = 128  # elements: compiled code wants parameters at addresses that 16 divides
_MANY_BLOCKS = 8  # a network of so many has its ends whole on every rank


@dataclass(frozen=True)
class Placement:
    """Where the shards of a frozen network are, and how they come together."""

    ranks: Ranks  # that have the network once between them
    offload: bool = False  # shards wait in (page-locked) host memory
    copies: bool = False  # each rank copies from the others' memory, on one machine; else by a collective
    obstacle: str | None = None  # to copying, where that would be preferred

    def __str__(self) -> str:
        """As in "the base is …"."""
        if self.ranks.world_size == 1 and not self.offload:
            return "whole on every rank"
        where = f"in shards over {self.ranks.world_size} ranks" + (", in host memory" if self.offload else "")
        why = "" if self.obstacle is None else f" (copying {self.obstacle})"
        return f"{where}, " + ("copied from each other" if self.copies else f"gathered by collectives{why}")


def placement_of(config: dict[str, Any], gather: Gather, ranks: Ranks) -> Placement:
    """Where an engine's configuration and ``roles.gather`` put a frozen network. Collective.

    With ``auto``, and unless ``zero_hpz_partition_size`` says otherwise, each machine has it once; the ranks
    copy if they can. Raises UserError on every rank if they can't although they shall.
    """
    size = partition_size(config, ranks.world_size)
    part = ranks.part(size or (ranks_of_a_machine(ranks) if gather == "auto" else ranks.world_size))
    if offloads_parameters(config) or gather == "collective" or part.world_size == 1:
        return Placement(part, offloads_parameters(config))
    obstacle = obstacle_to_copying(part)
    with ranks.together():
        if obstacle is not None and gather == "copies":
            raise UserError(f"roles.gather: copies {obstacle}; write auto")
    return Placement(part, copies=obstacle is None, obstacle=obstacle)


@dataclass
class _Unit:
    """Parameters that are gathered together: one block's, or all that are in no block.

    A pass through a network begins with what is in no block and the first block, or backward with the last:
    nothing runs while they travel. Where there are many blocks these three stay whole.

    ``whole`` is flat, and its storage is empty while nothing needs it. The parameters are views of it for
    good, so that whatever autograd or compiled code has kept of them is right once it is gathered again.
    """

    whole: Tensor
    shard: Tensor  # this rank's range of it, in host memory if offloaded
    peers: list[Tensor] = field(default_factory=list)  # every rank's shard, where this one may read them
    memory: PeerMemory | None = None  # that the peers lie in
    is_kept: bool = False  # whole for good, once it has been gathered
    is_here: bool = False
    in_flight: tuple[dist.Work | None, Tensor] | None = (
        None  # what to wait for, and what must live until then
    )

    @property
    def is_resident(self) -> bool:
        """Whether the shard is all of it, as on a single rank, or at an end of a long network."""
        return self.shard is self.whole

    @property
    def stays(self) -> bool:
        """Whether nothing is to be released after use."""
        return self.is_resident or self.is_kept


class BlockShards:
    """The units of a network, in the order in which they run, and the hooks that gather and release them.

    Outside a forward or backward parameters have a shape but no values: reading them reads nothing. Every
    rank has to run the same blocks in the same order, unless shards are copied.
    """

    def __init__(
        self, network: nn.Module, blocks: Sequence[nn.Module], units: list[_Unit], ranks: Ranks
    ) -> None:
        self._units = units
        self._ranks = ranks
        self._stream = torch.cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None
        self._backward = False
        for index, module in enumerate((network, *blocks)):
            module.register_forward_pre_hook(partial(self._before_forward, index), with_kwargs=True)
            module.register_forward_hook(partial(self._after_forward, index))

    def _before_forward(self, index: int, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        if index == 0:  # the network itself, which is never computed once more
            self._backward = False
        if self._backward:  # computed once more; `_before_backward` has gathered it
            return None
        self._gather(index, range(index + 1, len(self._units)))
        return _through(partial(self._release, index), (args, kwargs))

    def _after_forward(self, index: int, _module: nn.Module, _args: Any, output: Any) -> Any:
        if self._backward:
            return None
        self._release(index)
        return _through(partial(self._before_backward, index), output)

    def _before_backward(self, index: int) -> None:
        self._backward = True
        self._gather(0)  # a loss of a block's own output doesn't pass through the network's
        self._gather(index, range((index or len(self._units)) - 1, 0, -1))

    def after_backward(self) -> None:
        """Release what backward has left: a block whose input needs no gradient, and what is in no block."""
        self._backward = False
        for index in range(len(self._units)):
            self._release(index)

    def keep(self, blocks: Collection[int]) -> None:
        """Have these of the blocks in shards stay whole once they have been gathered, and no others.

        Counted from 0, the resident ones left out, as :attr:`block_bytes` counts them. Between passes; every
        rank the same ones, unless shards are copied.
        """
        for number, unit in enumerate(self._blocks_in_shards):
            unit.is_kept = number in blocks
        self.after_backward()

    def gather_kept(self) -> None:
        """Have whole now what stays so, rather than when it is first needed, between allocations of a pass.

        Collective, unless shards are copied.
        """
        for index, unit in enumerate(self._units):
            if unit.is_kept:
                self._gather(index)

    @contextmanager
    def all_released(self) -> Iterator[None]:
        """Inside the block none stays whole but the resident ones; those to keep come again when needed."""
        kept = {number for number, unit in enumerate(self._blocks_in_shards) if unit.is_kept}
        self.keep(())
        try:
            yield
        finally:
            self.keep(kept)

    def _gather(self, index: int, following: Iterable[int] = ()) -> None:
        """Have a unit whole, and the first of the ``following`` ones that doesn't stay so on its way."""
        self._start(index)
        unit = self._units[index]
        if unit.in_flight is not None:
            work, _ = unit.in_flight
            if work is not None:
                work.wait()
            if self._stream is not None:
                torch.cuda.current_stream(self._ranks.device).wait_stream(self._stream)
            unit.in_flight = None
        travelling = next((each for each in following if not self._units[each].stays), None)
        if travelling is not None:
            self._start(travelling)

    def _start(self, index: int) -> None:
        unit = self._units[index]
        if unit.is_here:
            return
        unit.whole.untyped_storage().resize_(unit.whole.nbytes)
        if self._stream is None:
            self._exchange(unit)
        else:
            # What computed in the unit's memory before, on this stream, comes first.
            self._stream.wait_stream(torch.cuda.current_stream(self._ranks.device))
            with torch.cuda.stream(self._stream):
                self._exchange(unit)
        unit.is_here = True  # not before: what failed is tried again

    def _exchange(self, unit: _Unit) -> None:
        if self._ranks.world_size == 1:
            unit.whole.copy_(unit.shard, non_blocking=True)
            unit.in_flight = None, unit.shard
            return
        if unit.peers:
            for target, piece in copied_pieces(unit.whole, unit.peers, self._ranks.rank):
                target.copy_(piece, non_blocking=True)
            unit.in_flight = None, unit.shard
            return
        shard = unit.shard.to(self._ranks.device, non_blocking=True)
        # As bytes: not every backend exchanges every dtype.
        whole, mine = unit.whole.view(torch.uint8), shard.view(torch.uint8)
        work = dist.all_gather_into_tensor(whole, mine, group=self._ranks.group, async_op=True)
        unit.in_flight = work, shard

    def _release(self, index: int) -> None:
        unit = self._units[index]
        if not unit.is_here:
            return
        self._gather(index)  # for what is still in flight
        if not unit.stays:
            unit.whole.untyped_storage().resize_(0)
            unit.is_here = False

    @property
    def num_ranks(self) -> int:
        """That have the network once between them."""
        return self._ranks.world_size

    @property
    def _blocks_in_shards(self) -> list[_Unit]:
        return [unit for unit in self._units[1:] if not unit.is_resident]

    @property
    def block_bytes(self) -> list[int]:
        """What each block in shards takes while it is whole, in the order in which they run."""
        return [unit.whole.numel() * unit.whole.itemsize for unit in self._blocks_in_shards]

    @property
    def num_kept(self) -> int:
        """Blocks in shards that stay whole once they have been gathered."""
        return sum(unit.is_kept for unit in self._units)

    @property
    def shards(self) -> list[Tensor]:
        """This rank's part of each unit."""
        return [unit.shard for unit in self._units]

    @property
    def gathered_bytes(self) -> int:
        """How much is whole at present, beside the shards."""
        return sum(unit.whole.nbytes for unit in self._units if unit.is_here and not unit.is_resident)

    @property
    def mapped_bytes(self) -> int:
        """Of this rank's shards in memory that others map, which torch's allocator doesn't count."""
        return sum(unit.shard.nbytes for unit in self._units if unit.memory is not None)

    def close(self) -> None:
        """Free the memory; the network can't run any more."""
        self.after_backward()
        for unit in self._units:
            unit.whole.untyped_storage().resize_(0)
            if unit.memory is None:
                unit.shard.untyped_storage().resize_(0)
            else:  # nothing of what others map can be given back before all have let go of it
                unit.shard, unit.peers, unit.memory = unit.shard.new_empty(0), [], None


def ends_of(num_blocks: int) -> set[int]:
    """Which units stay whole on every rank; 0 is what is in no block, then come the blocks."""
    return {0, 1, num_blocks} if num_blocks >= _MANY_BLOCKS else set()


def build_sharded(
    make: Callable[[], nn.Module],
    blocks_of: Callable[[nn.Module], Sequence[nn.Module]],
    source: TensorSource,
    dtype: torch.dtype,
    placement: Placement,
    progress: Callable[[], None],
) -> tuple[nn.Module, BlockShards]:
    """A frozen network of which each rank reads and keeps 1/ranks, but for its ends, and what gathers it.

    ``make`` constructs the module, ``blocks_of`` names its blocks in the order in which they run.
    ``progress`` is called after each unit. Raises UserError if a tensor has another shape than the
    network's.
    """
    ranks = placement.ranks
    network = make_empty(make, dtype, ranks.device).requires_grad_(False).eval()
    blocks = list(blocks_of(network))
    names = {parameter: name for name, parameter in network.named_parameters()}
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    rest = [parameter for parameter in names if parameter not in in_blocks]
    homes = {
        parameter: (module, name)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    parts = [rest, *(list(block.parameters()) for block in blocks)]
    ends = ends_of(len(blocks))
    if ranks.world_size == 1 and not placement.offload:
        ends = set(range(len(parts)))
    sizes = [_size(part, 1 if index in ends else ranks.world_size) for index, part in enumerate(parts)]
    memory = None
    shared = sum(size for index, size in enumerate(sizes) if index not in ends)
    if placement.copies and shared:
        memory = share_memory(shared, dtype, ranks)
    units = []
    with nullcontext() if memory is None else ranks.together():  # then nobody copies what isn't there
        for part, unit in zip(parts, _allocate(sizes, ends, dtype, placement, memory), strict=True):
            views = _load({names[parameter]: parameter for parameter in part}, unit, source, ranks)
            for parameter, view in zip(part, views, strict=True):
                module, name = homes[parameter]
                setattr(module, name, nn.Parameter(view, requires_grad=False))
            if not unit.is_resident:
                unit.whole.untyped_storage().resize_(0)
            units.append(unit)
            progress()
        load_buffers(network, source, ranks.device)
        if memory is not None and ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
    return network, BlockShards(network, blocks, units, ranks)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _size(parameters: Sequence[nn.Parameter], num_ranks: int) -> int:
    """Elements of a shard, one of so many."""
    whole = sum(_aligned(parameter.numel()) for parameter in parameters)
    return _aligned(-(-whole // num_ranks))


def _allocate(
    sizes: Sequence[int],
    ends: Collection[int],
    dtype: torch.dtype,
    placement: Placement,
    memory: PeerMemory | None,
) -> Iterator[_Unit]:
    """Units with shards of so many elements, without values; as they are asked for, since all are whole.

    Those at ``ends`` stay whole.
    """
    ranks, offload = placement.ranks, placement.offload
    start = 0
    for index, size in enumerate(sizes):
        if index in ends:
            whole = torch.empty(size, dtype=dtype, device=ranks.device)
            yield _Unit(whole, whole, is_here=True)
            continue
        whole = torch.empty(ranks.world_size * size, dtype=dtype, device=ranks.device)
        if memory is not None:
            peers = [each[start : start + size] for each in memory.of_ranks]
            yield _Unit(whole, peers[ranks.rank], peers, memory)
        else:
            device, pin = ("cpu", ranks.device.type == "cuda") if offload else (ranks.device, False)
            yield _Unit(whole, torch.empty(size, dtype=dtype, device=device, pin_memory=pin))
        start += size


def _load(
    parameters: dict[str, nn.Parameter], unit: _Unit, source: TensorSource, ranks: Ranks
) -> list[Tensor]:
    """Read this rank's shard; the parameters as views of the whole."""
    # Not `whole` itself: gathering counts as a change of it, and autograd would refuse what it has kept.
    unversioned = unit.whole.data
    views, start = [], 0
    first = 0 if unit.is_resident else ranks.rank * unit.shard.numel()
    for name, parameter in parameters.items():
        check_shape(source, name, parameter.shape)
        low, high = max(start, first), min(start + parameter.numel(), first + unit.shard.numel())
        if low < high:
            mine = unit.shard[low - first : high - first]
            copy_flat(mine, source, name, parameter.shape, low - start, high - start)
        views.append(unversioned[start : start + parameter.numel()].view(parameter.shape))
        start += _aligned(parameter.numel())
    return views


class _Signal(torch.autograd.Function):
    """The identity; its backward calls ``action`` once all gradients have come.

    On a module's outputs that is before the rest of the module's backward, on its inputs after it.
    """

    @staticmethod
    def forward(ctx: Any, action: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.action = action
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.action()
        return (None, *gradients)


def _through(action: Callable[[], None], values: Any) -> Any:
    """``values`` with every tensor that requires a gradient passed through one node."""
    leaves, structure = tree_flatten(values)
    chosen = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not chosen or not torch.is_grad_enabled():
        return values
    for i, passed in zip(chosen, _Signal.apply(action, *(leaves[i] for i in chosen)), strict=True):
        leaves[i] = passed
    return tree_unflatten(leaves, structure)
