"""Pictures and captions of the shapes world in bulk, drawn by several processes.

Legend: N pictures, K wrong captions per picture, L text tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtdmd.shapes.captions import COLORS, SHAPES, SIZES, Caption
from rtdmd.shapes.drawing import draw_pictures
from rtdmd.shapes.negatives import hard_negatives
from rtdmd.shapes.splits import PROPORTIONS, Split

CHUNK = 2000
# What captions and Qwen3's chat template are made of; tokenizers hold these words whole.
WORDS = (
    *("a", "an", "two", "three", "and", "left", "right", "of", "above", "below", "user", "assistant"),
    *(*SIZES, *COLORS, *SHAPES, "circles", "squares", "triangles", "crosses"),
)


@dataclass(frozen=True)
class Drawn:
    """N pictures with their captions and, where asked for, K false captions each."""

    images: Tensor  # uint8 [N, 3, 64, 64]
    captions: list[Caption]
    wrong: list[list[str]]  # [N][K]

    def __len__(self) -> int:
        return len(self.captions)


def draw(
    seed: int,
    count: int,
    split: Split,
    num_wrong: int = 0,
    proportions: Mapping[str, float] = PROPORTIONS,
) -> Drawn:
    """``count`` pictures of ``split``, a function of the arguments, whatever the number of processes.

    Call it before CUDA is used: the processes are forks, which have imported everything already.
    """
    starts = range(0, count, CHUNK)
    job = partial(
        _draw_chunk, seed=seed, total=count, split=split, num_wrong=num_wrong, proportions=proportions
    )
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        parts = list(pool.map(job, starts))
    images = torch.from_numpy(np.concatenate([part[0] for part in parts])).permute(0, 3, 1, 2).contiguous()
    return Drawn(
        images,
        [caption for part in parts for caption in part[1]],
        [wrong for part in parts for wrong in part[2]],
    )


def _draw_chunk(
    start: int, *, seed: int, total: int, split: Split, num_wrong: int, proportions: Mapping[str, float]
) -> tuple[np.ndarray, list[Caption], list[list[str]]]:
    images, captions = draw_pictures(seed, start, min(CHUNK, total - start), split, proportions)
    wrong = []
    if num_wrong:
        for index, caption in enumerate(captions, start):
            rng = np.random.default_rng([seed, index, num_wrong])
            wrong.append([other.text for other in hard_negatives(rng, caption, num_wrong)])
    return images, captions, wrong


def to_unit(images: Tensor) -> Tensor:
    """uint8 pictures as float32 in [0, 1]."""
    return images.float() / 255


def chat_tokens(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Token ids [N, L] of prompts in Qwen3's chat template, as the pipeline makes them.

    The template is rendered once, around a placeholder, since it is the same for every prompt.
    """
    before, after = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    ).split("\0")
    return padded_tokens(tokenizer, [before + text + after for text in texts], length)


def padded_tokens(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Token ids [N, L], padded; ValueError if a text needs more than L tokens."""
    known = {text: number for number, text in enumerate(dict.fromkeys(texts))}  # most texts recur
    ids: list[list[int]] = tokenizer([*known], padding="max_length", max_length=length)["input_ids"]
    longest = max(map(len, ids))
    if longest > length:
        raise ValueError(f"a text has {longest} tokens, more than {length}")
    return torch.tensor(ids, dtype=torch.int64)[[known[text] for text in texts]]
