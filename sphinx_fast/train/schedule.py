"""The learning rate of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sphinx_fast.train.settings import OptimizerSettings


@dataclass(frozen=True)
class Schedule:
    """Linear from 0 to `rate` over `warmup` steps, then half a cosine to `min_rate` at step `steps`.

    rate(s) = rate * (s + 1) / warmup                                                     s < warmup
            = min + (rate - min) / 2 * (1 + cos(pi * (s - warmup) / (steps - warmup)))    else
    """

    rate: float
    min_rate: float
    warmup: int
    steps: int

    @classmethod
    def of(cls, settings: OptimizerSettings, steps: int, steps_per_epoch: float) -> Schedule:
        """`warmup_epochs` in steps: 0.03 epoch in the paper's second stage."""
        warmup = settings.warmup_steps
        if warmup is None:
            warmup = round((settings.warmup_epochs or 0.0) * steps_per_epoch)
        return cls(settings.rate, settings.min_rate, min(warmup, steps), steps)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.min_rate + (self.rate - self.min_rate) / 2 * (1 + math.cos(math.pi * min(done, 1.0)))
