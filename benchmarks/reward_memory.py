"""Memory and time of reward back-propagation at true size, through FLUX.2's decoder.

    python -m benchmarks.reward_memory --transformer --output reward_memory.json
    python -m benchmarks.reward_memory --tiny --device cpu --transformer --aesthetic --hpsv3 --geneval2

Everything has random weights, made on the device in bfloat16 (in float32 on a CPU, where that is faster), and
nothing is downloaded: the configurations are those of the published models. Measured is what a training step
does on its last transition: x0 from the generator (FLUX.2-klein 4B with a LoRA, activations recomputed),
the reward hinge through the decoder and the scorers, and the gradient back into the LoRA; without
``--transformer`` x0 is a leaf. First the decoder with a reward that costs nothing, then each scorer alone,
then all together. Without CUDA there is time only.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor, nn

from benchmarks.reward_models import BUILDERS, DEFAULT_SCORERS, OPTIONAL_SCORERS
from rtdmd.flow import predict_x0
from rtdmd.models.flux2 import Flux2Family
from rtdmd.models.lora import attach_adapter
from rtdmd.models.protocol import TextEmbeddings
from rtdmd.rewards.protocol import Metadata, Reward
from rtdmd.rewards.sources import first_line
from rtdmd.stages.combination import Combination
from rtdmd.stages.rewarding import Captions, RewardPanel
from rtdmd.stages.scoring_thread import ScoringThread

GIB = 2**30
PROMPT = "two red circles on a green square"
QUESTIONS = [["How many circles are in the image?", "two"]] + [["Are the circles red?", "Yes"]] * 6
MARGIN = 1e6  # above any score, so that the hinge is active
SIGMA = 0.7175  # of the last of four steps at 512 pixels
TEXT_TOKENS = 512


class Brightness:
    """A reward that costs nothing, to measure the decoder by."""

    name = "decoder alone"
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The mean of each picture, [B]."""
        return images.mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Row:
    """One measurement. Memory in GiB, None without CUDA; ``resident``: before the step; ``peak``: in it."""

    name: str
    parameters_millions: float
    resident: float | None
    peak: float | None
    reserved: float | None
    seconds: float | None
    error: str | None = None


@contextmanager
def creating_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules created in this block have their weights on ``device`` in ``dtype``."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous)


def build_family(tiny: bool) -> Flux2Family:
    """FLUX.2 with the VAE of AutoencoderKLFlux2's defaults, and no text encoder."""
    small: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    vae = AutoencoderKLFlux2(**(small if tiny else {})).requires_grad_(False).eval()
    vae.enable_gradient_checkpointing()
    return Flux2Family(None, None, (0, 0, 0), vae, TEXT_TOKENS, None)


def build_transformer(tiny: bool) -> Flux2Transformer2DModel:
    """FLUX.2-klein 4B (3.876 B parameters), frozen, whose activations are recomputed in backward."""
    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    small = {**shape, "joint_attention_dim": 48, "axes_dims_rope": (4, 4, 4, 4)}
    shape = {"num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24}
    full = {**shape, "joint_attention_dim": 7680, "axes_dims_rope": (32, 32, 32, 32)}
    chosen: dict[str, Any] = small if tiny else full
    transformer = Flux2Transformer2DModel(in_channels=128, guidance_embeds=False, **chosen)
    transformer.requires_grad_(False).enable_gradient_checkpointing()
    return transformer


class Step:
    """The last transition of a training step, from noise to a gradient.

    Args:
        family: decodes.
        transformer: the generator; None: the gradient ends at the final latents.
        batch: pictures.
        chunk: pictures decoded, scored and back-propagated at once.
        size: side of a picture in pixels.
        device: of everything.
        dtype: of the networks.
    """

    def __init__(
        self,
        family: Flux2Family,
        transformer: Flux2Transformer2DModel | None,
        batch: int,
        chunk: int,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.family = family
        self.transformer = transformer
        self.chunk = chunk
        self.device = device
        self.thread = ScoringThread(device)
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, *family.latent_shape(size, size))
        self.latents = torch.randn(shape, generator=generator, device=device)
        self.captions = Captions([PROMPT] * batch, [{"vqa_list": QUESTIONS}] * batch)
        if transformer is not None:
            texts = (batch, TEXT_TOKENS, transformer.config.joint_attention_dim)
            embeddings = torch.randn(texts, generator=generator, device=device, dtype=dtype)
            self.text = TextEmbeddings({"prompt_embeds": embeddings})

    def run(self, rewards: Sequence[Reward]) -> None:
        """One forward and backward; RuntimeError unless the gradient is finite and not zero."""
        names = [reward.name for reward in rewards]
        panel = RewardPanel(
            self.family,
            rewards,
            Combination(dict.fromkeys(names, 1.0)),
            names,
            margin=MARGIN,
            thread=self.thread,
            score_chunk=self.chunk,
            backprop_chunk=self.chunk,
            progress=lambda: None,
        )
        trained = [self.latents.clone().requires_grad_()]
        x0 = trained[0]
        if self.transformer is not None:
            trained = [p for p in self.transformer.parameters() if p.requires_grad]
            velocity = self.family.predict_velocity(self.transformer, self.latents, SIGMA, self.text)
            x0 = predict_x0(self.latents, velocity, SIGMA)
        weights = torch.ones(len(x0), device=self.device)
        pull = panel.score(x0.detach(), self.captions, closely=False).pull
        if pull is None:
            raise RuntimeError("no reward was back-propagated")
        loss, _ = pull.on(x0, weights)
        gradients = torch.autograd.grad(loss, trained)
        total = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        if not (torch.isfinite(total) and total > 0):
            raise RuntimeError(f"{', '.join(names)}: the gradient's squared norm is {float(total)}")


def gib(count: int, device: torch.device) -> float | None:
    """Bytes in GiB; None where memory isn't measured."""
    return round(count / GIB, 3) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(name: str, step: Step, rewards: Sequence[Reward], parameters: int, repeats: int) -> Row:
    """Run the step once to warm up, then ``repeats`` times; memory is the highest of all, time the median.

    A step that fails is an error in its row, so that the others are still measured.
    """
    device, on_cuda = step.device, step.device.type == "cuda"
    free(device)
    resident = torch.cuda.memory_allocated(device) if on_cuda else 0
    times, error = [], None
    try:
        for _ in range(repeats + 1):
            synchronize(device)
            start = time.perf_counter()
            step.run(rewards)
            synchronize(device)
            times.append(time.perf_counter() - start)
    except RuntimeError as failure:  # out of memory is one
        error = f"{type(failure).__name__}: {first_line(failure)}"
    return Row(
        name=name,
        parameters_millions=round(parameters / 1e6, 1),
        resident=gib(resident, device),
        peak=gib(torch.cuda.max_memory_allocated(device) if on_cuda else 0, device),
        reserved=gib(torch.cuda.max_memory_reserved(device) if on_cuda else 0, device),
        seconds=round(statistics.median(times[1:]), 4) if error is None else None,
        error=error,
    )


def count(modules: Sequence[nn.Module]) -> int:
    """Parameters of all modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def measure_all(arguments: argparse.Namespace, device: torch.device, report: Callable[[Row], None]) -> None:
    """Call ``report`` with each measurement as it is made."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with creating_on(device, dtype):
        family = build_family(arguments.tiny)
        transformer = build_transformer(arguments.tiny) if arguments.transformer else None
    fixed = [family.vae]
    if transformer is not None:
        fixed.append(transformer)
        attach_adapter(transformer, 32, 64.0, family.lora_targets)
    step = Step(family, transformer, arguments.batch, arguments.chunk, arguments.size, device, dtype)
    report(measure(Brightness.name, step, [Brightness()], count(fixed), arguments.repeats))
    optional = [name for name in OPTIONAL_SCORERS if getattr(arguments, name)]
    names = [*DEFAULT_SCORERS, *optional]

    def build(name: str) -> tuple[Reward, list[nn.Module]]:
        with creating_on(device, dtype):
            return BUILDERS[name](arguments.tiny)

    for name in names:
        reward, modules = build(name)
        report(measure(name, step, [reward], count(modules), arguments.repeats))
        del reward, modules
        free(device)
    built = [build(name) for name in names]
    parameters = count([module for _, modules in built for module in modules])
    report(measure("together", step, [reward for reward, _ in built], parameters, arguments.repeats))


def table(rows: Sequence[Row]) -> str:
    """The measurements for people to read."""
    header = ("", "M parameters", "resident GiB", "peak GiB", "reserved GiB", "seconds")
    cells: list[tuple[str, ...]] = [header]
    for row in rows:
        values = (row.parameters_millions, row.resident, row.peak, row.reserved, row.seconds)
        cells.append((row.name, *("-" if value is None else f"{value:g}" for value in values)))
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = []
    for name, *numbers in cells:
        right = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    errors = [f"{row.name}: {row.error}" for row in rows if row.error is not None]
    return "\n".join([*lines, *errors])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Memory and time of reward back-propagation.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--transformer", action="store_true", help="with a FLUX.2-klein 4B generator")
    for name in OPTIONAL_SCORERS:
        parser.add_argument(f"--{name}", action="store_true", help=f"{name} too")
    parser.add_argument("--batch", type=int, default=6, help="pictures of a step")
    parser.add_argument("--chunk", type=int, default=2, help="pictures decoded and back-propagated at once")
    parser.add_argument("--size", type=int, default=512, help="side of a picture in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script itself")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print table and JSON, and return what the JSON holds."""
    options = parse(arguments)
    device = torch.device(options.device)
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        print(json.dumps(asdict(row)), flush=True)

    measure_all(options, device, report)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }
    print(table(rows))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    raise SystemExit(any(row["error"] is not None for row in main()["rows"]))
