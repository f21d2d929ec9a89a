"""The LoRA layer of networks in training against peft's own."""

from __future__ import annotations

import pytest
import torch
from peft.tuners import lora
from torch import Tensor
from worlds import World

from rtdmd.models.lora import PlainLora, attach_adapter
from tests.lora_files import load_transformer

RANK = 4


def gradients(world: World, alpha: float, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], int]:
    """Velocity and gradients of a network with a random adapter, and its number of PlainLora layers."""
    network = load_transformer(world.folder, world.family.name)
    attach_adapter(network, RANK, alpha, world.family.lora_targets)
    generator = torch.Generator().manual_seed(0)
    network.to(dtype)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    text = world.family.encode_prompts(["a red circle", "two dogs"])
    text = type(text)({name: tensor.to(dtype) for name, tensor in text.tensors.items()})
    velocity = world.family.predict_velocity(network, world.latents(2), 0.8, text)
    found = list(torch.autograd.grad(velocity.square().mean(), trained))
    return velocity.detach(), found, sum(isinstance(module, PlainLora) for module in network.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_equal_pefts_bit_by_bit(
    world: World, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At alpha/rank = 2, as in every recipe; every adapted layer is one of ours."""
    velocity, found, count = gradients(world, 2.0 * RANK, dtype)
    assert count == len(found) / 2 > 0
    monkeypatch.delattr(PlainLora, "forward")
    assert PlainLora.forward is lora.Linear.forward
    pefts_velocity, pefts, _ = gradients(world, 2.0 * RANK, dtype)
    assert torch.equal(velocity, pefts_velocity)
    assert all(torch.equal(one, other) for one, other in zip(found, pefts, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in found)


def test_another_scale_differs_by_rounding(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    velocity, found, _ = gradients(world, 0.3 * RANK, torch.float32)
    monkeypatch.delattr(PlainLora, "forward")
    pefts_velocity, pefts, _ = gradients(world, 0.3 * RANK, torch.float32)
    torch.testing.assert_close(velocity, pefts_velocity)
    for one, other in zip(found, pefts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_merged_adapter_is_not_added_again(world: World) -> None:
    """diffusers' fuse_lora puts B·A into the weight."""
    network = load_transformer(world.folder, world.family.name)
    attach_adapter(network, RANK, 2.0 * RANK, world.family.lora_targets)
    text = world.family.encode_prompts(["a red circle", "two dogs"])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        apart = world.family.predict_velocity(network, world.latents(2), 0.8, text)
        network.fuse_lora()
        merged = world.family.predict_velocity(network, world.latents(2), 0.8, text)
    torch.testing.assert_close(merged, apart, atol=1e-4, rtol=1e-4)
