"""GenEval's rules (arXiv 2310.11513): does what was found in a picture agree with what the prompt asked for?

Pure functions of detections; no picture, no network. A request is a row of the benchmark's metadata::

    {"tag": "position", "prompt": "a photo of a dog right of a bench",
     "include": [{"class": "bench", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}

Boxes are (left, top, right, bottom) in pixels, y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rtdmd.errors import UserError, nearest_hint

Box = tuple[float, float, float, float]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

# COCO's 80 classes in COCO's order, under the benchmark's names.
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag",
    "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog",
    "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv",
    "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
    "toothbrush",
)
# fmt: on

MAX_PER_CLASS = 16
POSITION_MARGIN = 0.1

_CONFIDENCE = 0.3
_COUNTING_CONFIDENCE = 0.9
_MIN_DIRECTION = 0.5


@dataclass(frozen=True)
class Found:
    """An object in a picture: where, how sure the detector is, and its colour if one was asked for."""

    box: Box
    confidence: float
    color: str | None = None


# By class, the most confident first.
Objects = Mapping[str, Sequence[Found]]


@dataclass(frozen=True)
class Clause:
    """``count`` objects of a class, of a colour, at a relation to the objects of an earlier clause."""

    name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int = 0  # index of the earlier clause


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: all of ``include``, and none of ``exclude`` (that many or more)."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @classmethod
    def parse(cls, prompt: str, metadata: Mapping[str, Any]) -> Request:
        """Read a row of the benchmark's metadata.

        Raises:
            UserError: naming the prompt and the key that is missing or not understood.
        """
        place = f"prompt {prompt!r}"
        for key in ("tag", "include"):
            if key not in metadata:
                raise UserError(f"{place}: geneval needs the metadata {key!r}, which this prompt hasn't")
        tag = metadata["tag"]
        if tag not in TASKS:
            raise UserError(f"{place}: 'tag' is {tag!r}; known: {', '.join(TASKS)}")
        include = _clauses(place, "include", metadata["include"])
        if not include:
            raise UserError(f"{place}: 'include' is empty, so that there is nothing to score")
        return cls(tag, include, _clauses(place, "exclude", metadata.get("exclude") or []))

    @property
    def min_confidence(self) -> float:
        """Detections must be more confident than this: 0.3, for counting 0.9."""
        return _COUNTING_CONFIDENCE if self.tag == "counting" else _CONFIDENCE

    @property
    def colored(self) -> dict[str, int]:
        """Classes whose colour is asked for, with how many of their objects are looked at."""
        counts: dict[str, int] = {}
        for clause in self.include:
            if clause.color is not None:
                counts[clause.name] = max(clause.count, counts.get(clause.name, 0))
        return counts


def most_confident(confidences: Sequence[float], minimum: float, limit: int = MAX_PER_CLASS) -> list[int]:
    """Indices of the objects of one class that count: above ``minimum``, the surest ``limit``, in order."""
    kept = [index for index, confidence in enumerate(confidences) if confidence > minimum]
    return sorted(kept, key=lambda index: -confidences[index])[:limit]


def relations(box: Box, other: Box, margin: float = POSITION_MARGIN) -> frozenset[str]:
    """Where ``box`` lies relative to ``other``: none, one or two of ``RELATIONS``.

    Per axis, d is the centres' offset, shortened by margin·(size + other size) but not beyond 0. A relation
    holds where the shortened offset exceeds half the length of the unshortened offset (of both axes).
    """
    offset, shortened = [], []
    for axis in (0, 1):
        distance = (box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2
        sizes = (box[axis + 2] - box[axis]) + (other[axis + 2] - other[axis])
        offset.append(distance)
        shortened.append(math.copysign(max(abs(distance) - margin * sizes, 0.0), distance))
    length = math.hypot(*offset)
    if length == 0:
        return frozenset()
    right, down = (part / length for part in shortened)
    holds = (right < -_MIN_DIRECTION, right > _MIN_DIRECTION, down < -_MIN_DIRECTION, down > _MIN_DIRECTION)
    return frozenset(name for name, is_so in zip(RELATIONS, holds, strict=True) if is_so)


def benchmark_score(request: Request, objects: Objects) -> float:
    """1 if the picture is right by the benchmark's rules, else 0.

    Of each included class there are at least ``count``; of the surest ``count`` all have the colour, and each
    stands in the relation to each object of the target clause, which was fulfilled itself. No excluded class
    is there ``count`` times or more (which makes counting exact).
    """
    matched: list[Sequence[Found] | None] = []
    for clause in request.include:
        found = objects.get(clause.name, ())[: clause.count]
        fulfilled = (
            len(found) == clause.count
            and (clause.color is None or all(item.color == clause.color for item in found))
            and (clause.relation is None or _stand(found, clause.relation, matched[clause.target]))
        )
        matched.append(found if fulfilled else None)
    excess = any(len(objects.get(clause.name, ())) >= clause.count for clause in request.exclude)
    return float(None not in matched and not excess)


def partial_score(request: Request, objects: Objects) -> float:
    """The mean of partial credits that reinforcement learning trains on (from Flow-GRPO, arXiv 2505.05470).

    Per included clause of n objects, of which m were found: 1 − |n − m|/n; where m = n, also 1 − |n − k|/n
    for k of the asked colour, and, if all have it, 1 for the relation; where m ≠ n, 0 for either. As
    published, a wrong relation to objects that are there counts as the two credits 0 and 1, ``exclude`` is
    not looked at, and more objects than asked for cost as much as fewer: the mean falls below 0 where more
    than twice as many are there.
    """
    credits: list[float] = []
    matched: list[Sequence[Found] | None] = []
    for clause in request.include:
        found = objects.get(clause.name, ())
        fulfilled = len(found) == clause.count
        credits.append(_closeness(clause.count, len(found)))
        if not fulfilled:
            if clause.color is not None or clause.relation is not None:
                credits.append(0.0)
        elif clause.color is not None:
            right = sum(item.color == clause.color for item in found)
            credits.append(_closeness(clause.count, right))
            fulfilled = right == clause.count
        if fulfilled and clause.relation is not None:
            targets = matched[clause.target]
            fulfilled = _stand(found, clause.relation, targets)
            if targets is None:
                credits.append(0.0)
            else:
                credits += [1.0] if fulfilled else [0.0, 1.0]
        matched.append(found if fulfilled else None)
    return sum(credits) / len(credits)


def _closeness(wanted: int, found: int) -> float:
    return 1.0 - abs(wanted - found) / wanted


def _stand(found: Iterable[Found], relation: str, targets: Sequence[Found] | None) -> bool:
    """Whether every object stands in the relation to every target; False if there are no such targets."""
    if targets is None:
        return False
    return all(relation in relations(item.box, target.box) for item in found for target in targets)


def _clauses(place: str, key: str, rows: Any) -> tuple[Clause, ...]:
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise UserError(f"{place}: {key!r} is {type(rows).__name__}, not a list of clauses")
    return tuple(_clause(f"{place}: {key}.{index}", index, row) for index, row in enumerate(rows))


def _clause(place: str, index: int, row: Any) -> Clause:
    if not isinstance(row, Mapping):
        raise UserError(f"{place} is {type(row).__name__}, not an object with 'class' and 'count'")
    for key in ("class", "count"):
        if key not in row:
            raise UserError(f"{place} has no {key!r}")
    name, count, color = row["class"], row["count"], row.get("color")
    if name not in CLASSES:
        raise UserError(f"{place}: unknown class {name!r}{nearest_hint(str(name), CLASSES)}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{place}: 'count' is {count!r}, not a whole number from 1 on")
    if color is not None and color not in COLORS:
        raise UserError(f"{place}: unknown color {color!r}{nearest_hint(str(color), COLORS)}")
    if row.get("position") is None:
        return Clause(name, count, color)
    match row["position"]:
        case [str(relation), int(target)] if relation in RELATIONS and 0 <= target < index:
            return Clause(name, count, color, relation, target)
    raise UserError(
        f"{place}: 'position' is {row['position']!r}, not [relation, index of an earlier clause] with one of "
        f"{', '.join(RELATIONS)}"
    )
