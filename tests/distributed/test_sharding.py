"""A frozen network in shards, gathered block by block: the same numbers, and no more memory than two blocks.

One process with its shards in host memory goes the same ways as several ranks, which test_parity.py has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.peers import consecutive_runs
from rtdmd.distributed.sharding import BlockShards, Placement, build_sharded
from rtdmd.errors import UserError
from rtdmd.models import get_family
from rtdmd.models.blocks import (
    blocks_of,
    compile_forward,
    recomputation_of,
    recompute_activations,
)
from rtdmd.models.lora import adapter_parameters, attach_adapter
from rtdmd.models.weights import WeightSource
from rtdmd.randomness import Draws
from tests.distributed.launch import run_ranks

Case = tuple[Any, Path, torch.device]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: Any) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["flux2", "sd3", "long flux2"])
def case(request: Any, tiny_flux2: Path, tiny_sd3: Path, long_flux2: Path, device: torch.device) -> Case:
    folder = {"flux2": tiny_flux2, "sd3": tiny_sd3, "long flux2": long_flux2}[request.param]
    family = get_family(request.param.split()[-1]).load(str(folder), device=device, dtype=torch.float32)
    return family, folder, device


def build(case: Case, dtype: torch.dtype = torch.float32, **source: Any) -> tuple[Any, BlockShards]:
    family, folder, device = case
    weights = WeightSource(str(folder), **source)
    return build_sharded(
        lambda: family.transformer_class.from_config(weights.config),
        lambda network: blocks_of(network, family.block_lists),
        weights,
        dtype,
        Placement(Ranks(0, 1, device), offload=True),
        lambda: None,
    )


def adapt(network: nn.Module, family: Any, policy: Any) -> dict[str, nn.Parameter]:
    """With an adapter that isn't zero, and blocks recomputed as ``policy`` says."""
    attach_adapter(network, 4, 8.0, family.lora_targets)
    factors = adapter_parameters(network)
    with torch.no_grad():
        for name, factor in factors.items():
            factor.data = factor.to(family.vae.device)
            factor.copy_(0.1 * Draws(0, "test").normal(0, "lora", [name], factor.shape)[0])
    recomputation = recomputation_of(network, policy, family.block_lists)
    recompute_activations(network, lambda: recomputation)
    return factors


def inputs(family: Any) -> tuple[Tensor, Any]:
    text = family.encode_prompts(["a red cube", "two cats"])
    x = Draws(0, "test").normal(0, "x", [0, 1], family.latent_shape(64, 64))
    return x.to(family.vae.device), text


def gradients(network: Any, factors: dict[str, nn.Parameter], family: Any) -> tuple[Tensor, list[Tensor]]:
    """Of a loss over two forwards, after a forward without gradient."""
    x, text = inputs(family)
    with torch.no_grad():
        first = family.predict_velocity(network, x, 0.9, text)
    second = family.predict_velocity(network, first, 0.7, text)
    third = family.predict_velocity(network, second, 0.3, text)
    loss = (second - third).square().mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(factors.values())))


def expected(case: Case) -> tuple[Tensor, list[Tensor]]:
    family, folder, device = case
    network = family.transformer_class.from_pretrained(folder, subfolder="transformer").to(device)
    return gradients(network, adapt(network, family, "none"), family)


def assert_same(found: tuple[Tensor, list[Tensor]], whole: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], whole[0])
    for mine, theirs in zip(found[1], whole[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def check(case: Case, policy: str, scope: Any = "none") -> None:
    family, *_ = case
    network, shards = build(case)
    factors = adapt(network, family, policy)
    compile_forward(network, scope, family.block_lists)
    whole = expected(case)
    for _ in range(2):  # the second time with what the first has left behind
        found = gradients(network, factors, family)
        shards.after_backward()
        assert shards.gathered_bytes == 0
        assert_same(found, whole)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_gradients_are_the_whole_networks(case: Case, policy: str) -> None:
    check(case, policy)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "full"])
def test_gradients_of_compiled_blocks_are_the_whole_networks(case: Case, policy: str) -> None:
    """Compiled code keeps views of parameters for backward."""
    check(case, policy, "blocks")


def test_a_backward_that_broke_off_harms_no_later_forward(case: Case) -> None:
    family, *_ = case
    network, shards = build(case)
    factors = adapt(network, family, "full")
    x, text = inputs(family)

    def fail(_gradient: Tensor) -> None:
        raise RuntimeError("broken off")

    handle = next(iter(factors.values())).register_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        family.predict_velocity(network, x, 0.9, text).square().mean().backward()
    handle.remove()
    found = gradients(network, factors, family)
    shards.after_backward()
    assert_same(found, expected(case))


@pytest.mark.parametrize("kept", [set(), {0}], ids=["released", "kept"])
def test_a_block_that_could_not_be_gathered_is_gathered_the_next_time(
    case: Case, kept: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, *_ = case
    network, shards = build(case)
    factors = adapt(network, family, "full")
    shards.keep(kept)
    exchange, victim = shards._exchange, next(u for u in shards._units[1:] if not u.is_resident)

    def fail(unit: Any) -> None:
        if unit is victim:
            raise torch.OutOfMemoryError("no room")
        exchange(unit)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="no room"):
        patch.setattr(shards, "_exchange", fail)
        gradients(network, factors, family)
    shards.after_backward()
    for _ in range(2):
        assert_same(gradients(network, factors, family), expected(case))
        shards.after_backward()


def test_a_loss_of_a_blocks_own_output_has_its_gradient(case: Case) -> None:
    """It doesn't pass through the network's output, yet reaches what is in no block before it."""
    family, folder, device = case

    def gradient(network: Any) -> Tensor:
        seen: list[Tensor] = []
        block = blocks_of(network, family.block_lists)[1]
        block.register_forward_hook(lambda _module, _args, output: seen.append(output[-1]))
        x, text = inputs(family)
        x.requires_grad_()
        family.predict_velocity(network, x, 0.9, text)
        return torch.autograd.grad(seen[0].square().mean(), x)[0]

    network, shards = build(case)
    found = gradient(network)
    shards.after_backward()
    plain = family.transformer_class.from_pretrained(folder, subfolder="transformer").to(device)
    torch.testing.assert_close(found, gradient(plain.requires_grad_(False)), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_two_blocks_and_what_is_in_none_are_whole_at_a_time(case: Case, policy: str) -> None:
    family, *_ = case
    network, shards = build(case)
    factors = adapt(network, family, policy)
    sizes = sorted(unit.shard.nbytes for unit in shards._units[1:] if not unit.is_resident)
    rest = shards._units[0]
    allowed = (0 if rest.is_resident else rest.shard.nbytes) + sizes[-1] + sizes[-2]
    peaks: list[int] = []
    for block in blocks_of(network, family.block_lists):
        block.register_forward_pre_hook(lambda *_: peaks.append(shards.gathered_bytes))
    for factor in factors.values():
        factor.register_hook(lambda gradient: peaks.append(shards.gathered_bytes))
    gradients(network, factors, family)
    assert len(peaks) > len(factors) and 0 < max(peaks) <= allowed < sum(sizes)


def test_nothing_is_whole_outside_of_forward_and_nothing_is_left_when_closed(case: Case) -> None:
    family, *_ = case
    network, shards = build(case)
    x, text = inputs(family)
    assert shards.gathered_bytes == 0
    with torch.no_grad():
        family.predict_velocity(network, x, 0.9, text)
    assert shards.gathered_bytes == 0
    blocks = blocks_of(network, family.block_lists)
    whole = {id(p) for p in network.parameters() if p.untyped_storage().nbytes() > 0}
    if len(blocks) < 8:
        assert not whole
    else:  # the first and the last block, and what is in none
        sharded = {id(p) for block in blocks[1:-1] for p in block.parameters()}
        assert whole == {id(p) for p in network.parameters()} - sharded
    shards.close()
    assert all(shard.untyped_storage().nbytes() == 0 for shard in shards.shards)


def test_kept_blocks_travel_once(case: Case) -> None:
    """Every other block in shards, then the first alone, then none: the same gradients."""
    family, *_ = case
    network, shards = build(case)
    factors = adapt(network, family, "full")
    whole = expected(case)
    started: list[int] = []
    exchange = shards._exchange
    shards._exchange = lambda unit: (started.append(id(unit)), exchange(unit))[1]  # type: ignore[method-assign]
    units = [unit for unit in shards._units[1:] if not unit.is_resident]
    sizes = shards.block_bytes
    assert sizes == [unit.shard.nbytes for unit in units] and len(sizes) >= 2
    for kept in (set(range(0, len(sizes), 2)), {0}, set()):
        shards.keep(kept)
        assert shards.num_kept == len(kept)
        for first in (True, False):
            started.clear()
            assert_same(gradients(network, factors, family), whole)
            shards.after_backward()
            assert shards.gathered_bytes == sum(sizes[index] for index in kept)
            if not first:
                assert {id(unit) for unit in units} & set(started) == {
                    id(unit) for index, unit in enumerate(units) if index not in kept
                }
    shards.keep({1})
    gradients(network, factors, family)
    shards.close()
    assert all(unit.whole.untyped_storage().nbytes() == 0 for unit in shards._units)


def test_past_a_kept_block_the_next_one_travels(case: Case) -> None:
    """While every other block stays whole, one is there besides those, in flight before its turn."""
    family, *_ = case
    network, shards = build(case)
    factors = adapt(network, family, "none")
    inner = [index for index, unit in enumerate(shards._units) if index > 0 and not unit.is_resident]
    shards.keep(set(range(0, len(inner), 2)))
    gradients(network, factors, family)
    shards.after_backward()
    kept = shards.gathered_bytes
    travelling = {index for index in inner if not shards._units[index].is_kept}
    rest = 0 if shards._units[0].is_resident else shards._units[0].shard.nbytes
    largest = sum(sorted(shards._units[index].shard.nbytes for index in travelling)[-2:])
    late: list[int] = []
    for index, block in enumerate(blocks_of(network, family.block_lists), 1):
        before = index - 1 in inner or shards._units[index - 1].stays

        def watch(*_: Any, index: int = index, before: bool = before) -> None:
            assert shards.gathered_bytes <= kept + rest + largest
            if index + 1 in travelling and before and not shards._units[index + 1].is_here:
                late.append(index + 1)

        block.register_forward_pre_hook(watch)
    gradients(network, factors, family)
    assert travelling and not late


def test_weights_of_another_shape_are_refused(tiny_flux2: Path) -> None:
    family = get_family("flux2").load(str(tiny_flux2), device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(UserError, match=r"x_embedder\.weight: the weights have shape \(3, 3\)"):
        build((family, tiny_flux2, torch.device("cpu")), replacement={"x_embedder.weight": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    ("hosts", "size"),
    [("a", 1), ("aa", 2), ("aabb", 2), ("ab", 2), ("abab", 4), ("aaab", 4), ("aaabbb", 3), ("aabba", 5)],
)
def test_ranks_of_a_machine(hosts: str, size: int) -> None:
    """Parts where all machines have as many consecutive ranks, and more than one."""
    assert consecutive_runs(hosts) == size


@pytest.mark.parametrize(
    ("world_size", "accelerator"),
    [
        (4, "cpu"),
        pytest.param(2, "cuda", marks=pytest.mark.gpu),
        pytest.param(4, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_parts_of_the_ranks_have_a_base_once_each(
    long_flux2: Path, world_size: int, accelerator: str
) -> None:
    """Gathered by collectives of their own, and by copies."""
    if accelerator == "cuda" and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    arguments = ["-m", "tests.distributed.parts", str(long_flux2), "2"]
    outputs = run_ranks(arguments, world_size, accelerator=accelerator)
    for rank, output in enumerate(outputs):
        assert f"rank {rank} is done" in output.stdout
