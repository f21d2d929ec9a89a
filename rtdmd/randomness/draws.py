"""Every random draw of a run as a function of (seed, stage, step, purpose, global sample index).

No draw depends on rank, micro-batch or on what was drawn before. One rank and two, accumulated
and whole batches, straight and resumed runs therefore see the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtdmd.randomness.normals import normals, split_words
from rtdmd.transfer import to_device

_DIGEST_BITS = 128
_FLOAT32_BITS = 24


@dataclass(frozen=True)
class Draws:
    """The random numbers of one stage of a run.

    Every kind of draw starts from the BLAKE2b hash of all that it depends on but the sample. Noise takes it
    as the key of a counter-based generator whose counter names the sample (:func:`normals`), a number per
    sample is the hash continued with the sample itself.
    """

    seed: int
    stage: str

    def _hash(self, kind: str, step: int, purpose: str) -> Any:
        # A tuple's text is unambiguous; the kind keeps draws of one purpose but of different kinds apart.
        text = repr((self.seed, self.stage, kind, step, purpose))
        return blake2b(text.encode(), digest_size=_DIGEST_BITS // 8)

    def _numbers(self, kind: str, step: int, purpose: str, indices: Sequence[int | str]) -> Iterator[int]:
        """A uniform integer in [0, 2^128) per index."""
        common = self._hash(kind, step, purpose)
        for index in indices:
            own = common.copy()
            own.update(repr(index).encode())
            yield int.from_bytes(own.digest(), "little")

    def _generator(self, kind: str, step: int, purpose: str) -> np.random.Generator:
        key = int.from_bytes(self._hash(kind, step, purpose).digest(), "little")
        return np.random.Generator(np.random.Philox(key=key))

    def normal(
        self,
        step: int,
        purpose: str,
        indices: Sequence[int | str],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal noise [len(indices), *shape], float32, on ``device``.

        The same on every device, but for a last place where float64 functions differ in theirs and the
        rounding to float32 is a tie (about one number in 10^8).
        """
        key = split_words(self._hash("normal", step, purpose).digest())
        drawn = normals((key[0], key[1]), tuple(indices), math.prod(shape), torch.device(device))
        return drawn.view(len(indices), *shape)

    def uniform(
        self, step: int, purpose: str, indices: Sequence[int | str], device: torch.device | str = "cpu"
    ) -> Tensor:
        """Uniform numbers in [0, 1), multiples of 2^-24, [len(indices)], float32, on ``device``."""
        numbers = self._numbers("uniform", step, purpose, indices)
        rows = [(number >> (_DIGEST_BITS - _FLOAT32_BITS)) * 2.0**-_FLOAT32_BITS for number in numbers]
        return to_device(torch.tensor(rows, dtype=torch.float32), device)

    def integers(
        self,
        step: int,
        purpose: str,
        indices: Sequence[int | str],
        low: int,
        high: int,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Uniform integers in {low, …, high}, both ends included, [len(indices)], int64, on ``device``.

        A 128-bit number modulo n = high − low + 1: probabilities are within 2^-128 of 1/n.
        """
        numbers = self._numbers("integers", step, purpose, indices)
        rows = [low + number % (high - low + 1) for number in numbers]
        return to_device(torch.tensor(rows, dtype=torch.int64), device)

    def integer(self, step: int, purpose: str, low: int, high: int) -> int:
        """One integer in {low, …, high} for all samples of the step."""
        return low + next(self._numbers("integer", step, purpose, ["all"])) % (high - low + 1)

    def subset(self, step: int, purpose: str, population: int, size: int) -> list[int]:
        """``size`` distinct members of {0, …, population − 1} in ascending order."""
        drawn = self._generator("subset", step, purpose).choice(population, size, replace=False)
        return sorted(int(member) for member in drawn)

    def permutation(self, step: int, purpose: str, count: int) -> list[int]:
        """A permutation of {0, …, count − 1}."""
        return self._generator("permutation", step, purpose).permutation(count).tolist()
