"""Grids of sample pictures during training, painted with the EMA weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.masters import Piece
from rtdmd.images import picture_grid, to_pictures
from rtdmd.models.protocol import ModelFamily
from rtdmd.randomness import Draws
from rtdmd.rollout import FewSteps, paint
from rtdmd.stages.roles import Student
from rtdmd.stages.texts import PromptTexts


class Previews:
    """The same prompts and noise each time, shared out over the ranks."""

    def __init__(
        self,
        prompts: list[str],
        texts: PromptTexts,
        family: ModelFamily,
        steps: FewSteps,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._prompts = prompts
        self._texts = texts
        self._family = family
        self._few = steps
        self._draws = Draws(seed, "preview")
        self._ranks = ranks

    @torch.no_grad()
    def paint(self, generator: Student, weights: list[Piece], path: Path) -> None:
        """Collective: write a PNG grid to ``path``; nothing without prompts."""
        if not self._prompts:
            return
        per_rank = -(-len(self._prompts) // self._ranks.world_size)
        first = self._ranks.rank * per_rank
        # Ranks beyond the last prompt paint it again: every rank makes the same calls.
        mine = [min(first + i, len(self._prompts) - 1) for i in range(per_rank)]
        with generator.engine.weights_from(weights):
            images = self._images(generator, mine)
        everyone = self._ranks.all_gather(images).flatten(0, 1)[: len(self._prompts)]

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture_grid(to_pictures(everyone)).save(path)

        self._ranks.on_main_first(write)

    def _images(self, generator: Student, indices: list[int]) -> Tensor:
        text = self._texts.of([self._prompts[index] for index in indices])

        def noise(purpose: str) -> Tensor:
            return self._draws.normal(0, purpose, indices, self._few.latent_shape, self._ranks.device)

        return paint(self._family, generator.velocity(text), self._few, noise)
