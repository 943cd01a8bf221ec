"""What generators share whose state is the normalised motion itself: statistics, schedule and training examples.

Letters: B batch, T frames, D features, N training steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from motionrft.core.errors import ConfigError, explain
from motionrft.core.protocols import SolverTable
from motionrft.core.types import MotionBatch, valid_mask
from motionrft.diffusion.prediction import add_noise
from motionrft.diffusion.schedules import alpha_bars, spaced_timesteps
from motionrft.diffusion.solvers import ddim_table, ddpm_table
from motionrft.generators.base import Build, Generator, ModelConfig


@dataclass(frozen=True)
class NoisyMotion:
    """One training example per clip."""

    x0: Tensor  # (B, T, D) normalised motion, zeros beyond each length
    noise: Tensor  # (B, T, D)
    x_t: Tensor  # (B, T, D)
    t_B: Tensor  # (B,) int64 training steps
    keep_B: Tensor  # (B,) bool, False: train without the caption
    mask_BT: Tensor  # (B, T) bool


class RawMotionGenerator(Generator):
    """Generator whose state is the normalised motion, (T, D). Subclasses name the schedule and the loss."""

    schedule: ClassVar[str]
    """One of `diffusion.schedules.SCHEDULES`."""

    def __init__(self, build: Build, config: ModelConfig, network: nn.Module, *, guidance: float | None = None) -> None:
        super().__init__(build, config, network, guidance=guidance)
        self.alpha_bar = alpha_bars(self.schedule, self.spec.train_steps)  # (N,) float64, CPU
        if not bool((self.alpha_bar > 0).all()):
            raise ConfigError(
                explain(
                    "train_steps for which every step leaves some signal",
                    str(self.spec.train_steps),
                    f"{self.schedule} schedule of {config.family}",
                    "Use more training steps; published models have 1000.",
                )
            )

    def _shape(self, num_frames: int) -> tuple[int, ...]:
        return (num_frames, self.features)

    def _table(self, num_steps: int) -> SolverTable:
        if self.solver_name == "ddpm":
            return ddpm_table(self.alpha_bar, spaced_timesteps(self.spec.train_steps, num_steps), self.spec.prediction)
        return self._stochastic_table(num_steps, self.eta)

    def _stochastic_table(self, num_steps: int, noise: float) -> SolverTable:
        timesteps = spaced_timesteps(self.spec.train_steps, num_steps)
        return ddim_table(self.alpha_bar, timesteps, self.spec.prediction, noise)

    def decode(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Return physical features (B, T, D) of a normalised state, zeros beyond each length; differentiable."""
        return self.normalizer.denormalise(state, valid_mask(lengths_B, state.shape[1]))

    def encode(self, motion_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the normalised state (B, T, D) of physical features, zeros beyond each length."""
        return self.normalizer.normalise(motion_BTD, valid_mask(lengths_B, motion_BTD.shape[1]))

    def noisy(self, batch: MotionBatch, step: int, seed: int) -> NoisyMotion:
        """Return the clips at random training steps. Every draw depends on (seed, step, sample key) only.

        Args:
            batch: clips in the generator's representation.
            step: batch index of the run.
            seed: run seed.
        """
        x0 = self.encode(batch.motions[self.spec.representation], batch.lengths_B)
        frames = self.state_shape(x0.shape[1])[0]
        x0 = nn.functional.pad(x0, (0, 0, 0, frames - x0.shape[1]))
        u_B, keep_B, noise = self.draws(x0, batch, step, seed)
        t_B = self.timesteps(u_B)
        x_t = add_noise(x0, noise, self.alpha_bar.to(x0.device)[t_B])
        return NoisyMotion(x0, noise, x_t, t_B, keep_B, valid_mask(batch.lengths_B, frames))
