"""The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES gives them."""

from __future__ import annotations

import os

import torch


def visible_gpus() -> list[str]:
    """Those of CUDA_VISIBLE_DEVICES if it is set, else all by number."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]
