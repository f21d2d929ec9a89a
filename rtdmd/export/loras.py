"""LoRA files for diffusers and for peft: each stage's, and both stages' in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file

from rtdmd.export.run import FinishedRun
from rtdmd.models.adapters import PEFT_FILES, save_diffusers_lora
from rtdmd.models.lora import Adapter, stack_adapters


def stacked(adapters: Mapping[str, Adapter]) -> Adapter:
    """The stages' adapters as one; a single one as it is."""
    return stack_adapters(list(adapters.values())) if len(adapters) > 1 else next(iter(adapters.values()))


def write_diffusers(run: FinishedRun, folder: Path) -> None:
    """``pytorch_lora_weights.safetensors`` of each stage in a folder of its own, of all stages in ``folder``.

    ``pipeline.load_lora_weights(folder)`` gives the run's final model.
    """
    for stage, adapter in run.adapters.items():
        _write_diffusers(run, adapter, folder / stage)
    _write_diffusers(run, stacked(run.adapters), folder)


def _write_diffusers(run: FinishedRun, adapter: Adapter, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lora = replace(run.recipe.lora, rank=adapter.rank, alpha=adapter.alpha, targets=sorted(adapter.factors))
    save_diffusers_lora(adapter.state(), folder, run.family, lora)


def write_peft(run: FinishedRun, folder: Path) -> None:
    """peft's adapter folders, each stage's and, of several stages, ``stacked``.

    ``PeftModel.from_pretrained(transformer, folder / "stacked")`` gives the run's final network.
    """
    for stage, adapter in run.adapters.items():
        _write_peft(run, adapter, folder / stage)
    if len(run.adapters) > 1:
        _write_peft(run, stacked(run.adapters), folder / "stacked")


def _write_peft(run: FinishedRun, adapter: Adapter, folder: Path) -> None:
    folder.mkdir(parents=True)
    weights, revision = run.base
    LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # peft's annotation says int; it divides by the rank
        target_modules=sorted(adapter.factors),
        base_model_name_or_path=weights,
        revision=revision,
        inference_mode=True,
    ).save_pretrained(str(folder))
    names = {
        f"base_model.model.{name.replace('.default.weight', '.weight')}": tensor
        for name, tensor in adapter.state().items()
    }
    save_file(names, folder / PEFT_FILES[0], metadata={"format": "pt"})
