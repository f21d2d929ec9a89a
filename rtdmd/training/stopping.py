"""Rules that end a stage when a metric has fallen from its best, and which checkpoint was the best.

A rule looks at the mean of the last ``window`` logged values of its metric. The stage ends when that mean
has been more than ``drop`` below its best for ``patience`` steps. The best checkpoint is the one at which the
first rule's mean was highest, among those that ``checkpoint_every`` asks for: checkpoints of an interruption
don't count, so that a resumed run picks the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rtdmd.recipe.schema import StopRuleSection


@dataclass
class Course:
    """What a rule has seen; steps are finished steps."""

    recent: list[float] = field(default_factory=list)
    mean: float | None = None  # of the last `window` values, once there are so many
    best: float | None = None
    below_since: int | None = None

    def follow(self, step: int, value: float, rule: StopRuleSection) -> None:
        """Take in a logged value."""
        self.recent = [*self.recent, value][-rule.window :]
        if len(self.recent) < rule.window:
            return
        self.mean = sum(self.recent) / rule.window
        self.best = self.mean if self.best is None else max(self.best, self.mean)
        if self.best - self.mean <= rule.drop:
            self.below_since = None
        elif self.below_since is None:
            self.below_since = step

    def is_over(self, step: int, rule: StopRuleSection) -> bool:
        """Whether the fall has lasted."""
        return self.below_since is not None and step - self.below_since >= rule.patience


class StopRules:
    """A recipe's rules; without any, nothing ever ends early and no checkpoint is the best."""

    def __init__(self, rules: Sequence[StopRuleSection]) -> None:
        self.rules = list(rules)
        self._courses = [Course() for _ in rules]
        self._best_value: float | None = None
        self.best_step: int | None = None
        self.reason: str | None = None  # why the stage is over

    def observe(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Take in the metrics of ``step``; why the stage is over, if it is."""
        for rule, course in zip(self.rules, self._courses, strict=True):
            if rule.metric in metrics:
                course.follow(step, metrics[rule.metric], rule)
            if self.reason is None and course.is_over(step, rule):
                self.reason = (
                    f"{rule.metric} = {course.mean:.4g} has been more than {rule.drop:g} below its best, "
                    f"{course.best:.4g}, since step {course.below_since}"
                )
        return self.reason

    def choose(self, step: int) -> bool:
        """Whether the checkpoint that is due at ``step`` is the best so far, and henceforth the best."""
        mean = self._courses[0].mean if self._courses else None
        if mean is None or (self._best_value is not None and mean <= self._best_value):
            return False
        self._best_value, self.best_step = mean, step
        return True

    def forget_best(self) -> None:
        """The best checkpoint isn't there any more: the next one that is due takes its place."""
        self._best_value = self.best_step = None

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "rules": self.described(),
            "courses": [asdict(course) for course in self._courses],
            "best_value": self._best_value,
            "best_step": self.best_step,
            "reason": self.reason,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken; other rules start afresh."""
        if state["rules"] == self.described():
            self._courses = [Course(**course) for course in state["courses"]]
            self._best_value, self.best_step = state["best_value"], state["best_step"]
            self.reason = state["reason"]

    def described(self) -> list[dict[str, Any]]:
        """The rules as plain values."""
        return [asdict(rule) for rule in self.rules]
