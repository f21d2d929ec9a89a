"""Networks of the roles, each in an engine of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.config import engine_config, zero_stage
from rtdmd.distributed.engine import FrozenEngine, start_frozen, start_trained
from rtdmd.distributed.guard import CallLog
from rtdmd.distributed.loading import TensorSource, build_network
from rtdmd.distributed.sharding import build_sharded, placement_of
from rtdmd.distributed.shared import ReplicatedBase, ShardedBase, SharedBase
from rtdmd.models.blocks import blocks_of, compile_forward, recomputation_of, recompute_activations
from rtdmd.models.lora import DEFAULT, adapter_parameters, attach_adapter, check_targets, init_adapter
from rtdmd.models.protocol import ModelFamily
from rtdmd.models.recomputation import Recomputation
from rtdmd.randomness import Draws
from rtdmd.recipe.schema import (
    Checkpointing,
    ColdStartSection,
    OptimizerSection,
    Recipe,
    RtdmdSection,
    TeacherSection,
    TrainedSection,
)
from rtdmd.stages.activations import AutomaticRecomputation
from rtdmd.stages.residency import keep_blocks
from rtdmd.stages.roles import Roles, Student, Teacher


@dataclass(frozen=True)
class HandOver:
    """What an earlier stage trained: files to start from, null for the base weights."""

    generator: Path | None = None
    fake_score: Path | None = None


class NetworkWeights(TensorSource, Protocol):
    """A transformer's tensors with the configuration that they belong to."""

    @property
    def config(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class NetworkBuilder:
    """What the construction of all networks shares.

    ``weights(recipe, role, start)`` opens a role's weights with what the file ``start`` adds to them.
    """

    recipe: Recipe
    family: ModelFamily
    ranks: Ranks
    calls: CallLog
    draws: Draws
    weights: Callable[[Recipe, TeacherSection | TrainedSection, Path | None], NetworkWeights]
    automatic: AutomaticRecomputation | None

    @property
    def dtype(self) -> torch.dtype:
        """In which networks compute."""
        return getattr(torch, self.recipe.dtype)

    def network(
        self, section: TeacherSection | TrainedSection, start: Path | None, config: dict[str, Any]
    ) -> nn.Module:
        """A role's transformer, sharded as ``config`` says. Raises UserError for weights that don't fit."""
        with self._source(section, start) as (make, source):
            return build_network(make, source, config, self.dtype, self.ranks.device, self.calls.touch)

    def base(
        self,
        section: TeacherSection | TrainedSection,
        start: Path | None,
        config: dict[str, Any],
        num_users: int,
    ) -> SharedBase:
        """A transformer for several roles, placed as ``config`` says. Raises UserError as :meth:`network`."""
        if zero_stage(config) != 3:
            return ReplicatedBase(self.network(section, start, config), config, num_users)
        placement = placement_of(config, self.recipe.roles.gather, self.ranks)
        with self._source(section, start) as (make, source):
            network, shards = build_sharded(
                make,
                lambda made: blocks_of(made, self.family.block_lists),
                source,
                self.dtype,
                placement,
                self.calls.touch,
            )
        keep_blocks(shards, self.recipe.roles.whole_blocks or 0)
        return ShardedBase(network, shards, num_users, str(placement))

    @contextmanager
    def _source(
        self, section: TeacherSection | TrainedSection, start: Path | None
    ) -> Iterator[tuple[Callable[[], nn.Module], NetworkWeights]]:
        """What makes a role's transformer, and its weights."""
        source = self.weights(self.recipe, section, start)
        transformer_class: Any = self.family.transformer_class
        yield lambda: transformer_class.from_config(source.config), source
        source.close()

    def add_lora(self, role: str, network: nn.Module, name: str = DEFAULT) -> dict[str, nn.Parameter]:
        """A fresh adapter as the recipe has it; its factors, trainable, the only ones that are."""
        lora = self.recipe.lora
        check_targets(network, lora.targets or ())
        attach_adapter(network, lora.rank, lora.alpha, lora.targets or self.family.lora_targets, name)
        per_stage = getattr(lora.init_std, self.draws.stage)
        std = 1 / lora.rank if per_stage is None else per_stage
        init_adapter(
            network, std, lambda key, shape: self.draws.normal(0, f"lora/{role}", [key], shape)[0], name
        )
        factors = adapter_parameters(network, name)
        self.place(factors.values())
        return factors

    def place(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move adapters to where and in which dtype networks compute."""
        for parameter in parameters:
            parameter.data = parameter.data.to(self.ranks.device, self.dtype)

    def recomputation(
        self,
        role: str,
        policy: Checkpointing,
        network: nn.Module,
        bind: Callable[[nn.Module], Callable[..., Any]] = lambda block: block,
        is_present: Callable[[], bool] = lambda: True,
    ) -> Recomputation:
        """What a trained role recomputes; it ``is_present`` in forwards of its own."""
        is_automatic = policy == "auto" and self.automatic is not None
        policy = "none" if policy == "auto" and not is_automatic else policy
        made = recomputation_of(network, policy, self.family.block_lists, bind)
        if self.automatic is not None:
            self.automatic.add(role, network, made if is_automatic else None, is_present)
        return made

    def compile(self, section: TeacherSection | TrainedSection, network: nn.Module) -> None:
        """Compile what the recipe says; adapters are attached already."""
        compile_forward(network, section.compile, self.family.block_lists)

    def as_teacher(self, engine: FrozenEngine) -> Teacher:
        """The teacher that predicts with ``engine``."""
        unconditional = self.family.encode_prompts([""])
        return Teacher(engine, self.family, unconditional, self.recipe.model.guidance_scale)


def separate_roles(
    builder: NetworkBuilder, settings: ColdStartSection | RtdmdSection, hand_over: HandOver
) -> Roles:
    """Every role in a DeepSpeed engine of its own, as its section says."""
    roles = builder.recipe.roles
    return Roles(
        _teacher(builder, roles.teacher),
        _student(builder, "generator", roles.generator, settings.generator, hand_over.generator),
        _student(builder, "fake_score", roles.fake_score, settings.fake_score, hand_over.fake_score),
        builder.automatic,
    )


def _teacher(builder: NetworkBuilder, section: TeacherSection) -> Teacher:
    config = engine_config(section.engine, builder.recipe.dtype, None)
    network = builder.network(section, None, config)
    builder.compile(section, network)
    return builder.as_teacher(start_frozen("teacher", network, config, builder.calls))


def _student(
    builder: NetworkBuilder,
    name: str,
    section: TrainedSection,
    optimizer: OptimizerSection,
    start: Path | None,
) -> Student:
    config = engine_config(section.engine, builder.recipe.dtype, optimizer.max_grad_norm)
    network = builder.network(section, start, config)
    if section.trains == "lora":
        builder.add_lora(name, network)
    else:
        network.requires_grad_(True)
    recomputation = builder.recomputation(name, section.activation_checkpointing, network)
    recompute_activations(network, lambda: recomputation)
    builder.compile(section, network)
    engine = start_trained(name, network, config, optimizer, builder.calls, builder.ranks)
    return Student(engine, builder.family)
