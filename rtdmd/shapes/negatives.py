"""Captions that are certainly false, one attribute away from a true one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from rtdmd.shapes.captions import COLORS, MAX_OBJECTS, OPPOSITES, RELATIONS, SHAPES, SIZES, Caption, Group


def contradict(caption: Caption, other: Caption) -> bool:
    """Whether ``other`` is false for every picture that ``draw_scene`` makes of ``caption``.

    It is if the objects differ in number, colour or shape, if one is named small in one caption and large in
    the other, or if both name a relation of the same groups and not the same one (a scene's relation never
    holds together with one of the other axis).
    """
    groups = {group.combination: group for group in caption.groups}
    others = {group.combination: group for group in other.groups}
    if {key: group.count for key, group in groups.items()} != {
        key: group.count for key, group in others.items()
    }:
        return True
    if any({groups[key].size, others[key].size} == set(SIZES) for key in groups):
        return True
    if caption.relation is None or other.relation is None:
        return False
    same_order = caption.groups[0].combination == other.groups[0].combination
    return caption.relation != (other.relation if same_order else OPPOSITES[other.relation])


def hard_negatives(rng: np.random.Generator, caption: Caption, count: int = 8) -> list[Caption]:
    """``count`` distinct captions that are false for every picture of ``caption``, a function of ``rng``.

    Each differs in one attribute: a group's colour, shape, number, or size if named; the relation; or which
    group has which colour. The attributes take turns, in random order.

    Raises:
        ValueError: there are fewer than ``count`` (there are 12 at least).
    """
    altered: dict[str, list[Caption]] = {}
    for attribute, candidate in _alterations(caption):
        known = [item for items in altered.values() for item in items]
        if candidate not in known and contradict(caption, candidate):
            altered.setdefault(attribute, []).append(candidate)
    if sum(map(len, altered.values())) < count:
        raise ValueError(f"{caption.text!r} has fewer than {count} captions one attribute away")
    shuffled = [[items[place] for place in rng.permutation(len(items))] for items in altered.values()]
    turns = [shuffled[place] for place in rng.permutation(len(shuffled))]
    chosen: list[Caption] = []
    for turn in range(max(map(len, turns))):
        chosen += [items[turn] for items in turns if turn < len(items)]
    return chosen[:count]


def _alterations(caption: Caption) -> Iterator[tuple[str, Caption]]:
    """Captions of the language that differ from ``caption`` in one attribute, with its name."""
    groups = caption.groups
    for place, group in enumerate(groups):
        for attribute, altered in _group_alterations(group):
            replaced = (*groups[:place], altered, *groups[place + 1 :])
            if len({item.combination for item in replaced}) == len(groups):
                total = sum(item.count for item in replaced)
                if total <= MAX_OBJECTS:
                    yield attribute, Caption(replaced, caption.relation)
    if caption.relation is not None:
        for relation in RELATIONS:
            yield "relation", Caption(groups, relation)
    if len(groups) == 2:
        first, second = groups
        swapped = replace(first, color=second.color), replace(second, color=first.color)
        yield "binding", Caption(swapped, caption.relation)


def _group_alterations(group: Group) -> Iterator[tuple[str, Group]]:
    for color in COLORS:
        yield "color", replace(group, color=color)
    for shape in SHAPES:
        yield "shape", replace(group, shape=shape)
    for number in range(1, MAX_OBJECTS + 1):
        yield "count", replace(group, count=number)
    if group.size is not None:
        for size in SIZES:
            yield "size", replace(group, size=size)
