"""Rewards as the RTDMD stage uses them: scores of pictures, and their gradient at the final latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from rtdmd.models.protocol import ModelFamily
from rtdmd.objectives import reward_hinge
from rtdmd.rewards.image_statistics import STATISTICS, thumbnails
from rtdmd.rewards.protocol import Metadata, Reward
from rtdmd.stages.combination import Combination
from rtdmd.stages.scores import RewardPull, Scored
from rtdmd.stages.scoring_thread import ScoringThread


@dataclass(frozen=True)
class Captions:
    """Prompts with their metadata, one each per sample."""

    prompts: Sequence[str]
    metadata: Sequence[Metadata]

    def __getitem__(self, part: slice) -> Captions:
        return Captions(self.prompts[part], self.metadata[part])


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


class RewardPanel:
    """Several rewards and their combination, behind one decoder.

    ``backprop`` names the rewards whose gradient is used, for the hinge with ``margin``; without any no
    gradient is computed. ``monitors`` are never trained on. Pictures are decoded and scored ``score_chunk``
    at a time, back-propagated through ``backprop_chunk`` at a time; ``progress`` is called after each score.
    """

    def __init__(
        self,
        family: ModelFamily,
        rewards: Sequence[Reward],
        combination: Combination,
        backprop: Sequence[str],
        *,
        margin: float,
        monitors: Sequence[Reward] = (),
        thread: ScoringThread,
        score_chunk: int,
        backprop_chunk: int,
        progress: Callable[[], None],
    ) -> None:
        self._family = family
        self.rewards = list(rewards)
        self.monitors = list(monitors)
        self.combination = combination
        self._backprop = [reward for reward in rewards if reward.name in backprop]
        self._margin = margin
        self._thread = thread
        self._score_chunk = score_chunk
        self._backprop_chunk = backprop_chunk
        self._progress = progress

    @property
    def back_propagated(self) -> list[str]:
        """Names of the rewards whose gradient is used."""
        return [reward.name for reward in self._backprop]

    def start_scoring(self, latents: Tensor, captions: Captions, *, closely: bool) -> Future[Scored]:
        """What :meth:`score` will give, computed beside the caller; keep ``latents`` until then."""
        return self._thread.submit(lambda: self.score(latents, captions, closely=closely))

    @torch.no_grad()
    def score(self, latents: Tensor, captions: Captions, *, closely: bool) -> Scored:
        """Every reward's scores [B], float32, of final latents [B, C, H, W], with the rewards' pull on them.

        All of it is on the CPU. ``closely`` adds the monitors' scores and what the pictures are like. The
        pull is missing if no reward is back-propagated, or none yet: standardising takes an epoch's scores.
        """
        names = self.back_propagated
        pulls = bool(names) and self.combination.is_ready(names)
        parts = []
        for part in _chunks(len(latents), self._score_chunk):
            if pulls:
                images, rewards, pull = self._pull(latents[part], captions[part])
            else:
                images, rewards, pull = self._family.decode(latents[part]), {}, None
            others = [reward for reward in self.rewards if reward.name not in rewards]
            rewards |= self._scores(others, images, captions[part])
            if closely:
                monitors = self._scores(self.monitors, images, captions[part])
                statistics = {name: measure(images).cpu() for name, measure in STATISTICS.items()}
                parts.append(Scored(rewards, monitors, statistics, thumbnails(images).cpu(), pull))
            else:
                parts.append(Scored(rewards, pull=pull))
        return Scored.cat(parts)

    def _scores(self, rewards: Sequence[Reward], images: Tensor, captions: Captions) -> dict[str, Tensor]:
        scores = {}
        for reward in rewards:
            given = reward.score(images, captions.prompts, captions.metadata)
            scores[reward.name] = given.to("cpu", torch.float32)
            self._progress()
        return scores

    def _pull(self, latents: Tensor, captions: Captions) -> tuple[Tensor, dict[str, Tensor], RewardPull]:
        """The pictures, the scores of the rewards that are back-propagated, and their gradient.

        Decoder and rewards run forward and backward chunk by chunk; at most one chunk's graph exists at a
        time. A picture's gradient is its own: nothing in decoder or rewards mixes pictures.
        """
        pictures, scored, pulls = [], [], []
        for part in _chunks(len(latents), self._backprop_chunk):
            with torch.enable_grad():
                leaf = latents[part].detach().requires_grad_()
                images = self._family.decode(leaf)
                scores = {
                    reward.name: reward.score(images, captions[part].prompts, captions[part].metadata).to(
                        latents.device
                    )
                    for reward in self._backprop
                }
                losses = reward_hinge(self.combination.total(scores), self._margin)
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            self._progress()
            pictures.append(images.detach())
            scored.append({name: given.detach().to("cpu", torch.float32) for name, given in scores.items()})
            pulls.append(RewardPull(losses.detach().cpu(), gradient.cpu()))
            del images, scores, losses, gradient
        rewards = {name: torch.cat([scores[name] for scores in scored]) for name in scored[0]}
        return torch.cat(pictures), rewards, RewardPull.cat(pulls)

    def close(self) -> None:
        """End the thread and whatever processes rewards have started."""
        self._thread.close()
        for reward in (*self.rewards, *self.monitors):
            close = getattr(reward, "close", None)
            if close is not None:
                close()
