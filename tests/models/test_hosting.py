"""Text encoders that wait in host memory encode as those on the device do, and leave nothing there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rtdmd.models import get_family
from rtdmd.models.hosting import host_networks
from rtdmd.models.protocol import ModelFamily

PROMPTS = ["a red circle", "two cats"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def load(name: str, folder: Path, device: str) -> ModelFamily:
    return get_family(name).load(
        str(folder), device=torch.device(device), dtype=torch.float32, max_sequence_length=32
    )


@pytest.fixture(params=["flux2", "sd3"])
def case(request: Any, tiny_flux2: Path, tiny_sd3: Path) -> tuple[str, Path]:
    return request.param, {"flux2": tiny_flux2, "sd3": tiny_sd3}[request.param]


@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_on_the_device_only_while_a_network_runs(case: tuple[str, Path], device: str) -> None:
    family = load(*case, device)
    expected = family.encode_prompts(PROMPTS).tensors
    encoders = host_networks(family.text_encoders, torch.device(device))
    weights = [weight for network in family.text_encoders for weight in network.parameters()]
    waiting = [weight.data_ptr() for weight in weights]
    assert all(weight.device.type == "cpu" for weight in weights)
    assert all(weight.is_pinned() for weight in weights) == (device == "cuda")
    during: list[int] = []
    for network in family.text_encoders:
        # After the pre-hook that moves them.
        network.register_forward_pre_hook(lambda own, _: during.append(next(own.parameters()).data_ptr()))
    for _ in range(2):
        got = family.encode_prompts(PROMPTS).tensors
        for name, tensor in expected.items():
            assert got[name].device.type == device and torch.equal(got[name], tensor)
        assert [weight.data_ptr() for weight in weights] == waiting
    assert len(during) == 2 * len(encoders) and not set(during) & set(waiting)
    for encoder in encoders:
        encoder.free()
    assert sum(weight.numel() for weight in weights) == 0
    with pytest.raises(RuntimeError, match="after it had been freed"):
        family.encode_prompts(PROMPTS)


def test_a_failed_forward_leaves_nothing_on_the_device(tiny_flux2: Path) -> None:
    family = load("flux2", tiny_flux2, "cpu")
    (network,) = family.text_encoders
    host_networks([network], torch.device("cpu"))
    waiting = [weight.data_ptr() for weight in network.parameters()]
    with pytest.raises(IndexError):
        network(input_ids=torch.full((1, 4), 10**6))
    assert [weight.data_ptr() for weight in network.parameters()] == waiting
