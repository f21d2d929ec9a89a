"""A frozen network in shards over all ranks, gathered block by block while it runs.

DeepSpeed's ZeRO-3 gathers layer by layer, from hooks on every layer. Adapters that train on a frozen base
are ordinary tensors, so nothing of the base is ever reduced or updated, and a whole block can be gathered at
once: two hooks a block leave its code to torch.compile, and the next block travels while this one computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.loading import TensorSource, check_shape, copy_flat, load_buffers, make_empty

_ALIGNMENT = 128  # elements: compiled code wants parameters at addresses that 16 divides


@dataclass
class _Unit:
    """Parameters that are gathered together: one block's, or all that are in no block.

    ``whole`` is flat, and its storage is empty while nothing needs it. The parameters are views of it for
    good, so that whatever autograd or compiled code has kept of them is right once it is gathered again.
    """

    whole: Tensor
    shard: Tensor  # this rank's range of it, in host memory if offloaded
    is_here: bool = False
    in_flight: tuple[dist.Work | None, Tensor] | None = (
        None  # what to wait for, and what must live until then
    )

    @property
    def is_resident(self) -> bool:
        """Whether the shard is all of it, as on a single rank."""
        return self.shard is self.whole


class BlockShards:
    """The units of a network, in the order in which they run, and the hooks that gather and release them.

    Outside a forward or backward parameters have a shape but no values: reading them reads nothing. Every
    rank has to run the same blocks in the same order.
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
        self._gather(index, index + 1)
        return _through(partial(self._release, index), (args, kwargs))

    def _after_forward(self, index: int, _module: nn.Module, _args: Any, output: Any) -> Any:
        if self._backward:
            return None
        self._release(index)
        return _through(partial(self._before_backward, index), output)

    def _before_backward(self, index: int) -> None:
        self._backward = True
        self._gather(0, 0)  # a loss of a block's own output doesn't pass through the network's
        self._gather(index, index - 1 if index > 0 else len(self._units) - 1)

    def after_backward(self) -> None:
        """Release what backward has left: a block whose input needs no gradient, and what is in no block."""
        self._backward = False
        for index in range(len(self._units)):
            self._release(index)

    def _gather(self, index: int, following: int) -> None:
        """Have a unit whole, and the ``following`` one on its way."""
        self._start(index)
        unit = self._units[index]
        if unit.in_flight is not None:
            work, _ = unit.in_flight
            if work is not None:
                work.wait()
            if self._stream is not None:
                torch.cuda.current_stream(self._ranks.device).wait_stream(self._stream)
            unit.in_flight = None
        if 0 < following < len(self._units):
            self._start(following)

    def _start(self, index: int) -> None:
        unit = self._units[index]
        if unit.is_here:
            return
        unit.is_here = True
        unit.whole.untyped_storage().resize_(unit.whole.nbytes)
        if self._stream is None:
            self._exchange(unit)
            return
        # What computed in the unit's memory before, on this stream, comes first.
        self._stream.wait_stream(torch.cuda.current_stream(self._ranks.device))
        with torch.cuda.stream(self._stream):
            self._exchange(unit)

    def _exchange(self, unit: _Unit) -> None:
        if self._ranks.world_size == 1:
            unit.whole.copy_(unit.shard, non_blocking=True)
            unit.in_flight = None, unit.shard
            return
        shard = unit.shard.to(self._ranks.device, non_blocking=True)
        # As bytes: not every backend exchanges every dtype.
        whole, mine = unit.whole.view(torch.uint8), shard.view(torch.uint8)
        unit.in_flight = dist.all_gather_into_tensor(whole, mine, async_op=True), shard

    def _release(self, index: int) -> None:
        unit = self._units[index]
        if not unit.is_here:
            return
        self._gather(index, 0)  # for what is still in flight
        if not unit.is_resident:
            unit.whole.untyped_storage().resize_(0)
            unit.is_here = False

    @property
    def shards(self) -> list[Tensor]:
        """This rank's part of each unit."""
        return [unit.shard for unit in self._units]

    @property
    def gathered_bytes(self) -> int:
        """How much is whole at present, beside the shards."""
        return sum(unit.whole.nbytes for unit in self._units if unit.is_here and not unit.is_resident)

    def close(self) -> None:
        """Free the memory; the network can't run any more."""
        self.after_backward()
        for unit in self._units:
            unit.shard.untyped_storage().resize_(0)


def build_sharded(
    make: Callable[[], nn.Module],
    blocks_of: Callable[[nn.Module], Sequence[nn.Module]],
    source: TensorSource,
    dtype: torch.dtype,
    ranks: Ranks,
    offload: bool,
    progress: Callable[[], None],
) -> tuple[nn.Module, BlockShards]:
    """A frozen network of which each rank reads and keeps 1/ranks, and what gathers it.

    ``make`` constructs the module, ``blocks_of`` names its blocks in the order in which they run. With
    ``offload`` shards wait in (page-locked) host memory. ``progress`` is called after each unit. Raises
    UserError if a tensor has another shape than the network's.
    """
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
    units = []
    for parameters in (rest, *(list(block.parameters()) for block in blocks)):
        unit, views = _unit({names[p]: p for p in parameters}, source, dtype, ranks, offload)
        for parameter, view in zip(parameters, views, strict=True):
            module, name = homes[parameter]
            setattr(module, name, nn.Parameter(view, requires_grad=False))
        units.append(unit)
        progress()
    load_buffers(network, source, ranks.device)
    return network, BlockShards(network, blocks, units, ranks)


def _unit(
    parameters: dict[str, nn.Parameter],
    source: TensorSource,
    dtype: torch.dtype,
    ranks: Ranks,
    offload: bool,
) -> tuple[_Unit, list[Tensor]]:
    """The parameters, which have no values yet, as a unit with this rank's shard read; views of the whole."""
    starts, end = [], 0
    for name, parameter in parameters.items():
        check_shape(source, name, parameter.shape)
        starts.append(end)
        end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
    size = -(-end // (ranks.world_size * _ALIGNMENT)) * _ALIGNMENT  # of a shard
    first = ranks.rank * size
    whole = torch.empty(ranks.world_size * size, dtype=dtype, device=ranks.device)
    if ranks.world_size == 1 and not offload:
        shard = whole
    else:
        device, pin = ("cpu", ranks.device.type == "cuda") if offload else (ranks.device, False)
        shard = torch.empty(size, dtype=dtype, device=device, pin_memory=pin)
    # Not `whole` itself: gathering counts as a change of it, and autograd would refuse what it has kept.
    unversioned = whole.data
    views = []
    for (name, parameter), start in zip(parameters.items(), starts, strict=True):
        low, high = max(start, first), min(start + parameter.numel(), first + size)
        if low < high:
            mine = shard[low - first : high - first]
            copy_flat(mine, source, name, parameter.shape, low - start, high - start)
        views.append(unversioned[start : start + parameter.numel()].view(parameter.shape))
    unit = _Unit(whole, shard, is_here=shard is whole)
    if not unit.is_here:
        whole.untyped_storage().resize_(0)
    return unit, views


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
