"""Small runs of both families as training leaves them, and a process with plain diffusers for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rtdmd.cli import main
from rtdmd.sample import Painter
from tests.lora_files import load_transformer, merged, random_lora, write_stage

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [
    f"{count} {colour} circles" for count in ("two", "three") for colour in ("red", "blue", "Übergrün")
]
PROMPTS.append("Zürich, 漢字! " + "cat " * 40)
TEXT_TOKENS = {"flux2": 32, "sd3": 128}

RECIPE = """\
name: small
dtype: float32
model:
  family: {family}
  pipeline: {folder}
  height: 64
  width: 64
  guidance_scale: 3
  max_sequence_length: {tokens}
roles:
  teacher: {{engine: nowhere.json}}
  generator: {{engine: nowhere.json}}
  fake_score: {{engine: nowhere.json}}
cold_start:
  generator: {{learning_rate: 1e-6}}
  fake_score: {{learning_rate: 1e-6}}
  prompts: {{source: nowhere.txt}}
rtdmd:
  generator: {{learning_rate: 3e-6}}
  fake_score: {{learning_rate: 1e-6}}
  prompts: {{source: nowhere.txt}}
rewards:
  - name: clipscore
"""


@dataclass(frozen=True)
class World:
    """A tiny model, a recipe for it, and a run that has trained rank-32 adapters in both stages."""

    family: str
    pipeline: Path
    recipe: Path
    run: Path
    states: tuple[dict[str, Tensor], dict[str, Tensor]]

    @property
    def files(self) -> list[str]:
        return [str(self.run / stage / "generator_ema.pt") for stage in ("cold_start", "rtdmd")]

    def sample(self, folder: Path, *arguments: str) -> list[np.ndarray]:
        """Pictures that the command paints, in the order of the prompts."""
        prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        assert main(["sample", str(self.recipe), *prompts, "--out", str(folder), *arguments]) == 0
        files = [path for path in sorted(folder.glob("*.png")) if path.name != "grid.png"]
        assert len(files) == len(PROMPTS)
        return [np.asarray(Image.open(path)).astype(int) for path in files]

    def network(self, *states: dict[str, Tensor]) -> nn.Module:
        return merged(load_transformer(self.pipeline, self.family), *states)


def build_worlds(folders: dict[str, Path], pipelines: dict[str, Path]) -> dict[str, World]:
    """A run of each family in its folder."""
    made = {}
    for family, pipeline in pipelines.items():
        folder = folders[family]
        states = (random_lora(pipeline, family, 1), random_lora(pipeline, family, 2))
        for stage, state in zip(("cold_start", "rtdmd"), states, strict=True):
            write_stage(folder / stage, state, family)
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(family=family, folder=pipeline, tokens=TEXT_TOKENS[family]))
        made[family] = World(family, pipeline, recipe, folder, states)
    return made


def difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> int:
    """Greatest difference of two series of pictures, in levels of 255."""
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


# In a process that cannot import rtdmd: the blocks as they stand, with our sampler's noise handed in.
PLAIN = """
import json, sys
if sys.argv[1] == "plain":
    sys.modules["rtdmd"] = None
    try:
        import rtdmd
    except ImportError:
        pass
    else:
        raise SystemExit("rtdmd can be imported")
else:
    sys.path.insert(0, sys.argv[2])
import numpy, torch
from diffusers import Flux2KleinPipeline, StableDiffusion3Pipeline

jobs = json.loads(sys.stdin.read())
for job in jobs:
    noise = torch.load(job["noise"], weights_only=True)
    for pipeline_class in (Flux2KleinPipeline, StableDiffusion3Pipeline):
        call = getattr(pipeline_class, "stock_call", pipeline_class.__call__)
        pipeline_class.stock_call = call
        arguments = {"latents": noise["initial"]} | ({} if job.get("as_written") else {"output_type": "np"})
        pipeline_class.__call__ = lambda self, *words, call=call, more=arguments, **arguments: call(
            self, *words, **(arguments | more)
        )
    drawn_by_torch, scope, images = torch.randn, {}, []
    for block in job["blocks"]:
        drawn = iter([*noise["transitions"], torch.zeros_like(noise["transitions"][0])])
        torch.randn = lambda *shape, **arguments: next(drawn)
        exec(block, scope)
        torch.randn = drawn_by_torch
        if "image" in scope:
            image = numpy.asarray(scope.pop("image"))
            images.append(image / 255 if image.dtype == numpy.uint8 else image)
    numpy.save(job["out"], numpy.stack(images))
"""


def save_noise(painter: Painter, family: str, prompt: str, file: Path) -> None:
    """What our sampler draws for ``prompt``, in the layout of the family's pipeline."""
    steps = [painter.noise(f"transition{step}", [prompt]) for step in range(3)]
    if family == "flux2":  # its pipeline works on tokens
        steps = [step.flatten(2).transpose(1, 2) for step in steps]
    torch.save({"initial": painter.noise("initial", [prompt]), "transitions": steps}, file)


def run_plain(jobs: list[dict[str, Any]], folder: Path, *, with_rtdmd: bool = False) -> None:
    """Run each job's Python blocks in ``folder``, in one process for all, and save what they paint.

    A job has ``noise`` (a file of :func:`save_noise`), ``blocks``, and ``out``, an ``.npy`` file for each
    block's ``image``, [N, H, W, 3] in [0, 1]. Blocks see that noise, and floating-point pictures unless the
    job says ``as_written``. ``rtdmd`` can't be imported there, unless ``with_rtdmd``.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, "ours" if with_rtdmd else "plain", str(ROOT)],
        input=json.dumps(jobs),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
