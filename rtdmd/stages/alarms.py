"""Alarms that something else falls while the trained rewards rise: what reward hacking looks like.

Everything is a mean over the last three epochs that were looked at. The trained rewards are summed as
T = Σ w_i · mean_i / (σ_i + 1e-4), σ_i the standard deviation over the samples of the first such epoch.

- A monitor reward's alarm: it is more than 0.2·σ below its best (its own σ, likewise of the first epoch),
  and T is higher than it was then.
- A picture statistic's alarm: it differs by more than 30 % from where it began, and T is higher than it was
  then.

An alarm is given once, and again only after it has cleared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rtdmd.stages.scores import EpochScores, finite_mean, finite_std

_SMOOTHED = 3
_FALL = 0.2  # standard deviations
_CHANGE = 0.3  # of the first value
_STD_FLOOR = 1e-4

# A watched number and T, of every epoch that was looked at.
History = list[list[float]]


def smoothed(history: History) -> list[tuple[float, float]]:
    """Means of each three consecutive entries, number and T."""
    windows = [history[end - _SMOOTHED : end] for end in range(_SMOOTHED, len(history) + 1)]
    return [(sum(v for v, _ in each) / _SMOOTHED, sum(t for _, t in each) / _SMOOTHED) for each in windows]


def monitor_alarm(history: History, spread: float) -> bool:
    """Whether a monitor reward has fallen from its best while T rose; ``spread`` is its σ."""
    course = smoothed(history)
    if not course:
        return False
    (now, trained), (best, trained_then) = course[-1], max(course, key=lambda entry: entry[0])
    return best - now > _FALL * spread and trained > trained_then


def statistic_alarm(history: History) -> bool:
    """Whether a picture statistic has left where it began while T rose."""
    course = smoothed(history)
    if not course:
        return False
    (now, trained), (first, trained_then) = course[-1], course[0]
    return abs(now - first) > _CHANGE * abs(first) and trained > trained_then


class HackingAlarms:
    """Watches monitor rewards and picture statistics; ``weights`` are the trained rewards'."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._spreads: dict[str, float] = {}  # σ by name, of rewards and monitors
        self._histories: dict[str, History] = {}  # by metric

    def observe(self, scores: EpochScores) -> list[str]:
        """Take in an epoch with picture statistics; what there is to say of it."""
        if not scores.images:
            return []
        trained = 0.0
        for name, weight in self._weights.items():
            mean = finite_mean(scores.rewards[name])
            if weight and mean is not None:
                trained += weight * mean / (self._spread(name, scores.rewards) + _STD_FLOOR)
        notices = []
        for name in scores.monitors:
            mean, spread = finite_mean(scores.monitors[name]), self._spread(name, scores.monitors)
            if mean is not None:
                history = self._follow(f"monitor/{name}", mean, trained)
                if monitor_alarm(history, spread) and not monitor_alarm(history[:-1], spread):
                    notices.append(_words(f"monitor/{name}", history, "has fallen from its best"))
        for metric, value in scores.image_metrics().items():
            history = self._follow(metric, value, trained)
            if statistic_alarm(history) and not statistic_alarm(history[:-1]):
                notices.append(_words(metric, history, "is more than 30 % from where it began"))
        return notices

    def _spread(self, name: str, scores: Mapping[str, Any]) -> float:
        return self._spreads.setdefault(name, finite_std(scores[name]))

    def _follow(self, metric: str, value: float, trained: float) -> History:
        history = self._histories.setdefault(metric, [])
        history.append([value, trained])
        return history

    def state(self) -> dict[str, Any]:
        """Everything seen so far, for a checkpoint."""
        return {"spreads": dict(self._spreads), "histories": {k: list(v) for k, v in self._histories.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self._spreads = dict(state["spreads"])
        self._histories = {metric: list(history) for metric, history in state["histories"].items()}


def _words(metric: str, history: History, what: str) -> str:
    now = smoothed(history)[-1][0]
    return (
        f"{metric} = {now:.4g} {what} while the trained rewards rose: the generator may be exploiting them; "
        "look at samples/, and consider rtdmd.stop_when, clipping or other weights "
        "(docs/rewards_in_training.md)"
    )
