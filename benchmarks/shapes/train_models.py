"""Train the small world's models and write them to data/shapes.

  python -m benchmarks.shapes.train_models --out data/shapes

Everything follows from ``--seed``; one H100 takes under 15 minutes. ``--part clips`` may run on
another GPU meanwhile. ``--quick`` is a try of a few steps on a CPU; its models are worthless.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

from benchmarks.shapes import outcomes
from benchmarks.shapes.autoencoder import encode, normalise, train_autoencoder
from benchmarks.shapes.judge_clip import ClipSettings, choice_accuracy, train_clip
from benchmarks.shapes.pictures import WORDS, Drawn, chat_tokens, draw, to_unit
from benchmarks.shapes.teacher import TeacherSettings, train_teacher
from rtdmd.models.flux2 import Flux2Family
from rtdmd.models.tiny_tokenizers import qwen_tokenizer
from rtdmd.models.weights import WeightSource, load_network
from rtdmd.shapes.prompts import distinct_captions
from rtdmd.shapes.splits import PROPORTIONS, Split

TEXT_TOKENS = 24
CLIP_PROPORTIONS = {"single": 0.12, "count": 0.16, "and": 0.18, "relation": 0.34, "mix": 0.20}


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths of the trainings."""

    pictures: int
    autoencoder_steps: int
    autoencoder_batch: int
    teacher: TeacherSettings
    clip_pictures: int
    clips: dict[str, ClipSettings]
    captions: int  # for each measurement
    seed: int
    measured_steps: tuple[int, ...] = (4, 50)
    teacher_until: float | None = None  # seconds after the start
    out: Path = Path("data/shapes")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def drawings(self, part: str) -> list[tuple[int, int, Split, int, Mapping[str, float]]]:
        """What a part is made of, as arguments of ``draw``."""
        if part == "clips":
            return [
                (self.seed + 1, self.clip_pictures, "all", 8, CLIP_PROPORTIONS),
                (self.seed + 2, 4 * self.captions, "all", 8, PROPORTIONS),
            ]
        if part == "pipeline":
            return [(self.seed, self.pictures, "train", 0, PROPORTIONS)]
        return [(self.seed + 3, 2 * self.captions, "train", 0, PROPORTIONS)]


def full_plan(seed: int) -> Plan:
    return Plan(
        pictures=300_000,
        autoencoder_steps=1800,
        autoencoder_batch=256,
        teacher=TeacherSettings(steps=13_500, seed=seed),
        clip_pictures=200_000,
        clips={
            "clip": ClipSettings(width=96, vision_layers=4, text_layers=2, steps=5500, seed=seed),
            "monitor_clip": ClipSettings(
                width=64, vision_layers=3, text_layers=2, steps=3500, seed=seed + 1000, projection=48
            ),
        },
        captions=1024,
        seed=seed,
    )


def quick_plan(seed: int) -> Plan:
    plan = full_plan(seed)
    return replace(
        plan,
        pictures=256,
        autoencoder_steps=5,
        autoencoder_batch=8,
        teacher=replace(plan.teacher, steps=4, batch_size=16, compile=False),
        clip_pictures=128,
        clips={
            name: replace(item, steps=3, batch_size=16, compile=False) for name, item in plan.clips.items()
        },
        captions=8,
        measured_steps=(4,),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/shapes"))
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--teacher-until",
        type=float,
        metavar="SECONDS",
        help="train the teacher for fewer steps if it would not be done so long after the start",
    )
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    plan = quick_plan(options.seed) if options.quick else full_plan(options.seed)
    plan = replace(
        plan, out=options.out, device=torch.device(options.device), teacher_until=options.teacher_until
    )
    plan.out.mkdir(parents=True, exist_ok=True)
    parts = list(PARTS) if options.part == "all" else [options.part]
    drawn = {part: [draw(*what) for what in plan.drawings(part)] for part in parts}  # before CUDA is used
    for part in parts:
        start = time.perf_counter()
        measured = PARTS[part](plan, *drawn[part])
        measured["seconds"] = round(time.perf_counter() - start)
        text = json.dumps(measured, indent=2) + "\n"
        (plan.out / f"{part}.json").write_text(text, encoding="utf-8")
        print(text, flush=True)


def train_clips(plan: Plan, drawn: Drawn, others: Drawn) -> dict[str, object]:
    """The reward's CLIP and the monitor's, trained on every combination; their accuracy on other pictures."""
    measured: dict[str, object] = {}
    for name, settings in plan.clips.items():
        model, processor = train_clip(drawn, plan.device, settings)
        folder = plan.out / name
        shutil.rmtree(folder, ignore_errors=True)
        model.half().save_pretrained(folder)
        processor.save_pretrained(folder)
        measured[name] = {
            "right caption among 8 wrong ones": choice_accuracy(folder, others, plan.device),
            "steps": settings.steps,
        }
    return measured


def train_pipeline(plan: Plan, drawn: Drawn) -> dict[str, object]:
    """Autoencoder, then text encoder and transformer on its latents."""
    start, device = time.perf_counter(), plan.device
    images = drawn.images.to(device)
    autoencoder = train_autoencoder(
        images,
        device,
        steps=plan.autoencoder_steps,
        batch_size=plan.autoencoder_batch,
        learning_rate=2e-3,
        seed=plan.seed,
    )
    latents = normalise(autoencoder, encode(autoencoder, images, device))
    del images
    tokenizer = qwen_tokenizer(WORDS)
    texts = [caption.text for caption in drawn.captions]
    tokens = chat_tokens(tokenizer, texts, TEXT_TOKENS).to(device)
    empty = chat_tokens(tokenizer, [""], TEXT_TOKENS)[0].to(device)
    settings = plan.teacher
    if plan.teacher_until is not None:
        settings = replace(settings, seconds=plan.teacher_until - (time.perf_counter() - start))
    teacher, steps = train_teacher(latents, tokens, empty, tokenizer, settings)
    folder = plan.out / "pipeline"
    shutil.rmtree(folder, ignore_errors=True)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=autoencoder.half(),
        text_encoder=teacher.text_encoder.half(),
        tokenizer=tokenizer,
        transformer=teacher.transformer.half(),
    ).save_pretrained(folder)
    return {"autoencoder steps": plan.autoencoder_steps, "teacher steps": steps}


def measure_pipeline(plan: Plan, drawn: Drawn) -> dict[str, object]:
    """The judge's word on true pictures, reconstructions, and held-out captions by steps and guidance."""
    folder, device = plan.out / "pipeline", plan.device
    family = Flux2Family.load(
        str(folder), device=device, dtype=torch.float32, max_sequence_length=TEXT_TOKENS
    )
    network = load_network(family.transformer_class, WeightSource(str(folder)), torch.float32, device)
    images, captions = drawn.images, drawn.captions
    with torch.no_grad():
        latents = normalise(family.vae, encode(family.vae, images, device))
        rebuilt = torch.cat([family.decode(part) for part in latents.split(256)])
    measured: dict[str, object] = {
        "true pictures": outcomes.accuracy(outcomes.judge(to_unit(images), captions), captions),
        "reconstructions": outcomes.accuracy(outcomes.judge(rebuilt, captions), captions),
    }
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        held_out = distinct_captions(split, plan.captions, plan.seed)
        prompts = [caption.text for caption in held_out]
        for steps in plan.measured_steps:
            for guidance in (1.0, 2.0, 3.0, 4.0):
                sampler = outcomes.euler(steps, guidance)
                painted = outcomes.paint_many(family, network, prompts, sampler, seeds=[plan.seed])
                found = outcomes.accuracy(outcomes.judge(painted, held_out), held_out)
                measured[f"{split}, {steps} steps, guidance {guidance:g}"] = found
                print(split, steps, guidance, found, flush=True)
    return measured


PARTS: dict[str, Callable[..., dict[str, object]]] = {
    "clips": train_clips,
    "pipeline": train_pipeline,
    "measures": measure_pipeline,
}

if __name__ == "__main__":
    main()
