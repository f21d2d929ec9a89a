"""A gradient's layout makes no difference to attention's backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention import layouts
from rtdmd.models.attention import laid_out_like, mend_cudnn_backward

SHAPE = BATCH, HEADS, LENGTH, WIDTH = 2, 4, 48, 64


def test_only_other_layouts_are_copied() -> None:
    query = torch.randn(BATCH, LENGTH, HEADS, WIDTH).transpose(1, 2)
    same, other = torch.randn_like(query), torch.randn(SHAPE)
    assert laid_out_like(same, query) is same
    moved = laid_out_like(other, query)
    assert moved.stride() == query.stride() != other.stride()
    assert torch.equal(moved, other)


@pytest.mark.gpu
def test_cudnn_gives_one_gradient_for_every_layout() -> None:
    """The order in which FLUX.2's blocks come, eager and compiled, in one process."""
    mend_cudnn_backward()
    torch.manual_seed(0)
    inputs = [torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = torch.autograd.grad(functional.scaled_dot_product_attention(*exact), exact, gradient.double())
    for laid_out in layouts(gradient).values():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            got = torch.autograd.grad(functional.scaled_dot_product_attention(*inputs), inputs, laid_out)
        for ours, reference in zip(got, expected, strict=True):
            assert (ours.double() - reference).norm() <= 1e-2 * reference.norm()
