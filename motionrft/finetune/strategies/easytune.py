"""EasyTune: every trained denoising step is its own optimisation problem, so memory does not grow with steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionrft.core.errors import ConfigError
from motionrft.finetune.curriculum import curriculum_window
from motionrft.finetune.plan import SAMPLE, StepAction, StepPlan
from motionrft.finetune.rollout import Rollout
from motionrft.finetune.strategy import PlannedStrategy, replay

VARIANTS = ("step", "chain", "accumulate", "replay")
TIMESTEPS = ("curriculum", "last", "uniform", "all")


@dataclass(frozen=True)
class EasyTune(PlannedStrategy):
    """Score and update at each step of a window; the state is cut before every network call.

    Source: Eq. 21 to 25. The released code always trains the last k steps unless the curriculum is on; drawing steps
    uniformly is the paper's text.
    """

    window: int = 10
    """Trained steps k per rollout, each with its own score."""
    sweep_ratio: float = 0.4
    """Share of the run during which the curriculum window moves from noisiest to cleanest."""
    score: str = "x0_hat"
    """What the reward reads: "x0_hat" (one-step clean estimate) or "x_prev" (the next, still noisy state)."""
    timesteps: str = "curriculum"
    """Which steps: "curriculum", "last" (the last k), "uniform" (k at random) or "all"."""
    variant: str = "step"
    """"step": update the running network k times. "chain": k updates, but states and gradients of the whole rollout
    come from the parameters at its start. "accumulate": one update with the mean gradient. "replay": the same from
    stored states, `replay_steps` of them in one network call."""
    replay_steps: int = 1
    """Denoising steps per network call of the replay; memory grows with it."""
    equal_gain: bool = False
    """Weigh steps by the inverse of the sampler's own factor: |d x0_hat / d out| is 300 x larger at the noisiest step
    of a 50-step DDIM than at the cleanest."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        rules = [
            (self.window >= 1, f"window must be >= 1, got {self.window}"),
            (0 <= self.sweep_ratio <= 1, f"sweep_ratio must be in [0, 1], got {self.sweep_ratio}"),
            (self.score in ("x0_hat", "x_prev"), f"score must be x0_hat or x_prev, got {self.score!r}"),
            (self.timesteps in TIMESTEPS, f"timesteps must be one of {TIMESTEPS}, got {self.timesteps!r}"),
            (self.variant in VARIANTS, f"variant must be one of {VARIANTS}, got {self.variant!r}"),
            (self.replay_steps >= 1, f"replay_steps must be >= 1, got {self.replay_steps}"),
        ]
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise ConfigError("strategy EasyTune: " + "; ".join(problems))

    def plan(self, num_steps: int, progress: float, rng: np.random.Generator) -> StepPlan:
        """Return k scored steps, and nothing after the last of them."""
        steps = self._steps(num_steps, progress, rng)
        accumulate = self.variant in ("accumulate", "replay")
        share = 1.0 / len(steps) if accumulate else 1.0
        actions = [
            StepAction(
                grad=True,
                score=self.score,
                update=i == steps[-1] or not accumulate,
                weight=share,
                stop=i == steps[-1],
            )
            if i in steps
            else SAMPLE
            for i in range(steps[-1] + 1)
        ]
        chain = self.variant == "chain"
        return StepPlan(num_steps, tuple(actions), steps[0], snapshot=chain, equal_gain=self.equal_gain)

    def learn(self, rollout: Rollout) -> None:
        """Follow the plan of this batch, or replay its scored steps after a rollout without gradient."""
        if self.variant != "replay":
            return super().learn(rollout)
        plan = self.plan(rollout.num_steps, rollout.progress, rollout.rng)
        replay(plan, rollout, self.replay_steps)

    def _steps(self, num_steps: int, progress: float, rng: np.random.Generator) -> list[int]:
        window = min(self.window, num_steps)
        if self.timesteps == "all":
            return list(range(num_steps))
        if self.timesteps == "uniform":
            return sorted(int(i) for i in rng.choice(num_steps, window, replace=False))
        sweep = self.sweep_ratio if self.timesteps == "curriculum" else 0.0
        return list(curriculum_window(num_steps, window, progress, sweep))
