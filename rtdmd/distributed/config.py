"""DeepSpeed's JSON with the fields that the recipe decides filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import get_zero_config
from pydantic import ValidationError

from rtdmd.errors import UserError
from rtdmd.recipe.schema import Dtype


def engine_config(path: str | Path, dtype: Dtype, max_grad_norm: float | None) -> dict[str, Any]:
    """The configuration of one engine: how to shard from the file at ``path``, the rest from the recipe.

    Batch sizes are placeholders: micro-batches and accumulation boundaries are set by hand, losses
    are scaled by the stages. Gradients accumulate and travel in float32 whatever ``dtype``.

    Raises:
        UserError: DeepSpeed doesn't know a key of the file's ``zero_optimization``, or not such a value.
    """
    config: dict[str, Any] = json.loads(Path(path).read_text())
    try:
        get_zero_config(config)
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *found["loc"])))
        raise UserError(f"{path}: DeepSpeed doesn't accept {key}: {found['msg']}") from error
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        # On by default, and then every forward waits for all that the GPU has to do.
        "timers": {"throughput": {"enabled": False}},
    }
    if dtype == "bfloat16":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def offloads_parameters(config: dict[str, Any]) -> bool:
    """Whether shards of parameters wait in host memory."""
    offload = config.get("zero_optimization", {}).get("offload_param") or {}
    return offload.get("device", "none") == "cpu"


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage 0 to 3 of a configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def partition_size(config: dict[str, Any], world_size: int) -> int | None:
    """Over how many ranks ZeRO-3 has the parameters once: ``zero_hpz_partition_size``, at most all; None
    if the configuration doesn't say."""
    size = int(config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1))
    return min(size, world_size) if size > 1 else None
