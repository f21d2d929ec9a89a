"""What the small world's three trainings share: the learning-rate schedule, averages, progress."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn


class Schedule:
    """Warm-up, then a cosine to ``last`` of the learning rate; clipped, finite updates."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, steps: int, *, warmup: int, last: float = 0.02
    ) -> None:
        def factor(step: int) -> float:
            falling = last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
            return min((step + 1) / warmup, 1.0) * falling

        self.steps = steps
        self._optimizer = optimizer
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def update(self, loss: Tensor, model: nn.Module) -> None:
        """Backward and :meth:`step`."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.step(model)

    def step(self, model: nn.Module) -> None:
        """One clipped optimizer step along the gradients that are there."""
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self._optimizer.step()
        self._scheduler.step()


class Average:
    """Exponential moving average of a model's parameters, float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._decay = decay
        self._values = [parameter.detach().clone() for parameter in self._parameters]
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._values, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def write(self) -> None:
        """Put the average into the model."""
        for parameter, value in zip(self._parameters, self._values, strict=True):
            parameter.copy_(value)


class Clock:
    """A line of progress now and then; stops the run if the loss isn't finite."""

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps = name, steps
        self._every = max(steps // 10, 1)
        self._start = time.perf_counter()

    def tick(self, step: int, loss: Tensor) -> None:
        if (step + 1) % self._every and step + 1 != self._steps:
            return
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{self._name}: the loss is {value} at step {step + 1}")
        seconds = time.perf_counter() - self._start
        print(f"{self._name}: {step + 1}/{self._steps}, loss {value:.4f}, {seconds:.0f} s", flush=True)
