"""What families share about latents, noise levels and images."""

from __future__ import annotations

import torch
from torch import Tensor

from rtdmd.errors import UserError


def check_size(height: int, width: int, multiple: int) -> None:
    """UserError unless both sides of an image are positive multiples of ``multiple`` pixels."""
    for name, size in (("height", height), ("width", width)):
        if size < multiple or size % multiple:
            nearest = max(1, round(size / multiple)) * multiple
            raise UserError(
                f"{name} {size} does not fit the model: take a multiple of {multiple}, such as {nearest}"
            )


def per_sample(sigma: float | Tensor, x: Tensor) -> Tensor:
    """The noise level as float32 [B] on the device of ``x`` [B, ...]; ``sigma`` is one number or [B]."""
    if isinstance(sigma, Tensor):
        return sigma.to(x.device, torch.float32).expand(x.shape[0])
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)


def to_unit_range(images: Tensor) -> Tensor:
    """A decoder's output, nominally in [-1, 1], to float32 images clamped to [0, 1]."""
    return (images.float() / 2 + 0.5).clamp(0, 1)
