"""Networks below ZeRO-3 exist in the recipe's dtype alone, and their weights arrive in slices."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rtdmd.distributed import loading
from rtdmd.distributed.config import engine_config
from rtdmd.distributed.loading import build_network
from rtdmd.errors import UserError
from rtdmd.models import get_family
from rtdmd.models.lora import adapter_from_state
from rtdmd.models.weights import WeightSource
from tests.lora_files import random_lora

CPU = torch.device("cpu")


class Allocations(TorchDispatchMode):
    """Bytes of what operations return on the CPU, alive at once at most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._alive -= size


@pytest.fixture(params=["flux2", "sd3"])
def case(request: Any, tiny_flux2: Path, tiny_sd3: Path) -> tuple[Any, Path]:
    folder = {"flux2": tiny_flux2, "sd3": tiny_sd3}[request.param]
    return get_family(request.param).transformer_class, folder


def build(network_class: Any, source: WeightSource, dtype: torch.dtype) -> Any:
    return build_network(
        lambda: network_class.from_config(source.config), source, {}, dtype, CPU, lambda: None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [2**24, 100])
def test_weights_and_buffers_are_the_files(
    case: tuple[Any, Path], dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read at once."""
    monkeypatch.setattr(loading, "_SLICE", elements)
    network_class, folder = case
    expected = network_class.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)
    network = build(network_class, WeightSource(str(folder)), dtype)
    assert network.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        got = network.state_dict()[name]
        assert got.dtype == dtype and torch.equal(got, tensor), name
    buffers = dict(network.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    assert all(buffer.device == CPU for buffer in buffers.values())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_there_is_never_a_float32_copy(tiny_flux2: Path) -> None:
    """Beside the bfloat16 weights there is one tensor at most; the file's are in float32."""
    network_class = get_family("flux2").transformer_class
    source = WeightSource(str(tiny_flux2))
    with Allocations() as seen:
        network = build(network_class, source, torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    largest = max(parameter.numel() for parameter in network.parameters())
    assert weights <= seen.peak <= weights + 4 * largest < 1.2 * weights


def test_merged_adapters_are_the_same_in_slices(tiny_flux2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_from_state(random_lora(tiny_flux2, "flux2", 3), 64.0, "test")
    network_class = get_family("flux2").transformer_class

    def weights() -> dict[str, Tensor]:
        source = WeightSource(str(tiny_flux2), adapters=[adapter])
        return build(network_class, source, torch.float32).state_dict()

    whole = weights()
    monkeypatch.setattr(loading, "_SLICE", 100)
    for name, tensor in weights().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-7)


def test_what_deepspeed_does_not_know_is_named(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": "x"}}')
    with pytest.raises(
        UserError, match=r"engine.json: DeepSpeed doesn't accept zero_optimization.reduce_bucket"
    ):
        engine_config(path, "float32", None)


def test_weights_of_another_shape_are_refused(tiny_flux2: Path) -> None:
    source = WeightSource(str(tiny_flux2), replacement={"x_embedder.weight": torch.zeros(3, 3)})
    with pytest.raises(UserError, match=r"x_embedder\.weight: the weights have shape \(3, 3\)"):
        build(get_family("flux2").transformer_class, source, torch.float32)
