"""DRTune: the network's input is cut everywhere, the gradient travels through the sampler's linear part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionrft.core.errors import ConfigError
from motionrft.finetune.plan import StepAction, StepPlan
from motionrft.finetune.strategy import PlannedStrategy


@dataclass(frozen=True)
class DRTune(PlannedStrategy):
    """K evenly spaced steps learn from the clean estimate at a random one of the last M steps.

    Differs: upstream spreads the K steps over all S and loses those after the stop; here they lie before it.
    """

    grad_steps: int = 5
    """K, steps with gradient."""
    last_steps: int = 10
    """M: the stop is drawn from the last M steps."""

    def __post_init__(self) -> None:
        if self.grad_steps < 1 or self.last_steps < 1:
            raise ConfigError(
                f"strategy DRTune: grad_steps and last_steps must be >= 1, got {self.grad_steps}, {self.last_steps}"
            )

    def plan(self, num_steps: int, progress: float, rng: np.random.Generator) -> StepPlan:
        """Return spaced steps within a live chain up to the stop."""
        stop = num_steps - 1 - int(rng.integers(min(self.last_steps, num_steps)))
        kept = min(self.grad_steps, stop + 1)
        stride = (stop + 1) // kept
        first = int(rng.integers(stop + 1 - stride * kept + 1))
        steps = {first + j * stride for j in range(kept)}
        actions = [
            StepAction(
                grad=i in steps,
                cut_input=True,
                cut_after=i < first,
                score="x0_hat" if i == stop else "none",
                update=i == stop,
                stop=i == stop,
            )
            for i in range(stop + 1)
        ]
        return StepPlan(num_steps, tuple(actions), first, through_solver=True)
