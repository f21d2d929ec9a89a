"""GenEval 2's questions and the answers that count (arXiv 2512.16853); pure functions, no network.

A row of the benchmark: ``{"prompt": …, "vqa_list": [["How many cows are in the image?", "two"], ["Are the
cows red?", "Yes"], …], "atom_count": …, "skills": […]}``. Facts from
https://github.com/facebookresearch/GenEval2, README.md and evaluation.py (``soft_tifa``); the benchmark's
data are CC BY-NC 4.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardMode

_COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNTING = "How many"


@dataclass(frozen=True)
class Question:
    """What is asked of a picture, and the answer that is right."""

    text: str
    answer: str

    @property
    def instruction(self) -> str:
        """What the judge is told."""
        return f"{self.text} Answer in one word."

    def answer_forms(self, mode: RewardMode) -> list[str]:
        """The spellings of the answer whose probabilities are added up.

        ``default``: the answer as it stands, in lower case and with a capital, a count also as a digit; each
        with and without a blank before it. Whoever tokenizes them leaves out those of several tokens.

        ``official``: to "How many …" the answer, with a capital, and the digit, where ``zero`` and what is
        beyond ten have the digit "other"; to anything else Yes, whatever the row says. Of each the first
        token counts, though a blank before a digit is a token by itself, and so is 10's 1.
        """
        if mode == "official":
            if not self.text.startswith(_COUNTING):
                return ["Yes", "yes", " yes", " Yes"]
            is_known = self.answer in _COUNT_WORDS[1:]
            digit = str(_COUNT_WORDS.index(self.answer)) if is_known else "other"
            forms = [self.answer, self.answer.capitalize()]
            return [*forms, *(f" {form}" for form in forms), digit, f" {digit}"]
        word = self.answer.strip()
        forms = [word, word.lower(), word.capitalize()]
        if word.lower() in _COUNT_WORDS:
            forms.append(str(_COUNT_WORDS.index(word.lower())))
        return list(dict.fromkeys(form for plain in forms for form in (plain, f" {plain}")))


def questions(prompt: str, row: Mapping[str, Any]) -> list[Question]:
    """The questions of a row of metadata, at least one.

    Raises:
        UserError: naming the prompt and what is missing or not understood.
    """
    place = f"prompt {prompt!r}"
    if "vqa_list" not in row:
        raise UserError(
            f"{place}: geneval2 needs the metadata 'vqa_list', which this prompt hasn't: pairs of a "
            "question and its answer, as the benchmark's geneval2_data.jsonl has them"
        )
    pairs = row["vqa_list"]
    if not isinstance(pairs, list | tuple) or not pairs:
        raise UserError(f"{place}: 'vqa_list' must list one [question, answer] at least, got {pairs!r}")
    for pair in pairs:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or not all(isinstance(part, str) and part.strip() for part in pair):
            raise UserError(f"{place}: 'vqa_list' must hold [question, answer] in words, got {pair!r}")
    return [Question(text, answer) for text, answer in pairs]
