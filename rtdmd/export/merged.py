"""A whole diffusers pipeline with what was trained merged into its transformer."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from rtdmd.errors import UserError
from rtdmd.export.run import FinishedRun
from rtdmd.files import read_json
from rtdmd.models.weights import FETCH_AGAIN, WEIGHTS_FILE, WEIGHTS_INDEX, WeightSource

MAX_SHARD_BYTES = 2 * 2**30


def write_merged(run: FinishedRun, folder: Path, *, link: bool = False) -> None:
    """A pipeline folder that diffusers opens by itself, with the run's generator as its transformer.

    W + ΔW is summed in float32 and cast to the recipe's dtype, tensor by tensor; no more than one shard
    of the result is in memory at a time, and its copy while it is written. Text encoders, tokenizers and
    VAE are the recipe's, copied, or hard-linked with ``link`` where the file system allows. Raises
    UserError if the base can't be read.
    """
    pipeline = pipeline_folder(run)
    index = read_json(pipeline / "model_index.json", FETCH_AGAIN)
    folder.mkdir(parents=True)
    for name in _components(index):
        if name != "scheduler":
            _copy(pipeline / name, folder / name, link)
    write_transformer(run, folder / "transformer")
    stock_scheduler(run, pipeline).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", FlowMatchEulerDiscreteScheduler.__name__]
    index.pop("_name_or_path", None)
    if "is_distilled" in inspect.signature(run.family.pipeline_class).parameters:
        index["is_distilled"] = True  # the generator needs no guidance, and the pipeline's default has some
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def pipeline_folder(run: FinishedRun) -> Path:
    """The local folder of the recipe's pipeline; a hub id is downloaded, without its transformer."""
    model = run.recipe.model
    folder = Path(model.pipeline).expanduser()
    if folder.is_dir():
        return folder
    try:
        index = run.family.pipeline_class.load_config(model.pipeline, revision=model.revision)  # type: ignore[attr-defined]
        return Path(
            snapshot_download(
                model.pipeline,
                revision=model.revision,
                allow_patterns=["model_index.json", *(f"{name}/*" for name in _components(index))],
                ignore_patterns=["*.fp16.*", "*.bin", "*.msgpack", "*.h5"],
            )
        )
    except Exception as error:  # hub errors have no common class
        raise UserError(
            f"{model.pipeline}: no such folder, and not to be had from the hub "
            f"({type(error).__name__}: {error})"
        ) from error


def _components(index: Mapping[str, Any]) -> list[str]:
    """Folders that a ``model_index.json`` lists, apart from the transformer's."""
    return [
        name
        for name, entry in index.items()
        if isinstance(entry, list | tuple) and entry[0] is not None and name != "transformer"
    ]


def stock_scheduler(run: FinishedRun, pipeline: Path) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' own scheduler, set as near to the recipe's as it gets: its shift, and noise or none.

    With ``stochastic_sampling`` a step is the CPS transition at eta = 1, without it at eta = 0 (Euler's);
    in between diffusers has none.
    """
    schedule = run.recipe.schedule
    settings: dict[str, object] = {"stochastic_sampling": schedule.eta >= 0.5}
    if schedule.shift is not None:
        settings |= {"shift": schedule.shift, "use_dynamic_shifting": False}
    return FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline, subfolder="scheduler", **settings)


def write_transformer(run: FinishedRun, folder: Path) -> None:
    """The merged transformer in diffusers' layout: its configuration, and safetensors in shards."""
    weights, revision = run.base
    trained = run.trained
    source = WeightSource(
        weights, revision=revision, adapters=trained.adapters, replacement=trained.replacement
    )
    dtype = getattr(torch, run.recipe.dtype)
    folder.mkdir(parents=True)
    shards = list(_shards(source, dtype.itemsize))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else _shard_name(number, len(shards))
        tensors = {name: source.read(name).to(dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    source.close()
    if len(shards) > 1:
        content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = {key: value for key, value in source.config.items() if key != "_name_or_path"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shards(source: WeightSource, itemsize: int) -> Iterator[list[str]]:
    """Names in groups of at most MAX_SHARD_BYTES (a larger tensor has a shard to itself)."""
    names: list[str] = []
    size = 0
    for name in source.names:
        added = itemsize * torch.Size(source.shape(name)).numel()
        if names and size + added > MAX_SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += added
    yield names


def _shard_name(number: int, count: int) -> str:
    stem, _, suffix = WEIGHTS_FILE.rpartition(".")
    return f"{stem}-{number:05d}-of-{count:05d}.{suffix}"


def _copy(source: Path, target: Path, link: bool) -> None:
    """Copy a component's folder, following symbolic links; with ``link``, hard-link its files."""

    def place(file: str, at: str) -> None:
        if link:
            try:
                os.link(os.path.realpath(file), at)
                return
            except OSError:  # another file system, or one without hard links
                pass
        shutil.copyfile(file, at)

    if not source.is_dir():
        raise UserError(
            f"{source.parent}: its model_index.json lists {source.name!r}, but there is no such folder"
        )
    shutil.copytree(source, target, copy_function=place)
