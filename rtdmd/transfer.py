"""From the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """``value`` on ``device``, without making the host wait for what a GPU is doing."""
    if value.device.type == "cpu" and torch.device(device).type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
