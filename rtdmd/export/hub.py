"""A folder ready to upload, and the upload."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rtdmd.errors import UserError
from rtdmd.export.card import CardContent, write_card
from rtdmd.export.figures import draw_curves, read_figures
from rtdmd.export.licences import licence_of
from rtdmd.export.loras import write_diffusers
from rtdmd.export.merged import write_merged
from rtdmd.export.pictures import SamplePicture, cut_samples, paint_samples
from rtdmd.export.results import find_evaluation, hub_results
from rtdmd.export.run import FinishedRun
from rtdmd.export.usage import Usage
from rtdmd.models.adapters import STATE_FILE
from rtdmd.models.lora import Adapter
from rtdmd.recipe import dump_recipe


@dataclass(frozen=True)
class HubOptions:
    """What a model card needs to be told; None is what the run says."""

    name: str = ""  # the repository's id, or the folder's name
    base: str | None = None  # hub id of the base model
    licence: str | None = None  # id of the hub's list
    prompts: Sequence[str] = ()  # of the sample pictures
    paint: bool = True  # else they are cut from the run's last grid
    seed: int = 0
    device: str | None = None
    evaluation: Path | None = None  # results of rtdmd evaluate


def write_hub_folder(run: FinishedRun, folder: Path, options: HubOptions) -> None:
    """Weights, recipe, sample pictures, curves and a model card. Raises UserError for what is missing."""
    base = options.base or str(Path(run.base[0]).expanduser())
    evaluation, figures = find_evaluation(run, options.evaluation), read_figures(run.folder)
    trains_lora = run.trained.replacement is None
    if trains_lora:
        write_diffusers(run, folder)
        for stage, adapter in run.adapters.items():
            _write_state(run.files[stage], adapter, run.recipe.lora.alpha, folder / stage / STATE_FILE)
    else:
        write_merged(run, folder)
    # Where stage 2 started from a file, that file is the folder's own stage 1 now.
    own = replace(run.recipe.rtdmd, start_generator=None, start_fake_score=None)
    (folder / "recipe.yaml").write_text(dump_recipe(replace(run.recipe, rtdmd=own)), encoding="utf-8")
    if options.paint:
        pictures = paint_samples(run, folder, options.prompts, options.seed, options.device)
    else:
        pictures = cut_samples(run, folder)
    content = CardContent(
        run=run,
        title=options.name.rpartition("/")[2],
        base=None if Path(base).is_dir() else base,
        licence=licence_of(base, options.licence),
        usage=_usage(run, options.name, base if trains_lora else None, pictures),
        pictures=pictures,
        figures=figures,
        evaluation=evaluation,
        results=hub_results(evaluation, figures),
        has_curves=draw_curves(figures, folder / "training.png"),
    )
    write_card(content, folder)


def _write_state(file: Path, adapter: Adapter, alpha: float, target: Path) -> None:
    """The stage's own state dict; one of an adapter that came from a file of another kind, for ``alpha``."""
    if file.name == STATE_FILE:
        shutil.copyfile(file, target)
        return
    scaled = {module: (a, (adapter.alpha / alpha) * b) for module, (a, b) in adapter.factors.items()}
    torch.save(Adapter(scaled, alpha).state(), target)


def _usage(run: FinishedRun, name: str, base: str | None, pictures: Sequence[SamplePicture]) -> Usage:
    model, schedule = run.recipe.model, run.recipe.schedule
    return Usage(
        name=name,
        base=base,
        stages=list(run.files),
        pipeline_class=run.family.pipeline_class.__name__,
        dtype=run.recipe.dtype,
        prompt=pictures[0].prompt,
        height=model.height,
        width=model.width,
        steps=[timestep / 1000 for timestep in schedule.timesteps],
        eta=schedule.eta,
        shift=schedule.shift,
        call_arguments=run.family.call_arguments(model.pipeline, model.revision, model.max_sequence_length),
    )


def check_push(repo_id: str) -> None:
    """UserError, before anything is written, for an id that the hub won't take and for a missing token."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--push {repo_id}: {error}") from error
    if "/" not in repo_id:
        raise UserError(f"--push {repo_id}: give owner and name, such as someone/{repo_id}")
    if get_token() is None:
        raise UserError("--push: no token of the hub here; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload ``folder`` to a model repository, created if it isn't there; the commit's address.

    Raises UserError if the hub refuses or can't be reached; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="model", private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, repo_type="model", commit_message="Upload a generator"
        )
    except Exception as error:  # hub errors have no common class
        raise UserError(
            f"{repo_id}: not uploaded ({type(error).__name__}: {str(error).strip().splitlines()[0]}); "
            f"the folder is whole: hf upload {repo_id} {folder} tries again"
        ) from error
    return str(commit.commit_url)
