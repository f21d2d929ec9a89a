"""``roles.whole_blocks: null``: as many blocks of a base in shards stay whole as the device's memory allows.

What of a GPU's memory is not used otherwise holds blocks that needn't travel any more; the numbers are the
same. Measured on the stage's own updates, as for ``activation_checkpointing: auto``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.sharding import BlockShards
from rtdmd.distributed.shared import ShardedBase, SharedBase
from rtdmd.models.recomputation import spread
from rtdmd.recipe.schema import Recipe
from rtdmd.stages.device_memory import GIB, CudaMemory, DeviceMemory, Watched


def keep_blocks(shards: BlockShards, count: int) -> None:
    """Have ``count`` of the blocks in shards, evenly spread, stay whole; all if there are fewer."""
    total = len(shards.block_bytes)
    shards.keep(spread(min(count, total), total))


def most_kept(sizes: Sequence[int], room: float) -> int:
    """The largest k such that k of the blocks, evenly spread, take ``room`` bytes at most; 0 if none does."""
    total = len(sizes)
    counts = range(total, 0, -1)
    return next((k for k in counts if sum(sizes[index] for index in spread(k, total)) <= room), 0)


class AutomaticResidency:
    """Chooses how many blocks of each base stay whole, after two updates of the generator and a close look.

    Bases, named by their roles, share what is left in the proportion of their sizes.
    """

    def __init__(self, memory: DeviceMemory, ranks: Ranks, bases: Mapping[str, BlockShards]) -> None:
        self._memory = memory
        self._ranks = ranks
        self._bases = {name: shards for name, shards in bases.items() if shards.block_bytes}
        self._watched = Watched()
        self.restart()

    def restart(self) -> None:
        """Forget what was used so far: by loading, or by pictures between steps."""
        self._watched.restart()
        self._memory.empty_cache()
        self._memory.reset_peak()

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to choose."""
        return not self._bases

    def after_step(self, generator_updated: bool, closely: bool = True) -> list[str]:
        """Collective: call after each step; what was chosen, when it is."""
        if self.is_settled or not self._watched.after_step(generator_updated, closely):
            return []
        notices = self._settle()
        # Into memory of their own: carved out of what activations have left, they would stay in its way.
        self._memory.empty_cache()
        for shards in self._bases.values():
            shards.gather_kept()
        self._bases = {}
        return notices

    def _settle(self) -> list[str]:
        # Ranks that kept other blocks than each other would gather other ones by collectives.
        # Of what is reserved: an allocator that is short of it gives back and asks again in every step.
        mine = [self._memory.peak_reserved(), -self._memory.available()]
        together = torch.tensor(mine, dtype=torch.float64, device=self._ranks.device)
        peak, lacking = self._ranks.max(together).tolist()
        room = -lacking - peak
        sizes = {name: shards.block_bytes for name, shards in self._bases.items()}
        total = sum(map(sum, sizes.values()))
        counts = {name: most_kept(each, room * sum(each) / total) for name, each in sizes.items()}
        for name, shards in self._bases.items():
            keep_blocks(shards, counts[name])
            peak += sum(sizes[name][index] for index in spread(counts[name], len(sizes[name])))
        return [
            f"the base of {name}: {count} of {len(sizes[name])} blocks in shards stay whole from now on "
            f"(roles.whole_blocks: null); {peak / GIB:.1f} GiB at most, as reserved, "
            f"are expected of {-lacking / GIB:.1f} GiB to be had"
            for name, count in counts.items()
        ]


def automatic_residency(
    recipe: Recipe, ranks: Ranks, bases: Mapping[SharedBase, Sequence[str]]
) -> AutomaticResidency | None:
    """Where the recipe leaves it open, and there is a GPU whose memory can be watched."""
    if ranks.device.type != "cuda" or recipe.roles.whole_blocks is not None:
        return None
    shards = {", ".join(names): base.shards for base, names in bases.items() if isinstance(base, ShardedBase)}
    return AutomaticResidency(CudaMemory(ranks.device), ranks, shards)
