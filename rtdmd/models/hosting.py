"""Networks whose weights wait in host memory and are on the device only while they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtdmd.transfer import to_device


class HostedNetwork:
    """Moves a frozen network's weights to ``device`` before each forward and drops them after it.

    The weights stay in page-locked host memory, from where copies need not wait for the host; a forward's
    own kernels follow them on the same stream. Buffers, which are small, stay on the device. Tensors
    among the forward's arguments may be on the host.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._device = device
        self._waiting = [(parameter, _on_host(parameter.data)) for parameter in network.parameters()]
        self._leave()
        network.register_forward_pre_hook(self._enter, with_kwargs=True)
        network.register_forward_hook(self._leave, always_call=True)

    def _enter(self, _network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._waiting:
            raise RuntimeError("a text encoder was called after it had been freed")
        for parameter, waiting in self._waiting:
            parameter.data = waiting.to(self._device, non_blocking=True, copy=True)
        return tuple(self._move(value) for value in args), {k: self._move(v) for k, v in kwargs.items()}

    def _move(self, value: Any) -> Any:
        return to_device(value, self._device) if isinstance(value, Tensor) else value

    def _leave(self, *_: Any) -> None:
        for parameter, waiting in self._waiting:
            parameter.data = waiting

    def free(self) -> None:
        """Drop the weights from host memory too; the network can't run any more."""
        for parameter, waiting in self._waiting:
            parameter.data = torch.empty(0, dtype=waiting.dtype)
        self._waiting = []


def _on_host(values: Tensor) -> Tensor:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")
    return host.copy_(values)


def host_networks(networks: Sequence[nn.Module], device: torch.device) -> list[HostedNetwork]:
    """Move ``networks`` to host memory, one after the other, and give their device memory back."""
    hosted = [HostedNetwork(network, device) for network in networks]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return hosted
