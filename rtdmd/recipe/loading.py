"""Recipes from YAML: strict, typed, with every fault of a file and its overrides reported at once."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rtdmd.errors import UserError, nearest_hint
from rtdmd.recipe.keys import is_section, unknown_key_hint
from rtdmd.recipe.schema import Recipe
from rtdmd.recipe.tree import (
    Faults,
    Node,
    apply_override,
    dump_yaml,
    join_key,
    merge,
    parse_yaml,
    raise_faults,
)

# What a person is told to write, by the field's type.
_WANTED = {
    str: ("text", "'text'"),
    int: ("a whole number", "4"),
    float: ("a number", "0.5"),
    bool: ("true or false", "true"),
}
_ABSENT = object()
# Fields that may hold a path, in which ~ is the home folder.
_PATHS = (
    "engine",
    "output",
    "pipeline",
    "source",
    "start_fake_score",
    "start_generator",
    "token_file",
    "weights",
)
_LAYER = "with="


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, after ``key=value`` overrides.

    Keys of overrides are dotted, list items go by index (``rewards.0.weight=2``), values are YAML.
    ``with=FILE`` puts another file's sections over the recipe's; overrides apply in their order.
    Raises UserError with all faults of file and overrides: each names file and line (or the
    override), dotted key and value, and says what to write instead.
    """
    recipe, faults = parse_recipe(path, overrides)
    raise_faults(str(path), faults)
    assert recipe is not None
    return recipe


def parse_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe | None, list[str]]:
    """Like :func:`load_recipe`, but returns the faults; None if they leave no recipe to look at.

    A file that isn't a YAML mapping still raises UserError.
    """
    faults = Faults(str(path))
    root = _parse_mapping(path, faults, "a recipe is a mapping that starts with 'name:' and 'model:'")
    for override in overrides:
        if override.startswith(_LAYER):
            layer = override.removeprefix(_LAYER)
            if not layer:
                raise UserError(f"{_LAYER} names no file; write {_LAYER}recipes/layouts/shared_base.yaml")
            merge(root, _parse_mapping(layer, faults, "it is a mapping of a recipe's sections"))
        else:
            apply_override(root, override, faults)
    recipe = _build_section(Recipe, root, "", faults)
    return (None if recipe is _ABSENT else recipe), faults.lines


def _parse_mapping(path: str | Path, faults: Faults, advice: str) -> Node:
    node = parse_yaml(_read(Path(path)), str(path), faults)
    if not isinstance(node.value, dict):
        found = "is empty" if node.value is None else f"holds {node.describe()}"
        raise UserError(f"{path} {found}; {advice}")
    return node


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that loads back to an equal object."""
    return dump_yaml(dataclasses.asdict(recipe))


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        folders = {path.parent, Path("recipes")}
        near = [str(file) for folder in folders for file in folder.glob("[!.]*.yaml")]
        named = [file for file in near if Path(file).stem == path.stem]  # `demo` is recipes/demo.yaml
        hint = nearest_hint(named[0] if named else str(path), near) if near else "; give a recipe's path"
        raise UserError(f"{path}: there is no such recipe{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the path of a recipe's YAML file in it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8 text; save the recipe as UTF-8") from None


def _build_section(section: type, node: Node, key: str, faults: Faults) -> Any:
    """An object of the dataclass ``section``, or _ABSENT once a fault has been noted."""
    if not isinstance(node.value, dict):
        faults.add(
            node,
            key,
            f"expected a section with keys such as {dataclasses.fields(section)[0].name!r}, "
            f"got {node.describe()}",
        )
        return _ABSENT
    hints = get_type_hints(section)
    for name, child in node.value.items():
        if name not in hints:
            hint = unknown_key_hint(Recipe, section, key, name)
            faults.add(child, join_key(key, name), f"unknown key{hint}")
    values = {}
    for field in dataclasses.fields(section):
        dotted = join_key(key, field.name)
        if field.name in node.value:
            values[field.name] = _build(hints[field.name], node.value[field.name], dotted, faults)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            faults.add(node, dotted, f"missing; {_how_to_add(hints[field.name], field.name)}")
            values[field.name] = _ABSENT
    return _ABSENT if _ABSENT in values.values() else section(**values)


def _build(wanted: Any, node: Node, key: str, faults: Faults) -> Any:
    """A value of the type ``wanted``, or _ABSENT once a fault has been noted."""
    if node.faulty:
        return _ABSENT
    origin = get_origin(wanted)
    if origin in (Union, UnionType):
        if node.value is None:
            return None
        (inner,) = (option for option in get_args(wanted) if option is not NoneType)
        return _build(inner, node, key, faults)
    if node.value is None:
        faults.add(node, key, f"null is not allowed; write {_wanted_text(wanted)} or leave the key out")
        return _ABSENT
    if is_section(wanted):
        return _build_section(wanted, node, key, faults)
    if origin is list:
        return _build_list(get_args(wanted)[0], node, key, faults)
    if origin is Literal:
        return _build_literal(get_args(wanted), node, key, faults)
    return _build_scalar(wanted, node, key, faults)


def _build_list(wanted: Any, node: Node, key: str, faults: Faults) -> Any:
    if not isinstance(node.value, list):
        faults.add(node, key, f"expected a list, got {node.describe()}; write [{_example(wanted)}]")
        return _ABSENT
    items = [_build(wanted, item, join_key(key, str(index)), faults) for index, item in enumerate(node.value)]
    return _ABSENT if _ABSENT in items else items


def _build_literal(options: tuple[str, ...], node: Node, key: str, faults: Faults) -> Any:
    if isinstance(node.value, str) and node.value in options:
        return node.value
    close = get_close_matches(node.text, options, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    faults.add(node, key, f"expected one of {', '.join(options)}, got {node.describe()}{hint}")
    return _ABSENT


def _build_scalar(wanted: type, node: Node, key: str, faults: Faults) -> Any:
    value = node.value
    if wanted is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            value = math.inf
    if type(value) is not wanted:
        text, example = _WANTED[wanted]
        if wanted is int and type(value) is float and value.is_integer():
            example = str(int(value))
        elif wanted is str and not isinstance(value, dict | list):
            example = f"'{node.text}' in quotes"
        elif wanted in (int, float) and isinstance(value, str) and _is_number(value):
            example = f"{value} without quotes"
        faults.add(node, key, f"expected {text}, got {node.describe()}; write {example}")
        return _ABSENT
    if isinstance(value, float) and not math.isfinite(value):
        faults.add(node, key, f"expected a finite number, got {node.text}; write a number such as 0.5")
        return _ABSENT
    if isinstance(value, str) and key.rpartition(".")[2] in _PATHS:
        if "\0" in value:
            faults.add(node, key, "no path holds a zero byte; leave it out")
            return _ABSENT
        value = os.path.expanduser(value)
        if value.startswith("~"):
            faults.add(node, key, "there is no such home folder; write the path in full")
            return _ABSENT
    return value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _wanted_text(wanted: Any) -> str:
    if is_section(wanted):
        return "a section"
    if get_origin(wanted) is list:
        return "a list"
    if get_origin(wanted) is Literal:
        return "one of " + ", ".join(get_args(wanted))
    return _WANTED[wanted][0]


def _example(wanted: Any) -> str:
    if is_section(wanted):
        return f"{{{dataclasses.fields(wanted)[0].name}: …}}"
    return str(get_args(wanted)[0]) if get_origin(wanted) is Literal else _WANTED[wanted][1]


def _how_to_add(wanted: Any, name: str) -> str:
    if get_origin(wanted) is list:
        return f"add the list '{name}: [{_example(get_args(wanted)[0])}]'"
    if is_section(wanted):
        required = [
            field.name
            for field in dataclasses.fields(wanted)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        return f"add the section '{name}:' with {', '.join(required)}"
    return f"add '{name}: …' with {_wanted_text(wanted)}"
