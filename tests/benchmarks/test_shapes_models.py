"""The small world's shipped models: what they weigh, and that they do what their card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors import safe_open

from benchmarks.shapes import outcomes
from benchmarks.shapes.autoencoder import encode, normalise
from benchmarks.shapes.judge_clip import choice_accuracy
from benchmarks.shapes.measure import Judges, background_entropy
from benchmarks.shapes.mechanisms import REPEATS, reward_variance
from benchmarks.shapes.outcomes import euler, judge, paint_many
from benchmarks.shapes.pictures import Drawn, draw, to_unit
from benchmarks.shapes.report import NUM_SHIPPED, TEACHERS, read_teacher
from rtdmd.cli import main
from rtdmd.models.flux2 import Flux2Family
from rtdmd.models.weights import WeightSource, load_network
from rtdmd.recipe import load_recipe
from rtdmd.rewards.clip import ClipEncoder
from rtdmd.sample import SampleOptions, build_painter
from rtdmd.schedules import sd3_sigmas
from rtdmd.shapes.captions import Caption, Group
from rtdmd.shapes.drawing import draw_pictures
from rtdmd.shapes.prompts import distinct_captions

WORLD = Path(__file__).parents[2] / "data" / "shapes"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family() -> Flux2Family:
    return Flux2Family.load(str(WORLD / "pipeline"), device=CPU, dtype=torch.float32, max_sequence_length=24)


@pytest.fixture(scope="module")
def network(family: Flux2Family) -> torch.nn.Module:
    source = WeightSource(str(WORLD / "pipeline"))
    return load_network(family.transformer_class, source, torch.float32, CPU)


@pytest.fixture(scope="module")
def others() -> Drawn:
    """Pictures that no model was trained on, with 8 wrong captions each."""
    return draw(77, 96, "all", num_wrong=8)


def test_weights_are_small_and_in_half_precision() -> None:
    files = list(WORLD.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 16 * 2**20
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            kinds = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
        assert kinds <= {torch.float16, torch.int64}, file


def test_each_clip_picks_the_right_caption(others: Drawn) -> None:
    for name, least in (("clip", 0.95), ("monitor_clip", 0.85)):
        found = choice_accuracy(WORLD / name, others, CPU)
        assert sum(found.values()) / len(found) >= least


def test_the_autoencoder_keeps_what_captions_say(family: Flux2Family, others: Drawn) -> None:
    latents = normalise(family.vae, encode(family.vae, others.images, CPU))
    # The statistics are those of all latents.
    assert latents.mean().abs() < 0.1
    assert abs(latents.std().item() - 1) < 0.1
    rebuilt = family.decode(latents)
    assert sum(verdict.correct for verdict in judge(rebuilt, others.captions)) >= 95


def test_the_teacher_paints_what_is_asked_for(family: Flux2Family, network: torch.nn.Module) -> None:
    """Ten steps are fewer than its best, four without guidance clearly worse (78 % with it)."""
    captions = distinct_captions("test", 24, 5)
    prompts = [caption.text for caption in captions]

    def right(steps: int, guidance: float) -> int:
        images = paint_many(family, network, prompts, euler(steps, guidance), seeds=[3])
        return sum(verdict.correct for verdict in judge(images, captions))

    assert right(10, 2.5) >= 19
    assert right(2, 1.0) < 12


def test_pictures_depend_on_their_prompt_alone(family: Flux2Family, network: torch.nn.Module) -> None:
    prompts = ["a red circle", "two small blue squares", "a green cross"]
    sampler = outcomes.Sampler([1.0, 0.6], 0.9)
    whole = paint_many(family, network, prompts, sampler, seeds=[1])
    parts = paint_many(family, network, prompts, sampler, seeds=[0, 1], chunk=2)
    torch.testing.assert_close(whole, parts[3:], atol=1e-4, rtol=0)
    assert (whole - parts[:3]).abs().max() > 0.1


def test_the_stock_pipeline_paints(family: Flux2Family) -> None:
    """A red circle by diffusers alone, judged."""
    pipeline = Flux2KleinPipeline.from_pretrained(WORLD / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt=["a large red circle"] * 4,
        height=64,
        width=64,
        num_inference_steps=12,
        guidance_scale=3.0,
        max_sequence_length=24,
        text_encoder_out_layers=(1, 2, 3),
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    caption = Caption((Group(1, "red", "circle", "large"),))
    assert sum(verdict.correct for verdict in judge(images.float(), [caption] * 4)) >= 3


def test_the_shipped_teacher_is_of_these_captions() -> None:
    prompts = [caption.text for caption in distinct_captions("test", NUM_SHIPPED, 0)]
    rows = read_teacher(WORLD / "teacher", prompts)
    assert set(rows) == set(TEACHERS)
    scores = {name: sum(row.scores["accuracy"]) / NUM_SHIPPED for name, (row, _) in rows.items()}
    assert scores["teacher, 50 steps"] > 0.88
    assert scores["teacher, 4 steps"] < scores["teacher, 50 steps"] - 0.1
    first = json.loads((WORLD / "train_prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["prompt"] not in prompts


def test_background_entropy_of_known_pictures() -> None:
    """Half of the pictures rose, half sky: one bit."""
    rose, sky = torch.tensor([246, 214, 214]), torch.tensor([206, 222, 246])
    pictures = torch.stack([rose, sky, sky, rose]).view(4, 3, 1, 1).expand(4, 3, 64, 64) / 255
    assert background_entropy(pictures) == pytest.approx(1.0)


def test_judges_score_true_pictures_well(others: Drawn) -> None:
    judges = Judges.load("test", 24, CPU)
    drawn, captions = draw_pictures(3, 0, 24, "test")
    judges = Judges(captions, judges.reward, judges.monitor, judges.references)
    images = to_unit(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    found = judges.measure(images)
    assert found["accuracy"] == 1.0
    assert judges.measure(images.repeat(2, 1, 1, 1))["clip"] == pytest.approx(found["clip"])  # each twice
    shifted = Judges(captions[1:] + captions[:1], judges.reward, judges.monitor, judges.references)
    wrong = shifted.measure(images)
    assert wrong["accuracy"] < 0.2
    assert wrong["clip"] < found["clip"] - 0.1


def test_rewards_vary_with_the_noise_that_varies() -> None:
    prompts = ["a red circle", "two small green crosses"]
    painter = build_painter(load_recipe("recipes/shapes.yaml"), SampleOptions(), CPU)
    encoder = ClipEncoder.load(str(WORLD / "clip"), CPU, torch.float32)
    assert reward_variance(painter, encoder, prompts, set()).tolist() == [0, 0]
    found = reward_variance(
        painter, encoder, prompts, {"initial", "transition0", "transition1", "transition2"}
    )
    texts = encoder.text_features(prompts)
    scores = [
        (encoder.image_features(painter.paint(prompts, [repeat] * 2)) * texts).sum(-1)
        for repeat in range(REPEATS)
    ]
    expected = (torch.stack(scores) * encoder.logit_scale / 100).double().var(0)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    one = reward_variance(painter, encoder, prompts, {"transition2"})
    assert (one > 0).all()


def test_rtdmd_evaluate_measures_the_same(
    family: Flux2Family, network: torch.nn.Module, tmp_path: Path
) -> None:
    """The command's pictures are the report's: the same verdicts, and rewards but for rounding to 8 bits."""
    judges = Judges.load("test", 12, CPU)
    recipe = load_recipe("recipes/shapes.yaml")
    sigmas = family.sigmas(recipe.schedule.timesteps, 64, 64)
    shifted = sd3_sigmas([step / 1000 for step in recipe.schedule.timesteps], recipe.schedule.shift)
    assert sigmas != shifted  # the fixture's family has no shift of its own
    images = paint_many(family, network, judges.prompts, outcomes.Sampler(shifted, 0.9))
    expected = judges.score(images)
    rows = [json.dumps(caption.metadata) for caption in judges.captions]
    (tmp_path / "test.jsonl").write_text("\n".join(rows), encoding="utf-8")
    command = [
        "evaluate",
        "recipes/shapes.yaml",
        "--prompts",
        str(tmp_path / "test.jsonl"),
        "--model",
        "base",
    ]
    options = ["--rewards", "shapes,clipscore", "--batch-size", "5", "--device", "cpu"]
    assert main([*command, *options, "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["shapes"] for row in found] == expected["accuracy"]
    assert [row["clipscore"] for row in found] == pytest.approx(expected["clip"], abs=2e-3)
