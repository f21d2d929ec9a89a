"""Bootstrap, win rates and tables, by hand and in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rtdmd.evaluation.statistics import Column, Interval, Row, Table, bootstrap_interval, latex_text, win_rate


def test_bootstrap_of_two_values() -> None:
    """Resamples of 0 and 1 have mean 0, ½, 1 with probability ¼, ½, ¼: the 95 % interval is all of it."""
    assert bootstrap_interval([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == Interval(0.5, 0.5, 0.5)
    assert bootstrap_interval([3.0]) == Interval(3.0, 3.0, 3.0)


def test_bootstrap_of_many_values_is_the_normal_interval() -> None:
    """Standard error of the mean of n fair coins is ½/√n."""
    coins = [0.0, 1.0] * 800
    interval = bootstrap_interval(coins)
    half = 1.959964 * 0.5 / math.sqrt(1600)
    assert interval.mean == 0.5
    assert interval.low == pytest.approx(0.5 - half, abs=0.06 * half)
    assert interval.high == pytest.approx(0.5 + half, abs=0.06 * half)


def test_bootstrap_is_a_function_of_its_arguments() -> None:
    values = np.random.default_rng(3).normal(size=(20, 4))
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values.tolist(), seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_pictures_of_a_prompt_are_no_independent_samples() -> None:
    """Copies of each prompt's score leave the interval as it is."""
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(np.repeat(values[:, None], 4, axis=1)) == bootstrap_interval(values)


def test_strata_count_equally_and_are_redrawn_within() -> None:
    """Tasks a (1, 1, 1) and b (0, 0.5): mean ½·(1 + ¼); a's resamples don't vary, b's are 0, ¼ or ½."""
    interval = bootstrap_interval([1.0, 0.0, 1.0, 0.5, 1.0], ["a", "b", "a", "b", "a"])
    assert interval == Interval(0.625, 0.5, 0.75)


def test_win_rate_counts_ties_half() -> None:
    """2 wins, 1 tie, 1 loss: (2 + ½)/4."""
    rate = win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 1.0, 3.0, 1.0])
    assert rate.mean == 0.625 and 0 <= rate.low < 0.625 < rate.high <= 1
    reverse = win_rate([0.0, 1.0, 3.0, 1.0], [1.0, 2.0, 3.0, 0.0])
    assert reverse.mean == 0.375
    assert (reverse.low, reverse.high) == pytest.approx((1 - rate.high, 1 - rate.low))


def test_win_rate_pairs_pictures_and_resamples_prompts() -> None:
    """Prompt 0 wins both its pictures, prompt 1 loses both: resamples are 0, ½ or 1, never ¼."""
    first, second = [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]
    assert win_rate(first, second) == Interval(0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "not empty"), ([1.0, math.nan], "isn't finite"), (np.zeros((2, 2, 2)), r"shape \(2, 2, 2\)")],
)
def test_refused(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values)
    with pytest.raises(ValueError, match=message):
        win_rate(values, values)


def test_counts_have_to_agree() -> None:
    with pytest.raises(ValueError, match="2 values but 1 strata"):
        bootstrap_interval([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        win_rate([1.0, 2.0], [1.0, 2.0, 3.0])


COLUMNS = (
    Column("clipscore", "Draw_Bench", decimals=2),
    Column("hpsv2", "Draw_Bench", decimals=2),
    Column("FID", "GenEval", lower_is_better=True, decimals=1),
)
ROWS = (
    Row(
        "base",
        4,
        {
            ("Draw_Bench", "clipscore"): Interval(0.2812, 0.27, 0.29),
            ("Draw_Bench", "hpsv2"): 0.25,
            ("GenEval", "FID"): 20.0,
        },
    ),
    Row(
        "teacher|50",
        100,
        {("Draw_Bench", "clipscore"): Interval(0.2788, 0.27, 0.28), ("GenEval", "FID"): 18.5},
    ),
)


def test_markdown_table() -> None:
    """The best of each column is bold, equals as printed are best together, the unmeasured is a dash."""
    assert Table(COLUMNS, ROWS).markdown() == (
        "| model | NFE | Draw_Bench: clipscore | Draw_Bench: hpsv2 | GenEval: FID |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| base | 4 | **0.28** [0.27, 0.29] | **0.25** | 20.0 |\n"
        "| teacher\\|50 | 100 | **0.28** [0.27, 0.28] | – | **18.5** |\n"
    )


def test_latex_table() -> None:
    assert Table(COLUMNS, ROWS, intervals=False).latex() == (
        "\\begin{tabular}{lrrrr}\n"
        "\\toprule\n"
        " & & \\multicolumn{2}{c}{Draw\\_Bench} & \\multicolumn{1}{c}{GenEval} \\\\\n"
        "\\cmidrule(lr){3-4}\\cmidrule(lr){5-5}\n"
        "Model & NFE & clipscore $\\uparrow$ & hpsv2 $\\uparrow$ & FID $\\downarrow$ \\\\\n"
        "\\midrule\n"
        "base & 4 & \\textbf{0.28} & \\textbf{0.25} & 20.0 \\\\\n"
        "teacher|50 & 100 & \\textbf{0.28} & -- & \\textbf{18.5} \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_latex_intervals_and_special_characters() -> None:
    assert r"\textbf{0.28} {\scriptsize [0.27, 0.29]} &" in Table(COLUMNS, ROWS).latex()
    assert latex_text("50% of a_b\\c~{x}") == r"50\% of a\_b\textbackslash{}c\textasciitilde{}\{x\}"


def test_a_single_row_has_no_best() -> None:
    assert "**" not in Table(COLUMNS, ROWS[:1]).markdown()
