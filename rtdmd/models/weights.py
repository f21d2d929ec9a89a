"""Where a role's transformer weights come from, readable row by row.

An engine shards a network while it loads. It asks for the rows that its rank keeps, so that no
rank ever holds a whole model; adapters of an earlier stage are merged into just those rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

from rtdmd.errors import UserError
from rtdmd.files import read_json
from rtdmd.models.lora import Adapter, plain_name

WEIGHTS_INDEX = "diffusion_pytorch_model.safetensors.index.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
FETCH_AGAIN = "fetch the model again"


def transformer_folder(weights: str, revision: str | None = None) -> Path:
    """The local folder of a pipeline's transformer; a hub id is downloaded (that folder only).

    Raises UserError if there is none, or the hub can't be reached.
    """
    folder = Path(weights).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(weights, revision=revision, allow_patterns=["transformer/*"]))
        except Exception as error:  # hub errors have no common class
            raise UserError(
                f"{weights}: no such folder, and not to be had from the hub ({type(error).__name__}: {error})"
            ) from error
    transformer = folder / "transformer"
    if not (transformer / "config.json").is_file():
        raise UserError(f"{weights}: has no transformer/config.json; give the folder of a diffusers pipeline")
    return transformer


def check_adapter(adapter: Adapter, shape_of: Callable[[str], tuple[int, ...] | None], model: str) -> None:
    """Raise UserError unless every module of ``adapter`` is one of ``model``'s, in its shape.

    ``shape_of(name)`` is the shape of the model's tensor ``name``; None where it has no such tensor.
    """
    for module, (a, b) in adapter.factors.items():
        shape, delta = shape_of(f"{module}.weight"), (b.shape[0], a.shape[1])
        if shape is None:
            raise UserError(f"{adapter.source}: adapter for another model: {model} has no module {module!r}")
        if shape != delta:
            raise UserError(
                f"{adapter.source}: adapter for another model: {module} is {shape} in {model}, {delta} there"
            )


def architecture_shapes(
    network_class: Any, weights: str, revision: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a pipeline's transformer, from its configuration alone: no weights are read.

    Raises UserError if there is no configuration, or the hub can't be reached.
    """
    try:
        config = network_class.load_config(
            str(Path(weights).expanduser()), subfolder="transformer", revision=revision
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{weights}: no transformer/config.json to be had ({type(error).__name__}: {error})"
        ) from error
    with init_empty_weights():
        network = network_class.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _opened(path: Path) -> Any:
    """Tensors of a safetensors file. UserError if it is damaged."""
    try:
        return safe_open(str(path), framework="pt")
    except Exception as error:  # safetensors' errors have no common class
        raise UserError(f"{path}: missing or damaged ({error}); {FETCH_AGAIN}") from error


class WeightSource:
    """Tensors of one transformer, with the rows of ``adapters`` merged in, in order.

    ``replacement`` (the full weights that an earlier stage trained) takes the place of the stored
    tensors. Merging computes in float32 whatever the stored dtype; the caller casts.
    """

    def __init__(
        self,
        weights: str,
        *,
        revision: str | None = None,
        adapters: Sequence[Adapter] = (),
        replacement: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.folder = transformer_folder(weights, revision)
        self.adapters = list(adapters)
        self.replacement = {plain_name(name): value for name, value in (replacement or {}).items()}
        self._files = self._index()
        self._open: dict[Path, Any] = {}
        foreign = [name for name in self.replacement if name not in self._files]
        if foreign:
            raise UserError(f"weights of another model: {self.folder} has no tensor {foreign[0]!r}")
        for adapter in self.adapters:
            self.check_adapter(adapter)

    @property
    def config(self) -> dict[str, Any]:
        """The transformer's configuration, for ``from_config``."""
        return read_json(self.folder / "config.json", FETCH_AGAIN)

    def _index(self) -> dict[str, Path]:
        """File of each tensor."""
        if (self.folder / WEIGHTS_INDEX).is_file():
            weight_map = read_json(self.folder / WEIGHTS_INDEX, FETCH_AGAIN)["weight_map"]
            return {name: self.folder / file for name, file in weight_map.items()}
        single = self.folder / WEIGHTS_FILE
        if not single.is_file():
            raise UserError(f"{self.folder}: has no {WEIGHTS_FILE} and no {WEIGHTS_INDEX}")
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)

    def check_adapter(self, adapter: Adapter) -> None:
        """Raise UserError unless every module of ``adapter`` is one of this transformer's, in its shape."""
        check_adapter(
            adapter, lambda name: self.shape(name) if name in self._files else None, str(self.folder)
        )

    @property
    def names(self) -> list[str]:
        """All tensors, in the order of the files."""
        return list(self._files)

    def _slices(self, name: str) -> Any:
        if name not in self._files:
            raise UserError(f"{self.folder}: no tensor named {name!r}; weights of another architecture?")
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        if name in self.replacement:
            return tuple(self.replacement[name].shape)
        return tuple(self._slices(name).get_shape())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start…stop (of the first dimension) of tensor ``name``, adapters merged in."""
        source = self.replacement[name] if name in self.replacement else self._slices(name)
        rows = source[:] if stop is None else source[start:stop]
        module = name.removesuffix(".weight")
        deltas = [
            adapter.delta(module, start, start + len(rows)) for adapter in self.adapters if rows.ndim == 2
        ]
        for delta in deltas:
            if delta is not None:
                rows = rows.float() + delta
        return rows

    def close(self) -> None:
        """Close the files."""
        self._open.clear()


def load_network(
    network_class: Any, source: WeightSource, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A whole transformer for inference: eval mode, no gradients, ``dtype`` on ``device``.

    Tensors arrive one by one, adapters merged in float32 and then cast. Raises UserError for weights
    that don't have the shapes of the configuration beside them.
    """
    with init_empty_weights(include_buffers=False):
        network = network_class.from_config(source.config)
    tensors = {}
    for name, expected in network.state_dict().items():
        value = source.read(name)
        if value.shape != expected.shape:
            raise UserError(
                f"{source.folder}: {name} has shape {tuple(value.shape)}, its config.json says "
                f"{tuple(expected.shape)}"
            )
        tensors[name] = value.to(device, dtype)
    network.load_state_dict(tensors, assign=True)
    source.close()
    return network.to(device).eval().requires_grad_(False)
