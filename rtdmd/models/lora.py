"""Low-rank adapters: attaching them, the state-dict files that hold them, merging them by rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from peft import LoraConfig
from peft.tuners import lora
from safetensors.torch import load_file
from torch import Tensor, nn

from rtdmd.errors import UserError, nearest_hint

_PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "transformer.")
# Suffixes of the projections of a two-stream attention block, as peft's target_modules.
JOINT_ATTENTION_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
_FACTORS = ("lora_A", "lora_B")
DEFAULT = "default"  # name of a network's only adapter, and of any in files


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes that engines, compilers and peft put before it."""
    while name.startswith(_PREFIXES):
        name = name[len(next(prefix for prefix in _PREFIXES if name.startswith(prefix))) :]
    return name.replace("._orig_mod.", ".")


@dataclass(frozen=True)
class Adapter:
    """One LoRA: per module the factors A [rank, in] and B [out, rank]; ΔW = (alpha/rank)·B·A."""

    factors: dict[str, tuple[Tensor, Tensor]]
    alpha: float
    source: str = "adapter"  # where it was read from, for messages

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values()))[0].shape[0]

    def delta(self, module: str, start: int, stop: int) -> Tensor | None:
        """Rows start…stop of ΔW of ``module``, float32; None where the adapter has none."""
        if module not in self.factors:
            return None
        a, b = self.factors[module]
        return (self.alpha / a.shape[0]) * (b[start:stop].float() @ a.float())

    def state(self) -> dict[str, Tensor]:
        """The factors under the names of ``generator_ema.pt``."""
        return {
            f"{module}.{factor}.{DEFAULT}.weight": tensor.contiguous()
            for module, pair in self.factors.items()
            for factor, tensor in zip(_FACTORS, pair, strict=True)
        }


def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter with ΔW = ΔW_1 + ΔW_2 + …, float32, of the sum of their ranks, and alpha that sum.

    [s_1·B_1, s_2·B_2, …]·[A_1; A_2; …] with s_i = alpha_i/rank_i, so that its own alpha/rank is 1: exact
    where the s_i are powers of two (64/32 is), else to a rounding of B. Zeros stand for a module that one
    of them lacks. ``adapters`` have been checked against one and the same model.
    """
    shapes = {
        module: (b.shape[0], a.shape[1]) for adapter in adapters for module, (a, b) in adapter.factors.items()
    }
    factors = {}
    for module, (outputs, inputs) in shapes.items():
        rows, columns = [], []
        for adapter in adapters:
            missing = torch.zeros(adapter.rank, inputs), torch.zeros(outputs, adapter.rank)
            a, b = adapter.factors.get(module, missing)
            rows.append(a.float())
            columns.append((adapter.alpha / adapter.rank) * b.float())
        factors[module] = (torch.cat(rows), torch.cat(columns, dim=1))
    rank = sum(adapter.rank for adapter in adapters)
    return Adapter(factors, float(rank), " + ".join(adapter.source for adapter in adapters))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pt (no pickled objects) or .safetensors file, on the CPU, memory-mapped.

    Raises UserError if the file is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            state = load_file(str(path))
        elif not is_zipfile(path):  # torch's own words would be about mmap
            raise ValueError("torch.save writes others")
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the loaders' own errors have no common class
        raise UserError(f"{path}: not a readable weights file ({error})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a plain state dict of tensors")
    return state


def is_adapter(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds LoRA factors rather than full weights."""
    return any(".lora_A." in name for name in state)


def adapter_from_state(state: Mapping[str, Tensor], alpha: float, source: str) -> Adapter:
    """The adapter in a state dict, under any of the namings that peft, engines and compilers produce.

    Raises UserError, naming ``source``, for empty tensors (an adapter saved without gathering),
    a factor without its partner, foreign tensors, two adapters in one file, and ranks that differ.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, factor = _split_factor(plain_name(name))
        if factor is None:
            raise UserError(f"{source}: {name!r} is no LoRA tensor")
        if tensor.numel() == 0:
            raise UserError(
                f"{source}: {name!r} is empty; the adapter was saved without gathering its shards"
            )
        if tensor.ndim != 2:
            raise UserError(f"{source}: {name!r} has shape {tuple(tensor.shape)}; only linear layers adapt")
        if factor in halves.setdefault(module, {}):
            raise UserError(f"{source}: {module!r} has more than one adapter; save them one a file")
        halves[module][factor] = tensor
    if not halves:
        raise UserError(f"{source}: holds no tensors")
    incomplete = [module for module, pair in halves.items() if len(pair) != 2]
    if incomplete:
        raise UserError(f"{source}: {incomplete[0]!r} has only one of lora_A and lora_B")
    factors = {module: (pair["lora_A"], pair["lora_B"]) for module, pair in halves.items()}
    ranks = {a.shape[0] for a, _ in factors.values()} | {b.shape[1] for _, b in factors.values()}
    if len(ranks) != 1:
        raise UserError(f"{source}: modules of different ranks {sorted(ranks)}")
    return Adapter(factors, alpha, source)


def _split_factor(name: str) -> tuple[str, str | None]:
    """``a.b.lora_A.default.weight`` → (``a.b``, ``lora_A``)."""
    for factor in _FACTORS:
        module, found, _ = name.partition(f".{factor}.")
        if found:
            return module, factor
    return name, None


class AdapterSelection:
    """Which adapters of a network take part in a forward; ΔW is their sum, none leaves the base alone."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names

    @contextmanager
    def using(self, names: tuple[str, ...]) -> Iterator[None]:
        """Select ``names`` inside the block."""
        before, self.names = self.names, names
        try:
            yield
        finally:
            self.names = before

    def is_exactly(self, names: tuple[str, ...]) -> bool:
        """Whether ``names`` are selected, and no others."""
        return self.names == names

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with what is selected now, whenever it is called: a block to recompute in backward,
        when another role's adapters may be selected, or none."""
        names = self.names

        def bound(*args: Any, **kwargs: Any) -> Any:
            with self.using(names):
                return function(*args, **kwargs)

        return bound

    def govern(self, network: nn.Module) -> None:
        """Take over all layers of ``network`` that have adapters."""
        for module in network.modules():
            if isinstance(module, PlainLora):
                module.selection = self


class PlainLora(lora.Linear):
    """y = W·x + Σ B·(alpha/rank)·A·x over the selected adapters, by default the one named ``default``.

    In place of peft's own layer, which asks at each call which adapters there are: in a small network a tenth
    of the host's time. And peft scales B's output, so that in backward the gradient of the layer's whole
    output is scaled and written once more; here it is A's, of the rank's width. Where alpha/rank is a power
    of two the numbers are the same bit for bit.
    """

    selection = AdapterSelection((DEFAULT,))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x)
        for name in self.selection.names:
            if name in self.lora_A:
                y = y + self.lora_B[name](self.lora_A[name](x) * self.scaling[name])
        return y


def attach_adapter(
    transformer: nn.Module, rank: int, alpha: float, targets: Sequence[str], name: str = DEFAULT
) -> None:
    """Add a trainable LoRA to the modules whose names end in ``targets``.

    The base and adapters that are there already are frozen. A and B come from peft's own initialisation;
    :func:`init_adapter` sets them.
    """
    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    config._register_custom_module({nn.Linear: PlainLora})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # on purpose
        transformer.add_adapter(config, adapter_name=name)  # type: ignore[operator]


def check_targets(transformer: nn.Module, targets: Sequence[str]) -> None:
    """UserError for one of ``targets`` in which no linear layer's name ends: peft would leave it out."""
    layers = (name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear))
    names = [name.removesuffix(".base_layer").split(".") for name in layers if ".lora_" not in name]
    for target in targets:
        parts = target.split(".")
        if not any(name[-len(parts) :] == parts for name in names):
            known = sorted({".".join(name[-len(parts) :]) for name in names})
            raise UserError(
                f"lora.targets: no linear layer's name ends in {target!r}{nearest_hint(target, known)}"
            )


def adapter_parameters(transformer: nn.Module, name: str = DEFAULT) -> dict[str, nn.Parameter]:
    """The factors of one adapter, under the names that they have where it is the only one, ``default``."""
    marks = {f".{factor}.{name}.": f".{factor}.{DEFAULT}." for factor in _FACTORS}
    return {
        key.replace(mark, usual): parameter
        for key, parameter in transformer.named_parameters()
        for mark, usual in marks.items()
        if mark in key
    }


def load_adapter(transformer: nn.Module, adapter: Adapter, name: str = DEFAULT) -> None:
    """Put a trained adapter on the transformer unmerged, frozen, in the dtype of its modules.

    The modules' names are those of ``adapter``, which a :class:`rtdmd.models.weights.WeightSource` has
    checked against the model.
    """
    attach_adapter(transformer, adapter.rank, adapter.alpha, sorted(adapter.factors), name)
    factors = adapter_parameters(transformer, name)
    assert len(factors) == 2 * len(adapter.factors), "a module's name is the end of another's"
    with torch.no_grad():
        for key, parameter in factors.items():
            module, factor = _split_factor(key)
            a, b = adapter.factors[module]
            parameter.copy_(a if factor == "lora_A" else b)
    transformer.requires_grad_(False)


def init_adapter(
    transformer: nn.Module,
    std: float,
    normal: Callable[[str, Sequence[int]], Tensor],
    name: str = DEFAULT,
) -> None:
    """A ~ N(0, std²) and B = 0. ``normal(name, shape)`` gives standard normal numbers per tensor."""
    with torch.no_grad():
        for key, parameter in adapter_parameters(transformer, name).items():
            if ".lora_A." in key:
                parameter.copy_(std * normal(plain_name(key), parameter.shape))
            else:
                parameter.zero_()
