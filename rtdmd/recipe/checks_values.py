"""Ranges of single values, and names that have to be known."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

from rtdmd.errors import nearest_hint
from rtdmd.recipe.report import Report, value_at
from rtdmd.recipe.schema import DEFAULT_BACKPROP_REWARDS, Recipe, RewardSection

STAGES = ("cold_start", "rtdmd")
IMAGE_METRICS = ("edge_energy", "saturation", "entropy", "diversity")  # below image/
_OPTIMIZERS = tuple(f"{stage}.{role}" for stage in STAGES for role in ("generator", "fake_score"))

# (what to write, whether a value is fine, keys). Null is fine wherever the schema allows it.
_Rule = tuple[str, Callable[[Any], bool], tuple[str, ...]]
_RULES: tuple[_Rule, ...] = (
    (
        "write at least 1",
        lambda value: value >= 1,
        (
            "model.max_sequence_length",
            "lora.rank",
            "keep_checkpoints",
            "cold_start.iterations",
            "cold_start.generator_every",
            "cold_start.consistency_max_timesteps",
            "rtdmd.epochs",
            "rtdmd.consistency_max_timesteps",
            "rtdmd.monitor_every",
            "rtdmd.reward_backprop.micro_batch_size",
            "evaluation.batch_size",
            "evaluation.num_images_per_prompt",
            *(f"{stage}.{key}" for stage in STAGES for key in ("checkpoint_every", "sample_every")),
        ),
    ),
    (
        "write a number above 0",
        lambda value: value > 0,
        (
            "lora.alpha",
            "lora.init_std.cold_start",
            "lora.init_std.rtdmd",
            "schedule.shift",
            "timeout_seconds",
            "rtdmd.clip_range",
            "rtdmd.advantage_clip",
            *(f"{stage}.min_interval_timesteps" for stage in STAGES),
            *(f"{key}.{field}" for key in _OPTIMIZERS for field in ("learning_rate", "eps", "max_grad_norm")),
        ),
    ),
    (
        "write 0 or more",
        lambda value: value >= 0,
        (
            "seed",
            "model.prompt_embeddings_gib",
            "reward_workers",
            "roles.whole_blocks",
            "preview.num_images",
            "evaluation.seed",
            "evaluation.every",
            "cold_start.consistency_weight",
            "rtdmd.consistency_weight",
            "rtdmd.policy_weight",
            "rtdmd.distribution_matching_weight",
            "rtdmd.reward_backprop.weight",
            *(f"{key}.weight_decay" for key in _OPTIMIZERS),
        ),
    ),
    (
        "write a number in [0, 1), such as 0.9",
        lambda value: 0 <= value < 1,
        (*(f"{stage}.ema_decay" for stage in STAGES), "rtdmd.reward_backprop.statistics_decay"),
    ),
    ("write a number in [0, 1], such as 0.9", lambda value: 0 <= value <= 1, ("schedule.eta",)),
    (
        "write a share of the stage's steps in [0, 1], such as 0.4",
        lambda value: 0 <= value <= 1,
        tuple(f"{key}.cooldown" for key in _OPTIMIZERS),
    ),
    (
        "write at most 1000, the timesteps there are",
        lambda value: value <= 1000,
        tuple(f"{stage}.consistency_max_timesteps" for stage in STAGES),
    ),
    (
        "write 1 (no guidance) or more",
        lambda value: value >= 1,
        ("model.guidance_scale",),
    ),
    (
        "write two numbers in [0, 1), such as [0.9, 0.999]",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        tuple(f"{key}.betas" for key in _OPTIMIZERS),
    ),
    (
        "write two timesteps in ascending order between 0 and 1000, such as [20, 980]",
        lambda value: len(value) == 2 and 0 < value[0] < value[1] < 1000,
        tuple(f"{stage}.timestep_range" for stage in STAGES),
    ),
    (
        "write strictly decreasing timesteps from 1000 to above 0, such as [1000, 750, 500, 250]",
        lambda value: (
            bool(value)
            and value[0] == 1000
            and value[-1] > 0
            and all(later < earlier for earlier, later in pairwise(value))
        ),
        ("schedule.timesteps",),
    ),
    (
        "write a folder name of at most 200 letters, digits, '_', '-' and '.'",
        lambda value: bool(re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,199}", value, re.ASCII)),
        ("name",),
    ),
    (
        "write at least one suffix of a module name, or null for the family's own",
        lambda value: bool(value) and all(target.strip() for target in value),
        ("lora.targets",),
    ),
    (
        "write the project's name, or null for no wandb",
        lambda value: bool(value.strip()),
        ("tracking.wandb_project",),
    ),
    (
        "remove the empty prompts",
        lambda value: all(prompt.strip() for prompt in value),
        ("preview.prompts",),
    ),
)


def check_values(report: Report, recipe: Recipe) -> None:
    """Every value on its own: ranges, sizes of lists, multiples."""
    for advice, is_fine, keys in _RULES:
        for key in keys:
            value = value_at(recipe, key)
            if value is not None and not is_fine(value):
                report.fault(key, value, advice)
    for key in ("model.height", "model.width", "evaluation.height", "evaluation.width"):
        size = value_at(recipe, key)
        if size is not None and (size < 16 or size % 16):
            lower = max(16, size // 16 * 16)
            report.fault(key, size, f"write a multiple of 16, such as {lower} or {lower + 16}")


def check_stages(report: Report, recipe: Recipe, stages: Sequence[str]) -> None:
    """The recipe's stages, and those that are about to run, are known, single and in order."""
    for key, value in (("stages", recipe.stages), ("--stage", list(stages))):
        if not value or value != [stage for stage in STAGES if stage in value]:
            report.fault(key, value, f"write one or more of {', '.join(STAGES)}, each once, in this order")


def check_family(report: Report, recipe: Recipe, known: Collection[str]) -> None:
    """The model family is registered."""
    name = recipe.model.family
    if name not in known:
        report.fault("model.family", name, f"unknown model family{nearest_hint(name, sorted(known))}")


def check_text_encoder(report: Report, recipe: Recipe) -> None:
    """Text encoders that are freed encode nothing afterwards."""
    if recipe.model.text_encoder == "once" and recipe.evaluation.every > 0:
        report.fault(
            "model.text_encoder",
            recipe.model.text_encoder,
            f"evaluation.every = {recipe.evaluation.every} encodes other prompts during training; "
            "write offload, or 0 there",
        )


def check_stop_rules(report: Report, recipe: Recipe) -> None:
    """Rules name metrics that are logged, and can end a stage."""
    known = [f"reward/{reward.name}" for reward in recipe.rewards]
    known += [f"monitor/{reward.name}" for reward in recipe.monitor_rewards]
    known += [f"image/{name}" for name in IMAGE_METRICS]
    for index, rule in enumerate(recipe.rtdmd.stop_when):
        key = f"rtdmd.stop_when.{index}"
        if rule.metric not in known:
            report.fault(f"{key}.metric", rule.metric, f"not logged{nearest_hint(rule.metric, known)}")
        if rule.drop < 0:
            report.fault(f"{key}.drop", rule.drop, "write 0 or more, in the metric's own unit")
        if rule.patience < 0:
            report.fault(f"{key}.patience", rule.patience, "write 0 or more epochs")
        if rule.window < 1:
            report.fault(f"{key}.window", rule.window, "write at least 1")


def reward_sections(recipe: Recipe) -> dict[str, RewardSection]:
    """Every reward of the recipe by its dotted key, those that are trained on first."""
    return {
        f"{key}.{index}": reward
        for key in ("rewards", "monitor_rewards")
        for index, reward in enumerate(value_at(recipe, key))
    }


def check_rewards(
    report: Report, recipe: Recipe, differentiable: dict[str, bool], *, runs_rtdmd: bool
) -> None:
    """Rewards are registered, single, weighted; those that are back-propagated have a gradient.

    ``differentiable`` says for every registered reward whether it has one.
    """
    names = [reward.name for reward in recipe.rewards]
    first_keys: dict[str, str] = {}
    for key, reward in reward_sections(recipe).items():
        is_monitor = key.startswith("monitor_rewards")
        if reward.name not in differentiable:
            hint = nearest_hint(reward.name, sorted(differentiable))
            report.fault(f"{key}.name", reward.name, f"unknown reward{hint}")
        elif reward.name in first_keys:
            advice = "it is logged already" if is_monitor else "keep one and give it the weight"
            report.fault(f"{key}.name", reward.name, f"also {first_keys[reward.name]}; {advice}")
        first_keys.setdefault(reward.name, key)
        check_remote(report, key, reward, recipe.timeout_seconds)
        if is_monitor:
            if reward.weight != 1 or reward.clip is not None:
                advice = "a monitor is never trained on; leave weight and clip out"
                report.fault(key, reward.name, advice)
            continue
        if reward.weight < 0:
            report.fault(f"{key}.weight", reward.weight, "write 0 (only logged) or more")
        if reward.clip is not None and not (len(reward.clip) == 2 and reward.clip[0] < reward.clip[1]):
            report.fault(f"{key}.clip", reward.clip, "write [low, high] with low < high, such as [-2, 2]")
    if runs_rtdmd and not any(reward.weight > 0 for reward in recipe.rewards):
        report.fault("rewards", names, "stage rtdmd needs at least one reward with a weight above 0")
    at_urls = {reward.name for reward in recipe.rewards if reward.url is not None}
    here = {name: has and name not in at_urls for name, has in differentiable.items()}
    _check_backprop(report, recipe, names, here, runs_rtdmd)


def check_remote(report: Report, key: str, reward: RewardSection, patience: float) -> None:
    """A url is one, and what goes with it is in range."""
    if reward.timeout_seconds <= 0:
        report.fault(f"{key}.timeout_seconds", reward.timeout_seconds, "write a number above 0")
    if reward.retries < 0:
        report.fault(f"{key}.retries", reward.retries, "write 0 or more")
    if reward.url is None:
        if reward.token_file is not None:
            report.fault(f"{key}.token_file", reward.token_file, "goes with a url; leave it out")
        return
    longest = reward.timeout_seconds * (reward.retries + 1)
    if longest >= patience:
        report.fault(
            f"{key}.timeout_seconds",
            reward.timeout_seconds,
            f"with {reward.retries} retries a request may take {longest:g} s, and the run is taken for stuck "
            f"after timeout_seconds = {patience:g}; lower the one or raise the other",
        )
    if not re.fullmatch(r"https?://[\w.-]+(:\d{1,5})?(/[\w./-]*)?", reward.url, re.ASCII):
        report.fault(f"{key}.url", reward.url, "write http://HOST:PORT, such as http://127.0.0.1:8123")


def _check_backprop(
    report: Report, recipe: Recipe, names: list[str], differentiable: dict[str, bool], runs_rtdmd: bool
) -> None:
    section = recipe.rtdmd.reward_backprop
    key = "rtdmd.reward_backprop.rewards"
    logged = [reward.name for reward in recipe.rewards if reward.weight == 0]
    usable = [name for name in names if differentiable.get(name) and name not in logged]
    advice = f"choose from {usable}" if usable else "no reward that is trained on has a gradient"
    for index, name in enumerate(section.rewards or []):
        if name not in names:
            close = nearest_hint(name, names) if names else ""
            report.fault(f"{key}.{index}", name, f"not among the recipe's rewards{close}")
        elif name in (section.rewards or [])[:index]:
            report.fault(f"{key}.{index}", name, "named twice; keep one")
        elif differentiable.get(name) is False:
            at_url = any(reward.name == name and reward.url is not None for reward in recipe.rewards)
            why = (
                "a reward at a url has no gradient" if at_url else "this reward has no gradient to the image"
            )
            report.fault(f"{key}.{index}", name, f"{why}; {advice}")
        elif name in logged:
            report.fault(f"{key}.{index}", name, f"its weight is 0, so that it is only logged; {advice}")
    if not runs_rtdmd or section.weight <= 0 or len(logged) == len(names):
        return
    if section.rewards == [] or (
        section.rewards is None and not any(name in usable for name in DEFAULT_BACKPROP_REWARDS)
    ):
        report.fault(
            key,
            section.rewards,
            f"rtdmd.reward_backprop.weight = {section.weight:g} needs a reward with a gradient, by default "
            f"one of {', '.join(DEFAULT_BACKPROP_REWARDS)}; {advice}, or set that weight to 0",
        )
