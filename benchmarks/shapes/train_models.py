"""Train the small world's models and write them to data/shapes.

  python -m benchmarks.shapes.train_models --out data/shapes

Everything follows from ``--seed``; one H100 takes under 15 minutes. ``--part pipeline`` and ``--part clips``
may run on two GPUs at once. ``--quick`` is a try of a few steps on a CPU; its models are worthless.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

from benchmarks.shapes import outcomes
from benchmarks.shapes.autoencoder import encode, normalise, train_autoencoder
from benchmarks.shapes.judge_clip import ClipSettings, choice_accuracy, train_clip
from benchmarks.shapes.pictures import WORDS, Drawn, chat_tokens, draw, to_unit
from benchmarks.shapes.teacher import TeacherSettings, train_teacher
from rtdmd.models import get_family
from rtdmd.models.tiny_tokenizers import qwen_tokenizer
from rtdmd.models.weights import WeightSource, load_network
from rtdmd.shapes.prompts import distinct_captions
from rtdmd.shapes.splits import Split

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
    measured_steps: tuple[int, ...] = (4, 50)
    teacher_until: float | None = None  # seconds after the start


def full_plan(seed: int) -> Plan:
    return Plan(
        pictures=500_000,
        autoencoder_steps=2500,
        autoencoder_batch=256,
        teacher=TeacherSettings(steps=22_000, seed=seed),
        clip_pictures=300_000,
        clips={
            "clip": ClipSettings(width=96, vision_layers=4, text_layers=2, steps=9000, seed=seed),
            "monitor_clip": ClipSettings(
                width=64, vision_layers=3, text_layers=2, steps=7000, seed=seed + 1000, projection=48
            ),
        },
        captions=1024,
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
    parser.add_argument("--part", choices=("pipeline", "clips", "all"), default="all")
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
    device = torch.device(options.device)
    plan = quick_plan(options.seed) if options.quick else full_plan(options.seed)
    plan = replace(plan, teacher_until=options.teacher_until)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part in ("clips", "all"):
        _record(options.out / "clips.json", lambda: train_clips(plan, options.out, device, options.seed))
    if options.part in ("pipeline", "all"):
        _record(
            options.out / "pipeline.json", lambda: train_pipeline(plan, options.out, device, options.seed)
        )


def _record(path: Path, work) -> None:  # type: ignore[no-untyped-def]
    """Run and write what it measured, with the time it took."""
    start = time.perf_counter()
    measured = work()
    measured["seconds"] = round(time.perf_counter() - start)
    path.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=2), flush=True)


def train_clips(plan: Plan, out: Path, device: torch.device, seed: int) -> dict[str, object]:
    """The reward's CLIP and the monitor's, trained on every combination; their accuracy on other pictures."""
    drawn = draw(seed + 1, plan.clip_pictures, "all", num_wrong=8, proportions=CLIP_PROPORTIONS)
    others = draw(seed + 2, 4 * plan.captions, "all", num_wrong=8)
    measured: dict[str, object] = {}
    for name, settings in plan.clips.items():
        model, processor = train_clip(drawn, device, settings)
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        model.half().save_pretrained(folder)
        processor.save_pretrained(folder)
        measured[name] = {"right caption among 8 wrong ones": choice_accuracy(folder, others, device)}
    return measured


def train_pipeline(plan: Plan, out: Path, device: torch.device, seed: int) -> dict[str, object]:
    """Autoencoder, then text encoder and transformer on its latents; accuracy of the saved pipeline."""
    start = time.perf_counter()
    drawn = draw(seed, plan.pictures, "train")
    images = drawn.images.to(device)
    autoencoder = train_autoencoder(
        images,
        device,
        steps=plan.autoencoder_steps,
        batch_size=plan.autoencoder_batch,
        learning_rate=2e-3,
        seed=seed,
    )
    latents = normalise(autoencoder, encode(autoencoder, images, device))
    tokenizer = qwen_tokenizer(WORDS)
    texts = [caption.text for caption in drawn.captions]
    tokens = chat_tokens(tokenizer, texts, TEXT_TOKENS).to(device)
    empty = chat_tokens(tokenizer, [""], TEXT_TOKENS)[0].to(device)
    del images
    settings = plan.teacher
    if plan.teacher_until is not None:
        settings = replace(settings, seconds=plan.teacher_until - (time.perf_counter() - start))
    teacher, steps = train_teacher(latents, tokens, empty, tokenizer, settings)
    folder = out / "pipeline"
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
    return measure_pipeline(folder, drawn, plan, device, seed) | {"teacher_steps": steps}


def measure_pipeline(
    folder: Path, drawn: Drawn, plan: Plan, device: torch.device, seed: int
) -> dict[str, object]:
    """The judge's word on reconstructions, and on held-out captions by steps and guidance."""
    family = get_family("flux2").load(
        str(folder), device=device, dtype=torch.float32, max_sequence_length=TEXT_TOKENS
    )
    network = load_network(family.transformer_class, WeightSource(str(folder)), torch.float32, device)
    count = plan.captions
    images, captions = drawn.images[:count], drawn.captions[:count]
    vae = family.vae
    with torch.no_grad():
        latents = normalise(vae, encode(vae, images, device))
        rebuilt = torch.cat([family.decode(part) for part in latents.split(256)])
    measured: dict[str, object] = {
        "true pictures": outcomes.accuracy(outcomes.judge(to_unit(images), captions), captions),
        "reconstructions": outcomes.accuracy(outcomes.judge(rebuilt, captions), captions),
    }
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        held_out = distinct_captions(split, count, seed)
        prompts = [caption.text for caption in held_out]
        for steps in plan.measured_steps:
            for guidance in (1.0, 2.0, 3.0, 4.0):
                sampler = outcomes.euler(steps, guidance)
                painted = outcomes.paint_many(family, network, prompts, sampler, seed=seed)
                found = outcomes.accuracy(outcomes.judge(painted, held_out), held_out)
                measured[f"{split}, {steps} steps, guidance {guidance:g}"] = found
    return measured


if __name__ == "__main__":
    main()
