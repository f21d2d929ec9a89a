"""Networks built in shards: each rank reads only the rows that it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn

from rtdmd.distributed.config import zero_stage
from rtdmd.errors import UserError


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
    """A network with its weights loaded; under ZeRO-3 partitioned from the first moment.

    ``make`` constructs the module with arbitrary weights. Under ZeRO-3 each parameter exists whole
    only while it is constructed; its weights arrive slice by slice. ``progress`` is called after each
    tensor. Raises UserError if a tensor has another shape than the network's.
    """
    if zero_stage(config) == 3:
        # Without `dtype`, which a CPU without float16 overrules with bfloat16: the configuration says it too.
        with deepspeed.zero.Init(config_dict_or_path=config):
            network = make()
    else:
        with torch.device(device):
            network = make().to(dtype=dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            _check_shape(source, name, getattr(parameter, "ds_shape", parameter.shape))
            if hasattr(parameter, "ds_tensor"):
                _load_shard(parameter, name, source)
            else:
                parameter.copy_(source.read(name))
            progress()
        persistent = network.state_dict(keep_vars=True).keys()
        for name, buffer in network.named_buffers():
            if name in persistent:
                _check_shape(source, name, buffer.shape)
                buffer.copy_(source.read(name))
    return network.to(device) if zero_stage(config) != 3 else _buffers_to(network, device)


def _check_shape(source: TensorSource, name: str, shape: torch.Size) -> None:
    stored = source.shape(name)
    if tuple(stored) != tuple(shape):
        raise UserError(f"{name}: the weights have shape {tuple(stored)}, the network {tuple(shape)}")


def _load_shard(parameter: Any, name: str, source: TensorSource) -> None:
    """Fill this rank's shard of a parameter that ZeRO-3 has partitioned.

    The shard is the flat range [rank·n, (rank+1)·n) of the parameter, n elements a rank; it lies
    in the rows that cover the range. The last ranks' shards are padded.
    """
    shard = parameter.ds_tensor
    shape, total = tuple(parameter.ds_shape), parameter.ds_numel
    per_row = max(total // shape[0], 1) if shape else 1
    start = min(deepspeed.comm.get_rank() * shard.numel(), total)
    stop = min(start + shard.numel(), total)
    if start == stop:
        return
    first_row, last_row = start // per_row, -(-stop // per_row)
    rows = source.read(name, first_row, last_row) if shape else source.read(name)
    flat = rows.reshape(-1)[start - first_row * per_row : stop - first_row * per_row]
    shard.data[: stop - start].copy_(flat)


def _buffers_to(network: nn.Module, device: torch.device) -> nn.Module:
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return network
