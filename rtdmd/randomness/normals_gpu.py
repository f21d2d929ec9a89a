"""The numbers of :mod:`rtdmd.randomness.normals` in one kernel launch, written in Triton."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from rtdmd.randomness.normals import Key, sample_words
from rtdmd.transfer import to_device

_BLOCKS = 128  # blocks of four words, eight numbers, per program


@triton.jit
def _store_pair(out, position, count, word):
    """The two numbers of a word, at ``position`` and the next."""
    # A Python float would be rounded to float32; 0.5, 2^-32 and -2 are not changed by that.
    two_pi = tl.full(word.shape, 6.283185307179586, tl.float64)
    u = ((word & 0xFFFFFFFF).to(tl.float64) + 0.5) * 2.3283064365386963e-10
    v = ((word >> 32).to(tl.float64) + 0.5) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log(u))
    tl.store(out + position, (radius * tl.cos(two_pi * v)).to(tl.float32), position < count)
    tl.store(out + position + 1, (radius * tl.sin(two_pi * v)).to(tl.float32), position + 1 < count)


@triton.jit(do_not_specialize=["key_low", "key_high", "count"])
def _normals_kernel(out, samples, key_low, key_high, count, blocks: tl.constexpr):
    """Program (b, i): blocks b·``blocks`` … of sample i, row i of ``out`` [B, count]."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)
    nothing = block ^ block
    word0, word1, word2, word3 = tl.philox_impl(
        (block + 1).to(tl.uint64),
        (nothing + tl.load(samples + 3 * row)).to(tl.uint64),
        (nothing + tl.load(samples + 3 * row + 1)).to(tl.uint64),
        (nothing + tl.load(samples + 3 * row + 2)).to(tl.uint64),
        (nothing + key_low).to(tl.uint64),
        (nothing + key_high).to(tl.uint64),
    )
    out += row * count
    position = 8 * block
    _store_pair(out, position, count, word0)
    _store_pair(out, position + 2, count, word1)
    _store_pair(out, position + 4, count, word2)
    _store_pair(out, position + 6, count, word3)


def _signed(word: int) -> int:
    """The signed 64-bit integer with the bits of an unsigned one; Triton's plain integers are signed."""
    return word - 2**64 if word >= 2**63 else word


@lru_cache(maxsize=256)
def _samples_on(device: torch.device, indices: tuple[int | str, ...]) -> Tensor:
    """Each sample's counter words, int64 [B, 3]; a step draws many times for the same samples."""
    return to_device(torch.from_numpy(sample_words(indices).view(np.int64)), device)


def normals_on_gpu(key: Key, indices: tuple[int | str, ...], count: int, device: torch.device) -> Tensor:
    """``count`` numbers N(0, 1) for each of ``indices``, float32 [B, count].

    The words are the host's bit by bit; float64 logarithm, sine and cosine may differ from the host's in
    their last place, which the rounding to float32 hides but for about one number in 10^8.
    """
    out = torch.empty(len(indices), count, device=device)
    blocks = -(-count // 8)
    grid = (triton.cdiv(blocks, _BLOCKS), len(indices))
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(out):
        _normals_kernel[grid](
            out, _samples_on(device, indices), _signed(key[0]), _signed(key[1]), count, blocks=_BLOCKS
        )
    return out
