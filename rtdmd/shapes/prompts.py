"""Prompt files of the small world, in the format that ``rtdmd.prompts`` reads.

python -m rtdmd.shapes.prompts --split train --count 4000 > train.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from rtdmd.errors import UserError
from rtdmd.shapes.captions import Caption
from rtdmd.shapes.splits import PROPORTIONS, Split, draw_caption

_PATIENCE = 1000  # draws in a row without an unseen caption: there are none left, or too few


def distinct_captions(
    split: Split, count: int, seed: int, proportions: Mapping[str, float] = PROPORTIONS
) -> list[Caption]:
    """``count`` captions of unlike texts; a function of its arguments.

    A kind of which all captions are used up leaves its share to the others.

    Raises:
        UserError: ``split`` hasn't that many.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    chosen: dict[str, Caption] = {}
    draws = 0
    while len(chosen) < count:
        caption = draw_caption(rng, split, proportions=proportions)
        draws = 0 if caption.text not in chosen else draws + 1
        chosen.setdefault(caption.text, caption)
        if draws > _PATIENCE:
            raise UserError(
                f"split {split!r} has but {len(chosen)} distinct captions, {count} were asked for"
            )
    return list(chosen.values())


def write_prompts(
    path: Path | str, split: Split, count: int, seed: int, proportions: Mapping[str, float] = PROPORTIONS
) -> None:
    """Write ``count`` distinct captions as jsonl, each a row of metadata with its ``prompt``.

    Raises:
        UserError: ``split`` hasn't that many.
    """
    rows = [json.dumps(caption.metadata) for caption in distinct_captions(split, count, seed, proportions)]
    Path(path).write_text("\n".join(rows) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Print rows as jsonl. Exit codes: 0 fine, 2 a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m rtdmd.shapes.prompts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--split", choices=get_args(Split), required=True)
    parser.add_argument("--count", type=int, required=True, metavar="N", help="prompts")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    arguments = parser.parse_args(argv)
    try:
        if arguments.count < 1:
            raise UserError(f"--count {arguments.count}: write at least 1")
        if arguments.seed < 0:
            raise UserError(f"--seed {arguments.seed}: write 0 or more")
        for caption in distinct_captions(arguments.split, arguments.count, arguments.seed):
            print(json.dumps(caption.metadata))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
