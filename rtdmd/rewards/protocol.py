"""What the rest of the system knows of a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

Metadata = Mapping[str, Any]


class Reward(Protocol):
    """Scores pictures for their prompts; higher is better.

    ``differentiable`` promises that the score has a gradient to the images. One that has started processes
    also has ``close()``, which ends them.
    """

    name: str
    differentiable: bool

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores [B], float32, of images [B, 3, H, W] in [0, 1].

        Raises rather than inventing a score. A network's own number goes out as it is, finite or not.
        """
        ...
