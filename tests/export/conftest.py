"""Runs of both families with all that training leaves beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rtdmd.images import picture_grid, to_pictures
from rtdmd.recipe import load_recipe
from rtdmd.runs import LATEST, STATE
from rtdmd.sample import Painter, SampleOptions, build_painter
from tests.small_runs import World

CPU = torch.device("cpu")
PROMPT = 'a "cute" cat sitting on a windowsill'
PREVIEWS = [PROMPT, "two red circles", "drei Bären"]
BASES = {"flux2": "black-forest-labs/FLUX.2-klein-9B", "sd3": "stabilityai/stable-diffusion-3.5-medium"}


def write_progress(run: Path, stage: str, step: int) -> None:
    """A checkpoint without weights."""
    folder = run / stage / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATE).write_text(json.dumps({"step": step, "world_size": 8}))
    (folder.parent / LATEST).write_text(folder.name)


def write_records(run: Path) -> None:
    """Twenty steps a stage of 1.5 seconds; in the last two the rewards are 0.5 and 0.7."""
    records = []
    for stage in ("cold_start", "rtdmd"):
        for step in range(1, 21):
            record = {"stage": stage, "step": step, "seconds": 1.5, "fake_score/loss": 2 / step}
            if stage == "rtdmd":
                record["reward/clipscore"] = {19: 0.5, 20: 0.7}.get(step, 0.1)
            records.append(record)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_evaluation(run: Path, folder: Path) -> Path:
    """results.json in the form of ``rtdmd evaluate``: the base, and this run."""
    spec = {"run": None, "stage": None, "loras": [], "num_steps": None, "guidance_scale": None, "nfe": 4}
    models = {"base": spec | {"kind": "base"}, "ours": spec | {"kind": "run", "run": str(run)}}
    scores = [
        {
            "model": model,
            "set": "drawbench",
            "reward": reward,
            "mean": mean,
            "low": mean - 0.1,
            "high": mean + 0.1,
        }
        for reward in ("clipscore", "hpsv2")
        for model, mean in (("base", 0.25), ("ours", 0.3125))
    ]
    distances = [{"model": model, "set": "drawbench", "cmmd": 1.5, "cmmd_unbiased": 1.4} for model in models]
    results = {"models": models, "scores": scores, "distances": distances}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def complete_run(world: World, run: Path) -> Path:
    """A copy of a small run, both its stages finished, with records and a grid of pictures."""
    shutil.copytree(world.run, run)
    recipe = run / "recipe.yaml"
    text = recipe.read_text() + f"preview: {{prompts: {json.dumps(PREVIEWS)}, num_images: 3}}\n"
    recipe.write_text(
        text.replace("cold_start:", "cold_start:\n  iterations: 20").replace(
            "rtdmd:\n", "rtdmd:\n  epochs: 20\n"
        )
    )
    for stage in ("cold_start", "rtdmd"):
        write_progress(run, stage, 20)
    write_records(run)
    (run / "samples").mkdir()
    grey = torch.arange(3).view(3, 1, 1, 1).expand(3, 3, 64, 64) / 4
    picture_grid(to_pictures(grey)).save(run / "samples" / "rtdmd-000020.png")
    return run


@pytest.fixture(scope="session")
def runs(worlds: dict[str, World], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each family. Tests don't write to it."""
    folder = tmp_path_factory.mktemp("finished")
    return {name: complete_run(world, folder / name) for name, world in worlds.items()}


@pytest.fixture(scope="session")
def painters(runs: dict[str, Path]) -> dict[str, Painter]:
    """What ``rtdmd sample --run`` paints with."""
    return {name: painter_of(run) for name, run in runs.items()}


def painter_of(run: Path, *overrides: str) -> Painter:
    return build_painter(load_recipe(run / "recipe.yaml", overrides), SampleOptions(run=run), CPU)
