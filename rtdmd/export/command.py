"""``rtdmd export``: one run, one target, one folder that appears when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rtdmd.errors import UserError
from rtdmd.export.hub import HubOptions, check_push, push, write_hub_folder
from rtdmd.export.loras import write_diffusers, write_peft
from rtdmd.export.merged import write_merged
from rtdmd.export.run import FinishedRun, open_run


@dataclass(frozen=True)
class ExportOptions:
    """What is exported and how."""

    to: str  # one of TARGETS
    out: Path | None = None  # None is exports/NAME-TARGET
    overrides: Sequence[str] = ()  # of the run's recipe
    allow_unfinished: bool = False
    link: bool = False  # hard-link the pipeline's other components
    hub: HubOptions = field(default_factory=HubOptions)  # its name follows from `push` or `out`
    push: str | None = None  # the repository to upload a hub-folder to
    private: bool = False  # if it has to be created


Writer = Callable[[FinishedRun, Path, ExportOptions], None]

TARGETS: dict[str, Writer] = {
    "diffusers": lambda run, folder, options: write_diffusers(run, folder),
    "peft": lambda run, folder, options: write_peft(run, folder),
    "merged": lambda run, folder, options: write_merged(run, folder, link=options.link),
    "hub-folder": lambda run, folder, options: write_hub_folder(run, folder, options.hub),
}


def export(folder: Path, options: ExportOptions) -> Path:
    """Export the run in ``folder``; returns the folder written. Raises UserError for what is in the way."""
    if options.push is not None:
        if options.to != "hub-folder":
            raise UserError("--push goes with --to hub-folder, which has a model card")
        check_push(options.push)
    if options.out is not None:
        _check_absent(options.out)
    run = open_run(folder, options.overrides, allow_unfinished=options.allow_unfinished)
    out = options.out or Path("exports") / f"{run.recipe.name}-{options.to}"
    name = options.push or out.name
    with _appearing(out) as partial:
        TARGETS[options.to](run, partial, replace(options, hub=replace(options.hub, name=name)))
    if options.push is not None:
        print(push(out, options.push, private=options.private))
    return out


def _check_absent(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} is there already; move it away, or give another folder with --out")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that is moved to ``out`` when all is written, and removed if something fails."""
    _check_absent(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
