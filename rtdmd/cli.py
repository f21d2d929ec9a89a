"""The console command ``rtdmd``; each subcommand is an entry of ``COMMANDS``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtdmd import __version__
from rtdmd.errors import TrainingHalted, UserError, told_of_full_disk
from rtdmd.processes import environment_world_size


@dataclass(frozen=True)
class Command:
    """A subcommand: what it says of itself, its arguments, and what it does (returns the exit code)."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Exit codes: 0 fine, 1 a full disk, 2 the user's mistake, 3 training stopped itself, 130 Ctrl-C.
    """
    commands = "\n".join(f"  {name:<15}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="rtdmd",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{commands}\n\nrtdmd COMMAND --help says what each takes.",
    )
    parser.add_argument("--version", action="version", version=f"rtdmd {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    chosen = parser.parse_args(argv)
    command = COMMANDS[chosen.command]
    command_parser = argparse.ArgumentParser(prog=f"rtdmd {chosen.command}", description=command.summary)
    command.add_arguments(command_parser)
    # Intermixed, so that options may stand between recipes and overrides.
    arguments = command_parser.parse_intermixed_args(chosen.arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return command.run(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except TrainingHalted as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        told = told_of_full_disk(error)
        if told is None:
            raise
        print(told, file=sys.stderr)
        return 1


def _add_validate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="RECIPE|key=value",
        help="recipes, and overrides that apply to each of them",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="number of GPUs (ranks) to check for; default: the environment's WORLD_SIZE, or 1",
    )
    parser.add_argument("--stage", choices=("cold_start", "rtdmd"), help="check what this stage needs, alone")


def _validate(arguments: argparse.Namespace) -> int:
    """Load and check every recipe; one line for each good one, all faults of the others."""
    # Imported here, so that `rtdmd --help` needs neither YAML nor the registries.
    from rtdmd.recipe import load_checked
    from rtdmd.recipe.summary import summarize

    recipes = [argument for argument in arguments.arguments if "=" not in argument]
    overrides = [argument for argument in arguments.arguments if "=" in argument]
    if not recipes:
        raise UserError("rtdmd validate: name at least one recipe, such as recipes/flux2_4b.yaml")
    world_size = arguments.world_size if arguments.world_size is not None else environment_world_size()
    failed = False
    for path in recipes:
        try:
            recipe, stages = load_checked(path, overrides, world_size=world_size, stage=arguments.stage)
        except UserError as error:
            print(error, file=sys.stderr)
            failed = True
        else:
            print(f"{path}: ok: {summarize(recipe, world_size=world_size, stages=stages)}")
    return 2 if failed else 0


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments", nargs="+", metavar="RECIPE|key=value", help="a recipe, and overrides that apply to it"
    )
    prompts = parser.add_argument_group("what to paint")
    prompts.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    prompts.add_argument(
        "--prompts", metavar="FILE|-", help="prompts from a file (txt, jsonl, csv, parquet) or standard input"
    )
    network = parser.add_argument_group("with which network (default: the generator before training)")
    network.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="adapters, stacked in this order: generator_ema.pt, diffusers' LoRA files, peft folders",
    )
    network.add_argument("--run", metavar="FOLDER", help="what this run has trained so far")
    network.add_argument("--merge", action="store_true", help="merge the last adapter into the weights too")
    network.add_argument(
        "--teacher", action="store_true", help="the teacher, with guidance, by Euler steps of the ODE"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--steps", type=int, metavar="N", help="of the generator; default: the recipe's schedule"
    )
    how.add_argument("--num-steps", type=int, metavar="N", help="of the teacher; default: 50")
    how.add_argument("--guidance", type=float, metavar="W", help="of the teacher; default: the recipe's")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    how.add_argument("--batch-size", type=int, default=4, metavar="N", help="changes no picture; default: 4")
    how.add_argument("--device", help="default: cuda where there is one, else cpu")
    how.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="so many processes share the prompts; default: 1"
    )
    how.add_argument("--out", default="samples", metavar="FOLDER", help="for the PNG files; default: samples")
    how.add_argument("--grid", action="store_true", help="also grid.png, all pictures in one")


def _sample(arguments: argparse.Namespace) -> int:
    """Paint prompts to PNG files."""
    from rtdmd.recipe import load_for_sampling

    # An option that takes several values also takes the overrides that follow it.
    swallowed = [value for value in arguments.lora if "=" in value and not Path(value).exists()]
    loras = [value for value in arguments.lora if value not in swallowed]
    recipes = [argument for argument in arguments.arguments if "=" not in argument]
    overrides = [argument for argument in [*arguments.arguments, *swallowed] if "=" in argument]
    if len(recipes) != 1:
        raise UserError("rtdmd sample: name one recipe, such as recipes/flux2_4b.yaml, before the options")
    if not arguments.teacher and arguments.num_steps is not None:
        raise UserError("--num-steps are the teacher's: give --steps, or --teacher")
    if arguments.teacher and arguments.steps is not None:
        raise UserError("--steps are the generator's: give --num-steps, or leave out --teacher")
    recipe = load_for_sampling(recipes[0], overrides)

    from rtdmd import sample  # torch and diffusers load only for a sound recipe
    from rtdmd.processes import devices_for

    options = sample.SampleOptions(
        loras=loras,
        run=Path(arguments.run) if arguments.run else None,
        merge=arguments.merge,
        teacher=arguments.teacher,
        num_steps=arguments.num_steps if arguments.teacher else arguments.steps,
        guidance_scale=arguments.guidance,
        seed=arguments.seed,
    )
    prompts = sample.read_prompts(arguments.prompt, arguments.prompts)
    output = sample.Output(
        Path(arguments.out),
        batch_size=arguments.batch_size,
        devices=devices_for(arguments.gpus, arguments.device),
        grid=arguments.grid,
    )
    notice = sample.schedule_notice(options.run, recipe) if options.run else None
    if notice:
        print(notice, file=sys.stderr)
    sample.sample(recipe, options, " ".join([recipes[0], *overrides]), prompts, output)
    return 0


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments", nargs="+", metavar="RUN|key=value", help="a run's folder, and overrides of its recipe"
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("diffusers", "peft", "merged", "hub-folder"),
        help="LoRA files for diffusers or peft, a whole pipeline, or a folder ready for the hub",
    )
    parser.add_argument("--out", metavar="FOLDER", help="must not exist; default: exports/NAME-TARGET")
    parser.add_argument(
        "--unfinished", action="store_true", help="also what a stage that isn't finished has trained so far"
    )
    parser.add_argument(
        "--link", action="store_true", help="merged: hard-link text encoders and VAE instead of copying"
    )
    hub = parser.add_argument_group("hub-folder")
    hub.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="of a sample picture")
    hub.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample pictures; default: 0")
    hub.add_argument("--device", help="that paints them; default: cuda where there is one, else cpu")
    hub.add_argument(
        "--no-paint", action="store_true", help="cut the sample pictures from the last grid of training"
    )
    hub.add_argument("--evaluation", metavar="FOLDER", help="results of rtdmd evaluate for the card")
    hub.add_argument("--base-model", metavar="ID", help="hub id of the base; default: the recipe's")
    hub.add_argument("--license", metavar="ID", help="the hub's id of a licence; default: the base model's")
    hub.add_argument("--push", metavar="REPO_ID", help="upload the folder to this repository of the hub")
    hub.add_argument("--private", action="store_true", help="create the repository as a private one")


def _export(arguments: argparse.Namespace) -> int:
    """Write what a run has trained in a form that others load."""
    runs = [argument for argument in arguments.arguments if "=" not in argument]
    if len(runs) != 1:
        raise UserError("rtdmd export: name one run, such as runs/flux2_4b")

    from rtdmd.export import ExportOptions, HubOptions, export

    hub = HubOptions(
        base=arguments.base_model,
        licence=arguments.license,
        prompts=arguments.prompt,
        paint=not arguments.no_paint,
        seed=arguments.seed,
        device=arguments.device,
        evaluation=Path(arguments.evaluation) if arguments.evaluation else None,
    )
    options = ExportOptions(
        to=arguments.to,
        out=Path(arguments.out) if arguments.out else None,
        overrides=[argument for argument in arguments.arguments if "=" in argument],
        allow_unfinished=arguments.unfinished,
        link=arguments.link,
        hub=hub,
        push=arguments.push,
        private=arguments.private,
    )
    print(f"wrote {export(Path(runs[0]), options)}")
    return 0


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments", nargs="+", metavar="RECIPE|key=value", help="a recipe, and overrides that apply to it"
    )
    what = parser.add_argument_group("what to measure (default: the recipe's section `evaluation`)")
    what.add_argument(
        "--prompts",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="sets of prompts, named after their files (txt, csv, tsv, json, jsonl, parquet)",
    )
    what.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=SPEC",
        help="may be repeated; base, run:FOLDER, run:FOLDER@cold_start, lora:A.pt+B.pt, teacher; options "
        "follow: base:steps=8, teacher:steps=50,guidance=4",
    )
    what.add_argument("--rewards", metavar="NAME,NAME", help="reward models, such as clipscore,hpsv2")
    what.add_argument(
        "--num-images-per-prompt", type=int, metavar="N", help="default: 4 on GenEval's, else 1"
    )
    what.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each set")
    what.add_argument("--seed", type=int, metavar="N", help="default: the recipe's evaluation.seed")
    what.add_argument(
        "--reference", metavar="FOLDER|FILE", help="pictures, or features (npz, safetensors), for FD and CMMD"
    )
    what.add_argument("--features", metavar="WEIGHTS", help="CLIP that features are of; default: clipscore's")
    how = parser.add_argument_group("how")
    how.add_argument("--batch-size", type=int, metavar="N", help="default: the recipe's")
    how.add_argument("--device", help="default: cuda where there is one, else cpu")
    how.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="processes that share the work; default: 1"
    )
    how.add_argument("--save-images", action="store_true", help="keep the pictures, as PNG")
    how.add_argument("--out", metavar="FOLDER", help="default: evaluations/NAME of the recipe")


def _evaluate(arguments: argparse.Namespace) -> int:
    """Paint, score, and print the table."""
    from rtdmd.evaluation.choices import Choices
    from rtdmd.recipe import load_for_evaluation

    # An option that takes several values also takes the overrides that follow it.
    swallowed = [value for value in arguments.prompts if "=" in value and not Path(value).exists()]
    recipes = [argument for argument in arguments.arguments if "=" not in argument]
    overrides = [argument for argument in [*arguments.arguments, *swallowed] if "=" in argument]
    if len(recipes) != 1:
        raise UserError("rtdmd evaluate: name one recipe, such as recipes/flux2_4b.yaml, before the options")
    choices = Choices(
        prompts=[value for value in arguments.prompts if value not in swallowed],
        models=arguments.model,
        rewards=[name.strip() for name in (arguments.rewards or "").split(",") if name.strip()],
        num_images_per_prompt=arguments.num_images_per_prompt,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    if arguments.features and not arguments.reference:
        raise UserError("--features goes with --reference: without one nothing is compared")
    recipe = load_for_evaluation(recipes[0], overrides, choices.apply)

    from rtdmd.evaluation.run import EvaluationOptions, evaluate
    from rtdmd.processes import devices_for

    options = EvaluationOptions(
        out=Path(arguments.out or Path("evaluations") / recipe.name),
        devices=devices_for(arguments.gpus, arguments.device),
        save_images=arguments.save_images,
        reference=Path(arguments.reference) if arguments.reference else None,
        features=arguments.features,
    )
    results = evaluate(recipe, options)
    results.write(options.out)
    print(results.table().markdown())
    print(f"everything is in {options.out}: report.md, table.tex, results.json, scores.parquet, scores.jsonl")
    return 0


def _list_rewards(arguments: argparse.Namespace) -> int:
    """One row for each scorer, and the commands that fetch what its published weights lack here."""
    from rtdmd.rewards import REWARDS
    from rtdmd.rewards.listing import reward_table

    print(reward_table(REWARDS.values()))
    return 0


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="RECIPE|key=value",
        help="a recipe whose rewards to serve, and overrides",
    )
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME",
        help="of the recipe's rewards, by default those with a url, or all; without a recipe, what to serve",
    )
    parser.add_argument("--weights", metavar="PATH", help="folder, file or hub id, for one reward")
    parser.add_argument("--port", type=int, default=8123, metavar="N", help="default: 8123")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--token-file", metavar="FILE", help="let only clients in that have this token")
    parser.add_argument(
        "--max-batch", type=int, default=64, metavar="N", help="pictures a request; default: 64"
    )
    parser.add_argument("--max-megabytes", type=int, default=256, metavar="N", help="a request; default: 256")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: the recipe's; without one bfloat16, float32 on a cpu",
    )


def _serve_rewards(arguments: argparse.Namespace) -> int:
    """Score what clients send until SIGINT or SIGTERM."""
    from rtdmd.recipe import load_recipe

    recipes = [argument for argument in arguments.arguments if "=" not in argument]
    overrides = [argument for argument in arguments.arguments if "=" in argument]
    if len(recipes) > 1 or (overrides and not recipes):
        raise UserError("rtdmd serve-rewards: name one recipe, or none and --reward NAME")
    recipe = load_recipe(recipes[0], overrides) if recipes else None

    import torch

    from rtdmd.rewards.serving.command import ServeOptions, choose_sections, serve
    from rtdmd.rewards.serving.server import ServingLimits
    from rtdmd.sample import pick_device

    sections = [*recipe.rewards, *recipe.monitor_rewards] if recipe else []
    device = pick_device(arguments.device)
    fitting = "float32" if device.type == "cpu" else "bfloat16"
    dtype = arguments.dtype or (recipe.dtype if recipe else fitting)
    limits = ServingLimits(arguments.max_batch, arguments.max_megabytes * 1_000_000)
    serve(
        choose_sections(sections, arguments.reward, arguments.weights),
        device,
        getattr(torch, dtype),
        ServeOptions(arguments.host, arguments.port, arguments.token_file, limits),
    )
    return 0


COMMANDS = {
    "validate": Command("check recipes before anything loads", _add_validate_arguments, _validate),
    "sample": Command("paint prompts with the generator or the teacher", _add_sample_arguments, _sample),
    "export": Command("write a run's weights as others load them", _add_export_arguments, _export),
    "evaluate": Command("score models side by side on sets of prompts", _add_evaluate_arguments, _evaluate),
    "rewards": Command(
        "list the reward models: gradient, licence, what is here and what fetches the rest",
        lambda parser: None,
        _list_rewards,
    ),
    "serve-rewards": Command("score pictures for training elsewhere", _add_serve_arguments, _serve_rewards),
}

if __name__ == "__main__":
    sys.exit(main())
