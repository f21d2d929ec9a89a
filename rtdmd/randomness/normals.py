"""Standard normal numbers addressed by (key, sample, position), on the host or on a GPU.

Philox4x64-10 (Salmon et al. 2011, doi 10.1145/2063384.2063405), a counter-based generator: four 64-bit
words are a function of a 128-bit key, which says what is drawn, and a 256-bit counter, which says for
which sample and where. Each word makes two numbers by Box and Muller's transform in float64, rounded to
float32.
"""

from __future__ import annotations

import math
from functools import lru_cache
from hashlib import blake2b
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from rtdmd.transfer import to_device

Key = tuple[int, int]

_WORD = 2**64
_CHUNK_WORDS = 2**15  # transformed at once: their float64 values stay in the processor's cache
HAS_TRITON = find_spec("triton") is not None  # comes with torch's CUDA builds on Linux


def split_words(digest: bytes) -> list[int]:
    """64-bit words of a hash, little-endian."""
    return [int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8)]


@lru_cache(maxsize=256)
def sample_words(indices: tuple[int | str, ...]) -> np.ndarray:
    """Words 1 to 3 of each sample's counter, uint64 [B, 3]; word 0 counts blocks from 1.

    An integer is (itself, 0, 0), a string (its hash's two words, 1).
    """
    rows = [
        (*split_words(blake2b(index.encode(), digest_size=16).digest()), 1)
        if isinstance(index, str)
        else (index % _WORD, 0, 0)
        for index in indices
    ]
    return np.array(rows, dtype=np.uint64).reshape(-1, 3)


def normals(key: Key, indices: tuple[int | str, ...], count: int, device: torch.device) -> Tensor:
    """``count`` numbers N(0, 1) for each of ``indices``, float32 [B, count], on ``device``.

    Computed on the GPU where that is the device and Triton is there, else on the host.
    """
    if device.type == "cuda" and HAS_TRITON:
        from rtdmd.randomness.normals_gpu import normals_on_gpu

        return normals_on_gpu(key, indices, count, device)
    return to_device(normals_on_host(key, indices, count), device)


def normals_on_host(key: Key, indices: tuple[int | str, ...], count: int) -> Tensor:
    """See :func:`normals`; beyond the result, memory for a sample or some hundred thousand numbers."""
    words = -(-count // 2)
    drawn = torch.empty(len(indices), count)
    rows = max(1, _CHUNK_WORDS // max(words, 1))
    for start in range(0, len(indices), rows):
        part = philox_words(key, sample_words(indices)[start : start + rows], words)
        drawn[start : start + rows] = _box_muller(part)[:, :count]
    return drawn


def philox_words(key: Key, samples: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` words of Philox4x64-10 for each counter (1, *sample), uint64 [B, count]."""
    generator = np.random.Philox(key=0)
    state = generator.state
    state["state"]["key"][:] = key
    counter = state["state"]["counter"]
    words = np.empty((len(samples), count), dtype=np.uint64)
    for row, sample in zip(words, samples, strict=True):
        counter[1:] = sample  # word 0 stays 0: NumPy counts on before it computes a block
        generator.state = state
        row[:] = generator.random_raw(count)
    return words


def _box_muller(words: np.ndarray) -> Tensor:
    """[B, n] words to [B, 2n] numbers: √(−2·ln u)·(cos 2πv, sin 2πv), float32.

    u and v are the lower and the upper half of a word: (half + ½)/2^32, strictly between 0 and 1.
    """
    halves = torch.from_numpy(words.view(np.uint32).reshape(len(words), -1, 2))
    uniform = (halves.double() + 0.5) * 2.0**-32
    radius = (-2.0 * uniform[..., 0].log()).sqrt()
    angle = 2 * math.pi * uniform[..., 1]
    numbers = torch.empty(halves.shape, dtype=torch.float32)
    numbers[..., 0] = radius * angle.cos()
    numbers[..., 1] = radius * angle.sin()
    return numbers.flatten(1)
