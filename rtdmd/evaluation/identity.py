"""What a score depends on: the weights' content, the schedule, the prompts, the rewards, the seed."""

from __future__ import annotations

import json
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from rtdmd.errors import UserError
from rtdmd.evaluation.sets import EvaluationSet
from rtdmd.evaluation.specs import ModelSpec
from rtdmd.files import is_partial
from rtdmd.recipe.schema import Recipe, RewardSection, role_weights
from rtdmd.sample import TEACHER_STEPS, SampleOptions, few_timesteps, run_files

# Of a folder: what models are loaded from.
_LOADED = (".bin", ".jinja", ".json", ".model", ".pt", ".pth", ".safetensors", ".txt")

# Dotted key → value, as JSON has it.
Identity = dict[str, Any]


def sample_options(spec: ModelSpec, seed: int) -> SampleOptions:
    """The options of ``rtdmd sample`` that paint with ``spec``."""
    return SampleOptions(
        loras=spec.loras,
        run=None if spec.run is None else Path(spec.run),
        stage=spec.stage,
        teacher=spec.kind == "teacher",
        num_steps=spec.num_steps,
        guidance_scale=spec.guidance_scale,
        seed=seed,
    )


def guidance_of(recipe: Recipe, spec: ModelSpec) -> float:
    """w; 1, which is none, for a generator."""
    if spec.kind != "teacher":
        return 1.0
    return recipe.model.guidance_scale if spec.guidance_scale is None else spec.guidance_scale


def steps_of(recipe: Recipe, spec: ModelSpec) -> int:
    """Steps of the schedule that ``spec`` paints with."""
    if spec.kind == "teacher":
        return spec.num_steps or TEACHER_STEPS
    return len(few_timesteps(recipe.schedule, spec.num_steps))


def num_evaluations(recipe: Recipe, spec: ModelSpec) -> int:
    """NFE: network evaluations per picture, two a step under guidance."""
    return steps_of(recipe, spec) * (1 if guidance_of(recipe, spec) == 1 else 2)


class Digests:
    """SHA-256 of files and folders; each is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str | None], str] = {}

    def of(self, source: str | Path, revision: str | None = None) -> str:
        """Of a file, of all that is loaded from a folder; of a hub's pipeline, its id and commit.

        Raises UserError if it is nowhere.
        """
        key = str(source), revision
        if key not in self._known:
            self._known[key] = self._digest(*key)
        return self._known[key]

    def _digest(self, source: str, revision: str | None) -> str:
        path = Path(source).expanduser()
        if path.exists():
            return _of_local(path)
        try:
            index = hf_hub_download(source, "model_index.json", revision=revision)
        except Exception as error:  # hub errors have no common class
            raise UserError(
                f"{source}: no such file or folder, and not to be had from the hub "
                f"({type(error).__name__}: {error})"
            ) from error
        return f"{source}@{Path(index).parent.name}"

    def of_local(self, source: str | Path) -> str:
        """Of a file or folder here. UserError if it isn't there."""
        if not Path(source).expanduser().exists():
            raise UserError(f"{source}: there is no such file or folder")
        return self.of(source)


def _of_local(path: Path) -> str:
    if path.is_file():
        return _of_file(path)
    loaded = [file for file in path.rglob("*") if file.suffix in _LOADED and not is_partial(file)]
    files = sorted(file for file in loaded if file.is_file())
    parts = [f"{file.relative_to(path).as_posix()} {_of_file(file)}\n" for file in files]
    return sha256("".join(parts).encode()).hexdigest()


def _of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def model_identity(recipe: Recipe, spec: ModelSpec, digests: Digests) -> Identity:
    """Everything of recipe and weights that a picture depends on. Raises UserError for missing files."""
    options = sample_options(spec, recipe.evaluation.seed)
    options.check()
    model, roles = recipe.model, recipe.roles
    weights, revision = role_weights(model, roles.teacher if options.teacher else roles.generator)
    trained = run_files(options.run, recipe, options.stage) if options.run else list(options.loras)
    identity: Identity = {
        "model.family": model.family,
        "model.height": model.height,
        "model.width": model.width,
        "model.max_sequence_length": model.max_sequence_length,
        "model.pipeline": digests.of(model.pipeline, model.revision),
        "dtype": recipe.dtype,
        "schedule.shift": recipe.schedule.shift,
        "steps": steps_of(recipe, spec),
        "guidance": guidance_of(recipe, spec),
        "weights": digests.of(weights, revision),
        "trained": [digests.of_local(file) for file in trained],
        "evaluation.seed": recipe.evaluation.seed,
    }
    if not options.teacher:
        identity |= {
            "schedule.timesteps": few_timesteps(recipe.schedule, spec.num_steps),
            "schedule.eta": recipe.schedule.eta,
            "lora.alpha": recipe.lora.alpha,
        }
    return identity


def set_identity(prompts: EvaluationSet) -> Identity:
    """The prompts, with all that rewards are told of them, and how many pictures each gets."""
    return {"prompts": prompts.digest(), "num_images_per_prompt": prompts.images_per_prompt}


def reward_identity(rewards: list[RewardSection], features: str | None, digests: Digests) -> Identity:
    """Rewards and the model of the features; weights by content where they are local, else by name."""

    def by_content(weights: str | None) -> str | None:
        is_local = weights is not None and Path(weights).expanduser().exists()
        return digests.of(weights) if is_local and weights is not None else weights

    identity: Identity = {"features for --reference": by_content(features)}
    for reward in rewards:
        key = f"rewards.{reward.name}"
        identity |= {
            f"{key}.weights": by_content(reward.weights),
            f"{key}.revision": reward.revision,
            f"{key}.url": reward.url,
            f"{key}.mode": reward.mode,
        }
    return identity


def as_json(identity: Identity) -> str:
    """The identity as it is written."""
    return json.dumps(identity, indent=2, sort_keys=True) + "\n"


def differences(before: Identity, now: Identity) -> list[str]:
    """One text for every key that is gone, added, or has another value."""
    lines = [f"{key} is gone" for key in sorted(before.keys() - now.keys())]
    lines += [f"{key} is added" for key in sorted(now.keys() - before.keys())]
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key]:
            lines.append(f"{key} was {_short(before[key])}, is {_short(now[key])}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:24] + "…"
