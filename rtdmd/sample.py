"""Pictures from a recipe's generator, few-step, or from its teacher, many-step with guidance."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from tqdm import tqdm

from rtdmd import __version__
from rtdmd.errors import UserError
from rtdmd.images import picture_grid, to_pictures
from rtdmd.models import ModelFamily, get_family
from rtdmd.models.adapters import STATE_FILE, Trained, read_adapter, read_trained
from rtdmd.models.guidance import predict_guided_velocity
from rtdmd.models.lora import load_adapter
from rtdmd.models.protocol import Network, TextEmbeddings
from rtdmd.models.weights import WeightSource, load_network
from rtdmd.processes import Report, run_processes, shares, unshare
from rtdmd.prompts import PromptSet, is_text
from rtdmd.randomness import Draws
from rtdmd.recipe import load_recipe
from rtdmd.recipe.schema import PromptsSection, Recipe, ScheduleSection, role_weights
from rtdmd.rollout import FewSteps, paint
from rtdmd.runs import RECIPE_FILE

TEACHER_STEPS = 50
PICTURES = "sample"  # the stage of all draws for pictures


@dataclass(frozen=True)
class SampleOptions:
    """Which network paints, and how; None is what the recipe says."""

    loras: Sequence[str] = ()  # files or folders, stacked in this order
    run: Path | None = None  # a run's folder: its stages' weights, instead of `loras`
    stage: str | None = None  # of the run: its weights after this stage; None is what it trained last
    merge: bool = False  # merge the last adapter too (the earlier ones always are)
    teacher: bool = False  # the teacher's ODE with guidance instead of the generator's CPS steps
    num_steps: int | None = None  # of the generator, the recipe's schedule; of the teacher, 50
    guidance_scale: float | None = None  # of the teacher
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for options that contradict each other or are out of range."""
        if self.teacher and (self.loras or self.run):
            raise UserError("the teacher has no adapters: leave out --teacher, or --lora and --run")
        if self.loras and self.run:
            raise UserError("--run takes the run's own weights: leave out --lora or --run")
        if self.guidance_scale is not None and not self.teacher:
            raise UserError("--guidance goes with --teacher; the generator is trained to need none")
        if self.guidance_scale is not None and not 1 <= self.guidance_scale < math.inf:
            raise UserError(f"--guidance {self.guidance_scale:g}: give 1 (none) or more")
        if self.num_steps is not None and self.num_steps < 1:
            raise UserError(f"{self.num_steps} steps: give at least 1")


@dataclass(frozen=True)
class Painter:
    """A network with its schedule.

    A picture is a function of (seed, prompt, image number), whatever shares its batch.
    """

    family: ModelFamily
    network: Network
    few: FewSteps
    guidance_scale: float
    unconditional: TextEmbeddings
    draws: Draws
    device: torch.device

    def paint(self, prompts: Sequence[str], image_numbers: Sequence[int] | None = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32; ``image_numbers`` tell several of one prompt apart."""
        return self.paint_with(prompts, lambda purpose: self.noise(purpose, prompts, image_numbers))

    @torch.no_grad()
    def paint_with(self, prompts: Sequence[str], noise: Callable[[str], Tensor]) -> Tensor:
        """The same from the latents [B, C, H, W] that ``noise`` gives for each purpose (rollout.paint)."""
        text = self.family.encode_prompts(prompts)

        def velocity(x: Tensor, sigma: float | Tensor) -> Tensor:
            return predict_guided_velocity(
                self.family, self.network, x, sigma, text, self.unconditional, self.guidance_scale
            )

        return paint(self.family, velocity, self.few, noise)

    def noise(
        self, purpose: str, prompts: Sequence[str], image_numbers: Sequence[int] | None = None
    ) -> Tensor:
        """Standard normal latents [B, C, H, W], a function of (seed, purpose, prompt, image number) each."""
        numbers = [0] * len(prompts) if image_numbers is None else image_numbers
        rows = [
            self.draws.normal(number, purpose, [prompt], self.few.latent_shape, self.device)
            for prompt, number in zip(prompts, numbers, strict=True)
        ]
        return torch.cat(rows)


def build_painter(recipe: Recipe, options: SampleOptions, device: torch.device) -> Painter:
    """Load the network that ``options`` name, with the recipe's text encoders and decoder.

    Raises UserError for files that are missing or don't fit the recipe.
    """
    options.check()
    model, dtype = recipe.model, getattr(torch, recipe.dtype)
    trained = _trained(recipe, options)
    family = get_family(model.family).load(
        model.pipeline,
        device=device,
        dtype=dtype,
        revision=model.revision,
        max_sequence_length=model.max_sequence_length,
        schedule_shift=recipe.schedule.shift,
    )
    guidance_scale = 1.0
    if options.teacher:
        guidance_scale = model.guidance_scale if options.guidance_scale is None else options.guidance_scale
        timesteps, eta = _evenly(options.num_steps or TEACHER_STEPS), 0.0  # CPS without noise is Euler's step
    else:
        timesteps, eta = few_timesteps(recipe.schedule, options.num_steps), recipe.schedule.eta
    few = FewSteps(
        family.sigmas(timesteps, model.height, model.width),
        eta,
        family.latent_shape(model.height, model.width),
    )
    network = _network(recipe, options, trained, family, device)
    unconditional = family.encode_prompts([""])
    return Painter(family, network, few, guidance_scale, unconditional, Draws(options.seed, PICTURES), device)


def schedule_notice(run: Path, recipe: Recipe) -> str | None:
    """What to say where a run was trained to paint by another schedule than the recipe's."""
    own = run / RECIPE_FILE
    if not own.is_file():
        return None
    trained, given = asdict(load_recipe(own).schedule), asdict(recipe.schedule)
    told = [f"schedule.{key} = {trained[key]}" for key in trained if trained[key] != given[key]]
    if not told:
        return None
    return f"{run} was trained with {', '.join(told)}, and paints otherwise here; give {own} as the recipe"


def few_timesteps(schedule: ScheduleSection, num_steps: int | None) -> list[float]:
    """The recipe's timesteps before the shift; for another number of steps k, 1000·(1 − i/k)."""
    if num_steps is None or num_steps == len(schedule.timesteps):
        return schedule.timesteps
    return _evenly(num_steps)


def _evenly(num_steps: int) -> list[float]:
    return [1000 * (1 - i / num_steps) for i in range(num_steps)]


def run_files(run: Path, recipe: Recipe, stage: str | None = None) -> list[Path]:
    """The generator's weights files that a run has trained or started from, in stacking order.

    ``stage``: those of its weights after this stage; None is what it trained last.
    """
    first, second = run / "cold_start" / STATE_FILE, run / "rtdmd" / STATE_FILE
    if stage != "cold_start" and second.is_file():
        started, own = recipe.rtdmd.start_generator, run / RECIPE_FILE
        if started is None and own.is_file():  # the run may have been started with an override
            started = load_recipe(own).rtdmd.start_generator
        return [Path(started or first), second]
    if stage != "rtdmd" and first.is_file():
        return [first]
    missing = (
        f"no {stage}/{STATE_FILE}" if stage else f"neither cold_start/{STATE_FILE} nor rtdmd/{STATE_FILE}"
    )
    raise UserError(f"{run}: holds {missing}")


def check_trained(recipe: Recipe, options: SampleOptions) -> None:
    """Raise UserError unless what was trained is there and fits the network, before anything large loads."""
    role = recipe.roles.teacher if options.teacher else recipe.roles.generator
    weights, revision = role_weights(recipe.model, role)
    trained = _trained(recipe, options)
    WeightSource(
        weights, revision=revision, adapters=trained.adapters, replacement=trained.replacement
    ).close()


def _trained(recipe: Recipe, options: SampleOptions) -> Trained:
    if options.run is not None:
        return read_trained(run_files(options.run, recipe, options.stage), recipe.lora)
    lora = recipe.lora
    return Trained([read_adapter(path, alpha=lora.alpha, rank=lora.rank) for path in options.loras])


def _network(
    recipe: Recipe, options: SampleOptions, trained: Trained, family: ModelFamily, device: torch.device
) -> nn.Module:
    """The role's transformer with what was trained.

    Adapters are merged, except the last: so the last stage trained and previewed its own. In bfloat16
    that matters, since merging rounds away whatever of ΔW is below half a unit in the weights' last place.
    """
    role = recipe.roles.teacher if options.teacher else recipe.roles.generator
    weights, revision = role_weights(recipe.model, role)
    merged, last = trained.adapters, None
    if merged and not options.merge:
        merged, last = merged[:-1], merged[-1]
    source = WeightSource(weights, revision=revision, adapters=merged, replacement=trained.replacement)
    if last is not None:
        source.check_adapter(last)
    network = load_network(family.transformer_class, source, getattr(torch, recipe.dtype), device)
    if last is not None:
        load_adapter(network, last)
    return network


@dataclass(frozen=True)
class Share:
    """What one process paints: numbered prompts of the whole list, on a device."""

    recipe: Recipe
    options: SampleOptions
    source: str  # the recipe as it was given, for the metadata
    prompts: Sequence[tuple[int, str]]
    folder: Path
    batch_size: int
    device: str


@dataclass(frozen=True)
class Painted:
    """What a process has painted."""

    paths: list[Path]
    seconds: float  # without the loading
    metadata: dict[str, str]  # of all its pictures


def paint_share(share: Share, report: Report) -> Painted:
    """Load the network and paint the share's files."""
    painter = build_painter(share.recipe, share.options, pick_device(share.device))
    metadata = describe(painter, share.recipe, share.source, share.options)
    start = time.perf_counter()
    paths = paint_files(painter, share.prompts, share.folder, share.batch_size, metadata, report)
    return Painted(paths, time.perf_counter() - start, metadata)


def paint_files(
    painter: Painter,
    prompts: Sequence[tuple[int, str]],
    folder: Path,
    batch_size: int,
    metadata: Mapping[str, str],
    report: Report,
) -> list[Path]:
    """Paint numbered prompts to ``folder/0000-the-prompt.png``, in batches, reporting each batch's size.

    The numbers are those of the whole list of prompts: processes that share it out write the files that
    one alone would. ``metadata``, and each picture's prompt, go into the PNG as text chunks.
    """
    make_folder(folder)
    paths = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        painted = painter.paint([prompt for _, prompt in batch])
        if not bool(torch.isfinite(painted).all()):
            raise UserError(
                f"{batch[0][1]!r} and what is painted with it come out as numbers that aren't finite: the "
                "weights hold such numbers, or overflow in the recipe's dtype"
            )
        pictures = to_pictures(painted)
        for (number, prompt), picture in zip(batch, pictures, strict=True):
            paths.append(folder / file_name(number, prompt))
            save_picture(picture, paths[-1], {"prompt": prompt, **metadata})
        report(len(batch))
    return paths


def make_folder(folder: Path) -> None:
    """Make it, if it isn't there. UserError if it can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: no such folder can be made ({error.strerror}); name another one"
        ) from error


def save_picture(picture: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a PNG with text chunks: tEXt, or iTXt for what Latin-1 does not have."""
    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_text(key, value)
    picture.save(path, pnginfo=chunks)


def file_name(number: int, prompt: str) -> str:
    """``0007-the-prompt.png``."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-")
    return f"{number:04d}-{words}.png" if words else f"{number:04d}.png"


def describe(painter: Painter, recipe: Recipe, source: str, options: SampleOptions) -> dict[str, str]:
    """A generation's parameters for the pictures' metadata; ``source`` is the recipe as it was given."""
    role = recipe.roles.teacher if options.teacher else recipe.roles.generator
    weights, revision = role_weights(recipe.model, role)
    loras = (
        [str(file) for file in run_files(options.run, recipe, options.stage)]
        if options.run
        else list(options.loras)
    )
    return {
        "seed": str(options.seed),
        "steps": str(len(painter.few.sigmas)),
        "sigmas": json.dumps([round(sigma, 6) for sigma in painter.few.sigmas]),
        "eta": f"{painter.few.eta:g}",
        "guidance_scale": f"{painter.guidance_scale:g}",
        "loras": json.dumps(loras),
        "merged": json.dumps(options.merge),
        "weights": weights if revision is None else f"{weights}@{revision}",
        "role": "teacher" if options.teacher else "generator",
        "dtype": recipe.dtype,
        "recipe": source,
        "rtdmd": __version__,
    }


def read_prompts(given: Sequence[str], source: str | None) -> list[str]:
    """The prompts given one by one, then those of ``source``: ``-`` (standard input) or a prompt file."""
    prompts = list(given)
    if source == "-":
        prompts += [line.strip() for line in sys.stdin if line.strip()]
    elif source is not None:
        prompts += PromptSet.load(PromptsSection(source)).prompts
    if not prompts:
        raise UserError(
            'no prompts: give --prompt "a red cube", --prompts FILE, or --prompts - and pipe them in'
        )
    for number, prompt in enumerate(prompts, 1):
        if not is_text(prompt):
            raise UserError(f"prompt {number} is not UTF-8: {prompt!r}")
    return prompts


def pick_device(name: str | None) -> torch.device:
    """The device of that name, made the current one; by default the first GPU, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:  # unknown, or not of this build of torch
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


@dataclass(frozen=True)
class Output:
    """Where pictures go, and how they are worked off; nothing here changes a picture."""

    folder: Path
    batch_size: int = 4
    devices: Sequence[str] = ("cpu",)  # one process each
    grid: bool = False  # also grid.png of them all


def sample(
    recipe: Recipe, options: SampleOptions, source: str, prompts: Sequence[str], output: Output
) -> list[Path]:
    """Paint all prompts to PNG files, in as many processes as there are devices, and say how fast.

    ``source`` is the recipe as it was given, for the metadata. Raises UserError for options or files
    that don't fit.
    """
    if output.batch_size < 1:
        raise UserError(f"--batch-size {output.batch_size}: give at least 1")
    make_folder(output.folder)
    work = [
        Share(recipe, options, source, numbered, output.folder, output.batch_size, device)
        for numbered, device in zip(
            shares(list(enumerate(prompts)), len(output.devices)), output.devices, strict=False
        )
    ]
    with tqdm(total=len(prompts), unit="image", disable=not sys.stderr.isatty()) as progress:
        done = run_processes(paint_share, work, progress.update)
    paths = unshare([part.paths for part in done])
    if output.grid:
        grid = picture_grid([Image.open(path) for path in paths])
        metadata = {"prompts": json.dumps(list(prompts)), **done[0].metadata}
        save_picture(grid, output.folder / "grid.png", metadata)
    seconds = max(part.seconds for part in done)
    print(f"{len(paths)} pictures in {output.folder}: {len(paths) / seconds:.2f} images per second")
    return paths
