"""AlignProp: backpropagation through a random part of the denoising chain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionrft.core.errors import ConfigError
from motionrft.finetune.plan import StepAction, StepPlan
from motionrft.finetune.strategies.draft import chain_from
from motionrft.finetune.strategy import PlannedStrategy

MODES = ("truncated", "uniform", "bernoulli")


@dataclass(frozen=True)
class AlignProp(PlannedStrategy):
    """Chain from a random boundary to the final sample, or through randomly kept steps.

    Source: AlignProp's randomised truncation ("truncated": normal with mean 42 and deviation 5 of 50 steps).
    The public motion code keeps steps independently instead ("bernoulli"); skipped steps pass the gradient through the
    sampler only.
    """

    mode: str = "truncated"
    """"truncated" (normal boundary), "uniform" (uniform boundary) or "bernoulli"."""
    boundary_mean: float = 0.84
    """Mean of the boundary as a fraction of S (truncated)."""
    boundary_std: float = 0.1
    """Standard deviation of the boundary as a fraction of S (truncated)."""
    keep_prob: float = 0.5
    """Probability that a step carries gradient (bernoulli)."""
    recompute: bool = False
    """Run network calls with gradient again in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        rules = [
            (self.mode in MODES, f"mode must be one of {MODES}, got {self.mode!r}"),
            (0 <= self.boundary_mean <= 1, f"boundary_mean must be in [0, 1], got {self.boundary_mean}"),
            (self.boundary_std >= 0, f"boundary_std must be >= 0, got {self.boundary_std}"),
            (0 < self.keep_prob <= 1, f"keep_prob must be in (0, 1], got {self.keep_prob}"),
        ]
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise ConfigError("strategy AlignProp: " + "; ".join(problems))

    def plan(self, num_steps: int, progress: float, rng: np.random.Generator) -> StepPlan:
        """Return one chain to the final sample."""
        if num_steps == 1:
            return chain_from(1, 0, self.recompute)
        if self.mode == "truncated":
            return chain_from(num_steps, self._boundary(num_steps, rng), self.recompute)
        if self.mode == "uniform":
            return chain_from(num_steps, int(rng.integers(num_steps)), self.recompute)
        kept = rng.random(num_steps) < self.keep_prob
        if not kept.any():
            kept[rng.integers(num_steps)] = True  # as likely as redrawing until one is kept, for small probabilities
        first = int(np.argmax(kept))
        actions = [
            StepAction(
                grad=bool(kept[i]),
                cut_input=not kept[i],
                cut_after=i < first,
                score="x_prev" if i == num_steps - 1 else "none",
                update=i == num_steps - 1,
                stop=i == num_steps - 1,
            )
            for i in range(num_steps)
        ]
        return StepPlan(num_steps, tuple(actions), first, through_solver=True, recompute=self.recompute)

    def _boundary(self, num_steps: int, rng: np.random.Generator) -> int:
        """Return b in 1 .. S-1: redrawn while outside, and clipped should that not end."""
        boundary = 0
        for _ in range(100):
            boundary = int(rng.normal(self.boundary_mean * num_steps, self.boundary_std * num_steps))
            if 1 <= boundary <= num_steps - 1:
                return boundary
        return min(max(boundary, 1), num_steps - 1)
