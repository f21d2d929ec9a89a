"""The model card: README.md with the hub's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rtdmd import __version__
from rtdmd.export.card_tables import evaluation_table, figure_tables, training_table
from rtdmd.export.card_texts import (
    ABSTRACT,
    LICENCE,
    LIMITS,
    METHODS,
    PAPER,
    STAGES,
    TRANSITIONS,
    UNKNOWN_LICENCE,
)
from rtdmd.export.figures import StageFigures
from rtdmd.export.licences import Licence
from rtdmd.export.pictures import SamplePicture
from rtdmd.export.results import Evaluation
from rtdmd.export.run import FinishedRun
from rtdmd.export.usage import Usage
from rtdmd.prompts import is_hub_id
from rtdmd.recipe.schema import Recipe


@dataclass(frozen=True)
class CardContent:
    """All that a card says."""

    run: FinishedRun
    title: str
    base: str | None  # hub id of the model that was trained; None if it isn't on the hub
    licence: Licence
    usage: Usage
    pictures: Sequence[SamplePicture]
    figures: Sequence[StageFigures]
    evaluation: Evaluation | None
    results: Sequence[EvalResult]
    has_curves: bool


def write_card(content: CardContent, folder: Path) -> None:
    """Write ``README.md``."""
    text = f"---\n{card_data(content).to_yaml()}\n---\n\n{card_text(content)}"
    ModelCard(text).save(folder / "README.md")


def card_data(content: CardContent) -> ModelCardData:
    """The hub's metadata."""
    trains_lora = content.run.trained.replacement is None
    recipe, licence = content.run.recipe, content.licence
    tags = ["text-to-image", "diffusers", *(["lora"] if trains_lora else []), "few-step", "distillation"]
    return ModelCardData(
        base_model=content.base,
        base_model_relation=("adapter" if trains_lora else "finetune") if content.base else None,
        datasets=_datasets(recipe, content.run.files) or None,
        language="en",
        library_name="diffusers",
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        pipeline_tag="text-to-image",
        tags=[*tags, "rtdmd"],
        widget=[{"text": each.prompt, "output": {"url": each.path}} for each in content.pictures],
        model_name=content.title if content.results else None,  # written with results alone
        eval_results=list(content.results) or None,
    )


def _datasets(recipe: Recipe, stages: dict[str, Path]) -> list[str]:
    """Hub ids among the prompts' sources."""
    sources = {getattr(recipe, stage).prompts.source for stage in stages}
    return sorted(source for source in sources if is_hub_id(source))


def card_text(content: CardContent) -> str:
    """The card below its metadata."""
    run, usage = content.run, content.usage
    base = f"[{content.base}](https://huggingface.co/{content.base})" if content.base else f"`{run.base[0]}`"
    what = "LoRA adapters for" if usage.base is not None else "A fine-tuned version of"
    steps = len(usage.steps)
    parts = [
        f"# {content.title}",
        f"{what} {base}: text to image in {steps} steps.",
        _gallery(content.pictures),
        f"## Abstract\n\n{ABSTRACT.format(steps=steps, paper=PAPER)}",
        "## Method\n\n" + "\n\n".join(METHODS[stage] for stage in run.files),
        _usage(content),
        _files(content),
        _training(content),
        _evaluation(content),
        "## Limits\n\n" + LIMITS.format(width=usage.width, height=usage.height, steps=steps),
        _licence(content, base),
        f"Exported by rtdmd {__version__}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gallery(pictures: Sequence[SamplePicture]) -> str:
    return "\n".join(
        f'<img src="{each.path}" alt="{_escaped(each.prompt)}" width="200">' for each in pictures
    )


def _escaped(text: str) -> str:
    for sign, entity in (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;"), ("\n", " ")):
        text = text.replace(sign, entity)
    return text


def _usage(content: CardContent) -> str:
    usage = content.usage
    parts = [
        "## Use\n\nWith diffusers alone:",
        f"```python\n{usage.plain()}```",
        TRANSITIONS.format(eta=f"{usage.eta:g}"),
    ]
    if usage.base is not None and len(usage.stages) > 1:
        parts += [
            STAGES,
            f"```python\n{usage.separate_stages()}```",
        ]
    if usage.shift is None and usage.has_even_steps:
        parts += ["With the package `rtdmd` its scheduler takes the place of `CPS`:"]
        parts += [f"```python\n{usage.with_scheduler()}```"]
    if usage.base is not None:
        parts += ["and its command line paints with this folder:"]
        parts += [f"```bash\n{usage.command()}```"]
    return "\n\n".join(parts)


def _files(content: CardContent) -> str:
    rows = {"recipe.yaml": "the recipe, all fields of it, that `deepspeed train_ds.py recipe.yaml` trains"}
    if content.usage.base is not None:
        stages = " and ".join(f"`{stage}`" for stage in content.usage.stages)
        rows |= {
            "pytorch_lora_weights.safetensors": f"LoRA of {stages} in one, for `load_lora_weights`",
            "STAGE/pytorch_lora_weights.safetensors": "LoRA of one stage",
            "STAGE/generator_ema.pt": "the same as a state dict, under the transformer's own names "
            f"(rank {content.run.recipe.lora.rank}, alpha {content.run.recipe.lora.alpha:g})",
        }
    else:
        rows |= {"model_index.json, transformer/, …": "a whole diffusers pipeline"}
    lines = "\n".join(f"| `{name}` | {what} |" for name, what in rows.items())
    return f"## Files\n\n| file | what it is |\n|---|---|\n{lines}"


def _training(content: CardContent) -> str:
    parts = ["## Training", training_table(content.run.recipe, content.run.files)]
    parts += figure_tables(content.figures)
    if content.has_curves:
        parts.append('<img src="training.png" alt="losses and rewards over the steps of training">')
    return "\n\n".join(parts)


def _evaluation(content: CardContent) -> str:
    if content.evaluation is None:
        return ""
    said = "Means over prompts with 95 % bootstrap intervals, the same seeds for all:"
    return f"## Evaluation\n\n{said}\n\n{evaluation_table(content.evaluation)}"


def _licence(content: CardContent, base: str) -> str:
    licence = content.licence
    if licence.id == "unknown":
        return f"## Licence\n\n{UNKNOWN_LICENCE.format(base=base)}"
    named = licence.title if licence.link is None else f"[{licence.title}]({licence.link})"
    return f"## Licence\n\n{LICENCE.format(base=base, licence=named)}"
