"""Which captions are held out, and draws of captions.

Held out are combinations: unordered pairs of (colour, shape) for captions of two groups, (colour, shape,
count) for counts. All of them, sorted by a hash, are cut into test, validation and training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import blake2b
from itertools import combinations, product
from typing import Literal, TypeVar

import numpy as np

from rtdmd.shapes.captions import COLORS, KINDS, RELATIONS, SHAPES, SIZES, Caption, Combination, Group

T = TypeVar("T")

Split = Literal["train", "validation", "test", "all"]

TEST_SHARE = 0.10
VALIDATION_SHARE = 0.05

# Captions that mix a count with another object are the hardest to learn, so that they are drawn most often.
PROPORTIONS: Mapping[str, float] = {"single": 0.15, "count": 0.15, "and": 0.2, "relation": 0.22, "mix": 0.28}

_SIZE_IS_NAMED = 0.4
_ALL = tuple(product(COLORS, SHAPES))

Pair = tuple[Combination, Combination]
Counted = tuple[Combination, int]


@cache
def pairs(split: Split) -> tuple[Pair, ...]:
    """Pairs of unlike combinations, each once, in the order of ``COLORS`` and ``SHAPES``."""
    return _part(list(combinations(_ALL, 2)), split)


@cache
def counted(split: Split) -> tuple[Counted, ...]:
    """Combinations with a count of two or three."""
    return _part(list(product(_ALL, (2, 3))), split)


def split_of(caption: Caption) -> Split | None:
    """The split that may draw ``caption``; ``all`` for one object, which no split holds out.

    None is for counts of one held-out part beside a pair of another.
    """
    if caption.kind == "single":
        return "all"
    splits: tuple[Split, ...] = ("train", "validation", "test")
    counts = [(group.combination, group.count) for group in caption.groups if group.count > 1]
    if caption.kind == "count":
        return next(split for split in splits if counts[0] in counted(split))
    pair = _ordered(*(group.combination for group in caption.groups))
    split = next(split for split in splits if pair in pairs(split))
    return split if all(_may_count(item, split) for item in counts) else None


def draw_caption(
    rng: np.random.Generator,
    split: Split = "train",
    kind: str | None = None,
    proportions: Mapping[str, float] = PROPORTIONS,
) -> Caption:
    """A caption of ``split``, of a random kind by ``proportions`` unless ``kind`` says which.

    ``train`` has no held-out combination. In ``validation`` and ``test`` every count is held out, and so is
    every pair; a single object is any. ``all`` holds nothing out. A size is named in two of five groups.
    """
    kind = kind or _draw_kind(rng, proportions)
    if kind == "single":
        return Caption((_group(rng, _pick(rng, _ALL), 1),))
    if kind == "count":
        combination, count = _pick(rng, counted(split))
        return Caption((_group(rng, combination, count),))
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    while True:
        chosen = _pick(rng, pairs(split))
        first, second = chosen if rng.random() < 0.5 else chosen[::-1]
        counts = (1, 1)
        if kind == "mix":
            counts = (2, 1) if rng.random() < 0.5 else (1, 2)
            if not _may_count((first if counts[0] == 2 else second, 2), split):
                continue
        related = kind == "relation" or (kind == "mix" and rng.random() < 0.5)
        relation = _pick(rng, RELATIONS) if related else None
        return Caption((_group(rng, first, counts[0]), _group(rng, second, counts[1])), relation)


def _part(items: list[T], split: Split) -> tuple[T, ...]:
    if split == "all":
        return tuple(items)
    ranked = sorted(items, key=lambda item: blake2b(repr(item).encode(), digest_size=8).digest())
    test = round(TEST_SHARE * len(items))
    validation = test + round(VALIDATION_SHARE * len(items))
    part = {"test": ranked[:test], "validation": ranked[test:validation], "train": ranked[validation:]}
    return tuple(sorted(part[split], key=items.index))


def _ordered(first: Combination, second: Combination) -> Pair:
    return (first, second) if _ALL.index(first) < _ALL.index(second) else (second, first)


@cache
def _may_count(item: Counted, split: Split) -> bool:
    """Whether ``item`` may stand beside another group in captions of ``split``."""
    return item in counted("train") or item in counted(split)


def _draw_kind(rng: np.random.Generator, proportions: Mapping[str, float]) -> str:
    bounds = np.cumsum(list(proportions.values()))
    return list(proportions)[int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))]


def _group(rng: np.random.Generator, combination: Combination, count: int) -> Group:
    size = _pick(rng, SIZES) if rng.random() < _SIZE_IS_NAMED else None
    return Group(count, *combination, size)


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]
