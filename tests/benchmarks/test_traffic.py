"""What steps exchange: counted by hand, and against what a base in shards gathers; scaling's table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling, traffic, train_step
from benchmarks.full_size import size_of
from rtdmd.distributed.collectives import stop_ranks
from rtdmd.distributed.sharding import BlockShards
from rtdmd.models import get_family
from rtdmd.recipe import load_recipe


def test_intervals_by_hand() -> None:
    computing = [(0.0, 1.0), (2.0, 4.0), (3.0, 5.0)]
    assert traffic.length(computing) == 4.0
    assert traffic.exposed([(0.5, 1.5), (4.5, 6.0)], computing) == 0.5 + 1.0
    assert traffic.exposed([(2.5, 3.0)], computing) == 0.0


def test_a_trace_by_hand() -> None:
    computing, gathering = {"args": {"stream": 7}}, {"args": {"stream": 20}}
    events = [
        {"cat": "kernel", "name": "ncclDevKernel_AllGather_RING_LL", "ts": 1e6, "dur": 5e5},
        {"cat": "kernel", "name": "triton_poi_fused", "ts": 2e6, "dur": 1e6, **computing},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 0, "dur": 1e6, **computing},
        {"cat": "gpu_memcpy", "name": "Memcpy PtoP", "ts": 4e6, "dur": 1e6, **gathering},
        {"cat": "gpu_user_annotation", "name": "nccl:all_gather", "ts": 0, "dur": 9e6},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9e6},
        {"name": "process_name"},
    ]
    found = traffic.device_intervals({"traceEvents": events})
    assert found == ([(1.0, 1.5), (4.0, 5.0)], [(2.0, 3.0), (0.0, 1.0)])


def test_seconds_by_hand() -> None:
    """10 GB gathered and 1 GB reduced: a half of the former and twice a half of the latter on two ranks."""

    def seconds(ranks: int, partition: int) -> float:
        return traffic.Traffic(gathered=10**10, reduced=10**9, partition=partition).seconds(ranks, 1e9)

    assert seconds(1, 1) == 0
    assert seconds(2, 2) == pytest.approx(6)
    assert seconds(4, 4) == pytest.approx(9)
    assert seconds(4, 2) == pytest.approx(5 + 1.5)


def test_the_barrier_before_a_step_does_not_count() -> None:
    """It is the first to communicate, and has the device clear a tensor before."""
    waited, cleared = (1.0, 3.0), (0.5, 0.75)
    first, second, computed = (3.5, 4.0), (6.0, 7.0), (3.0, 5.0)
    found = traffic.after_barrier([second, waited, first], [cleared, computed])
    assert found == ([second, first], [computed])


def test_passes_by_hand() -> None:
    recipe = load_recipe("recipes/flux2_4b.yaml")
    # Three micro-batches; the anchor's and both moves' evaluation, forward and backward.
    assert traffic.cold_start_passes(recipe, 4, False) == Counter(generator=4, fake_score=12)
    both = Counter(generator=4 + 3 + 3 + 3, fake_score=12 + 3, teacher=3)
    assert traffic.cold_start_passes(recipe, 4, True) == both
    # 16 batches of 6: 4 steps; the fake score by twos; in halves, forward and backward of two drawn steps and
    # the last.
    assert traffic.rtdmd_passes(recipe) == Counter(
        generator=16 * (4 + 2 * 6), fake_score=16 * (3 * 4 + 2), teacher=16 * 2
    )
    everywhere = load_recipe(
        "recipes/flux2_4b.yaml", ["rtdmd.matched_steps=trained", "rtdmd.policy_weight=0"]
    )
    assert traffic.rtdmd_passes(everywhere) == Counter(
        generator=16 * (4 + 2 * 6), fake_score=16 * 3 * (3 * 4 + 2), teacher=16 * 3 * 2
    )


def test_bytes_of_the_published_recipe() -> None:
    """A base in shards: 3.312 of 3.876 B parameters of two bytes a pass; an update's adapter, in float32."""
    recipe = load_recipe("recipes/flux2_4b.yaml")
    config = size_of(recipe, tiny=False).transformer
    sizes = traffic.Sizes.of(recipe, get_family("flux2"), config)
    sent = traffic.traffic(recipe, sizes, Counter(generator=2, teacher=1), ["generator"], 2)
    assert sizes.whole == 3_875_544_576
    assert sent.gathered == 3 * 2 * 3_312_458_496  # without the ends
    assert sent.reduced == 4 * 37_355_520
    assert sizes.gathered(100) == 0 and len(sizes.blocks) == 23
    sent = traffic.traffic(recipe, sizes, Counter(teacher=1), [], 2, kept=22)
    assert sent.gathered == 2 * sizes.blocks[1]  # the second is the one left, as they are spread
    whole = [f"roles.{role}.engine=ds_configs/zero2.json" for role in ("generator", "fake_score")]
    recipe = load_recipe("recipes/flux2_4b.yaml", ["with=recipes/layouts/separate_zero3.yaml", *whole])
    sent = traffic.traffic(recipe, sizes, Counter(generator=2, teacher=1), [], 2)
    assert (sent.gathered, sent.reduced) == (2 * 3_875_544_576, 0)


@pytest.mark.parametrize("stage", ["cold_start", "rtdmd"])
def test_a_base_in_shards_is_gathered_as_often_as_counted(
    stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The third unit, a block: the first and what is in none stay from one graph's backward to another's."""
    gathered: list[int] = []
    start = BlockShards._start

    def counting(self: BlockShards, index: int) -> None:
        if index == 2 and not self._units[index].is_here:
            gathered.append(index)
        start(self, index)

    monkeypatch.setattr(BlockShards, "_start", counting)
    roles = ("teacher", "generator", "fake_score")
    overrides = [
        *(f"roles.{role}.engine=ds_configs/frozen_zero3_offload.json" for role in roles),
        "rewards=[{name: clipscore}]",
        "cold_start.batch_size=4",
        "cold_start.micro_batch_size=2",
        "rtdmd.fake_score_micro_batch_size=1",
    ]
    arguments = [
        "--stage",
        stage,
        "--tiny",
        "--steps",
        "1",
        "--warmup",
        "0",
        "--phase-steps",
        "1",
        "--no-save",
    ]
    try:
        result = train_step.main(["recipes/flux2_4b.yaml", *overrides, *arguments, "--stops", "2"])
    finally:
        stop_ranks()
    assert result["error"] is None
    recipe = load_recipe(
        "recipes/flux2_4b.yaml", ["rtdmd.num_sample_batches=2", *train_step.TINY_OVERRIDES, *overrides]
    )
    if stage == "cold_start":
        passes = [traffic.cold_start_passes(recipe, 2, both) for both in (True, False)]
    else:
        passes = [traffic.rtdmd_passes(recipe)]
    # Each row is run once to be measured and once for its phases.
    assert len(gathered) == 2 * sum(sum(each.values()) for each in passes)
    config = size_of(recipe, tiny=True).transformer
    sizes = traffic.Sizes.of(recipe, get_family("flux2"), config)
    expected = traffic.traffic(recipe, sizes, passes[0], ["generator", "fake_score"], 1)
    assert result["rows"][0]["traffic"] == asdict(expected)


def write(path: Path, ranks: int, seconds: float, **more: Any) -> Path:
    row = {"case": "stop 1", "seconds": seconds, "utilisation": 0.5, "peak_gib": 20.0, **more}
    row["traffic"] = {"gathered": 10**10, "reduced": 10**9, "partition": ranks}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"ranks": ranks, "rows": [row, {"case": "save", "seconds": 1.0}]}))
    return path


def test_the_scaling_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two ranks 6 s at 1 GB/s if nothing is hidden: 4/(4 + 6)."""
    one = write(tmp_path / "one" / "x.json", 1, 4.0)
    spent = {"seconds": 2.5, "exposed_seconds": 1.0}
    two = write(tmp_path / "two" / "x.json", 2, 5.0, communication=spent)
    alone = write(tmp_path / "two" / "y.json", 2, 5.0)
    scaling.main([str(one), str(two), str(alone), "--bandwidth", "1", "--to", str(tmp_path / "to")])
    assert "y: 'stop 1' is left out" in capsys.readouterr().err
    lines = (tmp_path / "to" / "scaling.md").read_text().splitlines()
    assert lines[2] == "| `x` | stop 1 | 1 | 4.000 | 100.0% | 100.0% to 100% |  |  | 20.0 |"
    assert lines[3] == "| `x` | stop 1 | 2 | 5.000 | 80.0% | 40.0% to 100% | 50% | 20% | 20.0 |"
    assert (tmp_path / "to" / "scaling.png").stat().st_size > 1000


def test_scaling_needs_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = write(tmp_path / "two" / "x.json", 2, 5.0)
    with pytest.raises(SystemExit) as stopped:
        scaling.main([str(two), "--bandwidth", "1", "--to", str(tmp_path)])
    assert stopped.value.code == 2
    assert "nothing was measured on one rank" in capsys.readouterr().err
