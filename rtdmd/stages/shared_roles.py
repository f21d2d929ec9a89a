"""Roles on shared bases: weights that several roles start from are in memory once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from rtdmd.distributed.config import engine_config
from rtdmd.distributed.engine import FrozenEngine, TrainedEngine
from rtdmd.distributed.shared import AdapterEngine, SharedNetwork
from rtdmd.models.adapters import Trained, read_trained
from rtdmd.models.blocks import recompute_activations
from rtdmd.models.lora import AdapterSelection, adapter_parameters, load_adapter
from rtdmd.models.weights import check_adapter
from rtdmd.recipe.schema import (
    ColdStartSection,
    OptimizerSection,
    RtdmdSection,
    TeacherSection,
    TrainedSection,
    role_weights,
)
from rtdmd.stages.networks import HandOver, NetworkBuilder
from rtdmd.stages.residency import automatic_residency
from rtdmd.stages.roles import Roles, Student


@dataclass(frozen=True)
class _Occupant:
    """A role before its network is there."""

    name: str
    section: TeacherSection | TrainedSection
    optimizer: OptimizerSection | None
    start: Path | None  # file of what an earlier stage trained
    trained: Trained  # what is in it


def shared_roles(
    builder: NetworkBuilder, settings: ColdStartSection | RtdmdSection, hand_over: HandOver
) -> Roles:
    """Roles with the same weights on one base, each with adapters of its own."""
    recipe = builder.recipe
    roles = recipe.roles

    def occupant(
        name: str,
        section: TeacherSection | TrainedSection,
        optimizer: OptimizerSection | None = None,
        start: Path | None = None,
    ) -> _Occupant:
        trained = read_trained([] if start is None else [start], recipe.lora)
        return _Occupant(name, section, optimizer, start, trained)

    occupants = [
        occupant("teacher", roles.teacher),
        occupant("generator", roles.generator, settings.generator, hand_over.generator),
        occupant("fake_score", roles.fake_score, settings.fake_score, hand_over.fake_score),
    ]
    engines: dict[str, FrozenEngine] = {}
    for group in _groups(builder, occupants):
        engines |= _on_one_base(builder, group)
    generator, fake_score = engines["generator"], engines["fake_score"]
    assert isinstance(generator, TrainedEngine) and isinstance(fake_score, TrainedEngine)
    made = Roles(
        builder.as_teacher(engines["teacher"]),
        Student(generator, builder.family),
        Student(fake_score, builder.family),
        builder.automatic,
    )
    return replace(made, residency=automatic_residency(recipe, builder.ranks, made.bases))


def _groups(builder: NetworkBuilder, occupants: Sequence[_Occupant]) -> list[list[_Occupant]]:
    """Occupants by what their base is; full weights that an earlier stage trained are another base."""
    groups: dict[object, list[_Occupant]] = {}
    for occupant in occupants:
        replaced = occupant.start if occupant.trained.replacement is not None else None
        base = (role_weights(builder.recipe.model, occupant.section), replaced)
        groups.setdefault(base, []).append(occupant)
    return list(groups.values())


def _on_one_base(builder: NetworkBuilder, group: Sequence[_Occupant]) -> dict[str, FrozenEngine]:
    """Load and place the base, then attach the adapters of all its roles.

    What an earlier stage trained differs between roles: their adapters stay unmerged and frozen beneath the
    trainable ones. Full weights, and the adapter of a role that is alone on its base, are merged.
    """
    first = group[0]
    config = engine_config(first.section.engine, builder.recipe.dtype, None)
    is_merged = len(group) == 1 or first.trained.replacement is not None
    base = builder.base(first.section, first.start if is_merged else None, config, len(group))
    network = base.module
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    adapters = {
        each.name: [] if is_merged else _put_beneath(builder, each, network, shapes) for each in group
    }
    factors = {}
    for each in group:
        if each.optimizer is not None:
            factors[each.name] = builder.add_lora(each.name, network, each.name)
            adapters[each.name].append(each.name)

    selection = AdapterSelection()
    selection.govern(network)
    selected = {each.name: tuple(adapters[each.name]) for each in group}
    recomputations = {
        selected[each.name]: builder.recomputation(
            each.name,
            each.section.activation_checkpointing,
            network,
            selection.bind,
            partial(selection.is_exactly, selected[each.name]),
        )
        for each in group
        if isinstance(each.section, TrainedSection)
    }
    recompute_activations(network, lambda: recomputations[selection.names])
    builder.compile(first.section, network)
    engines: dict[str, FrozenEngine] = {}
    for each in group:
        shared = SharedNetwork(base, partial(selection.using, selected[each.name]))
        if each.optimizer is None:
            engines[each.name] = FrozenEngine(each.name, shared, builder.calls)
        else:
            engines[each.name] = AdapterEngine(
                each.name,
                shared,
                builder.calls,
                builder.ranks,
                factors[each.name],
                each.optimizer,
                builder.dtype,
            )
    return engines


def _put_beneath(
    builder: NetworkBuilder, occupant: _Occupant, network: nn.Module, shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    """Attach what an earlier stage trained, frozen; the names of these adapters."""
    names = []
    for number, adapter in enumerate(occupant.trained.adapters):
        check_adapter(adapter, shapes.get, role_weights(builder.recipe.model, occupant.section)[0])
        names.append(f"{occupant.name}_start{number}")
        load_adapter(network, adapter, names[-1])
        builder.place(adapter_parameters(network, names[-1]).values())
    return names
