"""Short texts that say what paints: ``base``, ``teacher:steps=50,guidance=4``, ``run:FOLDER``,
``lora:A.pt+B.pt``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from rtdmd.errors import UserError, nearest_hint

KINDS = ("base", "teacher", "run", "lora")
STAGES = ("cold_start", "rtdmd")
NAME = re.compile(r"[A-Za-z0-9_][\w.+-]*", re.ASCII)  # also a folder's name
_OPTION = re.compile(r"(steps|guidance)=(.*)")
_EXAMPLE = "such as cold=run:runs/flux2_4b@cold_start"


@dataclass(frozen=True)
class ModelSpec:
    """A network and its schedule; None is what the recipe says."""

    kind: str
    run: str | None = None  # a run's folder
    stage: str | None = None  # of the run: its weights after this stage; None: what it trained last
    loras: tuple[str, ...] = ()  # files, stacked in this order
    num_steps: int | None = None
    guidance_scale: float | None = None  # of the teacher


def parse_spec(text: str) -> ModelSpec:
    """What ``text`` names; no file is looked for.

    ============================  =====================================================================
    ``base``                      the generator before training
    ``run:FOLDER``                what a run trained last; ``run:FOLDER@cold_start``, ``@rtdmd``: after that
    ``lora:A.pt+B.pt``            adapters, stacked in this order
    ``teacher``                   the teacher under guidance
    ============================  =====================================================================

    Options follow, separated by commas: ``steps=4``, and the teacher's ``guidance=4.0``. Raises UserError.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UserError(f"model {text!r}: unknown kind {kind!r}{nearest_hint(kind, KINDS)}")
    path, spec = _split_options(text, rest, ModelSpec(kind))
    if spec.guidance_scale is not None and kind != "teacher":
        raise UserError(f"model {text!r}: guidance is the teacher's; a generator is trained to need none")
    if kind in ("base", "teacher"):
        if path:
            raise UserError(f"model {text!r}: {path!r} is no option; known: steps=N, guidance=W")
        return spec
    if not path:
        raise UserError(f"model {text!r}: name what to load, such as run:runs/flux2_4b or lora:A.pt+B.pt")
    if kind == "lora":
        return replace(spec, loras=tuple(path.split("+")))
    folder, at, stage = path.rpartition("@")
    if at and stage in STAGES:
        return replace(spec, run=folder, stage=stage)
    if at and not Path(path).exists():
        raise UserError(f"model {text!r}: no stage {stage!r}{nearest_hint(stage, STAGES)}")
    return replace(spec, run=path)


def parse_model(text: str) -> tuple[str, str]:
    """Name and spec of ``NAME=SPEC``; ``base`` and ``teacher`` need no name. Raises UserError."""
    name, equals, spec = text.partition("=")
    if not equals or ":" in name:
        name, spec = text.partition(":")[0], text
        if name in ("run", "lora"):
            raise UserError(f"model {text!r}: give it a name, {_EXAMPLE}")
    if not NAME.fullmatch(name):
        raise UserError(f"model {text!r}: name it with letters, digits, '_', '-', '+' and '.', {_EXAMPLE}")
    parse_spec(spec)
    return name, spec


def _split_options(text: str, rest: str, spec: ModelSpec) -> tuple[str, ModelSpec]:
    """The path, which may have commas in it, and ``spec`` with the options after it."""
    parts = rest.split(",") if rest else []
    while parts and (found := _OPTION.fullmatch(parts[-1])):
        name, value = found.groups()
        try:
            number = int(value) if name == "steps" else float(value)
        except ValueError:
            raise UserError(f"model {text!r}: {name}={value} is no number") from None
        if not number >= 1:
            raise UserError(f"model {text!r}: {name}={value}: give at least 1")
        spec = (
            replace(spec, num_steps=int(number)) if name == "steps" else replace(spec, guidance_scale=number)
        )
        parts.pop()
    return ",".join(parts), spec
