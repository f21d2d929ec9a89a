"""Rewards as the RTDMD stage uses them: scores of pictures, and a gradient at the final latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from rtdmd.models.protocol import ModelFamily
from rtdmd.objectives import reward_hinge_loss
from rtdmd.rewards.image_statistics import STATISTICS, thumbnails
from rtdmd.rewards.protocol import Metadata, Reward
from rtdmd.stages.combination import Combination
from rtdmd.stages.scores import Scored
from rtdmd.stages.scoring_thread import ScoringThread


@dataclass(frozen=True)
class Captions:
    """Prompts with their metadata, one each per sample."""

    prompts: Sequence[str]
    metadata: Sequence[Metadata]

    def __getitem__(self, part: slice) -> Captions:
        return Captions(self.prompts[part], self.metadata[part])

    def rows(self, chosen: Sequence[int]) -> Captions:
        return Captions([self.prompts[i] for i in chosen], [self.metadata[i] for i in chosen])


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


class RewardPanel:
    """Several rewards and their combination, behind one decoder.

    ``backprop`` names the rewards whose gradient is used; ``monitors`` are never trained on. Pictures are
    decoded and scored ``score_chunk`` at a time, and back-propagated through ``backprop_chunk`` at a time;
    ``progress`` is called after each score.
    """

    def __init__(
        self,
        family: ModelFamily,
        rewards: Sequence[Reward],
        combination: Combination,
        backprop: Sequence[str],
        *,
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
        self._thread = thread
        self._score_chunk = score_chunk
        self._backprop_chunk = backprop_chunk
        self._progress = progress

    def start_scoring(self, latents: Tensor, captions: Captions, *, closely: bool) -> Future[Scored]:
        """What :meth:`score` will give, computed beside the caller; keep ``latents`` until then."""
        return self._thread.submit(lambda: self.score(latents, captions, closely=closely))

    @torch.no_grad()
    def score(self, latents: Tensor, captions: Captions, *, closely: bool) -> Scored:
        """Every reward's scores [B], float32, on the CPU, of final latents [B, C, H, W].

        ``closely`` adds the monitors' scores and what the pictures are like.
        """
        parts = []
        for part in _chunks(len(latents), self._score_chunk):
            images = self._family.decode(latents[part])
            rewards = self._scores(self.rewards, images, captions[part])
            if closely:
                monitors = self._scores(self.monitors, images, captions[part])
                statistics = {name: measure(images).cpu() for name, measure in STATISTICS.items()}
                parts.append(Scored(rewards, monitors, statistics, thumbnails(images).cpu()))
            else:
                parts.append(Scored(rewards))
        return Scored.cat(parts)

    def _scores(self, rewards: Sequence[Reward], images: Tensor, captions: Captions) -> dict[str, Tensor]:
        scores = {}
        for reward in rewards:
            given = reward.score(images, captions.prompts, captions.metadata)
            scores[reward.name] = given.to("cpu", torch.float32)
            self._progress()
        return scores

    def close(self) -> None:
        """End the thread and whatever processes rewards have started."""
        self._thread.close()
        for reward in (*self.rewards, *self.monitors):
            close = getattr(reward, "close", None)
            if close is not None:
                close()

    def hinge(
        self, x0: Tensor, captions: Captions, margin: float, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reward hinge loss over the samples that weigh something, and its metrics.

        Differentiable in ``x0`` [B, C, H, W]; ``weights`` [B]. Decoder and reward models run forward and
        backward chunk by chunk on detached latents; the returned scalar carries their gradient on into
        ``x0``'s own graph. At most one chunk's graph exists at a time. Its value is the loss's.

        Samples of weight 0 are neither decoded nor scored: one of them may be there for want of a finite
        score, and 0·NaN is NaN.
        """
        weighty = weights.nonzero().flatten().tolist()
        total = weights.sum()
        loss, exceeding = torch.zeros((), device=x0.device), torch.zeros((), device=x0.device)
        gradient = torch.zeros_like(x0)
        for part in _chunks(len(weighty), self._backprop_chunk):
            rows = weighty[part]
            leaf = x0[rows].detach().requires_grad_()
            reward = self._differentiable_sum(leaf, captions.rows(rows))
            # The weighted mean over all samples is the chunks' means, weighted by their shares.
            chunk_loss = weights[rows].sum() / total * reward_hinge_loss(reward, margin, weights[rows])
            (gradient[rows],) = torch.autograd.grad(chunk_loss, leaf)
            loss = loss + chunk_loss.detach()
            exceeding = exceeding + (reward.detach() >= margin).sum() / len(weighty)
        carried = (x0 * gradient).sum()
        return loss + carried - carried.detach(), {"hinge": loss, "hinge_active": 1 - exceeding}

    def _differentiable_sum(self, latents: Tensor, captions: Captions) -> Tensor:
        """The combination of the rewards that back-propagate, of decode(latents), [B]."""
        images = self._family.decode(latents)
        scores = {
            reward.name: reward.score(images, captions.prompts, captions.metadata).to(latents.device)
            for reward in self._backprop
        }
        return self.combination.total(scores)
