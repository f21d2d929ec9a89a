"""The language of the small world: what a caption says, its text, and its metadata in GenEval's manner.

    caption = group | group "and" group | group relation group
    relation = "left of" | "right of" | "above" | "below"
    group = ("a" | "two" | "three") ["small" | "large"] colour noun

A caption speaks of three objects at most, and its two groups differ in colour or shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rtdmd.errors import UserError, nearest_hint

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
KINDS = ("single", "count", "and", "relation", "mix")
MAX_OBJECTS = 3

_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
_NUMBERS = {2: "two", 3: "three"}
_ARTICLES = {"orange": "an"}

Combination = tuple[str, str]  # colour and shape


@dataclass(frozen=True)
class Group:
    """``count`` objects of one colour and shape; of one size if ``size`` is named."""

    count: int
    color: str
    shape: str
    size: str | None = None

    @property
    def combination(self) -> Combination:
        """Colour and shape."""
        return self.color, self.shape

    @property
    def text(self) -> str:
        """As the caption has it: ``two small red circles``."""
        noun = self.shape if self.count == 1 else _PLURALS[self.shape]
        words = [word for word in (self.size, self.color, noun) if word is not None]
        return " ".join([_NUMBERS.get(self.count) or _ARTICLES.get(words[0], "a"), *words])


@dataclass(frozen=True)
class Caption:
    """One or two groups; ``relation`` is where every object of the first stands to every one of the second.

    Raises:
        ValueError: the language has no such caption.
    """

    groups: tuple[Group, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        combinations = [group.combination for group in self.groups]
        total = sum(group.count for group in self.groups)
        if not 1 <= len(self.groups) <= 2 or len(set(combinations)) != len(combinations):
            raise ValueError(f"a caption has one or two groups, unlike in colour or shape, got {self.groups}")
        if min(group.count for group in self.groups) < 1 or total > MAX_OBJECTS:
            raise ValueError(f"a caption has 1 to {MAX_OBJECTS} objects, got {self.groups}")
        if self.relation is not None and len(self.groups) != 2:
            raise ValueError(f"{self.relation!r} needs two groups, got {self.groups}")

    @property
    def kind(self) -> str:
        """One of ``KINDS``; ``mix`` is a count together with another group."""
        several = max(group.count for group in self.groups) > 1
        if len(self.groups) == 1:
            return "count" if several else "single"
        if several:
            return "mix"
        return "and" if self.relation is None else "relation"

    @property
    def text(self) -> str:
        """The caption in words, twelve at most."""
        return f" {self.relation or 'and'} ".join(group.text for group in self.groups)

    @property
    def metadata(self) -> dict[str, Any]:
        """A row as GenEval writes it: the object of a relation comes first, who stands there second.

        ``size`` and ``position`` are there only if the caption names them.
        """
        groups = self.groups if self.relation is None else self.groups[::-1]
        include: list[dict[str, Any]] = []
        for group in groups:
            clause: dict[str, Any] = {"class": group.shape, "count": group.count, "color": group.color}
            if group.size is not None:
                clause["size"] = group.size
            include.append(clause)
        if self.relation is not None:
            include[1]["position"] = [self.relation, 0]
        return {"tag": self.kind, "include": include, "prompt": self.text}

    @classmethod
    def from_metadata(cls, row: Mapping[str, Any]) -> Caption:
        """The caption that ``metadata`` describes.

        Raises:
            UserError: naming the prompt and the key that is missing or not understood.
        """
        place = f"prompt {row.get('prompt')!r}"
        if "include" not in row:
            raise UserError(f"{place}: shapes needs the metadata 'include', which this prompt hasn't")
        rows = row["include"]
        if not isinstance(rows, Sequence) or isinstance(rows, str) or not 1 <= len(rows) <= 2:
            raise UserError(f"{place}: 'include' is {rows!r}, not a list of one or two clauses")
        groups = tuple(_group(f"{place}: include.{index}", clause) for index, clause in enumerate(rows))
        relation = _relation(place, rows)
        try:
            return cls(groups if relation is None else groups[::-1], relation)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error


def _group(place: str, clause: Any) -> Group:
    if not isinstance(clause, Mapping):
        raise UserError(f"{place} is {type(clause).__name__}, not an object with 'class', 'count', 'color'")
    for key, known in (("class", SHAPES), ("color", COLORS)):
        if clause.get(key) not in known:
            raise UserError(
                f"{place}: {key!r} is {clause.get(key)!r}{nearest_hint(str(clause.get(key)), known)}"
            )
    count, size = clause.get("count"), clause.get("size")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_OBJECTS:
        raise UserError(f"{place}: 'count' is {count!r}, not a whole number from 1 to {MAX_OBJECTS}")
    if size is not None and size not in SIZES:
        raise UserError(f"{place}: 'size' is {size!r}{nearest_hint(str(size), SIZES)}")
    return Group(count, clause["color"], clause["class"], size)


def _relation(place: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    positions = [clause.get("position") for clause in rows]
    match positions:
        case [None] | [None, None]:
            return None
        case [None, [str(relation), 0]] if relation in RELATIONS:
            return relation
    raise UserError(
        f"{place}: 'position' is {positions!r}; only the second clause may have one, [relation, 0] with "
        f"one of {', '.join(RELATIONS)}"
    )
