"""Time and peak memory of a stage's phases, taken by wrapping the stage's own methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rtdmd.stages.assemble import Stage
from rtdmd.stages.cold_start import ColdStart
from rtdmd.training.ema import Ema

REST = "rest"


@dataclass
class Phase:
    """Seconds without inner phases, and the highest allocation in bytes, over all its runs."""

    seconds: float = 0.0
    peak: int = 0


class PhaseClock:
    """A stack of phases; a phase's time is its own, without that of phases within it.

    While disabled, wrapped methods run as they are. While enabled, the device is waited for wherever a phase
    begins or ends, so phases don't overlap and their sum exceeds an undisturbed step.
    """

    def __init__(self, device: torch.device) -> None:
        self.enabled = False
        self.phases: dict[str, Phase] = {}
        self._device = device
        self._stack: list[str] = []
        self._since = 0.0

    def _mark(self) -> None:
        """Put what has passed since the last mark to the account of the innermost phase."""
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._stack:
            phase = self.phases.setdefault(self._stack[-1], Phase())
            phase.seconds += now - self._since
            if on_cuda:
                phase.peak = max(phase.peak, torch.cuda.max_memory_allocated(self._device))
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Account for the block under ``name``."""
        if not self.enabled:
            yield
            return
        self._mark()
        self._stack.append(name)
        try:
            yield
        finally:
            self._mark()
            self._stack.pop()

    def timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``call``, accounted for under ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        return timed

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Replace a method of one object by its timed self."""
        setattr(owner, method, self.timed(getattr(owner, method), name))


def instrument(stage: Stage, ema: Ema, clock: PhaseClock) -> None:
    """Let ``clock`` see what ``stage`` and ``ema`` do."""
    stage.texts = clock.timed(stage.texts, "text encoding")  # type: ignore[assignment]
    clock.wrap(stage._matching, "fake_score_loss", "fake score: forward")
    clock.wrap(stage._matching, "generator_loss", "generator: teacher and fake score")
    clock.wrap(stage.family, "decode", "decode")
    for role in ("generator", "fake_score"):
        engine, label = getattr(stage.roles, role).engine, role.replace("_", " ")
        clock.wrap(engine, "backward", f"{label}: backward")
        clock.wrap(engine, "step", f"{label}: optimizer")
    clock.wrap(ema, "update", "EMA")
    if isinstance(stage, ColdStart):
        clock.wrap(stage, "_steps", "rollout")
        return
    clock.wrap(stage, "_roll_out", "rollout")
    clock.wrap(stage, "_drawn_step_term", "generator: drawn steps, forward")
    clock.wrap(stage, "_last_step_term", "generator: last step, forward")
    clock.wrap(stage.panel, "_pull", "reward back-propagation")
    for reward in stage.panel.rewards:
        clock.wrap(reward, "score", f"reward: {reward.name}")
    start = stage.panel.start_scoring

    def start_scoring(*args: Any, **kwargs: Any) -> Future[Any]:
        future = start(*args, **kwargs)
        if clock.enabled:  # phases of two threads can't be told apart
            future.result()
        return future

    stage.panel.start_scoring = start_scoring  # type: ignore[method-assign]
