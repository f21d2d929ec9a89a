"""Stage 1, cold start: AC-DMD distils the teacher into a few-step generator (arXiv 2605.26108)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rtdmd.distributed.collectives import Ranks
from rtdmd.models.protocol import ModelFamily, TextEmbeddings
from rtdmd.prompts import PromptSet, ShuffledPrompts
from rtdmd.randomness import Draws
from rtdmd.recipe.schema import ColdStartSection
from rtdmd.rollout import FewSteps, Trajectory, rollout
from rtdmd.stages.ac_dmd import AmbientMatching, Samples
from rtdmd.stages.metrics import Means, StepReport
from rtdmd.stages.roles import Roles
from rtdmd.stages.texts import PromptTexts


@dataclass(frozen=True)
class MicroBatch:
    """Prompts of one micro-batch, with their global sample indices."""

    indices: list[int]
    text: TextEmbeddings


class ColdStart:
    """One iteration is one fake-score update and, every so often, a generator update."""

    name = "cold_start"

    def __init__(
        self,
        roles: Roles,
        family: ModelFamily,
        prompts: PromptSet,
        texts: PromptTexts,
        steps: FewSteps,
        matching: AmbientMatching,
        draws: Draws,
        settings: ColdStartSection,
        ranks: Ranks,
    ) -> None:
        self.roles = roles
        self.settings = settings
        self.num_steps = settings.iterations
        self.family = family
        self.prompts = prompts
        self.texts = texts
        self._order = ShuffledPrompts(len(prompts), draws.seed, self.name)
        self.few = steps
        self._matching = matching
        self.draws = draws
        self._ranks = ranks

    def step(self, iteration: int) -> StepReport:
        """Iteration 0, 1, …"""
        means = Means()
        batch = self._micro_batches(iteration)
        fake = self._update_fake_score(iteration, batch, means)
        updates_generator = (iteration + 1) % self.settings.generator_every == 0
        norms = {"fake_score/grad_norm": fake}
        if updates_generator:
            norms["generator/grad_norm"] = self._update_generator(iteration, batch, means)
        notices = self.roles.after_step(updates_generator)
        return StepReport(means.read(self._ranks) | norms, updates_generator, notices)

    def close(self) -> None:
        """Free the engines."""
        self.roles.close()

    def state(self) -> dict[str, Any]:
        """Nothing: an iteration learns from another by the weights alone."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """There is nothing to take up."""

    def _update_fake_score(self, iteration: int, batch: list[MicroBatch], means: Means) -> float:
        """The fake score learns the distribution of what the generator paints now."""
        stop = self.draws.integer(iteration, "fake/stop", 1, len(self.few.sigmas))
        fake = self.roles.fake_score
        for number, micro in enumerate(batch):
            trajectory = self._rollout(iteration, "fake", micro, stop, grad_last=False)
            samples = Samples(trajectory.final, trajectory.final_sigma, iteration, micro.indices)
            loss, parts = self._matching.fake_score_loss(fake.velocity(micro.text), samples)
            fake.engine.backward(loss / len(batch), last=number == len(batch) - 1)
            means.add("fake_score", parts | {"loss": loss})
        return fake.engine.step().grad_norm

    def _update_generator(self, iteration: int, batch: list[MicroBatch], means: Means) -> float:
        """The generator follows teacher minus fake score, on the same prompts."""
        stop = self.draws.integer(iteration, "generator/stop", 1, len(self.few.sigmas))
        teacher, fake, generator = self.roles.teacher, self.roles.fake_score, self.roles.generator
        for number, micro in enumerate(batch):
            trajectory = self._rollout(iteration, "generator", micro, stop, grad_last=True)
            samples = Samples(trajectory.final, trajectory.final_sigma, iteration, micro.indices)
            loss = self._matching.generator_loss(
                teacher.velocity(micro.text), fake.velocity(micro.text), samples
            )
            generator.engine.backward(loss / len(batch), last=number == len(batch) - 1)
            means.add("generator", {"distribution_matching": loss})
        return generator.engine.step().grad_norm

    def _rollout(
        self, iteration: int, purpose: str, micro: MicroBatch, stop: int, grad_last: bool
    ) -> Trajectory:
        def noise(name: str) -> Tensor:
            shape, device = self.few.latent_shape, self._ranks.device
            return self.draws.normal(iteration, f"{purpose}/{name}", micro.indices, shape, device)

        # Cut off after its last step, the schedule leads to the clean picture that this step predicts.
        sigmas = self.few.sigmas if self.settings.sub_interval else self.few.sigmas[:stop]
        return rollout(
            self.roles.generator.velocity(micro.text),
            noise("initial"),
            sigmas,
            self.few.eta,
            lambda step: noise(f"transition{step}"),
            num_steps=stop,
            grad_last=grad_last,
        )

    def _micro_batches(self, iteration: int) -> list[MicroBatch]:
        """This rank's prompts of the iteration; sample m·W·b + rank·b + i for micro-batch m of b."""
        size = self.settings.micro_batch_size or self.settings.batch_size
        world, rank = self._ranks.world_size, self._ranks.rank
        batches = []
        for number in range(self.settings.batch_size // size):
            first = (number * world + rank) * size
            indices = list(range(first, first + size))
            offset = iteration * self.settings.batch_size * world
            text = self.texts([self._order.index(offset + index) for index in indices])
            batches.append(MicroBatch(indices, text))
        return batches
