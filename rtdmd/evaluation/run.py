"""``rtdmd evaluate``: models side by side on sets of prompts, in several processes, resumable."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from rtdmd import __version__
from rtdmd.errors import UserError
from rtdmd.evaluation.features import check_reference, load_vision, reference_features
from rtdmd.evaluation.identity import (
    Digests,
    Identity,
    model_identity,
    num_evaluations,
    reward_identity,
    sample_options,
    set_identity,
)
from rtdmd.evaluation.results import Measured, ModelLine, Results, distances_to
from rtdmd.evaluation.scoring import check_finite, paint_numbers, score_numbers
from rtdmd.evaluation.sets import (
    EvaluationSet,
    at_evaluation_size,
    evaluation_rewards,
    load_sets,
    match_rewards,
)
from rtdmd.evaluation.specs import ModelSpec, parse_spec
from rtdmd.evaluation.store import Store
from rtdmd.files import replace_file, replacing
from rtdmd.images import to_pictures
from rtdmd.processes import Report, run_processes, shares
from rtdmd.recipe.schema import EvaluationModelSection, Recipe, RewardSection
from rtdmd.rewards import REWARDS, load_rewards
from rtdmd.rewards.clip_vision import ClipVision
from rtdmd.rewards.protocol import Reward
from rtdmd.sample import Painter, build_painter, check_trained, make_folder, pick_device, save_picture

FEATURES = "features"  # beside the rewards' names in a batch's file


@dataclass(frozen=True)
class EvaluationOptions:
    """Where results go, and how they are worked off."""

    out: Path
    devices: Sequence[str] = ("cpu",)  # one process each
    save_images: bool = False
    reference: Path | None = None  # a folder of pictures, or a file of features
    features: str | None = None  # CLIP weights; None: clipscore's


@dataclass(frozen=True)
class Plan:
    """An evaluation, read and checked; every process gets it."""

    recipe: Recipe
    sets: dict[str, EvaluationSet]
    rewards: dict[str, list[RewardSection]]  # by set
    models: dict[str, ModelSpec]
    features: str | None  # CLIP weights, where there is a reference
    options: EvaluationOptions

    def store(self, model: str, prompts: str) -> Store:
        """Where a model's scores on a set are."""
        return Store(self.options.out / "scores" / model / prompts, self.sets[prompts].num_pictures)

    def picture(self, model: str, prompts: str, number: int) -> Path:
        """Where a kept picture is."""
        owner, image = divmod(number, self.sets[prompts].images_per_prompt)
        return self.options.out / "pictures" / model / prompts / f"{owner:05d}-{image}.png"


@dataclass(frozen=True)
class Batch:
    """Pictures of one set that one model paints together."""

    model: str
    prompts: str
    numbers: range


def make_plan(recipe: Recipe, options: EvaluationOptions) -> tuple[Plan, list[str]]:
    """The evaluation that a checked recipe describes, and notices for the user. Raises UserError."""
    section = recipe.evaluation
    sets = load_sets(section)
    scoring = match_rewards(sets, evaluation_rewards(recipe))
    models = section.models or [EvaluationModelSection("base", "base")]
    features = None
    if options.reference is not None:
        check_reference(options.reference)
        features = options.features or _clipscore_weights(evaluation_rewards(recipe))
        small = [each.name for each in sets if each.num_pictures < 2]
        if small:
            raise UserError(f"--reference: set {small[0]!r} has one picture, a distance needs at least 2")
    plan = Plan(
        at_evaluation_size(recipe),
        {each.name: each for each in sets},
        scoring.rewards,
        {each.name: parse_spec(each.model) for each in models},
        features,
        options,
    )
    return plan, scoring.notices


def _clipscore_weights(rewards: Sequence[RewardSection]) -> str:
    given = next((reward.weights for reward in rewards if reward.name == "clipscore"), None)
    weights = given or REWARDS["clipscore"].default_weights
    assert weights is not None
    return weights


def evaluate(recipe: Recipe, options: EvaluationOptions) -> Results:
    """Paint and score whatever isn't scored yet, in as many processes as there are devices.

    Raises UserError for files that are missing or don't fit, and if ``options.out`` holds scores of something
    else.
    """
    plan, notices = make_plan(recipe, options)
    for notice in notices:
        print(f"rtdmd: {notice}", file=sys.stderr)
    claims = check_stores(plan)
    todo = missing_batches(plan)
    for model in dict.fromkeys(batch.model for batch in todo):
        check_trained(plan.recipe, sample_options(plan.models[model], plan.recipe.evaluation.seed))
    reference = _reference(plan)  # before the pictures, so that what is wrong with it is known before
    make_folder(options.out)
    for store, identity in claims:
        store.claim(identity)
    total = sum(each.num_pictures for each in plan.sets.values()) * len(plan.models)
    done = total - sum(len(batch.numbers) for batch in todo)
    print(f"rtdmd: {total - done} of {total} pictures to paint", file=sys.stderr)
    if todo:
        work = [
            Share(plan, batches, device)
            for batches, device in zip(shares(todo, len(options.devices)), options.devices, strict=False)
        ]
        with tqdm(total=total, initial=done, unit="image", disable=not sys.stderr.isatty()) as progress:
            run_processes(work_off, work, progress.update)
    return collect(plan, reference)


def check_stores(plan: Plan) -> list[tuple[Store, Identity]]:
    """Every folder with what its scores depend on. UserError if one holds scores of something else."""
    digests = Digests()
    claims: list[tuple[Store, Identity]] = []
    for model, spec in plan.models.items():
        of_model = model_identity(plan.recipe, spec, digests)
        for name, prompts in plan.sets.items():
            of_rewards = reward_identity(plan.rewards[name], plan.features, digests)
            store, identity = plan.store(model, name), of_model | set_identity(prompts) | of_rewards
            store.check(identity)
            claims.append((store, identity))
    return claims


def missing_batches(plan: Plan) -> list[Batch]:
    """What is left to paint and score, model after model."""
    todo = []
    for model in plan.models:
        for name in plan.sets:

            def has_picture(number: int, model: str = model, name: str = name) -> bool:
                return not plan.options.save_images or plan.picture(model, name, number).is_file()

            batches = plan.store(model, name).missing(plan.recipe.evaluation.batch_size, has_picture)
            todo += [Batch(model, name, numbers) for numbers in batches]
    return todo


@dataclass(frozen=True)
class Share:
    """What one process works off."""

    plan: Plan
    batches: Sequence[Batch]
    device: str


@dataclass(frozen=True)
class Judges:
    """What a process scores pictures with."""

    rewards: dict[str, Reward]
    vision: ClipVision | None


def work_off(share: Share, report: Report) -> None:
    """Paint, score and store the share's batches, loading each model once."""
    plan, device = share.plan, pick_device(share.device)
    judges = _load_judges(plan, device)
    for model, batches in groupby(share.batches, key=lambda batch: batch.model):
        options = sample_options(plan.models[model], plan.recipe.evaluation.seed)
        painter = build_painter(plan.recipe, options, device)
        for batch in batches:
            _work_off_batch(plan, batch, painter, judges)
            report(len(batch.numbers))
        del painter  # before the next one is loaded
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _load_judges(plan: Plan, device: torch.device) -> Judges:
    sections = {reward.name: reward for rewards in plan.rewards.values() for reward in rewards}
    loaded = load_rewards(list(sections.values()), device, getattr(torch, plan.recipe.dtype))
    vision = None if plan.features is None else load_vision(plan.features, device)
    return Judges({reward.name: reward for reward in loaded}, vision)


def _work_off_batch(plan: Plan, batch: Batch, painter: Painter, judges: Judges) -> None:
    prompts = plan.sets[batch.prompts]
    pictures = paint_numbers(painter, prompts, batch.numbers)
    rewards = [judges.rewards[section.name] for section in plan.rewards[batch.prompts]]
    measured = score_numbers(rewards, prompts, batch.numbers, pictures)
    check_finite(measured, prompts, batch.numbers)
    if judges.vision is not None:
        with torch.no_grad():
            measured[FEATURES] = judges.vision.features(pictures).float().cpu()
    if plan.options.save_images:
        for number, picture in zip(batch.numbers, to_pictures(pictures), strict=True):
            _save_picture(plan, batch, number, picture)
    plan.store(batch.model, batch.prompts).write(batch.numbers, measured)


def _save_picture(plan: Plan, batch: Batch, number: int, picture: Image.Image) -> None:
    prompts = plan.sets[batch.prompts]
    owner, image = divmod(number, prompts.images_per_prompt)
    path = plan.picture(batch.model, batch.prompts, number)
    metadata = {
        "prompt": prompts.prompts.prompts[owner],
        "image_number": str(image),
        "seed": str(plan.recipe.evaluation.seed),
        "model": batch.model,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        save_picture(picture, beside, metadata)


def collect(plan: Plan, reference: Tensor | None) -> Results:
    """All scores of a finished evaluation, and the distances to the ``reference``'s features."""
    measured = []
    for model in plan.models:
        for name, prompts in plan.sets.items():
            rows = plan.store(model, name).read()
            features = rows.pop(FEATURES, None)
            shape = (len(prompts.prompts), prompts.images_per_prompt)
            # In the recipe's order.
            scores = {
                section.name: rows[section.name].double().view(shape).numpy()
                for section in plan.rewards[name]
            }
            distances = {} if reference is None or features is None else distances_to(reference, features)
            measured.append(Measured(model, prompts, scores, distances))
    models = [ModelLine(name, spec, num_evaluations(plan.recipe, spec)) for name, spec in plan.models.items()]
    return Results(models, measured, _settings(plan))


def _settings(plan: Plan) -> dict[str, Any]:
    recipe = plan.recipe
    rewards = {reward.name: reward for used in plan.rewards.values() for reward in used}
    return {
        "recipe": recipe.name,
        "family": recipe.model.family,
        "height": recipe.model.height,
        "width": recipe.model.width,
        "dtype": recipe.dtype,
        "seed": recipe.evaluation.seed,
        "rewards": {
            name: {"weights": reward.weights or REWARDS[name].default_weights, "mode": reward.mode}
            for name, reward in rewards.items()
        },
        "features": plan.features,
        "rtdmd": __version__,
    }


def _reference(plan: Plan) -> Tensor | None:
    """The reference's features, also left in ``reference.safetensors`` for the next time."""
    if plan.options.reference is None or plan.features is None:
        return None
    vision = load_vision(plan.features, pick_device(plan.options.devices[0]))
    features = reference_features(plan.options.reference, vision)
    make_folder(plan.options.out)
    content = save({FEATURES: features.contiguous()})
    replace_file(plan.options.out / "reference.safetensors", content, shared=True)
    return features
