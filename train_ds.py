"""Train a few-step generator:  deepspeed train_ds.py RECIPE [key=value …] [--stage STAGE]

Loads and checks the recipe, builds its stages and runs them, resuming where an earlier launch was
left. Exit codes: 0 done, 1 anything unforeseen, or a full disk, 2 something in the recipe or its files
is wrong, 3 stopped to protect the run (non-finite numbers, diverging ranks), 4 ranks waiting for each
other, 75 interrupted, everything there is to save is saved.
"""

import argparse
import os
import socket
import sys
import traceback

from rtdmd.errors import TrainingHalted, UserError, told_of_full_disk
from rtdmd.processes import environment_world_size
from rtdmd.recipe import Recipe, load_checked
from rtdmd.termination import end_with_launcher, leave_on_signals


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file, recipes/flux2_4b.yaml say")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe, dotted")
    parser.add_argument("--stage", choices=["cold_start", "rtdmd"], help="run this stage alone")
    parser.add_argument("--max-steps", type=int, help="stop, saved, after so many steps of this launch")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher sets it
    # Intermixed, so that options may stand between the recipe and the overrides.
    return parser.parse_intermixed_args()


def main() -> int:
    leave_on_signals()
    arguments = parse_arguments()
    if arguments.max_steps is not None and arguments.max_steps < 1:
        print(f"rtdmd: --max-steps {arguments.max_steps}: give at least 1", file=sys.stderr)
        return 2
    if arguments.local_rank is not None:
        end_with_launcher()
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    is_main = os.environ.get("RANK", "0") == "0"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not is_main:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # one rank's bars are enough
    try:
        world_size = environment_world_size()
        recipe, stages = load_checked(
            arguments.recipe, arguments.overrides, world_size=world_size, stage=arguments.stage
        )
    except UserError as error:
        if is_main:
            print(f"rtdmd: {error}", file=sys.stderr)
        elif os.environ.get("LOCAL_RANK") == "0":  # other machines may lack what rank 0's has
            print(f"rtdmd (rank {os.environ['RANK']}, {socket.gethostname()}): {error}", file=sys.stderr)
        return 2
    return run(recipe, stages, arguments.max_steps, is_main)


def run(recipe: Recipe, stages: list[str], max_steps: int | None, is_main: bool) -> int:
    """Train; a rank that fails leaves at once, since the others may be waiting for it in a collective."""
    from rtdmd.training.run import train  # torch, diffusers and DeepSpeed load only for a sound recipe

    who = "rtdmd" if is_main else f"rtdmd (rank {os.environ['RANK']})"
    try:
        return train(recipe, stages, max_steps)
    except UserError as error:
        code, report = 2, f"{who}: {error}"
    except TrainingHalted as error:
        code, report = 3, f"{who}: {error}"
    except KeyboardInterrupt:  # the second Ctrl-C
        code, report = 130, f"{who}: interrupted; the last checkpoint is as it was"
    except Exception as error:
        code, report = 1, f"{who}: {told_of_full_disk(error) or traceback.format_exc()}"
    print(report, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
