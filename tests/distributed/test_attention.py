"""A gradient's layout makes no difference to attention's backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention import SIZES, attend, errors, layouts
from rtdmd.distributed.attention import laid_out_like, mend_cudnn_backward


def test_only_other_layouts_are_copied() -> None:
    wider, rows, heads = layouts(torch.randn(SIZES)).values()
    assert len({value.stride() for value in (wider, rows, heads)}) == 3
    assert laid_out_like(rows, rows) is rows
    for other in (wider, heads):
        moved = laid_out_like(other, rows)
        assert moved.stride() == rows.stride() != other.stride()
        assert torch.equal(moved, other)


@pytest.mark.gpu
def test_cudnn_gives_one_gradient_for_every_layout() -> None:
    """Of a part of wider rows, as after FLUX.2's single blocks, then of rows, as after its double blocks."""
    mend_cudnn_backward()
    found = errors()
    assert len(found) == 3
    assert all(0 < error < 1e-2 for each in found.values() for error in each)


@pytest.mark.gpu
def test_cudnn_has_no_second_derivative() -> None:
    mend_cudnn_backward()
    query = torch.randn(SIZES, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(NotImplementedError, match="second"):
        torch.autograd.grad(attend([query] * 3).float().sum(), query, create_graph=True)
