"""DRaFT-K and DRaFT-LV: backpropagate the final sample's reward through the last K denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionrft.core.errors import ConfigError
from motionrft.core.rng import keyed_normal
from motionrft.diffusion.denoise import noised
from motionrft.finetune.plan import SAMPLE, StepAction, StepPlan
from motionrft.finetune.rollout import Rollout
from motionrft.finetune.strategy import PlannedStrategy, follow


@dataclass(frozen=True)
class DRaFT(PlannedStrategy):
    """Full chain over the last K steps; memory grows with K."""

    last_steps: int = 10
    """K; 0 = all steps."""
    recompute: bool = False
    """Keep only the states of the K steps and run the network again in the backward pass: memory of one step plus K
    states, at the price of K more network calls."""

    def __post_init__(self) -> None:
        if self.last_steps < 0:
            raise ConfigError(f"strategy DRaFT: last_steps must be >= 0, got {self.last_steps}")

    def plan(self, num_steps: int, progress: float, rng: np.random.Generator) -> StepPlan:
        """Return a gradient-free prefix and a live chain to the final sample."""
        return chain_from(num_steps, max(num_steps - self.last_steps, 0) if self.last_steps else 0, self.recompute)


@dataclass(frozen=True)
class DRaFTLV(PlannedStrategy):
    """DRaFT-1 whose gradient is averaged with that of the final sample noised again, to lower its variance.

    Source: DRaFT (Clark et al.), the LV variant: the last step learns from `samples` more noises of the same sample.
    """

    samples: int = 2
    """n, how often the final sample is noised again to the level before the last step."""
    reduction: str = "mean"
    """"mean" or "sum" of the n + 1 gradients."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        rules = [
            (self.samples >= 1, f"samples must be >= 1, got {self.samples}"),
            (self.reduction in ("mean", "sum"), f"reduction must be mean or sum, got {self.reduction!r}"),
        ]
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise ConfigError("strategy DRaFT-LV: " + "; ".join(problems))

    def plan(self, num_steps: int, progress: float, rng: np.random.Generator) -> StepPlan:
        """Return DRaFT-1."""
        return chain_from(num_steps, num_steps - 1)

    def learn(self, rollout: Rollout) -> None:
        """Accumulate the last step's gradient and those of the n noisy copies, one at a time; update once."""
        table, last = rollout.table, rollout.num_steps - 1
        share = 1.0 / (self.samples + 1) if self.reduction == "mean" else 1.0
        final = follow(self.plan(rollout.num_steps, 1.0, rollout.rng), rollout, update=False, share=share)
        predict, time = rollout.predict(), table.model_time[last].to(final.device)
        for sample in range(self.samples):
            noise = keyed_normal(rollout.batch.keys_B, rollout.shape, "draft-lv", rollout.seed, rollout.step, sample)
            z = noised(table, last, final, noise)
            scored = rollout.score(float(table.p[last]) * z + float(table.q[last]) * predict(z, time))
            rollout.backward(-scored.total_B, share)
        rollout.update(f"{last:02d}")


def chain_from(num_steps: int, start: int, recompute: bool = False) -> StepPlan:
    """Return a plan whose steps `start` .. S-1 form one live chain, scored at the final sample."""
    live = StepAction(grad=True, cut_input=False, cut_after=False)
    end = StepAction(grad=True, cut_input=False, cut_after=False, score="x_prev", update=True, stop=True)
    return StepPlan(
        num_steps, (SAMPLE,) * start + (live,) * (num_steps - start - 1) + (end,), start, recompute=recompute
    )
