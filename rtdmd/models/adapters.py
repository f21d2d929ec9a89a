"""LoRA files of every kind in use, read as one :class:`rtdmd.models.lora.Adapter`, and written.

Three kinds differ in how they state alpha, without which the factors say only half:

- state-dict files (``generator_ema.pt``, ours and the published ones) don't: it is the recipe's;
- diffusers' ``pytorch_lora_weights.safetensors`` does in its adapter metadata, and without such
  metadata alpha is the rank, as diffusers takes it;
- peft's folders do in ``adapter_config.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from rtdmd.errors import UserError
from rtdmd.models.lora import Adapter, adapter_from_state, is_adapter, read_state_dict
from rtdmd.models.protocol import ModelFamily
from rtdmd.recipe.schema import LoraSection

STATE_FILE = "generator_ema.pt"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Settings of peft under which ΔW is not (alpha/rank)·B·A, the same for all modules.
_OTHER_ARITHMETIC = (
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "use_dora",
    "use_rslora",
)


def read_adapter(path: str | Path, *, alpha: float, rank: int | None = None) -> Adapter:
    """The adapter in a state-dict file, a diffusers LoRA file, a peft folder, or a folder with one of them.

    ``alpha`` (the recipe's ``lora.alpha``) holds for files that don't state their own. Prefixes of
    engines, compilers, peft and pipelines are stripped from names. Raises UserError, naming the file,
    if it can't be read or is no plain LoRA, if a tensor is empty or a factor missing, and if its rank
    isn't ``rank`` (the recipe's ``lora.rank``; None takes any).
    """
    file = _adapter_file(Path(path).expanduser())
    state = read_state_dict(file)
    if not is_adapter(state):
        raise UserError(f"{file}: no LoRA file: it has no tensors named lora_A{_first(state)}")
    adapter = adapter_from_state(state, alpha, str(file))
    settings, stated = _settings(file), "the lora.alpha it was trained with"
    if settings is not None:
        adapter = replace(adapter, alpha=_stated_alpha(settings, adapter))
        stated = f"lora.alpha={adapter.alpha:g}"
    elif file.suffix == ".safetensors" and not _names_an_adapter(state):
        adapter = replace(adapter, alpha=float(adapter.rank))
    if rank is not None and adapter.rank != rank:
        raise UserError(
            f"{file}: its rank is {adapter.rank}, the recipe's lora.rank {rank}; is it another model's? "
            f"If not, add lora.rank={adapter.rank} and {stated}"
        )
    return adapter


@dataclass(frozen=True)
class Trained:
    """What training added to base weights: full weights in their place, and adapters on top, in order."""

    adapters: list[Adapter]
    replacement: dict[str, Tensor] | None = None


def read_trained(files: Sequence[str | Path], lora: LoraSection) -> Trained:
    """Stages' weights files in the order of the stages, LoRA or full weights, under the recipe's ``lora``.

    Full weights hold all that was trained before them. Raises UserError like :func:`read_adapter`.
    """
    trained = Trained([])
    for file in map(Path, files):
        state = read_state_dict(file) if file.is_file() else {}
        if state and not is_adapter(state):
            trained = Trained([], state)
        else:
            trained.adapters.append(read_adapter(file, alpha=lora.alpha, rank=lora.rank))
    return trained


def _adapter_file(path: Path) -> Path:
    """The weights file that ``path`` is or holds."""
    if not path.is_dir():
        return path
    names = PEFT_FILES if (path / PEFT_CONFIG).is_file() else (DIFFUSERS_FILE, STATE_FILE)
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"{path}: the folder has no LoRA file ({', '.join(names)})")
    return found


def _settings(file: Path) -> dict[str, Any] | None:
    """What peft or diffusers wrote about the adapter; None where they wrote nothing."""
    if file.name in PEFT_FILES and (file.parent / PEFT_CONFIG).is_file():
        return _parse((file.parent / PEFT_CONFIG).read_text(encoding="utf-8"), file.parent / PEFT_CONFIG)
    if file.suffix != ".safetensors":
        return None
    with safe_open(str(file), framework="pt") as opened:
        metadata = (opened.metadata() or {}).get("lora_adapter_metadata")
    if metadata is None:
        return None
    # Pipelines put their component's name before each key, transformers nothing.
    return {key.removeprefix("transformer."): value for key, value in _parse(metadata, file).items()}


def _parse(text: str, file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: its adapter settings are not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file}: its adapter settings are {type(settings).__name__}, not a mapping")
    return settings


def _stated_alpha(settings: dict[str, Any], adapter: Adapter) -> float:
    file = adapter.source
    kind = settings.get("peft_type") or "LORA"
    if kind != "LORA":
        raise UserError(f"{file}: an adapter of kind {kind}, not LoRA")
    other = [name for name in _OTHER_ARITHMETIC if settings.get(name)]
    if settings.get("bias") not in (None, "none"):
        other.append("bias")
    if other:
        raise UserError(f"{file}: a LoRA with {', '.join(other)}, which is not supported")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float):
            raise UserError(f"{file}: its adapter settings have no number {name!r}")
    if settings["r"] != adapter.rank:
        raise UserError(f"{file}: its settings say rank {settings['r']}, its tensors have {adapter.rank}")
    return float(settings["lora_alpha"])


def _names_an_adapter(state: Iterable[str]) -> bool:
    """Whether names are those of a module's parameters (``lora_A.default.weight``), not of a LoRA file."""
    return not any(name.endswith(".lora_A.weight") for name in state)


def _first(state: Iterable[str]) -> str:
    name = next(iter(state), None)
    return "" if name is None else f", but {name!r}"


def save_diffusers_lora(
    state: dict[str, Tensor], folder: Path, family: type[ModelFamily] | ModelFamily, lora: LoraSection
) -> None:
    """``pytorch_lora_weights.safetensors`` for ``pipeline.load_lora_weights``, with rank and alpha.

    ``state`` has the names of ``generator_ema.pt``. Without the adapter metadata diffusers takes the rank
    for alpha without a word. Call on rank 0.
    """
    layers = {name.replace(".default.weight", ".weight"): tensor for name, tensor in state.items()}
    metadata = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets or family.lora_targets),
    }
    beside = folder / ".lora.partial"
    shutil.rmtree(beside, ignore_errors=True)
    family.pipeline_class.save_lora_weights(  # type: ignore[attr-defined]
        str(beside), transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )
    for file in beside.iterdir():
        file.replace(folder / file.name)
    beside.rmdir()
