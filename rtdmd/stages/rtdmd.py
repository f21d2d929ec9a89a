"""Stage 2, RTDMD: rewards through SubGRPO on the stochastic steps and back-propagation on the last.

Reward-Tilted Distribution Matching Distillation, arXiv 2605.26108.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rtdmd.distributed.collectives import Ranks
from rtdmd.flow import cps_log_prob, cps_transition, predict_x0
from rtdmd.models.protocol import ModelFamily, TextEmbeddings
from rtdmd.objectives import group_advantages, policy_loss, weighted_mean
from rtdmd.prompts import GroupSampler, PromptSet
from rtdmd.randomness import Draws
from rtdmd.recipe.schema import RtdmdSection
from rtdmd.rollout import FewSteps, Trajectory, rollout
from rtdmd.stages.ac_dmd import AmbientMatching, Samples
from rtdmd.stages.alarms import HackingAlarms
from rtdmd.stages.metrics import Means, StepReport
from rtdmd.stages.records import Record, SharedTexts, Weighted
from rtdmd.stages.rewarding import Captions, RewardPanel
from rtdmd.stages.roles import Roles
from rtdmd.stages.scores import EpochScores, Scored
from rtdmd.stages.texts import PromptTexts


class Rtdmd:
    """One epoch is a set of rollouts, one fake-score update and one generator update."""

    name = "rtdmd"

    def __init__(
        self,
        roles: Roles,
        family: ModelFamily,
        prompts: PromptSet,
        texts: PromptTexts,
        panel: RewardPanel,
        steps: FewSteps,
        matching: AmbientMatching,
        draws: Draws,
        settings: RtdmdSection,
        ranks: Ranks,
    ) -> None:
        self.roles = roles
        self.settings = settings
        self.num_steps = settings.epochs
        self.family = family
        self.prompts = prompts
        self.texts = texts
        self.panel = panel
        self.few = steps
        self._last_step = len(steps.sigmas) - 1
        self._matching = matching
        self.draws = draws
        self._ranks = ranks
        self._alarms = HackingAlarms(panel.combination.weights)
        self._sampler = GroupSampler(
            len(prompts),
            settings.images_per_prompt,
            settings.sample_batch_size,
            settings.num_sample_batches,
            ranks.world_size,
            draws.seed,
        )

    def step(self, epoch: int) -> StepReport:
        """Epoch 0, 1, …"""
        means = Means()
        self.roles.set_learning_rates(self.settings, epoch, self.num_steps)
        drawn = self.draws.subset(epoch, "policy_steps", self._last_step, self.settings.num_policy_steps)
        records, scores = self._sample(epoch, drawn)
        fake_norm = self._update_fake_score(epoch, records, drawn, means)
        advantages = self._advantages(records, scores, means)
        generator_norm = self._update_generator(epoch, records, advantages, drawn, means)
        norms = {"fake_score/grad_norm": fake_norm, "generator/grad_norm": generator_norm}
        metrics = scores.metrics() | means.read(self._ranks) | norms
        notices = [*scores.notices(), *self._alarms.observe(scores), *self._hinge_notices(epoch, metrics)]
        closely = self._looks_closely(epoch) or not self.panel.monitors
        notices += self.roles.after_step(True, closely)
        return StepReport(metrics, generator_updated=True, notices=tuple(notices))

    def close(self) -> None:
        """Free the engines; end what scores."""
        self.panel.close()
        self.roles.close()

    def state(self) -> dict[str, Any]:
        """What one epoch learns from another besides weights: JSON, equal on all ranks."""
        return {"combination": self.panel.combination.state(), "alarms": self._alarms.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self.panel.combination.restore(state["combination"])
        self._alarms.restore(state["alarms"])

    def _hinge_notices(self, epoch: int, metrics: dict[str, float]) -> list[str]:
        backprop, names = self.settings.reward_backprop, self.panel.back_propagated
        active = metrics.get("generator/hinge_active")
        if active is None and names and epoch > 0:
            return [f"no reward was back-propagated: there are no statistics yet to standardise {names} by"]
        if active != 0 or metrics["advantage/zero_fraction"] == 1:  # nothing weighed anything
            return []
        return [
            f"every reward exceeds rtdmd.reward_backprop.margin = {backprop.margin:g}, so that "
            "reward back-propagation has no gradient; raise the margin, or lower the rewards' weights"
        ]

    def _looks_closely(self, epoch: int) -> bool:
        """Whether the monitors, if there are any, look at the epoch's pictures, too."""
        return epoch % self.settings.monitor_every == 0

    @torch.no_grad()
    def _sample(self, epoch: int, drawn: Sequence[int]) -> tuple[list[Record], EpochScores]:
        """Rollouts of all this rank's sampling batches, and the scores of all ranks' pictures.

        A batch is decoded and scored while the next one is rolled out, the rewards' gradient at its final
        latents included. A scorer that fails on one rank stops all of them, once all have rolled out.
        """
        plan = self._sampler.epoch(epoch)
        count = self.settings.num_sample_batches
        batches = [list(self._sampler.rank_positions(self._ranks.rank, number)) for number in range(count)]
        # Each prompt is encoded once, however many batches its pictures are in.
        distinct = sorted({plan[index] for indices in batches for index in indices})
        texts = SharedTexts(self.texts(distinct), {prompt: row for row, prompt in enumerate(distinct)})
        closely = self._looks_closely(epoch)
        records, jobs = [], []
        for indices in batches:
            prompt_ids = [plan[index] for index in indices]
            record = self._roll_out(epoch, indices, prompt_ids, texts, drawn)
            captions = Captions(
                [self.prompts.prompts[prompt] for prompt in prompt_ids],
                [self.prompts.metadata[prompt] for prompt in prompt_ids],
            )
            jobs.append(self.panel.start_scoring(record.trajectory.final, captions, closely=closely))
            records.append(record)
        with self._ranks.together():
            scored = [job.result() for job in jobs]
        records = [replace(record, pull=seen.pull) for record, seen in zip(records, scored, strict=True)]
        mine = [prompt for record in records for prompt in record.prompt_ids]
        scores = EpochScores.of_all_ranks(mine, Scored.cat(scored), self._ranks)
        scores.check_usable(self.panel.combination.weights)
        return records, scores

    def _roll_out(
        self,
        epoch: int,
        indices: list[int],
        prompt_ids: list[int],
        texts: SharedTexts,
        drawn: Sequence[int],
    ) -> Record:
        """One sampling batch of this rank.

        A group's members differ in their initial noise and in the drawn steps' noise; with
        ``shared_noise`` the noise of the other stochastic steps is the prompt's.
        """

        def noise(purpose: str, keys: Sequence[int]) -> Tensor:
            return self.draws.normal(epoch, purpose, keys, self.few.latent_shape, self._ranks.device)

        def step_noise(step: int) -> Tensor:
            own = step in drawn or not self.settings.shared_noise
            return noise(f"transition{step}" if own else f"shared{step}", indices if own else prompt_ids)

        velocity = self.roles.generator.velocity(texts.of(prompt_ids))
        trajectory = rollout(velocity, noise("initial", indices), self.few.sigmas, self.few.eta, step_noise)
        log_probs = {
            step: cps_log_prob(
                trajectory.states[step + 1], self._mean(trajectory, step, trajectory.velocities[step])
            )
            for step in drawn
        }
        taken = replace(trajectory, velocities=[])  # nothing needs them any more
        return Record(indices, prompt_ids, texts, taken, log_probs)

    def _mean(self, trajectory: Trajectory, step: int, velocity: Tensor) -> Tensor:
        """Of the transition from ``step``'s state under ``velocity``."""
        sigma, sigma_next = trajectory.sigmas[step], trajectory.sigmas[step + 1]
        mean, _ = cps_transition(trajectory.states[step], velocity, sigma, sigma_next, self.few.eta)
        return mean

    def _matched(self, drawn: Sequence[int]) -> list[int]:
        """Steps whose outcomes' distribution is matched, and learnt by the fake score."""
        return [*(drawn if self.settings.matches_drawn else ()), self._last_step]

    def _update_fake_score(
        self, epoch: int, records: list[Record], drawn: Sequence[int], means: Means
    ) -> float:
        """One step of the fake score on the whole epoch, at all states that are to be matched."""
        size = self.settings.fake_score_micro_batch_size or self.settings.sample_batch_size
        parts = [
            (micro, step)
            for record in records
            for micro in record.split(size)
            for step in self._matched(drawn)
        ]
        fake = self.roles.fake_score
        for number, (micro, step) in enumerate(parts):
            samples = self._samples(epoch, micro, step, micro.trajectory.states[step + 1])
            loss, found = self._matching.fake_score_loss(fake.velocity(micro.sample_text), samples)
            fake.engine.backward(loss / len(parts), last=number == len(parts) - 1)
            name = "fake_score" if step == self._last_step else "fake_score_drawn"
            means.add(name, found | {"loss": loss})
        return fake.engine.step().grad_norm

    def _samples(self, epoch: int, record: Record, step: int, states: Tensor) -> Samples:
        """``states`` as what ``step`` led to."""
        transition = None if step == self._last_step else step
        return Samples(states, record.trajectory.sigmas[step + 1], epoch, record.indices, transition)

    def _advantages(self, records: list[Record], scores: EpochScores, means: Means) -> list[Tensor]:
        """This rank's advantages per record, normalised over all samples of all ranks."""
        combination = self.panel.combination
        rewards = combination.clip(scores.rewards)
        combination.observe(rewards)
        everyone = group_advantages(
            rewards, scores.prompt_ids, combination.weights, global_std=self.settings.advantage_global_std
        )
        local = everyone.view(self._ranks.world_size, -1)[self._ranks.rank]
        means.add(
            "advantage", {"zero_fraction": (local == 0).double().mean(), "largest": everyone.abs().max()}
        )
        return list(local.split([len(record) for record in records]))

    def _update_generator(
        self,
        epoch: int,
        records: list[Record],
        advantages: list[Tensor],
        drawn: Sequence[int],
        means: Means,
    ) -> float:
        """Policy loss on the drawn steps, reward hinge on the last, distribution matching where it is due."""
        engine = self.roles.generator.engine
        micro_batches = self._weigh(records, advantages)
        scale = 1 / (len(micro_batches) * (len(drawn) + 1))
        for number, micro in enumerate(micro_batches):
            for step in drawn if self.settings.trains_drawn else ():
                term = self._drawn_step_term(epoch, micro, step, means)
                engine.backward(scale * micro.share * term, last=False)
            final = self._last_step_term(epoch, micro, means)
            engine.backward(scale * micro.share * final, last=number == len(micro_batches) - 1)
        return engine.step().grad_norm

    def _weigh(self, records: list[Record], advantages: list[Tensor]) -> list[Weighted]:
        """Micro-batches in which samples without advantage weigh nothing.

        A mean runs over the weights of all ranks together: DeepSpeed averages over W ranks, so a
        rank's own weighted mean counts W·Σ_own w / Σ_all w times.
        """
        size = self.settings.micro_batch_size or self.settings.sample_batch_size
        parts = [
            (micro, chosen)
            for record, values in zip(records, advantages, strict=True)
            for micro, chosen in zip(record.split(size), values.split(size), strict=True)
        ]
        weights = [(chosen != 0).float() for _, chosen in parts]
        own = torch.stack([weight.sum() for weight in weights])
        total = self._ranks.sum(own)
        shares = self._ranks.world_size * own / torch.where(total > 0, total, torch.ones_like(total))
        return [
            Weighted(micro, chosen, weight, share)
            for (micro, chosen), weight, share in zip(parts, weights, shares, strict=True)
        ]

    def _drawn_step_term(self, epoch: int, micro: Weighted, step: int, means: Means) -> Tensor:
        """The network once more at one drawn step's state, for policy, matching, or both."""
        settings, record = self.settings, micro.record
        trajectory, text = record.trajectory, record.sample_text
        velocity = self.roles.generator.velocity(text)(trajectory.states[step], trajectory.sigmas[step])
        mean, outcome = self._mean(trajectory, step, velocity), trajectory.states[step + 1]
        term = torch.zeros((), device=mean.device)
        if settings.policy_weight > 0:
            term = term + settings.policy_weight * self._policy_loss(
                micro, cps_log_prob(outcome, mean), step, means
            )
        if settings.matches_drawn:
            moved = mean + (outcome - mean).detach()  # the outcome, by the noise that led to it
            matching = self._matching_loss(epoch, micro, text, step, moved)
            means.add("generator", micro.shared({"distribution_matching_drawn": matching}))
            term = term + settings.distribution_matching_weight * matching
        return term

    def _policy_loss(self, micro: Weighted, log_prob: Tensor, step: int, means: Means) -> Tensor:
        """Clipped ratio loss at one drawn step."""
        settings, rolled = self.settings, micro.record.log_probs[step]
        old = rolled if settings.old_log_prob == "rollout" else log_prob.detach()
        loss = policy_loss(
            log_prob,
            old,
            micro.advantages,
            settings.clip_range,
            settings.clip_range,
            settings.advantage_clip,
            micro.weights,
        )
        # Against the rollout's log-probability, whichever one the loss uses: with `training` the ratio is 1.
        drift = (log_prob.detach() - rolled).abs()
        clipped = (drift.exp() - 1 > settings.clip_range).float()
        found = {
            "loss": loss,
            "clip_fraction": weighted_mean(clipped, micro.weights),
            "rollout_difference": weighted_mean(drift, micro.weights),
        }
        means.add("policy", micro.shared(found))
        return loss

    def _last_step_term(self, epoch: int, micro: Weighted, means: Means) -> Tensor:
        """The network once more at the last step's state; from there to the loss nothing is unrolled.

        The rewards' gradient was computed where the pictures were scored: x0 has the values that it had then,
        since an epoch has one update.
        """
        settings, record = self.settings, micro.record
        trajectory, text = record.trajectory, record.sample_text
        state, sigma = trajectory.states[self._last_step], trajectory.sigmas[self._last_step]
        x0 = predict_x0(state, self.roles.generator.velocity(text)(state, sigma), sigma)
        matching = self._matching_loss(epoch, micro, text, self._last_step, x0)
        means.add("generator", micro.shared({"distribution_matching": matching}))
        loss = settings.distribution_matching_weight * matching
        if record.pull is not None:
            hinge, parts = record.pull.on(x0, micro.weights)
            means.add("generator", micro.shared(parts))
            loss = loss + settings.reward_backprop.weight * hinge
        return loss

    def _matching_loss(
        self, epoch: int, micro: Weighted, text: TextEmbeddings, step: int, states: Tensor
    ) -> Tensor:
        """Distribution matching at ``states``, which ``step`` led to, through their graph."""
        return self._matching.generator_loss(
            self.roles.teacher.velocity(text),
            self.roles.fake_score.velocity(text),
            self._samples(epoch, micro.record, step, states),
            micro.weights,
        )
