"""A plan says what happens at each denoising step of one rollout. `strategy.follow` runs it."""

from __future__ import annotations

from dataclasses import dataclass

from motionrft.diffusion.denoise import SAMPLE, SCORES, StepAction

__all__ = ["SAMPLE", "SCORES", "StepAction", "StepPlan"]


@dataclass(frozen=True)
class StepPlan:
    """Actions for steps 0 .. len-1 of a sampler with `num_steps` steps; the remaining steps are not run."""

    num_steps: int
    actions: tuple[StepAction, ...]
    window_start: int
    """First step with gradient."""
    snapshot: bool = False
    """States and gradients come from the parameters at the start of the rollout, although updates happen on the way."""
    through_solver: bool = False
    """The gradient path through the sampler is that of noise prediction, whatever the network predicts."""
    recompute: bool = False
    """Network calls with gradient keep their input only and run again in the backward pass."""
    equal_gain: bool = False
    """Scored steps are weighed by the inverse of the sampler's own factor (`strategy.step_weights`)."""

    def __post_init__(self) -> None:
        """Refuse plans that train nothing, or whose last gradient reaches no update."""
        if not 1 <= len(self.actions) <= self.num_steps:
            raise ValueError(f"{len(self.actions)} actions for {self.num_steps} steps")
        scored = [i for i, action in enumerate(self.actions) if action.score != "none"]
        trained = [i for i, action in enumerate(self.actions) if action.grad]
        if not trained or not scored or trained[0] > scored[-1]:
            raise ValueError("a plan needs a scored step at or after a step with gradient")
        if not self.actions[-1].update or scored[-1] != len(self.actions) - 1:
            raise ValueError("the last action of a plan must be scored and must update")
        if self.window_start != trained[0]:
            raise ValueError(f"window_start is {self.window_start}, the first step with gradient is {trained[0]}")

    def strip(self) -> str:
        """Return the plan as one line per property, one character per denoising step, noisiest left.

        network: `#` with gradient, `.` without, blank = not run. reward: `0` reads x0_hat, `<` reads x_prev.
        update: `^`. chain: `-` where the state's history is kept, `|` where it is cut.
        """
        rest = " " * (self.num_steps - len(self.actions))
        symbols = {"none": " ", "x0_hat": "0", "x_prev": "<"}
        rows = {
            "network": ["#" if a.grad else "." for a in self.actions],
            "chain": ["|" if a.cut_after else "-" for a in self.actions],
            "reward": [symbols[a.score] for a in self.actions],
            "update": ["^" if a.update else " " for a in self.actions],
        }
        return "\n".join(f"{name:8}[{''.join(cells)}{rest}]" for name, cells in rows.items())
