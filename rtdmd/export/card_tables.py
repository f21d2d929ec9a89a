"""The card's tables: recipe, training, evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rtdmd.export.figures import StageFigures
from rtdmd.export.results import Evaluation
from rtdmd.recipe.schema import ColdStartSection, OptimizerSection, Recipe, RtdmdSection

_LOSSES = ("fake_score/loss", "generator/distribution_matching")


def training_table(recipe: Recipe, stages: Iterable[str]) -> str:
    """What the recipe says of the training of ``stages``."""
    roles = recipe.roles
    teacher, generator, fake = (
        role.weights or recipe.model.pipeline for role in (roles.teacher, roles.generator, roles.fake_score)
    )
    rows = [
        ("teacher", f"`{teacher}`, guidance {recipe.model.guidance_scale:g}"),
        ("generator starts from", f"`{generator}`"),
        ("fake score starts from", f"`{fake}`"),
        ("trains", _trains(recipe)),
        ("pixels", f"{recipe.model.width}x{recipe.model.height}"),
        ("precision", f"{recipe.dtype}, float32 master weights"),
    ]
    sections = {stage: getattr(recipe, stage) for stage in stages}
    for stage, section in sections.items():
        rows.append((f"{stage}: prompts", f"`{section.prompts.source}`"))
        rows.append((f"{stage}: settings", _settings(section)))
    if "rtdmd" in sections:
        rewards = ", ".join(f"{reward.name} x {reward.weight:g}" for reward in recipe.rewards)
        rows.append(("rtdmd: rewards", rewards))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _trains(recipe: Recipe) -> str:
    if recipe.roles.generator.trains == "full":
        return "all weights of the generator"
    return f"LoRA of rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}"


def _rate(optimizer: OptimizerSection) -> str:
    falls = f" falling to 0 over the last {optimizer.cooldown:.0%}" if optimizer.cooldown else ""
    return f"{optimizer.learning_rate:g}{falls}"


def _settings(section: ColdStartSection | RtdmdSection) -> str:
    rates = (
        f"learning rates {_rate(section.generator)} (generator) and {_rate(section.fake_score)} (fake score)"
    )
    if isinstance(section, ColdStartSection):
        return (
            f"{section.iterations} iterations, a generator update every {section.generator_every}, "
            f"batch {section.batch_size} a GPU, {rates}"
        )
    return (
        f"{section.epochs} updates, {section.num_sample_batches} sampling batches of "
        f"{section.sample_batch_size} a GPU each, {section.images_per_prompt} pictures a prompt, {rates}"
    )


def figure_tables(figures: Sequence[StageFigures]) -> list[str]:
    """Steps, time and final values of each stage."""
    if not figures:
        return []
    lines = [
        f"| {each.stage} | {each.steps} | {each.num_gpus or 'unknown'} | {each.seconds / 3600:.2f} | "
        f"{each.seconds / len(each.records):.3g} |"
        for each in figures
    ]
    parts = ["| stage | steps | GPUs | hours | seconds a step |\n|---|---|---|---|---|\n" + "\n".join(lines)]
    values = [
        f"| {each.stage} | {name} | {value:.4g} |"
        for each in figures
        for name, value in each.final.items()
        if name in _LOSSES or name.startswith(("reward/", "monitor/"))
    ]
    if values:
        parts.append(
            "Means over the last tenth of the steps:\n\n| stage | | |\n|---|---|---|\n" + "\n".join(values)
        )
    return parts


def evaluation_table(found: Evaluation) -> str:
    """Every evaluated model by sets and rewards."""
    columns = list(dict.fromkeys((score["set"], score["reward"]) for score in found.scores))
    cells = {(score["model"], score["set"], score["reward"]): score for score in found.scores}
    lines = ["| model | " + " | ".join(f"{dataset}: {reward}" for dataset, reward in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for model in found.models:
        name = f"**{model}** (this model)" if model == found.model else model
        values = [cells.get((model, *column)) for column in columns]
        lines.append("| " + " | ".join([name, *map(_interval, values)]) + " |")
    return "\n".join(lines)


def _interval(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    ends = f" [{score['low']:.4g}, {score['high']:.4g}]" if "low" in score else ""
    return f"{score['mean']:.4g}{ends}"
