"""One rank of a base in shards that several parts of the ranks have once each.

RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python -m tests.distributed.parts PIPELINE SIZE
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import torch

from rtdmd.distributed.collectives import Ranks, start_ranks, stop_ranks
from rtdmd.distributed.sharding import Placement, build_sharded, placement_of
from rtdmd.models import get_family
from rtdmd.models.blocks import blocks_of
from rtdmd.models.weights import WeightSource


def check_placements(ranks: Ranks, size: int) -> None:
    """What a configuration and ``roles.gather`` come to on one machine."""

    def placed(gather: Any, **zero: Any) -> tuple[int, bool, bool]:
        found = placement_of({"zero_optimization": {"stage": 3, **zero}}, gather, ranks)
        return found.ranks.world_size, found.offload, found.copies

    everyone = ranks.world_size
    assert placed("auto") == (everyone, False, True)
    assert placed("collective") == (everyone, False, False)
    assert placed("auto", zero_hpz_partition_size=size) == (size, False, True)
    assert placed("copies", zero_hpz_partition_size=size) == (size, False, True)
    assert placed("auto", offload_param={"device": "cpu"}) == (everyone, True, False)
    found = placement_of({"zero_optimization": {"stage": 3}}, "auto", ranks)
    assert str(found) == f"in shards over {everyone} ranks, copied from each other"
    found = Placement(ranks, obstacle="needs GPUs")
    assert str(found).endswith("ranks, gathered by collectives (copying needs GPUs)")


def main() -> None:
    pipeline, size = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    ranks = start_ranks(120)
    family = get_family("flux2").load(pipeline, device=ranks.device, dtype=torch.float32)
    part = ranks.part(size)
    assert (part.rank, part.world_size) == (ranks.rank % size, size)
    first = ranks.rank - part.rank
    assert part.gather_objects(ranks.rank) == list(range(first, first + size))
    assert part.sum(torch.tensor(ranks.rank, device=ranks.device)) == sum(range(first, first + size))
    check_placements(ranks, size)
    whole = family.transformer_class.from_pretrained(pipeline, subfolder="transformer").to(ranks.device)
    text = family.encode_prompts(["a red cube"])
    x = torch.ones(1, *family.latent_shape(64, 64), device=ranks.device)
    expected = family.predict_velocity(whole, x, 0.7, text)
    for copies in (False, True):
        source = WeightSource(pipeline)
        network, shards = build_sharded(
            lambda config=source.config: family.transformer_class.from_config(config),
            lambda made: blocks_of(made, family.block_lists),
            source,
            torch.float32,
            Placement(part, copies=copies),
            lambda: None,
        )
        held = sum(shard.numel() for shard in shards.shards)
        total = sum(parameter.numel() for parameter in whole.parameters())
        inner = [p for block in blocks_of(whole, family.block_lists)[1:-1] for p in block.parameters()]
        sharded = sum(parameter.numel() for parameter in inner)
        share = total - sharded + sharded / size
        padding = 128 * (len(list(whole.parameters())) + len(shards.shards))
        assert share <= held < share + padding
        torch.testing.assert_close(family.predict_velocity(network, x, 0.7, text), expected)
        mapped = [weakref.ref(unit.memory) for unit in shards._units if unit.memory is not None]
        assert len(mapped) == (len(shards.shards) - 3 if copies else 0)
        shards.close()
        gc.collect()
        assert shards.mapped_bytes == 0 and not [memory for memory in mapped if memory() is not None]
    print(f"rank {ranks.rank} is done", flush=True)
    stop_ranks()


if __name__ == "__main__":
    main()
