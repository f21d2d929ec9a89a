"""From a recipe to a stage: family, networks, prompts, rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.guard import CallLog
from rtdmd.errors import UserError
from rtdmd.models import get_family
from rtdmd.models.adapters import read_trained
from rtdmd.models.blocks import compile_layers
from rtdmd.models.hosting import host_networks
from rtdmd.models.protocol import ModelFamily
from rtdmd.models.weights import WeightSource
from rtdmd.prompts import PromptSet
from rtdmd.randomness import Draws
from rtdmd.recipe.schema import (
    DEFAULT_BACKPROP_REWARDS,
    ColdStartSection,
    Recipe,
    RewardSection,
    RtdmdSection,
    TeacherSection,
    TrainedSection,
    role_weights,
)
from rtdmd.rewards import load_rewards
from rtdmd.rewards.protocol import Reward
from rtdmd.rollout import FewSteps
from rtdmd.stages.ac_dmd import AmbientMatching, AmbientSettings
from rtdmd.stages.activations import automatic_recomputation
from rtdmd.stages.cold_start import ColdStart
from rtdmd.stages.combination import Combination
from rtdmd.stages.networks import HandOver, NetworkBuilder, NetworkWeights, separate_roles
from rtdmd.stages.rewarding import RewardPanel
from rtdmd.stages.rtdmd import Rtdmd
from rtdmd.stages.scoring_thread import ScoringThread
from rtdmd.stages.shared_roles import shared_roles
from rtdmd.stages.texts import PromptTexts

Stage = ColdStart | Rtdmd


def load_family(recipe: Recipe, device: torch.device) -> ModelFamily:
    """Text encoders and decoder of the recipe's pipeline. Raises UserError."""
    model = recipe.model
    return get_family(model.family).load(
        model.pipeline,
        device=device,
        dtype=getattr(torch, recipe.dtype),
        revision=model.revision,
        max_sequence_length=model.max_sequence_length,
        schedule_shift=recipe.schedule.shift,
    )


def open_weights(recipe: Recipe, role: TeacherSection | TrainedSection, start: Path | None) -> NetworkWeights:
    """A role's base weights with what an earlier stage trained. Raises UserError."""
    weights, revision = role_weights(recipe.model, role)
    trained = read_trained([] if start is None else [start], recipe.lora)
    return WeightSource(
        weights, revision=revision, adapters=trained.adapters, replacement=trained.replacement
    )


@dataclass(frozen=True)
class Loaders:
    """Where networks come from; by default the recipe's files."""

    family: Callable[[Recipe, torch.device], ModelFamily] = load_family
    weights: Callable[[Recipe, TeacherSection | TrainedSection, Path | None], NetworkWeights] = open_weights
    rewards: Callable[[Sequence[RewardSection], torch.device, torch.dtype, int], list[Reward]] = load_rewards


FROM_FILES = Loaders()


def build_stage(
    name: str,
    recipe: Recipe,
    ranks: Ranks,
    calls: CallLog,
    hand_over: HandOver,
    loaders: Loaders = FROM_FILES,
) -> Stage:
    """Load everything that stage ``name`` needs. Raises UserError for files that don't fit."""
    model = recipe.model
    settings = recipe.cold_start if name == "cold_start" else recipe.rtdmd
    prompts = PromptSet.load(settings.prompts)
    family = loaders.family(recipe, ranks.device)
    if model.text_encoder_compile == "blocks":
        for network in family.text_encoders:
            compile_layers(network)
    encoders = [] if model.text_encoder == "device" else host_networks(family.text_encoders, ranks.device)
    texts = encode_texts(recipe, family, prompts, calls.touch)
    draws = Draws(recipe.seed, name)
    automatic = automatic_recomputation(recipe, ranks)
    builder = NetworkBuilder(recipe, family, ranks, calls, draws, loaders.weights, automatic)
    shared = recipe.roles.engines == "shared_base"
    roles = (shared_roles if shared else separate_roles)(builder, settings, hand_over)
    steps = FewSteps(
        family.sigmas(recipe.schedule.timesteps, model.height, model.width),
        recipe.schedule.eta,
        family.latent_shape(model.height, model.width),
    )
    matching = AmbientMatching(draws, _ambient_settings(recipe, settings))
    if model.text_encoder == "once":
        for encoder in encoders:
            encoder.free()
    if isinstance(settings, ColdStartSection):
        return ColdStart(roles, family, prompts, texts, steps, matching, draws, settings, ranks)
    if not recipe.rtdmd.reward_backprop.recompute_decoder:
        family.vae.disable_gradient_checkpointing()
    panel = _build_panel(recipe, family, ranks, calls, loaders)
    return Rtdmd(roles, family, prompts, texts, panel, steps, matching, draws, settings, ranks)


def preview_prompts(recipe: Recipe, prompts: PromptSet) -> list[str]:
    """What a stage with ``prompts`` paints now and then."""
    return (recipe.preview.prompts or prompts.prompts)[: recipe.preview.num_images]


def encode_texts(
    recipe: Recipe, family: ModelFamily, prompts: PromptSet, progress: Callable[[], None]
) -> PromptTexts:
    """Texts of a stage and of its previews. Raises UserError if they have to be kept and don't fit."""
    model = recipe.model
    previews = preview_prompts(recipe, prompts)
    texts = PromptTexts(family, prompts.prompts, model.prompt_embeddings_gib, progress, previews)
    if model.text_encoder == "once" and not texts.are_kept:
        raise UserError(
            f"model.text_encoder = 'once': the prompts' embeddings take {texts.gib:.2f} GiB, "
            f"model.prompt_embeddings_gib is {model.prompt_embeddings_gib:g}; raise it, use fewer prompts "
            "(their `limit`), or write offload"
        )
    return texts


def _ambient_settings(recipe: Recipe, settings: ColdStartSection | RtdmdSection) -> AmbientSettings:
    low, high = settings.timestep_range
    return AmbientSettings(
        eta=recipe.schedule.eta,
        consistency_weight=settings.consistency_weight,
        consistency_max_timesteps=settings.consistency_max_timesteps,
        min_interval_timesteps=settings.min_interval_timesteps,
        timestep_range=(low, high),
    )


def _build_panel(
    recipe: Recipe, family: ModelFamily, ranks: Ranks, calls: CallLog, loaders: Loaders
) -> RewardPanel:
    backprop = recipe.rtdmd.reward_backprop
    names = [reward.name for reward in recipe.rewards if reward.weight > 0]
    chosen: Sequence[str] = backprop.rewards or [name for name in DEFAULT_BACKPROP_REWARDS if name in names]
    if backprop.weight == 0:
        chosen = []
    sections = [*recipe.rewards, *recipe.monitor_rewards]
    dtype = getattr(torch, recipe.dtype)
    loaded = loaders.rewards(sections, ranks.device, dtype, recipe.reward_workers)
    return RewardPanel(
        family,
        loaded[: len(recipe.rewards)],
        _combination(recipe),
        [reward.name for reward in loaded if reward.name in chosen and reward.differentiable],
        margin=backprop.margin,
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
