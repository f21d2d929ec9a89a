"""The judge: does a picture show what a caption says, and nothing else?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from rtdmd.shapes.captions import Caption, Group
from rtdmd.shapes.drawing import Picture
from rtdmd.shapes.reading import Found, Reading, read_picture

_MOST_THINGS = 6  # the largest are compared with the caption; beyond these the picture is wrong anyway

# An object asked for (and by which group), and the one taken for it, None if there are too few.
_Match = Sequence[tuple[int, Group, Found | None]]


@dataclass(frozen=True)
class Verdict:
    """What holds of a caption; ``size`` and ``relation`` are None where it names none.

    ``count`` is whether there are as many objects as asked for in all. The other parts are judged on those
    that agree best with the caption, as many as asked for; none of them holds if a group has none at all.
    """

    color: bool
    shape: bool
    count: bool
    size: bool | None
    relation: bool | None
    plain: bool  # the background is one of the world's

    @property
    def parts(self) -> dict[str, bool]:
        """The parts that apply, by name."""
        every = {name: getattr(self, name) for name in ("color", "shape", "count", "size", "relation")}
        return {name: holds for name, holds in every.items() if holds is not None}

    @property
    def correct(self) -> bool:
        """Everything holds, there is nothing else, and the background is one of the world's."""
        return self.plain and all(self.parts.values())

    @property
    def credit(self) -> float:
        """The share of the parts that hold, in [0, 1]."""
        return sum(self.parts.values()) / len(self.parts)


def verify(image: Picture, wanted: Caption | Mapping[str, Any]) -> Verdict:
    """Judge a picture [64, 64, 3] of uint8 by a caption or its metadata.

    Raises:
        ValueError: the picture has another shape or type.
        UserError: the metadata aren't understood.
    """
    caption = wanted if isinstance(wanted, Caption) else Caption.from_metadata(wanted)
    return judge(read_picture(image), caption)


def judge(reading: Reading, caption: Caption) -> Verdict:
    """Judge what was read of a picture; :func:`verify` without the reading."""
    match = _best_match(reading.things[:_MOST_THINGS], caption)
    present = [(group, thing) for _, group, thing in match if thing is not None]
    groups = {index for index, _, thing in match if thing is not None}
    whole = len(groups) == len(caption.groups)
    sized = any(group.size is not None for group in caption.groups)
    return Verdict(
        color=whole and all(thing.color == group.color for group, thing in present),
        shape=whole and all(thing.shape == group.shape for group, thing in present),
        count=len(reading.things) == len(match),
        size=whole and all(group.size in (None, thing.size) for group, thing in present) if sized else None,
        relation=None if caption.relation is None else whole and _stand(match, caption.relation),
        plain=reading.background is not None,
    )


def stands(thing: Found, relation: str, other: Found) -> bool:
    """Whether ``thing`` stands so to ``other``: their boxes don't overlap along the relation's axis."""
    if relation in ("right of", "below"):
        thing, other = other, thing
    axis = 0 if relation in ("left of", "right of") else 1
    return thing.box[axis + 2] <= other.box[axis]


def _best_match(things: Sequence[Found], caption: Caption) -> _Match:
    """The objects that agree with the caption in the most attributes, then in the relation."""
    asked = [(index, group) for index, group in enumerate(caption.groups) for _ in range(group.count)]
    padded: list[Found | None] = [*things, *[None] * (len(asked) - len(things))]

    def agreement(match: _Match) -> tuple[int, bool]:
        attributes = sum(
            (thing.color == group.color) + (thing.shape == group.shape) + (group.size in (None, thing.size))
            for _, group, thing in match
            if thing is not None
        )
        return attributes, caption.relation is not None and _stand(match, caption.relation)

    matches = (
        [(index, group, thing) for (index, group), thing in zip(asked, chosen, strict=True)]
        for chosen in permutations(padded, len(asked))
    )
    return max(matches, key=agreement)


def _stand(match: _Match, relation: str) -> bool:
    """Whether every object of the first group stands in the relation to every one of the second."""
    first = [thing for index, _, thing in match if index == 0 and thing is not None]
    second = [thing for index, _, thing in match if index == 1 and thing is not None]
    return all(stands(thing, relation, other) for thing in first for other in second)
