"""Why the methods differ: the fake score's tracking error, the policy gradient's variance and the rewards'.

  python -m benchmarks.shapes.mechanisms tracking RUN [--to FILE]
  python -m benchmarks.shapes.mechanisms variance RUN [--to FILE]
  python -m benchmarks.shapes.mechanisms sources RUN [--to FILE]

RUN is the folder of a cold start that benchmarks/shapes/study.py trained. ``tracking``: how far the fake
score is from one trained to convergence on the frozen generator. ``variance``: signal and noise of the policy
gradient at the cold start's generator, at equal numbers of samples, by the number of drawn steps and with or
without shared noise. ``sources``: how rewards vary within a prompt while one of its noises varies alone, or
all but one, as where that one is shared.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes.measure import WORLD, features, rewards, tell
from rtdmd.distributed.collectives import Ranks, start_ranks, stop_ranks
from rtdmd.distributed.guard import CallLog
from rtdmd.flow import renoise
from rtdmd.prompts import PromptSet
from rtdmd.recipe import load_for_sampling
from rtdmd.recipe.schema import Recipe
from rtdmd.rewards.clip import ClipEncoder
from rtdmd.sample import Painter, SampleOptions, build_painter
from rtdmd.stages.ac_dmd import Samples
from rtdmd.stages.assemble import build_stage
from rtdmd.stages.cold_start import ColdStart
from rtdmd.stages.metrics import Means
from rtdmd.stages.networks import HandOver
from rtdmd.stages.rtdmd import Rtdmd
from rtdmd.training.checkpoint import CheckpointStore
from rtdmd.training.ema import Ema
from rtdmd.training.loop import StageRun
from rtdmd.training.previews import Previews
from rtdmd.training.stopping import StopRules

ROLES = ("teacher", "generator", "fake_score")
CONVERGENCE_ITERATIONS = 800
# In float32, without engines' and compilers' own ways, however the run was trained.
PLAIN = [
    "dtype=float32",
    "roles.engines=separate",
    *(f"roles.{role}.engine=ds_configs/zero0.json" for role in ROLES),
    *(f"roles.{role}.compile=none" for role in ROLES),
]
PROBES = 16  # batches on which velocities are compared
EPOCHS = 96  # estimates of the policy gradient
PROMPTS = 512  # whose rewards' variance is measured
REPEATS = 8  # pictures of each


def resume_cold_start(run: Path, recipe: Recipe, ranks: Ranks, calls: CallLog) -> ColdStart:
    """The stage as it was after its last checkpoint: the live generator and fake score."""
    stage = build_stage("cold_start", recipe, ranks, calls, HandOver())
    assert isinstance(stage, ColdStart)
    store = CheckpointStore(run / "cold_start" / "checkpoints", ranks, recipe.keep_checkpoints)
    ema = Ema(stage.roles.generator.engine, recipe.cold_start.ema_decay, warmup=False)
    previews = Previews([], stage.texts, stage.family, stage.few, recipe.seed, ranks)
    StageRun(stage, ema, store, previews, None, recipe, ranks, run, StopRules([]), {}).resume()
    return stage


def tracking(run: Path, recipe: Recipe, ranks: Ranks, calls: CallLog, iterations: int) -> dict[str, float]:
    """‖v − v*‖²/‖v*‖² of the fake score's velocity v against the converged v*, on the generator's samples.

    v* is the fake score after ``iterations`` more updates, at a learning rate that falls to zero, while the
    generator stands still, without the regulariser.
    """
    first = recipe.cold_start.iterations + PROBES
    last = first + iterations
    section = replace(
        recipe.cold_start,
        iterations=last,
        consistency_weight=0.0,
        generator_every=10**9,
        fake_score=replace(recipe.cold_start.fake_score, cooldown=iterations / last),
    )
    stage = resume_cold_start(run, replace(recipe, cold_start=section), ranks, calls)
    probes = range(first - PROBES, first)
    before = [_probe(stage, number) for number in probes]
    for number in range(first, last):
        stage.step(number)
    after = [_probe(stage, number) for number in probes]
    wrong = sum((old - new).double().square().sum() for old, new in zip(before, after, strict=True))
    whole = sum(new.double().square().sum() for new in after)
    return {"tracking_error": float(wrong / whole)}


@torch.no_grad()
def _probe(stage: ColdStart, iteration: int) -> Tensor:
    """The fake score's velocity where its loss evaluates it, on fresh samples of the generator."""
    velocities = []
    for stop in range(1, len(stage.few.sigmas) + 1):
        batch = stage._batch(iteration)
        trajectory = stage._rollout(iteration, "probe", batch, stop)
        samples = Samples(trajectory.final, trajectory.final_sigma, iteration, batch.indices)
        matching = stage._matching
        t = matching._sigma_t(samples, "probe/t")
        x_t = renoise(samples.states, matching._noise(samples, "probe/noise"), samples.sigma, t)
        velocities.append(stage.roles.fake_score.velocity(batch.text)(x_t, t))
    return torch.stack(velocities)


def variance(run: Path, recipe: Recipe, ranks: Ranks, calls: CallLog, epochs: int) -> dict[str, float]:
    """tr Cov(g)/‖E g‖² of an epoch's policy gradient g, over ``epochs`` of equal size; smaller is better."""
    cold = run / "cold_start"
    hand_over = HandOver(cold / "generator_ema.pt", cold / "fake_score.pt")
    no_backprop = replace(recipe.rtdmd.reward_backprop, weight=0.0)
    found: dict[str, float] = {}
    for label, steps, shared in (
        ("1 step", 1, True),
        ("2 steps", 2, True),
        ("all steps", 3, True),
        ("1 step, own noise", 1, False),
        ("2 steps, own noise", 2, False),
    ):
        section = replace(
            recipe.rtdmd,
            num_policy_steps=steps,
            shared_noise=shared,
            matched_steps="last",
            reward_backprop=no_backprop,
        )
        stage = build_stage("rtdmd", replace(recipe, rtdmd=section), ranks, calls, hand_over)
        assert isinstance(stage, Rtdmd)
        gradients = torch.stack([_policy_gradient(stage, epoch) for epoch in range(epochs)])
        found |= {f"{label}/{key}": value for key, value in noise_to_signal(gradients).items()}
        stage.close()
    return found


def noise_to_signal(gradients: Tensor) -> dict[str, float]:
    """From R estimates [R, P]: tr Cov, ‖E g‖² without bias (‖mean‖² − tr Cov/R), and their ratio."""
    values = gradients.double()
    trace = values.var(0).sum().item()
    signal = values.mean(0).square().sum().item() - trace / len(values)
    return {"noise": trace, "signal": signal, "ratio": trace / signal if signal > 0 else float("inf")}


def _policy_gradient(stage: Rtdmd, epoch: int) -> Tensor:
    """The flat gradient of the policy loss of one epoch; nothing is updated."""
    means = Means()
    count = len(stage.few.sigmas) - 1
    drawn = stage.draws.subset(epoch, "policy_steps", count, stage.settings.num_policy_steps)
    records, scores = stage._sample(epoch, drawn)
    micro_batches = stage._weigh(records, stage._advantages(records, scores, means))
    engine = stage.roles.generator.engine
    terms = [(micro, step) for micro in micro_batches for step in drawn]
    for number, (micro, step) in enumerate(terms):
        loss = micro.share * stage._drawn_step_term(epoch, micro, step, means) / len(terms)
        engine.backward(loss, last=number == len(terms) - 1)
    gradient = torch.cat([part.flatten() for _, part in engine.masters.gradients()])
    engine.network.module.zero_grad()
    return gradient


def sources(run: Path, recipe: Recipe, device: torch.device, num_prompts: int) -> dict[str, float]:
    """Mean variance of CLIP's reward within a prompt while all noise varies, one alone, or all but one.

    Noise goes by the purpose that it is drawn for (``initial``, ``transition0``, …). What doesn't vary is the
    prompt's own. As shares of ``all``, a noise alone is its total effect (Homma and Saltelli 1996), and what
    ``all but`` it lacks to 1 is its first-order effect, which sharing that noise takes away.
    """
    painter = build_painter(recipe, SampleOptions(run=run, stage="cold_start"), device)
    encoder = ClipEncoder.load(str(WORLD / "clip"), device, torch.float32)
    prompts = PromptSet.load(recipe.rtdmd.prompts).prompts[:num_prompts]
    purposes = ["initial", *(f"transition{step}" for step in range(len(painter.few.sigmas) - 1))]
    varied = {purpose: {purpose} for purpose in purposes}
    varied |= {f"all but {purpose}": {*purposes} - {purpose} for purpose in purposes}
    varied["all"] = {*purposes}
    return {
        name: reward_variance(painter, encoder, prompts, noises).mean().item()
        for name, noises in varied.items()
    }


@torch.no_grad()
def reward_variance(
    painter: Painter, encoder: ClipEncoder, prompts: Sequence[str], varied: Collection[str]
) -> Tensor:
    """Each prompt's variance [N] of CLIP's reward over pictures that differ in the ``varied`` noise alone."""
    texts = encoder.text_features(prompts)
    scores = []
    for repeat in range(REPEATS):

        def noise(purpose: str, repeat: int = repeat) -> Tensor:
            numbers = [repeat if purpose in varied else 0] * len(prompts)
            return painter.noise(purpose, prompts, numbers)

        pictures = features(encoder, painter.paint_with(prompts, noise), painter.device)
        scores.append(rewards(encoder, pictures, texts))
    return torch.stack(scores).double().var(0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("tracking", "variance", "sources"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument(
        "--length", type=int, help="iterations (tracking), epochs (variance), prompts (sources)"
    )
    options = parser.parse_args(arguments)
    recipe = load_for_sampling(str(options.run / "recipe.yaml"), PLAIN)
    ranks = start_ranks(3600)
    calls = CallLog(ranks)
    if options.kind == "tracking":
        found = tracking(options.run, recipe, ranks, calls, options.length or CONVERGENCE_ITERATIONS)
    elif options.kind == "variance":
        found = variance(options.run, recipe, ranks, calls, options.length or EPOCHS)
    else:
        found = sources(options.run, recipe, ranks.device, options.length or PROMPTS)
    stop_ranks()
    tell(found, options.to)


if __name__ == "__main__":
    main()
