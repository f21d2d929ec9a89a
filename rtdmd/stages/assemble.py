"""From a recipe to a stage: family, networks in their engines, prompts, rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.config import engine_config
from rtdmd.distributed.engine import TrainedEngine, start_frozen, start_trained
from rtdmd.distributed.guard import CallLog
from rtdmd.distributed.loading import build_network
from rtdmd.models import get_family
from rtdmd.models.adapters import read_trained
from rtdmd.models.lora import attach_adapter, init_adapter
from rtdmd.models.protocol import ModelFamily
from rtdmd.models.weights import WeightSource, role_weights
from rtdmd.prompts import PromptSet
from rtdmd.randomness import Draws
from rtdmd.recipe.schema import (
    DEFAULT_BACKPROP_REWARDS,
    ColdStartSection,
    OptimizerSection,
    Recipe,
    RtdmdSection,
    TeacherSection,
    TrainedSection,
)
from rtdmd.rewards import load_rewards
from rtdmd.rollout import FewSteps
from rtdmd.stages.ac_dmd import AmbientMatching, AmbientSettings
from rtdmd.stages.cold_start import ColdStart
from rtdmd.stages.combination import Combination
from rtdmd.stages.rewarding import RewardPanel
from rtdmd.stages.roles import Roles, Student, Teacher
from rtdmd.stages.rtdmd import Rtdmd
from rtdmd.stages.scoring_thread import ScoringThread
from rtdmd.stages.texts import PromptTexts

Stage = ColdStart | Rtdmd


@dataclass(frozen=True)
class HandOver:
    """What an earlier stage trained: files to start from, null for the base weights."""

    generator: Path | None = None
    fake_score: Path | None = None


def build_stage(name: str, recipe: Recipe, ranks: Ranks, calls: CallLog, hand_over: HandOver) -> Stage:
    """Load everything that stage ``name`` needs. Raises UserError for files that don't fit."""
    model = recipe.model
    family = get_family(model.family).load(
        model.pipeline,
        device=ranks.device,
        dtype=getattr(torch, recipe.dtype),
        revision=model.revision,
        max_sequence_length=model.max_sequence_length,
        schedule_shift=recipe.schedule.shift,
    )
    draws = Draws(recipe.seed, name)
    settings = recipe.cold_start if name == "cold_start" else recipe.rtdmd
    roles = _build_roles(recipe, settings, family, ranks, calls, draws, hand_over)
    steps = FewSteps(
        family.sigmas(recipe.schedule.timesteps, model.height, model.width),
        recipe.schedule.eta,
        family.latent_shape(model.height, model.width),
    )
    matching = AmbientMatching(draws, _ambient_settings(recipe, settings))
    prompts = PromptSet.load(settings.prompts)
    texts = PromptTexts(family, prompts.prompts, model.prompt_embeddings_gib, calls.touch)
    if isinstance(settings, ColdStartSection):
        return ColdStart(roles, family, prompts, texts, steps, matching, draws, settings, ranks)
    panel = _build_panel(recipe, family, ranks, calls)
    return Rtdmd(roles, family, prompts, texts, panel, steps, matching, draws, settings, ranks)


def _ambient_settings(recipe: Recipe, settings: ColdStartSection | RtdmdSection) -> AmbientSettings:
    low, high = settings.timestep_range
    return AmbientSettings(
        eta=recipe.schedule.eta,
        consistency_weight=settings.consistency_weight,
        consistency_max_timesteps=settings.consistency_max_timesteps,
        min_interval_timesteps=settings.min_interval_timesteps,
        timestep_range=(low, high),
    )


def _build_panel(recipe: Recipe, family: ModelFamily, ranks: Ranks, calls: CallLog) -> RewardPanel:
    backprop = recipe.rtdmd.reward_backprop
    names = [reward.name for reward in recipe.rewards]
    chosen: Sequence[str] = backprop.rewards or [name for name in DEFAULT_BACKPROP_REWARDS if name in names]
    sections = [*recipe.rewards, *recipe.monitor_rewards]
    dtype = getattr(torch, recipe.dtype)
    loaded = load_rewards(sections, ranks.device, dtype, recipe.reward_workers)
    return RewardPanel(
        family,
        loaded[: len(recipe.rewards)],
        _combination(recipe),
        [reward.name for reward in loaded if reward.name in chosen and reward.differentiable],
        monitors=loaded[len(recipe.rewards) :],
        thread=ScoringThread(ranks.device),
        score_chunk=recipe.rtdmd.score_batch_size or recipe.rtdmd.sample_batch_size,
        backprop_chunk=backprop.micro_batch_size,
        progress=calls.touch,
    )


def _combination(recipe: Recipe) -> Combination:
    backprop = recipe.rtdmd.reward_backprop
    return Combination(
        {reward.name: reward.weight for reward in recipe.rewards},
        {reward.name: (reward.clip[0], reward.clip[1]) for reward in recipe.rewards if reward.clip},
        backprop.statistics_decay if backprop.standardize else None,
    )


def _build_roles(
    recipe: Recipe,
    settings: ColdStartSection | RtdmdSection,
    family: ModelFamily,
    ranks: Ranks,
    calls: CallLog,
    draws: Draws,
    hand_over: HandOver,
) -> Roles:
    builder = _RoleBuilder(recipe, family, ranks, calls, draws)
    return Roles(
        builder.teacher(recipe.roles.teacher),
        builder.student("generator", recipe.roles.generator, settings.generator, hand_over.generator),
        builder.student("fake_score", recipe.roles.fake_score, settings.fake_score, hand_over.fake_score),
    )


@dataclass(frozen=True)
class _RoleBuilder:
    """What the roles' construction shares."""

    recipe: Recipe
    family: ModelFamily
    ranks: Ranks
    calls: CallLog
    draws: Draws

    def teacher(self, section: TeacherSection) -> Teacher:
        config = engine_config(section.engine, self.recipe.dtype, None)
        network = self._network(self._source(section, None), config)
        return Teacher(
            start_frozen("teacher", network, config, self.calls),
            self.family,
            self.family.encode_prompts([""]),
            self.recipe.model.guidance_scale,
        )

    def student(
        self, name: str, section: TrainedSection, optimizer: OptimizerSection, start: Path | None
    ) -> Student:
        config = engine_config(section.engine, self.recipe.dtype, optimizer.max_grad_norm)
        network = self._network(self._source(section, start), config)
        if section.trains == "lora":
            self._add_lora(name, network)
        else:
            network.requires_grad_(True)
        if section.activation_checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        engine: TrainedEngine = start_trained(name, network, config, optimizer, self.calls, self.ranks)
        return Student(engine, self.family)

    def _source(self, section: TeacherSection | TrainedSection, start: Path | None) -> WeightSource:
        weights, revision = role_weights(self.recipe.model, section)
        trained = read_trained([] if start is None else [start], self.recipe.lora)
        return WeightSource(
            weights, revision=revision, adapters=trained.adapters, replacement=trained.replacement
        )

    def _network(self, source: WeightSource, config: dict[str, object]) -> nn.Module:
        make = self.family.transformer_class
        network = build_network(
            lambda: make.from_config(source.config),  # type: ignore[attr-defined]
            source,
            config,
            getattr(torch, self.recipe.dtype),
            self.ranks.device,
            self.calls.touch,
        )
        source.close()
        return network

    def _add_lora(self, role: str, network: nn.Module) -> None:
        lora = self.recipe.lora
        attach_adapter(network, lora.rank, lora.alpha, lora.targets or self.family.lora_targets)
        per_stage = getattr(lora.init_std, self.draws.stage)
        std = 1 / lora.rank if per_stage is None else per_stage
        init_adapter(network, std, lambda name, shape: self.draws.normal(0, f"lora/{role}", [name], shape)[0])
        dtype = getattr(torch, self.recipe.dtype)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.ranks.device, dtype)
