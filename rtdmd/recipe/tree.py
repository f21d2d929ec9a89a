"""YAML as a tree of values that know where they were written, and overrides of such a tree.

Scalars follow YAML 1.2: `1e-6` is a number, `on`, `yes`, `1:30` and dates are text.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from rtdmd.errors import UserError

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_RESOLVERS = (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT))
_MAX_SHOWN = 60  # characters of a value that a message quotes


class _Loader(yaml.SafeLoader):
    """Composes nodes only; which scalar is what is decided by ``_RESOLVERS``."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {  # type: ignore[misc]
        None: [(_TAG + name, pattern) for name, pattern in _RESOLVERS],
    }


class _Dumper(yaml.SafeDumper):
    """Quotes any text that either this module or a YAML 1.1 reader would take for something else."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {  # type: ignore[misc]
        **yaml.SafeDumper.yaml_implicit_resolvers,
        None: [(_TAG + name, pattern) for name, pattern in _RESOLVERS],
    }


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Between single quotes PyYAML folds Unicode's own line breaks away; between double ones it escapes them.
    style = '"' if set(text) & {"\x85", "\u2028", "\u2029"} else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)


@dataclass
class Node:
    """A value of the recipe; ``where`` is a file and line, or the override that set it."""

    value: Any  # dict[str, Node], list[Node] or a scalar
    where: str
    order: int  # position in the report
    text: str = ""  # a scalar as written
    faulty: bool = False  # its fault has been noted already

    def describe(self) -> str:
        """The value for a message: its kind and how it was written."""
        if isinstance(self.value, dict):
            return "a section"
        if isinstance(self.value, list):
            return "a list"
        if self.value is None:
            return "null"
        shown = _short(self.text)
        return f"the text {shown!r}" if isinstance(self.value, str) else shown


@dataclass
class Faults:
    """Everything that is wrong, in the order in which it stands in the file."""

    source: str
    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, node: Node, key: str, message: str) -> None:
        """Note a fault of the value at dotted ``key``."""
        text = f"{node.where}: {key}: {message}" if key else f"{node.where}: {message}"
        self.found.append((node.order, text))

    @property
    def lines(self) -> list[str]:
        """All faults in their order."""
        return [text for _, text in sorted(self.found, key=lambda fault: fault[0])]


def raise_faults(source: str, lines: list[str]) -> None:
    """UserError that lists ``lines`` as the faults of the file ``source``; nothing if there are none."""
    if lines:
        count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
        raise UserError("\n".join([f"{source} has {count}:", *(f"  {line}" for line in lines)]))


def parse_yaml(text: str, source: str, faults: Faults) -> Node:
    """The tree of a YAML text. Syntax errors raise UserError; repeated keys and the like are noted."""
    try:
        return _to_tree(_compose(text, source), _Place(source, faults), "")
    except RecursionError:
        raise UserError(f"{source}: not valid here: an alias refers to what contains it") from None


def apply_override(root: Node, override: str, faults: Faults) -> None:
    """Set the value of ``key=value`` in the tree; a malformed one is noted as a fault."""
    where = f"{faults.source}: override {override!r}"
    order = 10**9 + len(faults.found)  # after everything that is in the file
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not text.strip() or not all(parts):
        advice = "write key=value, such as cold_start.batch_size=4 (null for nothing)"
        faults.add(Node(None, where, order), "", advice)
        return
    try:
        composed = _compose(text.strip(), "value")
    except UserError as error:
        faults.add(Node(None, where, order), key, f"the value is not YAML: {error}")
        return
    parent = root
    for depth, part in enumerate(parts[:-1]):
        child = _child(parent, part, parts[:depth], where, order, faults)
        if child is None:
            return
        parent = child
    leaf = _to_tree(composed, _Place(where, faults, order), key.strip())
    if isinstance(parent.value, dict):
        parent.value[parts[-1]] = leaf
    elif _item(parent, parts[-1], parts[:-1], where, order, faults) is not None:
        parent.value[int(parts[-1])] = leaf


def merge(root: Node, layer: Node) -> None:
    """Put the values of ``layer`` over those of ``root``; sections are merged key by key, lists replaced."""
    for name, child in layer.value.items():
        present = root.value.get(name)
        if present is not None and isinstance(present.value, dict) and isinstance(child.value, dict):
            merge(present, child)
        else:
            root.value[name] = child


def dump_yaml(value: dict[str, Any]) -> str:
    """Plain values as block YAML, keys in the given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _child(parent: Node, part: str, path: list[str], where: str, order: int, faults: Faults) -> Node | None:
    if isinstance(parent.value, list):
        child = _item(parent, part, path, where, order, faults)
        if child is None:
            return None
    else:
        child = parent.value.setdefault(part, Node({}, where, order))
    if child.value is None:
        child.value = {}
    if not isinstance(child.value, dict | list):
        key = ".".join([*path, part])
        faults.add(Node(None, where, order), key, f"is {child.describe()}, not a section; set {key} itself")
        return None
    return child


def _item(parent: Node, part: str, path: list[str], where: str, order: int, faults: Faults) -> Node | None:
    count = len(parent.value)
    if part.isascii() and part.isdigit() and int(part) < count:
        return parent.value[int(part)]
    key = ".".join(path)
    wanted = f"an index from 0 to {count - 1}" if count else f"the whole list, {key}=[…], because it is empty"
    faults.add(Node(None, where, order), ".".join([key, part]), f"{key} is a list of {count}; write {wanted}")
    return None


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{source}{line}: not valid YAML: {reason}") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise UserError(f"{source}: not valid YAML: {reason}") from None


@dataclass(frozen=True)
class _Place:
    """Where a text came from: a file, in which positions matter, or an override (``order`` is set)."""

    name: str
    faults: Faults
    order: int | None = None

    def node(self, mark: yaml.Mark, text: str = "") -> Node:
        if self.order is not None:
            return Node(None, self.name, self.order, text)
        return Node(None, f"{self.name}:{mark.line + 1}", mark.index, text)


def _to_tree(node: yaml.Node | None, place: _Place, key: str) -> Node:
    """Convert composed YAML, noting repeated keys, keys that aren't text, and foreign tags."""
    if node is None:
        return Node(None, place.name, 0)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, place, key)
    result = place.node(node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        result.value = [_to_tree(item, place, join_key(key, str(i))) for i, item in enumerate(node.value)]
        return result
    result.value = {}
    for key_node, value_node in node.value:
        at = place.node(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            place.faults.add(at, key, "a key is a list or a section; keys are plain words")
            continue
        name = key_node.value
        if name in result.value:
            first = f" (first at {result.value[name].where})" if place.order is None else ""
            place.faults.add(at, join_key(key, name), f"this key is written twice{first}; keep one")
        child = _to_tree(value_node, place, join_key(key, name))
        # A section starts below its key; messages about it point at the key.
        result.value[name] = dataclasses.replace(child, where=at.where, order=at.order)
    return result


def _scalar(node: yaml.ScalarNode, place: _Place, key: str) -> Node:
    result = place.node(node.start_mark, node.value)
    kind = node.tag.removeprefix(_TAG)
    digits = node.value.replace("_", "")
    try:
        if kind == "str":
            result.value = node.value
        elif kind == "bool" and _BOOL.match(node.value):
            result.value = node.value.lower() == "true"
        elif kind == "int":
            result.value = int(digits)
        elif kind == "float":
            result.value = float(re.sub(r"\.(?=inf|nan)", "", digits.lower()))
        elif kind != "null":
            raise ValueError
    except ValueError:
        result.faulty = True
        shown = f"{node.tag} {_short(result.text)!r}"
        place.faults.add(result, key, f"{shown} cannot be read; write plain text, a number, true or false")
    return result


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def join_key(key: str, name: str) -> str:
    """The dotted key of ``name`` in the section at dotted ``key`` (empty: the root)."""
    return f"{key}.{name}" if key else name
