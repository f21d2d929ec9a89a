"""What is done to a transformer and its blocks: recomputing activations, compiling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from rtdmd.models.recomputation import Recomputation
from rtdmd.recipe.schema import Checkpointing, Compile

# Graphs that one kind of block, or of network, may have: batch sizes × with and without gradient × with and
# without an adapter × variants of the block. Beyond the limit torch runs it uncompiled, and says so once.
MAX_GRAPHS = 64


def blocks_of(network: nn.Module, lists: Sequence[str]) -> list[nn.Module]:
    """The blocks of a transformer in the order of their execution; ``lists`` names their ModuleLists."""
    return [block for name in lists for block in network.get_submodule(name).children()]


def recomputation_of(
    network: nn.Module,
    policy: Checkpointing,
    lists: Sequence[str],
    bind: Callable[[nn.Module], Callable[..., Any]] = lambda block: block,
) -> Recomputation:
    """Which blocks drop their activations in forward, to be computed once more in backward.

    ``full``: every one; ``selective``: every other one, beginning with the first; ``none``: none; ``auto``:
    every one as yet, until the caller chooses. ``bind``: see :class:`Recomputation`.
    """
    recomputation = Recomputation(blocks_of(network, lists), bind)
    total = len(recomputation.blocks)
    if policy in ("none", "selective"):
        recomputation.choose(0 if policy == "none" else (total + 1) // 2)
    return recomputation


def recompute_activations(network: nn.Module, present: Callable[[], Recomputation]) -> None:
    """Let blocks run as the recomputation of the ``present`` role says, where a gradient is asked for."""

    def run(block: nn.Module, *args: Any) -> Any:
        return present().run(block, *args)

    network.enable_gradient_checkpointing(run)  # type: ignore[operator]


def compile_forward(network: nn.Module, scope: Compile, lists: Sequence[str]) -> None:
    """Compile with static shapes: ``blocks``, a graph per kind of block and shape; ``network``, one a shape.

    Blocks of a kind share their graphs, so that a deep network compiles in the time of a few blocks. One
    graph of everything leaves the host less to do at each step, which decides where layers are small;
    compiling takes as much longer as there are blocks.

    The module itself stays, so names in state dicts do too, and hooks on it run around the compiled code.
    Hooks on the layers within, ZeRO-3's, would break the graph at each of them: a tiny network alone exceeds
    64 graphs a layer, and nothing is gained. Attach adapters before.
    """
    if scope == "none":
        return
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    for module in [network] if scope == "network" else blocks_of(network, lists):
        module.forward = torch.compile(module.forward, dynamic=False)


def compile_layers(encoder: nn.Module) -> None:
    """Compile each layer of a text encoder: the modules of its longest list.

    The number of prompts may differ from call to call; from the second on it is a variable of one graph.
    """
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    for layer in max(lists, key=len):
        layer.forward = torch.compile(layer.forward)


def num_compiled_graphs() -> int:
    """Graphs that this process has compiled so far; it stops growing once all shapes have been seen."""
    return int(counters["stats"]["unique_graphs"])
