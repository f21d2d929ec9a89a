"""Stop rules by hand; the best checkpoint; the same after a resume."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from rtdmd.recipe.schema import StopRuleSection
from rtdmd.training.stopping import StopRules

RULE = StopRuleSection("monitor/m", drop=0.5, patience=3, window=2)


def run(
    rules: Sequence[StopRuleSection], values: Sequence[float | None], resume_after: int | None = None
) -> tuple[int | None, StopRules]:
    """The step at which the rules ended a stage that logs these values (None: not logged at this step)."""
    stop = StopRules(rules)
    for step, value in enumerate(values, start=1):
        if stop.observe(step, {} if value is None else {"monitor/m": value}) is not None:
            return step, stop
        stop.choose(step)
        if step == resume_after:
            state = json.loads(json.dumps(stop.state()))
            stop = StopRules(rules)
            stop.restore(state)
    return None, stop


# Means of two: 1, 2, 2, 1.4 (step 5, 0.6 below 2), 1, 1, 1.
VALUES = [1.0, 1.0, 3.0, 1.0, 1.8, 0.2, 1.8, 0.2, 1.8]


def test_ends_when_the_drop_has_lasted() -> None:
    """Step 3 has the best mean (1 + 3)/2 = 2; step 5 is the first more than 0.5 below; 5 + 3 = 8."""
    step, stop = run([RULE], VALUES)
    assert step == 8 and stop.best_step == 3
    assert stop.reason == "monitor/m = 1 has been more than 0.5 below its best, 2, since step 5"


@pytest.mark.parametrize("resume_after", range(1, 8))
def test_a_resumed_run_ends_at_the_same_step(resume_after: int) -> None:
    assert run([RULE], VALUES, resume_after)[0] == 8


def test_a_recovery_starts_the_patience_again() -> None:
    recovered = [*VALUES[:6], 3.8, 0.2, 0.2, 0.2, 0.2]
    assert run([RULE], recovered)[0] is None
    assert run([RULE], [*recovered, 0.2])[0] == 12


def test_steps_without_the_metric_count_as_time() -> None:
    """Logged at every other step: the mean of two has fallen at step 5, and 5 + 3 = 8."""
    assert run([RULE], [3.0, None, 3.0, None, 1.0, None, None, None, None])[0] == 8


def test_before_the_window_is_full_nothing_counts() -> None:
    step, stop = run([StopRuleSection("monitor/m", drop=0.1, patience=0, window=5)], [9.0, 1.0, 1.0, 1.0])
    assert step is None and stop.best_step is None


def test_any_rule_ends_and_the_first_chooses() -> None:
    never = StopRuleSection("monitor/other", drop=0.5)
    assert run([never, RULE], VALUES)[0] == 8
    assert run([never, RULE], VALUES)[1].best_step is None
    assert run([RULE, never], VALUES)[1].best_step == 3


def test_other_rules_start_afresh() -> None:
    _, stop = run([RULE], VALUES)
    other = StopRules([StopRuleSection("monitor/m", drop=0.6, patience=3, window=2)])
    other.restore(stop.state())
    assert other.reason is None and other.best_step is None
    none = StopRules([])
    none.restore(stop.state())
    assert none.observe(9, {"monitor/m": -9.0}) is None and not none.choose(9)
