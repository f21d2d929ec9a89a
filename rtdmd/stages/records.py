"""What the RTDMD stage keeps of its rollouts until the epoch's updates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rtdmd.models.protocol import TextEmbeddings
from rtdmd.rollout import Trajectory
from rtdmd.stages.scores import RewardPull


@dataclass(frozen=True)
class SharedTexts:
    """Embeddings of an epoch's distinct prompts, and each prompt's row."""

    text: TextEmbeddings
    rows: dict[int, int]

    def of(self, prompt_ids: list[int]) -> TextEmbeddings:
        """One row for each of the samples' prompts."""
        return self.text[[self.rows[prompt] for prompt in prompt_ids]]


@dataclass(frozen=True)
class Record:
    """What a rollout leaves behind for training, of B samples."""

    indices: list[int]  # global sample indices of the epoch
    prompt_ids: list[int]
    texts: SharedTexts
    trajectory: Trajectory
    log_probs: dict[int, Tensor]  # rollout log-probability of each drawn step, [B]
    pull: RewardPull | None = None  # the rewards' on the final latents, once they are scored

    def __getitem__(self, part: slice) -> Record:
        moving = self.trajectory
        return Record(
            self.indices[part],
            self.prompt_ids[part],
            self.texts,
            Trajectory(moving.sigmas, [x[part] for x in moving.states], [v[part] for v in moving.velocities]),
            {step: value[part] for step, value in self.log_probs.items()},
            None if self.pull is None else self.pull[part],
        )

    def __len__(self) -> int:
        return len(self.indices)

    def split(self, size: int) -> list[Record]:
        return [self[slice(start, start + size)] for start in range(0, len(self), size)]

    @property
    def sample_text(self) -> TextEmbeddings:
        return self.texts.of(self.prompt_ids)


@dataclass(frozen=True)
class Weighted:
    """A micro-batch of the generator update with advantages and weights [B].

    ``share`` turns this rank's weighted mean into its part of the mean over all ranks.
    """

    record: Record
    advantages: Tensor
    weights: Tensor
    share: Tensor

    def shared(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted means of this rank, each as its part of the one over all ranks."""
        return {name: mean * self.share for name, mean in means.items()}
