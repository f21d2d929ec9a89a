"""Reading published checkpoints: nothing of the file is run, nothing of the model stays random."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from rtdmd.errors import UserError
from rtdmd.rewards.sources import HubFiles, first_line

Config = TypeVar("Config")


def read_state_dict(path: Path, published: HubFiles) -> dict[str, Tensor]:
    """The tensors of a .pt, .pth or .safetensors file by name, on the CPU.

    They may lie under ``state_dict`` or ``model``, and each name may begin with ``module.``, as training
    scripts save them.

    Raises:
        UserError: the file is damaged or holds something else; names the command that fetches ``published``.
    """
    fetch = f"fetch it anew with: hf download {published.repo} {published.files[0]} --force-download"
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise about anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: damaged, or no file of weights ({reason}); {fetch}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no weights; {fetch}")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def config_beside(folder: Path | None, published: Config) -> Config:
    """The transformers configuration in ``folder``'s config.json, else the published architecture.

    So that a checkpoint of another size loads, which describes itself.

    Raises:
        UserError: config.json belongs to another type of model, or can't be read.
    """
    file = None if folder is None else folder / "config.json"
    if file is None or not file.is_file():
        return published
    config_class: Any = type(published)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        found = settings.get("model_type")
        config = config_class.from_dict(settings)
    except Exception as error:  # transformers' validation has errors of its own
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file}: no configuration of a {config_class.model_type} ({reason})") from error
    if found != config_class.model_type:
        raise UserError(
            f"{file}: describes a {found!r}, this reward's network is a {config_class.model_type!r}; "
            "move the weights to a folder of their own"
        )
    return config


def build_model(
    model_class: Any,
    config: Any,
    state: Mapping[str, Tensor],
    source: Path,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A transformers model in ``dtype`` and evaluation mode with exactly the weights of ``state``.

    ``options`` go to the model's constructor. Names that the model doesn't know are left out.

    Raises:
        UserError: a weight is absent from ``state`` or has another shape; transformers would go on with
            random values in its place.
    """
    with torch.device("meta"):
        expected = model_class(config, **options).state_dict()
    check_weights(expected, state, source, model_class.__name__)
    chosen = {name: state[name] for name in expected}
    # Unlike the constructor this draws no random weights first, which takes long and moves the global seed.
    model = model_class.from_pretrained(None, config=config, state_dict=chosen, dtype=dtype, **options)
    return model.requires_grad_(False).eval()


def check_weights(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Path, network: str
) -> None:
    """UserError unless ``state`` has every name of ``expected``, with its shape."""
    absent = [name for name in expected if name not in state]
    if absent:
        raise UserError(
            f"{source}: {len(absent)} of {len(expected)} weights of {network} are not in it, "
            f"such as {absent[0]}"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} of {network} has the shape {list(state[name].shape)}, "
                f"expected {list(tensor.shape)}"
            )
