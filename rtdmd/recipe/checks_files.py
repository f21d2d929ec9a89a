"""Files and folders that a recipe names: engine JSONs, models, the output folder."""

from __future__ import annotations

import json
import os
import re
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rtdmd.errors import UserError, nearest_hint
from rtdmd.recipe.report import Report, value_at
from rtdmd.recipe.schema import Recipe, role_weights

_ROLES = ("teacher", "generator", "fake_score")
# The recipe decides these; an engine JSON that sets them too could disagree.
_DECIDED_BY_RECIPE = {
    "train_batch_size": "batch_size or sample_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "cold_start.generator and its like",
    "scheduler": "learning_rate and cooldown",
    "bf16": "dtype",
    "fp16": "dtype",
    "amp": "dtype",
}
_SEPARATE = "with=recipes/layouts/separate_zero3.yaml"  # each role in a DeepSpeed engine of its own
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def check_engines(report: Report, recipe: Recipe, world_size: int) -> None:
    """Each role's DeepSpeed JSON is there, is valid, and leaves to the recipe what it decides."""
    contents: dict[str, dict[str, Any] | None] = {}
    is_shared = recipe.roles.engines == "shared_base"
    for role in _ROLES:
        key = f"roles.{role}.engine"
        path = value_at(recipe, key)
        is_first = path not in contents  # what is wrong for every role is reported once
        content = contents[path] if not is_first else _read_engine(report, key, path)
        contents[path] = content
        if content is not None:
            if is_first:
                _check_engine(report, key, path, content)
                _check_partition(report, key, path, content, world_size)
            if is_shared:
                _check_base_engine(report, key, path, content)
            else:
                _check_role_engine(report, key, path, content, frozen=role == "teacher")
                if role != "teacher" and recipe.dtype == "bfloat16" and _stage(content) == 0:
                    advice = "use ZeRO 1 (zero1.json), dtype float32 or roles.engines: shared_base"
                    report.fault(key, path, f"ZeRO 0 keeps no float32 masters of bfloat16 weights; {advice}")
            compile_key = f"roles.{role}.compile"
            scope = value_at(recipe, compile_key)
            if scope != "none" and _stage(content) == 3 and not is_shared:
                advice = "use ZeRO 0 to 2, roles.engines: shared_base or compile: none"
                broken = f"{path} has ZeRO 3, whose hooks on every layer break compiled code to pieces"
                report.fault(compile_key, scope, f"{broken}; {advice}")
            elif scope == "network" and _stage(content) == 3:
                advice = f"{path} has ZeRO 3, which gathers a shared base block by block"
                report.fault(compile_key, scope, f"{advice}; write blocks, or use ZeRO 0")
    if is_shared:
        _check_shared_base(report, recipe, contents)
    if recipe.roles.gather == "copies":
        _check_gathered(report, "roles.gather", "copies", is_shared, contents)
        _check_on_gpu(report, contents)
    if recipe.roles.whole_blocks is not None:
        _check_gathered(report, "roles.whole_blocks", recipe.roles.whole_blocks, is_shared, contents)


def _check_partition(report: Report, key: str, path: str, content: dict[str, Any], world_size: int) -> None:
    """ZeRO-3 has the parameters once among so many consecutive ranks; with 1 the file doesn't say."""
    zero = content.get("zero_optimization")
    size = zero.get("zero_hpz_partition_size", 1) if isinstance(zero, dict) else 1
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        report.fault(key, path, f"zero_hpz_partition_size is {json.dumps(size)}; write the GPUs of a machine")
    elif size < world_size and world_size % size:
        fitting = [str(part) for part in range(1, world_size + 1) if world_size % part == 0]
        advice = f"which doesn't divide the {world_size} ranks; write {' or '.join(fitting)}"
        report.fault(key, path, f"zero_hpz_partition_size is {size}, {advice}")


def _check_gathered(
    report: Report, key: str, value: Any, is_shared: bool, contents: dict[str, dict[str, Any] | None]
) -> None:
    """How blocks are gathered is a setting of shared bases in shards."""
    if not is_shared:
        advice = "write roles.engines: shared_base, too, or leave it out"
        report.fault(key, value, f"separate engines gather layers by collectives of their own; {advice}")
    elif not any(_stage(content) == 3 for content in contents.values() if content is not None):
        report.fault(key, value, "no engine has ZeRO 3, so that nothing is gathered; leave it out")


def _check_on_gpu(report: Report, contents: dict[str, dict[str, Any] | None]) -> None:
    """Copied from are shards on the GPU."""
    for path, content in contents.items():
        zero = {} if content is None else content.get("zero_optimization")
        if isinstance(zero, dict) and _offloads(zero, "offload_param"):
            report.fault("roles.gather", "copies", f"{path} has the shards in host memory; write collective")


def _check_base_engine(report: Report, key: str, path: str, content: dict[str, Any]) -> None:
    """A shared base is frozen; its adapters are whole on every rank and train without DeepSpeed."""
    zero = content.get("zero_optimization")
    advice = f"a shared base has none; use stage 3 or 0, or add {_SEPARATE}"
    _check_role_engine(report, key, path, content, frozen=True, advice=advice)
    if isinstance(zero, dict) and _offloads(zero, "offload_optimizer"):
        advice = "the adapters on a shared base stay on the GPU; use ds_configs/frozen_zero3_offload.json"
        report.fault(key, path, f"offload_optimizer has nothing to offload: {advice}")
    device = _offload_device(zero, "offload_param") if isinstance(zero, dict) else "none"
    if device not in ("none", "cpu"):
        advice = f"a shared base waits on the GPU or in host memory; write cpu, or add {_SEPARATE}"
        report.fault(key, path, f"offload_param.device is {json.dumps(device)}: {advice}")


def _check_shared_base(report: Report, recipe: Recipe, contents: dict[str, dict[str, Any] | None]) -> None:
    """Only adapters train, and roles on one base agree in what concerns the base."""
    bases: dict[tuple[str, str | None], str] = {}
    for role in _ROLES:
        section: Any = value_at(recipe, f"roles.{role}")
        if role != "teacher" and section.trains == "full":
            advice = f"write lora, or add {_SEPARATE}"
            report.fault(f"roles.{role}.trains", "full", f"a shared base stays as it is; {advice}")
        base = role_weights(recipe.model, section)
        other = bases.setdefault(base, role)
        for field in ("engine", "compile"):
            key, mine = f"roles.{role}.{field}", getattr(section, field)
            other_key = f"roles.{other}.{field}"
            theirs = value_at(recipe, other_key)
            if contents.get(mine, mine) != contents.get(theirs, theirs):
                advice = f"{role} and {other} share the base {base[0]}; write {theirs}"
                report.fault(key, mine, f"{other_key} is {theirs}, but {advice}")


def check_models(report: Report, recipe: Recipe) -> None:
    """Pipelines and weights are pipeline folders or have the form of a hub id."""
    for key in ("model.pipeline", *(f"roles.{role}.weights" for role in _ROLES)):
        value = value_at(recipe, key)
        if value is not None:
            check_source(report, key, value, needs="model_index.json")


def check_starts(report: Report, recipe: Recipe) -> None:
    """The files that stage rtdmd is told to start from are there, and hold weights as the recipe has them."""
    for key in ("rtdmd.start_generator", "rtdmd.start_fake_score"):
        value = value_at(recipe, key)
        if value is None:
            continue
        if not Path(value).is_file():
            what = "a folder; give the .pt file in it" if Path(value).is_dir() else "not there"
            report.fault(key, value, f"this file is {what}; null starts from this run's own cold start")
            continue
        from rtdmd.models.adapters import read_trained  # torch loads for those who name a file

        try:
            read_trained([value], recipe.lora)
        except UserError as error:
            report.fault(key, value, str(error).removeprefix(f"{value}: "))


def check_readable(report: Report, key: str, value: str) -> None:
    """``value`` is a file that can be opened."""
    try:
        with open(Path(value).expanduser(), "rb"):
            pass
    except OSError as error:
        report.fault(key, value, f"cannot be read: {error.strerror}")


def check_source(report: Report, key: str, value: str, needs: str | None) -> None:
    """``value`` is an existing folder that holds the file ``needs``, or may be a hub id `owner/name`."""
    path = Path(value).expanduser()
    built = "; make the dry run's models with: python -m rtdmd.models.tiny build/tiny"
    hint = built if path.parts[:2] == ("build", "tiny") else ""
    if path.is_dir():
        if needs and not (path / needs).is_file():
            report.fault(key, value, f"this folder holds no {needs}{hint or '; give the folder that does'}")
    elif path.is_file():
        if needs:
            report.fault(key, value, f"this is a file; give the folder that holds {needs}")
    elif _looks_like_path(value):
        report.fault(
            key, value, f"there is no such folder{hint or '; give an existing one or a hub id owner/name'}"
        )
    elif not _HUB_ID.fullmatch(value) or ".." in value or "--" in value:
        report.fault(key, value, "neither an existing folder nor a hub id of the form owner/name")


def check_output(report: Report, recipe: Recipe) -> None:
    """The run's folder can be written; nothing is left behind."""
    target = Path(recipe.output) / recipe.name
    for name in ("cold_start", "rtdmd", "samples"):
        child = target / name
        if os.path.lexists(child) and not child.is_dir():
            report.fault("output", recipe.output, f"{child} is not a folder; move it or choose another name")
    existing = target
    while not existing.exists() and not existing.is_symlink() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError
        with tempfile.TemporaryFile(dir=existing):
            pass
    except NotADirectoryError:
        report.fault("output", recipe.output, f"{existing} is not a folder; move it or choose another output")
    except OSError as error:
        advice = "choose another output"
        report.fault("output", recipe.output, f"cannot write below {existing} ({error.strerror}); {advice}")


def _looks_like_path(value: str) -> bool:
    first = Path(value).parts[:1]
    return (
        value.startswith((".", "/", "~"))
        or value.count("/") > 1
        or value.endswith((".pt", ".safetensors", "/"))
        or ("/" in value and bool(first) and Path(first[0]).is_dir())
    )


def _read_engine(report: Report, key: str, path: str) -> dict[str, Any] | None:
    """The JSON object in a file, or None once a fault has been noted."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_reject_repeated)
    except FileNotFoundError:
        there = [str(file) for file in sorted(Path(path).parent.glob("*.json"))]
        hint = nearest_hint(path, there) if there else "; paths are relative to the working directory"
        report.fault(key, path, f"there is no such file{hint}")
    except UnicodeDecodeError:
        report.fault(key, path, "this file is not UTF-8 text; write a DeepSpeed JSON")
    except json.JSONDecodeError as error:
        report.fault(key, path, f"line {error.lineno} is not valid JSON: {error.msg}")
    except KeyError as error:
        report.fault(key, path, f"the key {error.args[0]!r} is written twice in one object; keep one")
    except (OSError, ValueError, RecursionError) as error:
        report.fault(key, path, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    else:
        if isinstance(content, dict):
            return content
        report.fault(key, path, "this file holds no JSON object; write one such as ds_configs/zero3.json")
    return None


def _reject_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise KeyError(name)
        result[name] = value
    return result


def _check_engine(report: Report, key: str, path: str, content: dict[str, Any]) -> None:
    for name in content:
        if name in _DECIDED_BY_RECIPE:
            decider = _DECIDED_BY_RECIPE[name]
            report.fault(key, path, f"sets {name!r}, which follows from the recipe's {decider}; remove it")
    stage = _stage(content)
    if stage is None:
        # DeepSpeed ignores a misspelt section and shards nothing.
        close = [] if "zero_optimization" in content else get_close_matches("zero_optimization", content, n=1)
        typo = f"; {close[0]!r} is not that" if close else ""
        report.fault(key, path, f'add "zero_optimization": {{"stage": 3}} with a stage from 0 to 3{typo}')
    elif stage not in (0, 1, 2, 3):
        report.fault(key, path, f"zero_optimization.stage is {json.dumps(stage)}; write 0, 1, 2 or 3")


def _check_role_engine(
    report: Report,
    key: str,
    path: str,
    content: dict[str, Any],
    *,
    frozen: bool,
    advice: str = "a frozen network has none; use stage 3 or 0",
) -> None:
    """What DeepSpeed would refuse only after the weights are loaded. ``advice`` is for frozen networks."""
    stage = _stage(content)
    if frozen and stage in (1, 2):
        report.fault(key, path, f"ZeRO stage {stage} shards optimizer state, and {advice}")
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    if stage in (0, 1, 2) and _offloads(zero, "offload_param"):
        report.fault(key, path, f"offload_param needs ZeRO stage 3, the file has {stage}")
    forces_cpu_adam = content.get("zero_force_ds_cpu_optimizer", True)
    if not frozen and forces_cpu_adam and _offloads(zero, "offload_optimizer"):
        needs = 'needs "zero_force_ds_cpu_optimizer": false at top level'
        report.fault(key, path, f"offload_optimizer with torch's AdamW {needs}")


def _stage(content: dict[str, Any]) -> Any:
    """ZeRO stage as written, None where there is none; a bool is no stage."""
    zero = content.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    return str(stage) if isinstance(stage, bool | float | list | dict) else stage


def _offloads(zero: dict[str, Any], name: str) -> bool:
    return _offload_device(zero, name) != "none"


def _offload_device(zero: dict[str, Any], name: str) -> Any:
    section = zero.get(name)
    return section.get("device", "none") if isinstance(section, dict) else "none"
