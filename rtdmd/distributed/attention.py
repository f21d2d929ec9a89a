"""cuDNN's attention, whose backward torch would otherwise run with the layout of an earlier call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def laid_out_like(value: Tensor, other: Tensor) -> Tensor:
    """``value`` with the strides that ``torch.empty_like(other)`` has: itself, or a copy."""
    wanted = torch.empty_like(other)
    return value if value.stride() == wanted.stride() else wanted.copy_(value)


@cache
def mend_cudnn_backward() -> torch.library.Library:
    """From here on, gradients reach cuDNN's attention backward laid out as the queries are.

    Where cuDNN is 9.5.1 or later, torch (2.6 to 2.13: ``aten/src/ATen/native/cudnn/MHA.cpp``) builds a
    backward for the strides of the first output gradient that it sees, and finds it again by those of
    queries, keys and values alone. A later gradient of other strides is read as if it had the first
    one's: silently wrong, or not finite where that reaches past its end. Blocks compiled and not, and
    FLUX.2's two kinds of block, do differ there. Costs a copy of a gradient that is laid out differently.
    """
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default

    def backward(
        gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *rest: Any, **named: Any
    ) -> Any:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (gradient, query, key, value)):
            raise NotImplementedError("cuDNN's attention has no second derivative")
        gradient, out = laid_out_like(gradient, query), laid_out_like(out, query)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(gradient, query, key, value, out, *rest, **named)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_cudnn_attention_backward", backward, "AutogradCUDA")
    return library
