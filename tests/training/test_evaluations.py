"""What training logs of an evaluation; that it is ``rtdmd evaluate``'s is in test_resume.py."""

from __future__ import annotations

import math

import pytest
import torch

from rtdmd.evaluation.sets import EvaluationSet
from rtdmd.prompts import PromptSet
from rtdmd.training.evaluations import set_metrics

PROMPTS = PromptSet(["a", "b", "c"], [{}, {}, {}])
GENEVAL = EvaluationSet("bench", "geneval", PROMPTS, ["one", "two", "one"], images_per_prompt=2)
PLAIN = EvaluationSet("words", "plain", PROMPTS, None, images_per_prompt=2)


def test_means() -> None:
    """Prompts 0.5, 1, 0: their mean is ½; tasks are one = ¼ and two = 1, their mean 0.625."""
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert set_metrics(PLAIN, "geneval", scores) == {"evaluation/words/geneval": 0.5}
    assert set_metrics(GENEVAL, "clipscore", scores) == {"evaluation/bench/clipscore": 0.5}
    assert set_metrics(GENEVAL, "geneval", scores) == {"evaluation/bench/geneval": 0.625}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prompt_without_a_finite_score_is_left_out_and_counted(value: float) -> None:
    """Prompt b is gone: the tasks that are left have mean ¼."""
    scores = torch.tensor([0.0, 1.0, 1.0, value, 0.0, 0.0])
    assert set_metrics(GENEVAL, "geneval", scores) == {
        "evaluation/bench/geneval": 0.25,
        "evaluation/bench/nonfinite/geneval": 1.0,
    }
    nothing = torch.full((6,), value)
    assert set_metrics(PLAIN, "ocr", nothing) == {"evaluation/words/nonfinite/ocr": 3.0}
