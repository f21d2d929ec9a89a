"""Scores of numbered pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd.errors import UserError
from rtdmd.evaluation.scoring import check_finite, score_numbers
from rtdmd.evaluation.sets import EvaluationSet
from rtdmd.prompts import PromptSet

SET = EvaluationSet("words", "plain", PromptSet(["a", "bb"], [{"n": 1}, {"n": 2}]), None, images_per_prompt=3)


class Sum:
    """A picture's sum, plus its prompt's length and metadata."""

    name = "sum"
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        extra = [10 * len(prompt) + 100 * row["n"] for prompt, row in zip(prompts, metadata, strict=True)]
        return images.sum(dim=(1, 2, 3)) + torch.tensor(extra)


def test_pictures_go_with_the_prompts_of_their_numbers() -> None:
    """Three pictures a prompt: numbers 1 and 2 are a's, 3 is bb's."""
    pictures = torch.zeros(3, 3, 1, 1, requires_grad=True)
    scores = score_numbers([Sum()], SET, [1, 2, 3], pictures)
    assert scores["sum"].tolist() == [110, 110, 220]
    assert not scores["sum"].requires_grad


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_score_that_is_not_finite_is_named(value: float) -> None:
    check_finite({"sum": torch.tensor([0.0, 1.0])}, SET, [2, 3])
    with pytest.raises(UserError, match=f"words: reward 'sum' gave {value} for the prompt 'bb'"):
        check_finite({"sum": torch.tensor([0.0, value])}, SET, [2, 3])
