"""MDM family: diffusion on normalised motion features with clean-motion prediction.

Letters: B batch, T frames, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from motionrft.core.protocols import SolverTable
from motionrft.core.rng import keyed_normal, keyed_uniform
from motionrft.core.types import MotionBatch, Representation, valid_mask
from motionrft.diffusion.prediction import add_noise
from motionrft.diffusion.schedules import alpha_bars, spaced_timesteps
from motionrft.diffusion.solvers import ddim_table, ddpm_table
from motionrft.generators.base import Build, Generator
from motionrft.generators.mdm_network import MDM, OFFICIAL, MDMConfig

__all__ = ["MDM", "OFFICIAL", "MDMConfig", "MDMGenerator"]

_POSITION_CHANNELS = 67  # root and joint positions of the kinematic features


class MDMGenerator(Generator):
    """Generator whose state is the normalised motion itself, (T, D).

    Args:
        build: identity, statistics, sampler; the size of the text features replaces the config's.
        config: sizes and variant of the network.
        guidance: overrides the spec's scale.
        network: an existing network to use; default: a new one from torch's global generator.
    """

    config: MDMConfig

    def __init__(
        self, build: Build, config: MDMConfig, guidance: float | None = None, network: MDM | None = None
    ) -> None:
        config = replace(config, text_dim=build.token_dim if config.text == "tokens" else build.pooled_dim)
        network = MDM(build.normalizer.mean.shape[0], config) if network is None else network
        super().__init__(build, config, network, guidance=guidance)
        self.alpha_bar = alpha_bars("cosine", self.spec.train_steps)  # (N,) float64, CPU

    def _shape(self, num_frames: int) -> tuple[int, ...]:
        # Models without frame mask always run at their full number of frames.
        return (num_frames if self.config.mask_frames else self.spec.max_frames, self.features)

    def _table(self, num_steps: int) -> SolverTable:
        timesteps = spaced_timesteps(self.spec.train_steps, num_steps)
        if self.solver_name == "ddpm":
            return ddpm_table(self.alpha_bar, timesteps, self.spec.prediction)
        return ddim_table(self.alpha_bar, timesteps, self.spec.prediction, self.eta)

    def decode(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Return physical features (B, T, D) of a normalised state, zeros beyond each length; differentiable."""
        return self.normalizer.denormalise(state, valid_mask(lengths_B, state.shape[1]))

    def encode(self, motion_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the normalised state (B, T, D) of physical features, zeros beyond each length."""
        return self.normalizer.normalise(motion_BTD, valid_mask(lengths_B, motion_BTD.shape[1]))

    def pretrain_loss(
        self, network: Callable[..., Tensor], batch: MotionBatch, step: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses (B,) of denoising training, and detached means for the log.

        Loss: mean over valid frames and features of (x0_hat - x0)^2, plus `velocity_weight` times the same of frame
        differences of root and joint positions. Time, noise and caption dropout depend on (seed, step, sample key)
        only.

        Args:
            network: the model's network, or the engine around it.
            batch: clips in the generator's representation.
            step: batch index of the run.
            seed: run seed.
        """
        kind = self.spec.representation
        x0 = self.encode(batch.motions[kind], batch.lengths_B)
        frames = self.state_shape(x0.shape[1])[0]
        x0 = nn.functional.pad(x0, (0, 0, 0, frames - x0.shape[1]))
        draw: tuple[Any, ...] = (seed, "pretrain", step)
        keys_B, steps = batch.keys_B, self.spec.train_steps
        t_B = (keyed_uniform(keys_B, "t", *draw) * steps).long().clamp(max=steps - 1)
        keep_B = keyed_uniform(keys_B, "text", *draw) >= self.config.text_dropout
        noise = keyed_normal(keys_B, tuple(x0.shape[1:]), "noise", *draw)
        x_t = add_noise(x0, noise, self.alpha_bar.to(x0.device)[t_B])
        text = batch.prompt
        out = network(x_t, t_B, text.tokens_BLD, text.mask_BL, text.pooled_BD, keep_B, batch.lengths_B)

        mask_BT = valid_mask(batch.lengths_B, frames)
        error = out - x0
        x0_B = _mean_over_frames(error.square().mean(-1), mask_BT)
        positions = error[..., :_POSITION_CHANNELS] if kind == Representation.KINEMATIC else error
        change = positions[:, 1:] - positions[:, :-1]
        velocity_B = _mean_over_frames(change.square().mean(-1), mask_BT[:, 1:])
        loss_B = x0_B + self.config.velocity_weight * velocity_B
        return loss_B, {"loss/x0": x0_B.detach().mean(), "loss/velocity": velocity_B.detach().mean()}


def _mean_over_frames(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, value_BT, 0.0).sum(1) / mask_BT.sum(1).clamp(min=1)
