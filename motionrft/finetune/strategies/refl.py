"""ReFL: one random late step, its clean estimate, one update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionrft.core.errors import ConfigError
from motionrft.finetune.plan import SAMPLE, StepAction, StepPlan
from motionrft.finetune.strategy import PlannedStrategy


@dataclass(frozen=True)
class ReFL(PlannedStrategy):
    """Stop at a random one of the last steps and learn from the clean estimate there.

    Differs: upstream's draw excludes the first of the last M steps; `last_steps` M - 1 gives the same.
    """

    last_steps: int = 10
    """How many of the last steps the stop is drawn from."""

    def __post_init__(self) -> None:
        if self.last_steps < 1:
            raise ConfigError(f"strategy ReFL: last_steps must be >= 1, got {self.last_steps}")

    def plan(self, num_steps: int, progress: float, rng: np.random.Generator) -> StepPlan:
        """Return a gradient-free prefix and one scored step."""
        stop = num_steps - 1 - int(rng.integers(min(self.last_steps, num_steps)))
        last = StepAction(grad=True, score="x0_hat", update=True, stop=True)
        return StepPlan(num_steps, (SAMPLE,) * stop + (last,), stop)
