"""Both stages in one plain PyTorch process: no engines, no micro-batches, no ranks.

Written from the stages' description, to compare the sharded system with. It shares with it the
formulas (tested by themselves), the random draws (functions of global sample indices) and the
model families; not the roles, rollouts, micro-batches, weights, reductions or optimizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rtdmd import flow
from rtdmd.models import get_family
from rtdmd.models.lora import attach_adapter, init_adapter
from rtdmd.objectives import (
    ambient_score_loss,
    consistency_loss,
    distribution_matching_loss,
    group_advantages,
    policy_loss,
    reward_hinge_loss,
)
from rtdmd.prompts import GroupSampler, PromptSet, ShuffledPrompts
from rtdmd.randomness import Draws
from rtdmd.recipe.schema import OptimizerSection, Recipe
from rtdmd.rewards import load_rewards

Tensors = dict[str, Tensor]
CPU = torch.device("cpu")


def without_rounding(rewards: list[Any]) -> list[Any]:
    """The same CLIP rewards on unrounded pictures.

    Scored pictures have 256 levels. A difference in the last place would move a level here and there,
    and with it the rewards by far more than rounding.
    """
    for reward in rewards:
        reward.encoder.vision.quantise = False
    return rewards


@dataclass
class Outcome:
    """What is compared: each update's gradient before clipping, and the final weights."""

    gradients: list[tuple[str, Tensors]] = field(default_factory=list)
    weights: dict[str, Tensors] = field(default_factory=dict)


class PlainRole:
    """A whole diffusers transformer with AdamW."""

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        family: Any,
        draws: PlacedDraws,
        optimizer: OptimizerSection,
        outcome: Outcome,
    ) -> None:
        self.name, self.family, self.outcome = name, family, outcome
        self.network = load_transformer(recipe, family, draws.placed_on)
        self.optimizer = optimizer
        if getattr(recipe.roles, name).trains == "lora":
            lora = recipe.lora
            attach_adapter(self.network, lora.rank, lora.alpha, family.lora_targets)
            std = 1 / lora.rank if draws.stage == "cold_start" else 1.0
            init_adapter(
                self.network, std, lambda key, shape: draws.normal(0, f"lora/{name}", [key], shape)[0]
            )
            place(recipe, self.network, draws.placed_on)
        else:
            self.network.requires_grad_(True)
        self.trained = {k: p for k, p in self.network.named_parameters() if p.requires_grad}
        self.adam = torch.optim.AdamW(
            self.trained.values(),
            lr=optimizer.learning_rate,
            betas=tuple(optimizer.betas),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

    def velocity(self, x: Tensor, sigma: float | Tensor, text: Any) -> Tensor:
        return self.family.predict_velocity(self.network, x, sigma, text)

    def update(self, loss: Tensor, step: int, num_steps: int) -> None:
        cooling = self.optimizer.cooldown * num_steps
        self.adam.param_groups[0]["lr"] = self.optimizer.learning_rate * min(1, (num_steps - step) / cooling)
        self.adam.zero_grad()
        loss.backward()
        zeros = {k: torch.zeros_like(p) for k, p in self.trained.items()}
        gradient = {k: zeros[k] if p.grad is None else p.grad.clone() for k, p in self.trained.items()}
        self.outcome.gradients.append((self.name, gradient))
        nn.utils.clip_grad_norm_(list(self.trained.values()), self.optimizer.max_grad_norm)
        self.adam.step()
        self.outcome.weights[self.name] = {k: p.detach().clone() for k, p in self.trained.items()}


def load_transformer(recipe: Recipe, family: Any, device: torch.device) -> nn.Module:
    network = family.transformer_class.from_pretrained(recipe.model.pipeline, subfolder="transformer")
    return place(recipe, network.requires_grad_(False), device)


def place(recipe: Recipe, network: nn.Module, device: torch.device) -> nn.Module:
    """On ``device``, in the recipe's dtype; past diffusers' own ``to``, which warns."""
    return nn.Module.to(network, device, getattr(torch, recipe.dtype))


def load_family(recipe: Recipe, device: torch.device) -> Any:
    return get_family(recipe.model.family).load(
        recipe.model.pipeline,
        device=device,
        dtype=getattr(torch, recipe.dtype),
        max_sequence_length=recipe.model.max_sequence_length,
    )


class PlacedDraws(Draws):
    """The host's numbers, moved to ``placed_on``."""

    placed_on = CPU

    def normal(self, *args: Any) -> Tensor:  # type: ignore[override]
        return super().normal(*args).to(self.placed_on)

    def uniform(self, *args: Any) -> Tensor:  # type: ignore[override]
        return super().uniform(*args).to(self.placed_on)

    def integers(self, *args: Any) -> Tensor:  # type: ignore[override]
        return super().integers(*args).to(self.placed_on)


class Reference:
    """What both stages share, over the global batch of ``world_size`` ranks."""

    def __init__(self, recipe: Recipe, stage: str, world_size: int, device: torch.device = CPU) -> None:
        self.recipe, self.world_size = recipe, world_size
        self.settings: Any = getattr(recipe, stage)
        self.family = load_family(recipe, device)
        self.draws = PlacedDraws(recipe.seed, stage)
        self.draws.placed_on = device
        self.outcome = Outcome()
        self.teacher = load_transformer(recipe, self.family, device)
        arguments = (recipe, self.family, self.draws)
        self.generator = PlainRole("generator", *arguments, self.settings.generator, self.outcome)
        self.fake = PlainRole("fake_score", *arguments, self.settings.fake_score, self.outcome)
        height, width = recipe.model.height, recipe.model.width
        self.shape = self.family.latent_shape(height, width)
        self.levels = [*self.family.sigmas(recipe.schedule.timesteps, height, width), 0.0]
        self.eta = recipe.schedule.eta
        self.prompts = PromptSet.load(self.settings.prompts)
        self.empty = self.family.encode_prompts([""])

    def teacher_velocity(self, x: Tensor, sigma: Tensor, text: Any) -> Tensor:
        conditional = self.family.predict_velocity(self.teacher, x, sigma, text)
        unconditional = self.family.predict_velocity(self.teacher, x, sigma, self.empty.expand(len(text)))
        return unconditional + self.recipe.model.guidance_scale * (conditional - unconditional)

    def timesteps(self, step: int, purpose: str, indices: list[int], s: float) -> Tensor:
        low = 1000 * s + self.settings.min_interval_timesteps
        t = low + self.draws.uniform(step, purpose, indices) * (1000 - low)
        return t.clamp(*self.settings.timestep_range) / 1000

    def fake_loss(
        self, step: int, indices: list[int], x_s: Tensor, s: float, text: Any, mark: str = ""
    ) -> Tensor:
        def noise(purpose: str) -> Tensor:
            return self.draws.normal(step, f"fake/{purpose}{mark}", indices, self.shape)

        t = self.timesteps(step, f"fake/t{mark}", indices, s)
        x_t = flow.renoise(x_s, noise("noise"), s, t)
        v = self.fake.velocity(x_t, t, text)
        loss = ambient_score_loss(v, *flow.ambient_velocity_target(x_s, noise("noise"), s, t))
        if self.settings.consistency_weight == 0:
            return loss
        largest = self.settings.consistency_max_timesteps
        delta = self.draws.integers(step, f"fake/delta{mark}", indices, 1, largest) / 1000
        back = (t - delta).clamp_min(0)
        h = []
        for move in ("move0", "move1"):
            x = flow.cps_step(x_t, v.detach(), t, back, self.eta, noise(move))
            h.append(x - back.view(-1, 1, 1, 1) * self.fake.velocity(x, back, text))
        h_anchor = x_t - t.view(-1, 1, 1, 1) * v
        return loss + self.settings.consistency_weight * consistency_loss(h_anchor, h[0], h[1])

    def matching_loss(
        self,
        step: int,
        indices: list[int],
        x_s: Tensor,
        s: float,
        text: Any,
        weights: Tensor | None = None,
        mark: str = "",
    ) -> Tensor:
        t = self.timesteps(step, f"generator/t{mark}", indices, s)
        noise = self.draws.normal(step, f"generator/noise{mark}", indices, self.shape)
        back = self.draws.normal(step, f"generator/back{mark}", indices, self.shape)
        with torch.no_grad():
            x_t = flow.renoise(x_s, noise, s, t)
            real = flow.cps_step(x_t, self.teacher_velocity(x_t, t, text), t, s, self.eta, back)
            fake = flow.cps_step(x_t, self.fake.velocity(x_t, t, text), t, s, self.eta, back)
        return distribution_matching_loss(x_s, fake, real, weights=weights)


def reference_cold_start(
    recipe: Recipe, world_size: int, iterations: int, device: torch.device = CPU
) -> Outcome:
    """Stage 1 on the global batch."""
    plain = Reference(recipe, "cold_start", world_size, device)
    draws, settings, num_steps = plain.draws, plain.settings, len(plain.levels) - 1
    count = settings.batch_size * world_size
    indices = list(range(count))
    order = ShuffledPrompts(len(plain.prompts), recipe.seed, "cold_start")

    def final_state(step: int, purpose: str, stop: int, text: Any, grad: bool) -> tuple[Tensor, float]:
        levels = plain.levels if settings.sub_interval else [*plain.levels[:stop], 0.0]
        x = draws.normal(step, f"{purpose}/initial", indices, plain.shape)
        for i in range(stop):
            with torch.set_grad_enabled(grad and i == stop - 1):
                v = plain.generator.velocity(x, levels[i], text)
                noise = draws.normal(step, f"{purpose}/transition{i}", indices, plain.shape)
                x = flow.cps_step(x, v, levels[i], levels[i + 1], plain.eta, noise)
        return x, levels[stop]

    for step in range(iterations):
        chosen = [plain.prompts.prompts[order.index(step * count + i)] for i in indices]
        text = plain.family.encode_prompts(chosen)
        stop = draws.integer(step, "fake/stop", 1, num_steps)
        x_s, s = final_state(step, "fake", stop, text, grad=False)
        plain.fake.update(plain.fake_loss(step, indices, x_s, s, text), step, iterations)
        if (step + 1) % settings.generator_every == 0:
            stop = draws.integer(step, "generator/stop", 1, num_steps)
            x_s, s = final_state(step, "generator", stop, text, grad=True)
            loss = plain.matching_loss(step, indices, x_s, s, text)
            plain.generator.update(loss, step, iterations)
    return plain.outcome


def reference_rtdmd(recipe: Recipe, world_size: int, epochs: int) -> Outcome:
    """Stage 2 on whole sampling batches of all ranks together.

    A micro-batch of the sharded system is here the same samples of all ranks: its weighted mean is
    over all of them.
    """
    plain = Reference(recipe, "rtdmd", world_size)
    settings, levels, draws = plain.settings, plain.levels, plain.draws
    batch = settings.sample_batch_size
    sampler = GroupSampler(
        len(plain.prompts),
        settings.images_per_prompt,
        batch,
        settings.num_sample_batches,
        world_size,
        recipe.seed,
    )
    rewards = without_rounding(load_rewards(recipe.rewards, torch.device("cpu"), torch.float32))
    weights = {section.name: section.weight for section in recipe.rewards}
    for epoch in range(epochs):
        drawn = draws.subset(epoch, "policy_steps", len(levels) - 2, settings.num_policy_steps)
        plan = sampler.epoch(epoch)
        everything = list(range(len(plan)))
        states, scores, log_probs = _sample(plain, epoch, plan, drawn, rewards)
        text = plain.family.encode_prompts([plain.prompts.prompts[p] for p in plan])
        fake_loss = plain.fake_loss(epoch, everything, states[-1], 0.0, text)
        if settings.matched_steps == "trained":
            for i in drawn:
                x_s, s = states[i + 1], levels[i + 1]
                fake_loss = fake_loss + plain.fake_loss(epoch, everything, x_s, s, text, f"/after{i}")
            fake_loss = fake_loss / (len(drawn) + 1)
        plain.fake.update(fake_loss, epoch, epochs)
        advantages = group_advantages(scores, torch.tensor(plan), weights, settings.advantage_global_std)

        size = settings.micro_batch_size or batch
        micro_batches = []
        for number in range(settings.num_sample_batches):
            of_ranks = [list(sampler.rank_positions(rank, number)) for rank in range(world_size)]
            for at in range(0, batch, size):
                micro_batches.append([i for mine in of_ranks for i in mine[at : at + size]])
        loss = torch.zeros(())
        for micro in micro_batches:
            loss = loss + _micro_loss(
                plain, epoch, plan, micro, drawn, states, log_probs, advantages, rewards, weights
            )
        plain.generator.update(loss / (len(micro_batches) * (len(drawn) + 1)), epoch, epochs)
    return plain.outcome


@torch.no_grad()
def _sample(
    plain: Reference, epoch: int, plan: list[int], drawn: list[int], rewards: list[Any]
) -> tuple[list[Tensor], Tensors, list[Tensor]]:
    indices = list(range(len(plan)))
    text = plain.family.encode_prompts([plain.prompts.prompts[p] for p in plan])
    states = [plain.draws.normal(epoch, "initial", indices, plain.shape)]
    last = len(plain.levels) - 2
    log_probs: list[Tensor] = []
    for i in range(last + 1):
        own = i in drawn or i == last
        noise = plain.draws.normal(
            epoch, f"transition{i}" if own else f"shared{i}", indices if own else plan, plain.shape
        )
        v = plain.generator.velocity(states[-1], plain.levels[i], text)
        mean, _ = flow.cps_transition(states[-1], v, plain.levels[i], plain.levels[i + 1], plain.eta)
        states.append(flow.cps_step(states[-1], v, plain.levels[i], plain.levels[i + 1], plain.eta, noise))
        log_probs.append(flow.cps_log_prob(states[-1], mean))
    images = plain.family.decode(states[-1])
    prompts, metadata = _captions(plain, plan)
    return states, {reward.name: reward.score(images, prompts, metadata) for reward in rewards}, log_probs


def _captions(plain: Reference, chosen: list[int]) -> tuple[list[str], list[dict[str, Any]]]:
    return [plain.prompts.prompts[p] for p in chosen], [plain.prompts.metadata[p] for p in chosen]


def _micro_loss(
    plain: Reference,
    epoch: int,
    plan: list[int],
    micro: list[int],
    drawn: list[int],
    states: list[Tensor],
    old_log_probs: list[Tensor],
    advantages: Tensor,
    rewards: list[Any],
    weights: dict[str, float],
) -> Tensor:
    settings, levels = plain.settings, plain.levels
    text = plain.family.encode_prompts([plain.prompts.prompts[plan[i]] for i in micro])
    mask = (advantages[micro] != 0).float()
    loss = torch.zeros(())
    for i in drawn:
        v = plain.generator.velocity(states[i][micro], levels[i], text)
        mean, _ = flow.cps_transition(states[i][micro], v, levels[i], levels[i + 1], plain.eta)
        log_prob = flow.cps_log_prob(states[i + 1][micro], mean)
        clip = settings.clip_range
        # A rollout of the same weights has the same log-probability; a clip of 1e-5 tells them apart.
        old = old_log_probs[i][micro] if settings.old_log_prob == "rollout" else log_prob.detach()
        policy = policy_loss(log_prob, old, advantages[micro], clip, clip, settings.advantage_clip, mask)
        loss = loss + settings.policy_weight * policy
        if settings.matched_steps == "trained":
            s, std = levels[i + 1], levels[i + 1] * math.sin(plain.eta * math.pi / 2)
            noise = (states[i + 1][micro] - mean.detach()) / std
            x_s = flow.cps_step(states[i][micro], v, levels[i], s, plain.eta, noise)
            matching = plain.matching_loss(epoch, micro, x_s, s, text, mask, f"/after{i}")
            loss = loss + settings.distribution_matching_weight * matching
    last = len(levels) - 2
    x = states[last][micro]
    x0 = flow.predict_x0(x, plain.generator.velocity(x, levels[last], text), levels[last])
    matching = plain.matching_loss(epoch, micro, x0, 0.0, text, mask)
    loss = loss + settings.distribution_matching_weight * matching
    prompts, metadata = _captions(plain, [plan[i] for i in micro])
    images = plain.family.decode(x0)
    total = sum(weights[reward.name] * reward.score(images, prompts, metadata) for reward in rewards)
    hinge = reward_hinge_loss(total, settings.reward_backprop.margin, mask)
    return loss + settings.reward_backprop.weight * hinge
