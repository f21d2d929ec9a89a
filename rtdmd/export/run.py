"""A run as an export needs it: its recipe, and what its stages have trained, checked against the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rtdmd.errors import UserError
from rtdmd.models import ModelFamily, get_family
from rtdmd.models.adapters import STATE_FILE, Trained, read_trained
from rtdmd.models.lora import Adapter, plain_name
from rtdmd.models.weights import architecture_shapes, check_adapter
from rtdmd.recipe import load_for_sampling
from rtdmd.recipe.schema import Recipe, role_weights
from rtdmd.runs import RECIPE_FILE, ended_early, latest_checkpoint, read_progress
from rtdmd.sample import run_files

STAGES = ("cold_start", "rtdmd")


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder with all that is read from it."""

    folder: Path
    recipe: Recipe
    files: dict[str, Path]  # the generator's weights file by stage, in stacking order
    trained: Trained

    @property
    def family(self) -> type[ModelFamily]:
        return get_family(self.recipe.model.family)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The stages' adapters, in stacking order. UserError where full weights were trained."""
        if self.trained.replacement is not None:
            raise UserError(
                f"{self.folder}: the generator's full weights were trained, there is no adapter to write; "
                "export --to merged or --to hub-folder"
            )
        return dict(zip(self.files, self.trained.adapters, strict=True))

    @property
    def base(self) -> tuple[str, str | None]:
        """Folder or hub id, and revision, of the weights that the generator started from."""
        return role_weights(self.recipe.model, self.recipe.roles.generator)


def open_run(folder: Path, overrides: Sequence[str] = (), *, allow_unfinished: bool = False) -> FinishedRun:
    """Read a run's recipe and weights files and check that they fit.

    ``overrides`` change the run's recipe (``model.pipeline=…`` where the base lies elsewhere now). Raises
    UserError for a folder that is no run, a stage that isn't finished (unless ``allow_unfinished``), and for
    weights that can't be read, hold empty tensors or are another model's. Of the base it reads the
    transformer's configuration alone.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such run; give the folder that training has written, such as runs/flux2_4b"
        )
    recipe_file = folder / RECIPE_FILE
    if not recipe_file.is_file():
        raise UserError(f"{folder}: has no recipe.yaml, so it is not the folder of a run")
    recipe = load_for_sampling(str(recipe_file), list(overrides))
    if not allow_unfinished:
        _check_finished(folder, recipe)
    files = dict(zip(STAGES, run_files(folder, recipe), strict=False))
    run = FinishedRun(folder, recipe, files, read_trained(list(files.values()), recipe.lora))
    _check_fits(run)
    return run


def _check_finished(folder: Path, recipe: Recipe) -> None:
    totals = {"cold_start": recipe.cold_start.iterations, "rtdmd": recipe.rtdmd.epochs}
    for stage, total in totals.items():
        if not (folder / stage).is_dir():
            continue
        latest = latest_checkpoint(folder / stage / "checkpoints")
        # Without checkpoints (removed to save space, or never there) a weights file is taken as final.
        done = total if latest is None else int(read_progress(latest)["step"])
        is_complete = done >= total or ended_early(folder / stage, done)
        told = f"{done} of {total} steps are done"
        if not (folder / stage / STATE_FILE).is_file():
            is_complete, told = False, f"it has left no {STATE_FILE}"
        if not is_complete:
            raise UserError(
                f"{folder / stage}: the stage isn't finished, {told}; "
                "go on with training, or add --unfinished to export what there is"
            )


def _check_fits(run: FinishedRun) -> None:
    weights, revision = run.base
    shapes = architecture_shapes(run.family.transformer_class, weights, revision)
    for adapter in run.trained.adapters:
        check_adapter(adapter, shapes.get, weights)
    for name, tensor in (run.trained.replacement or {}).items():
        if tensor.numel() == 0:
            raise UserError(
                f"{run.folder}: {name!r} is empty; the weights were saved without gathering shards"
            )
        shape = shapes.get(plain_name(name), "absent")
        if shape != tuple(tensor.shape):
            raise UserError(
                f"{run.folder}: weights of another model: {name} is {tuple(tensor.shape)}, "
                f"{shape} in {weights}"
            )
