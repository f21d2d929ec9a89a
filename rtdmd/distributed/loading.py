"""Networks built in shards: each rank reads only the rows that it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import deepspeed
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from rtdmd.distributed.config import zero_stage
from rtdmd.errors import UserError

_SLICE = 2**24  # elements read at once: an adapter is merged into them in float32


class TensorSource(Protocol):
    """Named tensors, readable row by row."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start…stop of the first dimension; all without ``stop``."""
        ...


def build_network(
    make: Callable[[], nn.Module],
    source: TensorSource,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[], None],
) -> nn.Module:
    """A network with its weights loaded, in ``dtype`` on ``device`` from the first moment.

    ``make`` constructs the module with arbitrary weights, of which only one tensor at a time exists in
    another dtype or, under ZeRO-3, whole. Weights arrive slice by slice. ``progress`` is called after each
    tensor. Raises UserError if a tensor has another shape than the network's.
    """
    if zero_stage(config) == 3:
        # Without `dtype`, which a CPU without float16 overrules with bfloat16: the configuration says it too.
        with deepspeed.zero.Init(config_dict_or_path=config):
            network = make()
    else:
        network = make_empty(make, dtype, device)
        _allocate(network, device)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            check_shape(source, name, getattr(parameter, "ds_shape", parameter.shape))
            if hasattr(parameter, "ds_tensor"):
                _load_shard(parameter, name, source)
            else:
                copy_flat(parameter.view(-1), source, name, parameter.shape, 0, parameter.numel())
            progress()
    load_buffers(network, source, device)
    return network


def make_empty(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network whose parameters have a shape and ``dtype`` but no memory.

    Constructors make float32 parameters; each is dropped before the next one is made. Buffers stay as the
    module computes them: files may lack them.
    """
    with torch.device(device), init_empty_weights(include_buffers=False):
        # Past diffusers' own `to`, which warns of modules to keep in float32 where there are none.
        return nn.Module.to(make(), dtype)


def load_buffers(network: nn.Module, source: TensorSource, device: torch.device) -> None:
    """Fill the buffers that files hold, and move all of them to ``device``."""
    persistent = network.state_dict(keep_vars=True).keys()
    for name, buffer in network.named_buffers():
        if name in persistent:
            check_shape(source, name, buffer.shape)
            buffer.copy_(source.read(name))
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def check_shape(source: TensorSource, name: str, shape: torch.Size) -> None:
    """Raises UserError unless the stored tensor has the network's shape."""
    stored = source.shape(name)
    if tuple(stored) != tuple(shape):
        raise UserError(f"{name}: the weights have shape {tuple(stored)}, the network {tuple(shape)}")


def _allocate(network: nn.Module, device: torch.device) -> None:
    """Memory with arbitrary values for every parameter."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device=device)
            setattr(module, name, nn.Parameter(empty, parameter.requires_grad))


def _load_shard(parameter: Any, name: str, source: TensorSource) -> None:
    """Fill this rank's shard of a parameter that ZeRO-3 has partitioned.

    The shard is the flat range [rank·n, (rank+1)·n) of the parameter, n elements a rank; it lies
    in the rows that cover the range. The last ranks' shards are padded.
    """
    shard, total = parameter.ds_tensor, parameter.ds_numel
    start = min(deepspeed.comm.get_rank() * shard.numel(), total)
    stop = min(start + shard.numel(), total)
    if start < stop:
        copy_flat(shard.data[: stop - start], source, name, parameter.ds_shape, start, stop)


def copy_flat(
    into: Tensor, source: TensorSource, name: str, shape: Sequence[int], start: int, stop: int
) -> None:
    """Elements start…stop of the flat tensor ``name``, a few rows at a time, into a tensor of that length."""
    if not shape:
        into.copy_(source.read(name).reshape(-1))
        return
    per_row = max(math.prod(shape) // shape[0], 1)
    step = max(_SLICE // per_row, 1)
    for first_row in range(start // per_row, -(-stop // per_row), step):
        last_row = min(first_row + step, -(-stop // per_row))
        low, high = max(start, first_row * per_row), min(stop, last_row * per_row)
        rows = source.read(name, first_row, last_row).reshape(-1)
        into[low - start : high - start].copy_(rows[low - first_row * per_row : high - first_row * per_row])
