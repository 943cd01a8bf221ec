"""DRaFT-K: backpropagate the final sample's reward through the last K denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionrft.core.errors import ConfigError
from motionrft.finetune.plan import SAMPLE, StepAction, StepPlan, Strategy


@dataclass(frozen=True)
class DRaFT(Strategy):
    """Full chain over the last K steps; memory grows with K."""

    last_steps: int = 10
    """K; 0 = all steps."""

    def __post_init__(self) -> None:
        if self.last_steps < 0:
            raise ConfigError(f"strategy DRaFT: last_steps must be >= 0, got {self.last_steps}")

    def plan(self, num_steps: int, progress: float, rng: np.random.Generator) -> StepPlan:
        """Return a gradient-free prefix and a live chain to the final sample."""
        return chain_from(num_steps, max(num_steps - self.last_steps, 0) if self.last_steps else 0)


def chain_from(num_steps: int, start: int) -> StepPlan:
    """Return a plan whose steps `start` .. S-1 form one live chain, scored at the final sample."""
    live = StepAction(grad=True, cut_input=False, cut_after=False)
    end = StepAction(grad=True, cut_input=False, cut_after=False, score="x_prev", update=True, stop=True)
    return StepPlan(num_steps, (SAMPLE,) * start + (live,) * (num_steps - start - 1) + (end,), start)
