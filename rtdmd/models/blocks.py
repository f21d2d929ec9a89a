"""What is done to a transformer and its blocks: recomputing activations, compiling."""

from __future__ import annotations

from collections.abc import Sequence

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


def recompute_activations(
    network: nn.Module, policy: Checkpointing, lists: Sequence[str]
) -> Recomputation | None:
    """Drop blocks' activations in forward and compute them once more in backward; None where none are.

    ``full``: of every block; ``selective``: of every other one, beginning with the first; ``none``: of none;
    ``auto``: as yet of every block, until the caller chooses.
    """
    if policy == "none":
        return None
    recomputation = Recomputation(blocks_of(network, lists))
    if policy == "selective":
        recomputation.choose((len(recomputation.blocks) + 1) // 2)
    network.enable_gradient_checkpointing(recomputation.run)  # type: ignore[operator]
    return recomputation


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


def num_compiled_graphs() -> int:
    """Graphs that this process has compiled so far; it stops growing once all shapes have been seen."""
    return int(counters["stats"]["unique_graphs"])
