"""Stage 1, cold start: AC-DMD distils the teacher into a few-step generator (arXiv 2605.26108)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
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
class Batch:
    """This rank's prompts of an iteration, with their global sample indices."""

    indices: list[int]
    text: TextEmbeddings

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.indices[part], self.text[part])


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
        self._ahead: dict[int, Batch] = {}  # the next iteration's

    def step(self, iteration: int) -> StepReport:
        """Iteration 0, 1, …"""
        means = Means()
        self.roles.set_learning_rates(self.settings, iteration, self.num_steps)
        batch = self._ahead.pop(iteration, None) or self._batch(iteration)
        updates_generator = (iteration + 1) % self.settings.generator_every == 0
        self._train_fake_score(iteration, batch, means)
        if not updates_generator:
            self._encode_ahead(iteration + 1)
        norms = {"fake_score/grad_norm": self.roles.fake_score.engine.step().grad_norm}
        if updates_generator:
            self._train_generator(iteration, batch, means)
            self._encode_ahead(iteration + 1)
            norms["generator/grad_norm"] = self.roles.generator.engine.step().grad_norm
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

    def _train_fake_score(self, iteration: int, batch: Batch, means: Means) -> None:
        """Gradients by which the fake score learns the distribution of what the generator paints now."""
        stop = self.draws.integer(iteration, "fake/stop", 1, len(self.few.sigmas))
        with torch.no_grad():
            reached = self._rollout(iteration, "fake", batch, stop)
        fake, parts = self.roles.fake_score, self._parts(batch)
        for part in parts:
            micro = batch[part]
            samples = Samples(reached.final[part], reached.final_sigma, iteration, micro.indices)
            loss, terms = self._matching.fake_score_loss(fake.velocity(micro.text), samples)
            fake.engine.backward(loss / len(parts), last=part == parts[-1])
            means.add("fake_score", terms | {"loss": loss})

    def _train_generator(self, iteration: int, batch: Batch, means: Means) -> None:
        """Gradients by which the generator follows teacher minus fake score, on the same prompts.

        Of a rollout the last step alone carries gradient.
        """
        stop = self.draws.integer(iteration, "generator/stop", 1, len(self.few.sigmas))
        with torch.no_grad():
            reached = self._rollout(iteration, "generator", batch, stop, range(stop - 1))
        teacher, fake, generator = self.roles.teacher, self.roles.fake_score, self.roles.generator
        parts = self._parts(batch)
        for part in parts:
            micro = batch[part]
            state, last_step = reached.final[part], range(stop - 1, stop)
            last = self._steps(iteration, "generator", micro, stop, state, last_step)
            samples = Samples(last.final, last.final_sigma, iteration, micro.indices)
            loss = self._matching.generator_loss(
                teacher.velocity(micro.text), fake.velocity(micro.text), samples
            )
            generator.engine.backward(loss / len(parts), last=part == parts[-1])
            means.add("generator", {"distribution_matching": loss})

    def _rollout(
        self, iteration: int, purpose: str, batch: Batch, stop: int, steps: range | None = None
    ) -> Trajectory:
        """From noise, those ``steps`` of a rollout that stops after ``stop`` of them; by default all.

        Of the whole batch at once: without gradient they need little memory.
        """
        initial = self._noise(iteration, f"{purpose}/initial", batch)
        return self._steps(iteration, purpose, batch, stop, initial, range(stop) if steps is None else steps)

    def _steps(
        self, iteration: int, purpose: str, batch: Batch, stop: int, state: Tensor, steps: range
    ) -> Trajectory:
        # Cut off where a rollout stops, the schedule leads to the clean picture that its last step predicts.
        sigmas = self.few.sigmas if self.settings.sub_interval else self.few.sigmas[:stop]
        return rollout(
            self.roles.generator.velocity(batch.text),
            state,
            sigmas,
            self.few.eta,
            lambda step: self._noise(iteration, f"{purpose}/transition{step}", batch),
            first=steps.start,
            num_steps=len(steps),
        )

    def _noise(self, iteration: int, purpose: str, batch: Batch) -> Tensor:
        return self.draws.normal(iteration, purpose, batch.indices, self.few.latent_shape, self._ranks.device)

    def _encode_ahead(self, iteration: int) -> None:
        """Have the next iteration's prompts encoded: the optimizer's step, to follow, waits for the device.

        The host's part of encoding, which is most of it, then passes while the device is at a backward.
        """
        self.roles.gradient_is_done()
        if iteration < self.num_steps:
            self._ahead = {iteration: self._batch(iteration)}

    def _batch(self, iteration: int) -> Batch:
        """Samples rank·B … rank·B + B − 1 of the iteration's, for a batch size of B."""
        size, world = self.settings.batch_size, self._ranks.world_size
        first = self._ranks.rank * size
        indices = list(range(first, first + size))
        offset = iteration * size * world
        return Batch(indices, self.texts([self._order.index(offset + index) for index in indices]))

    def _parts(self, batch: Batch) -> list[slice]:
        """The batch in micro-batches."""
        size = self.settings.micro_batch_size or len(batch)
        return [slice(start, start + size) for start in range(0, len(batch), size)]
