"""Sample pictures for a model card, painted anew or cut from the run's own last grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rtdmd.errors import UserError
from rtdmd.export.run import FinishedRun
from rtdmd.prompts import PromptSet
from rtdmd.recipe.schema import PromptsSection
from rtdmd.sample import SampleOptions, build_painter, describe, file_name, paint_files, pick_device

MAX_PICTURES = 8


@dataclass(frozen=True)
class SamplePicture:
    """A prompt and its picture's path within the folder."""

    prompt: str
    path: str


def paint_samples(
    run: FinishedRun, folder: Path, prompts: Sequence[str], seed: int, device: str | None
) -> list[SamplePicture]:
    """Paint ``prompts`` (by default the run's preview prompts) to ``folder/samples``."""
    prompts = list(prompts) or _preview_prompts(run)
    options = SampleOptions(run=run.folder, seed=seed)
    painter = build_painter(run.recipe, options, pick_device(device))
    metadata = describe(painter, run.recipe, "recipe.yaml", options)
    metadata["loras"] = str(
        list(run.files)
    )  # the stages: where they lie on this machine is of no use to others
    paths = paint_files(painter, list(enumerate(prompts)), folder / "samples", 4, metadata, lambda done: None)
    return [
        SamplePicture(prompt, path.relative_to(folder).as_posix())
        for prompt, path in zip(prompts, paths, strict=True)
    ]


def cut_samples(run: FinishedRun, folder: Path) -> list[SamplePicture]:
    """Cut the last grid that training has painted into its pictures. UserError if there is none."""
    stage = list(run.files)[-1]
    grids = sorted((run.folder / "samples").glob(f"{stage}-*.png"))
    if not grids:
        raise UserError(
            f"{run.folder / 'samples'}: training has painted no {stage}-*.png; leave out --no-paint"
        )
    prompts, model = _preview_prompts(run), run.recipe.model
    grid = Image.open(grids[-1])
    columns = math.ceil(math.sqrt(len(prompts)))  # as rtdmd.images.picture_grid lays them out
    if grid.size != (columns * model.width, math.ceil(len(prompts) / columns) * model.height):
        raise UserError(
            f"{grids[-1]}: is no grid of {len(prompts)} pictures of {model.width}x{model.height}, as the "
            "run's recipe has it; leave out --no-paint"
        )
    (folder / "samples").mkdir(parents=True)
    found = []
    for number, prompt in enumerate(prompts[:MAX_PICTURES]):
        left, top = (number % columns) * model.width, (number // columns) * model.height
        path = f"samples/{file_name(number, prompt)}"
        grid.crop((left, top, left + model.width, top + model.height)).save(folder / path)
        found.append(SamplePicture(prompt, path))
    return found


def _preview_prompts(run: FinishedRun) -> list[str]:
    """The prompts of the run's previews: the recipe's, else the first of its last stage's prompts."""
    preview = run.recipe.preview
    if preview.prompts:
        return preview.prompts[: preview.num_images]
    section: PromptsSection = getattr(run.recipe, list(run.files)[-1]).prompts
    return PromptSet.load(section).prompts[: preview.num_images]
