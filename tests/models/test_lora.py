"""The LoRA layer of networks in training against peft's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners import lora
from torch import Tensor
from worlds import World

from rtdmd.errors import UserError
from rtdmd.models.lora import (
    AdapterSelection,
    PlainLora,
    adapter_parameters,
    attach_adapter,
    check_targets,
)
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


def test_selected_adapters_add_up(world: World) -> None:
    """None is the base alone; two are what peft computes with both active."""
    network: Any = load_transformer(world.folder, world.family.name)
    text = world.family.encode_prompts(["a red circle", "two dogs"])

    def velocity() -> Tensor:
        with torch.no_grad():
            return world.family.predict_velocity(network, world.latents(2), 0.8, text)

    base = velocity()
    for name, rank in (("one", 4), ("other", 2)):
        attach_adapter(network, rank, 2.0 * RANK, world.family.lora_targets, name)
    selection = AdapterSelection()
    selection.govern(network)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if ".lora_" in key:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(key)))
    assert torch.equal(velocity(), base)
    with selection.using(("one", "other")):
        both = velocity()
    assert torch.equal(velocity(), base)
    network.set_adapter(["one", "other"])
    for module in network.modules():
        if isinstance(module, PlainLora):
            module.__class__ = lora.Linear
    torch.testing.assert_close(both, velocity(), atol=1e-5, rtol=1e-5)


def test_an_adapters_parameters_have_the_names_of_an_only_one(world: World) -> None:
    alone, beside = (load_transformer(world.folder, world.family.name) for _ in range(2))
    attach_adapter(alone, RANK, 8.0, world.family.lora_targets)
    for name in ("default_start", "fake_score"):
        attach_adapter(beside, RANK, 8.0, world.family.lora_targets, name)
    trained = [key for key, parameter in alone.named_parameters() if parameter.requires_grad]
    assert list(adapter_parameters(alone)) == list(adapter_parameters(beside, "fake_score")) == trained
    assert len(adapter_parameters(beside, "default_start")) == len(trained)
    assert not adapter_parameters(beside)


def test_targets_are_ends_of_linear_layers_names(world: World) -> None:
    network = load_transformer(world.folder, world.family.name)
    for name in ("first", "second"):  # beneath an adapter, too
        check_targets(network, ["to_q", "attn.to_q", "transformer_blocks.0.attn.to_k"])
        for wrong, words in (
            ("to_qq", "'to_q'"),
            ("atn.to_q", "'attn.to_q'"),
            ("o_q", ""),
            ("attn", "known: "),
        ):
            with pytest.raises(UserError, match=f"no linear layer's name ends in '{wrong}'.*{words}"):
                check_targets(network, ["to_q", wrong])
        attach_adapter(network, RANK, 8.0, ["to_q", "to_k"], name)


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
