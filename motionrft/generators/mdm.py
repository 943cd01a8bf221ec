"""MDM family: diffusion on normalised motion features with clean-motion prediction.

Letters: B batch, T frames, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from motionrft.core.errors import ConfigError, RepresentationError, explain
from motionrft.core.protocols import GeneratorSpec, SolverTable
from motionrft.core.rng import keyed_normal, keyed_uniform
from motionrft.core.types import Condition, MotionBatch, Representation, valid_mask
from motionrft.diffusion.guidance import double_rows, guide_doubled
from motionrft.diffusion.prediction import add_noise
from motionrft.diffusion.schedules import alpha_bars, spaced_timesteps
from motionrft.diffusion.solvers import ddim_table, ddpm_table
from motionrft.generators.mdm_network import MDM, OFFICIAL, MDMConfig
from motionrft.representations.normalize import Normalizer

__all__ = ["MDM", "OFFICIAL", "SOLVERS", "MDMConfig", "MDMGenerator", "pretrain_loss"]

SOLVERS = ("ddim", "ddpm")
_POSITION_CHANNELS = 67  # root and joint positions of the kinematic features


class MDMGenerator:
    """`core.protocols.MotionGenerator` whose state is the normalised motion itself.

    Args:
        spec: identity of the model; its guidance scale is the default one.
        config: sizes and variant of the network.
        normalizer: statistics of the state; its width sets D.
        solver: "ddim" or "ddpm" (ancestral).
        eta: share of fresh noise of DDIM.
        guidance: overrides the spec's scale; 1 runs the network once per step, without the empty condition.
        network: an existing network to use; default: a new one from torch's global generator.

    Raises:
        ConfigError: unknown solver or a spec this family cannot be.
        RepresentationError: normaliser and spec name different representations.
    """

    def __init__(
        self,
        spec: GeneratorSpec,
        config: MDMConfig,
        normalizer: Normalizer,
        *,
        solver: str = "ddim",
        eta: float = 0.0,
        guidance: float | None = None,
        network: MDM | None = None,
    ) -> None:
        if solver not in SOLVERS:
            raise ConfigError(explain(f"a solver of {SOLVERS}", repr(solver), "MDM generator", "Correct the name."))
        if spec.prediction != "x0":
            raise ConfigError(explain("prediction 'x0'", repr(spec.prediction), "MDM generator", "Correct the card."))
        if normalizer.representation != spec.representation:
            raise RepresentationError(
                explain(
                    f"statistics of {spec.representation.value!r}",
                    f"of {normalizer.representation.value!r}",
                    "MDM generator",
                    "Load the normaliser the generator was trained with.",
                )
            )
        self.spec, self.config, self.normalizer = spec, config, normalizer
        self.guidance = spec.guidance_scale if guidance is None else guidance
        self.solver_name, self.eta = solver, eta
        self.network: nn.Module = network if network is not None else MDM(normalizer.mean.shape[0], config)
        self.alpha_bar = alpha_bars("cosine", spec.train_steps)  # (N,) float64, CPU

    @property
    def features(self) -> int:
        """Feature count D of the state."""
        return self.normalizer.mean.shape[0]

    def to(self, device: torch.device | str) -> MDMGenerator:
        """Move network and statistics; returns self."""
        self.network.to(device)
        self.normalizer = self.normalizer.to(device)
        return self

    def state_shape(self, num_frames: int) -> tuple[int, ...]:
        """Return (T, D). Models without frame mask always run at their full number of frames.

        Raises:
            ConfigError: more frames than the model was trained for.
        """
        if not 1 <= num_frames <= self.spec.max_frames:
            raise ConfigError(
                explain(
                    f"1 to {self.spec.max_frames} frames",
                    str(num_frames),
                    f"generator {self.spec.family!r}",
                    "Shorten the clip, or train a generator for more frames.",
                )
            )
        return (num_frames if self.config.mask_frames else self.spec.max_frames, self.features)

    def solver(self, num_steps: int) -> SolverTable:
        """Return the sampler at S steps, spread over the whole training schedule.

        Raises:
            ConfigError: more steps than the training schedule has.
        """
        if not 1 <= num_steps <= self.spec.train_steps:
            raise ConfigError(
                explain(
                    f"1 to {self.spec.train_steps} denoising steps",
                    str(num_steps),
                    f"generator {self.spec.family!r}",
                    "Choose fewer steps.",
                )
            )
        timesteps = spaced_timesteps(self.spec.train_steps, num_steps)
        if self.solver_name == "ddpm":
            return ddpm_table(self.alpha_bar, timesteps, self.spec.prediction)
        return ddim_table(self.alpha_bar, timesteps, self.spec.prediction, self.eta)

    def predict(
        self, network: Callable[..., Tensor], x: Tensor, t: Tensor, condition: Condition, lengths_B: Tensor
    ) -> Tensor:
        """Return the guided clean estimate (B, T, D) for state x (B, T, D) at step t (0-dim or (B,)).

        Caption and empty condition go through one network call of 2B rows.
        """
        rows = len(x)
        t_B = t.expand(rows)
        keep_B = torch.ones(rows, dtype=torch.bool, device=x.device)
        if self.guidance == 1.0:
            return network(x, t_B, condition.tokens_BLD, condition.mask_BL, condition.pooled_BD, keep_B, lengths_B)
        out = network(
            double_rows(x),
            double_rows(t_B),
            double_rows(condition.tokens_BLD),
            double_rows(condition.mask_BL),
            double_rows(condition.pooled_BD),
            torch.cat([keep_B, ~keep_B]),
            double_rows(lengths_B),
        )
        return guide_doubled(out, self.guidance)

    def decode(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Return physical features (B, T, D) of a normalised state, zeros beyond each length; differentiable."""
        return self.normalizer.denormalise(state, valid_mask(lengths_B, state.shape[1]))

    def encode(self, motion_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the normalised state (B, T, D) of physical features, zeros beyond each length."""
        return self.normalizer.normalise(motion_BTD, valid_mask(lengths_B, motion_BTD.shape[1]))


def pretrain_loss(
    generator: MDMGenerator, network: Callable[..., Tensor], batch: MotionBatch, step: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return per-sample losses (B,) of denoising training, and detached means for the log.

    Loss: mean over valid frames and features of (x0_hat - x0)^2, plus `velocity_weight` times the same of frame
    differences of root and joint positions. Time, noise and caption dropout depend on (seed, step, sample key) only.

    Args:
        generator: the model being trained.
        network: its network, or the engine around it.
        batch: clips in the generator's representation.
        step: batch index of the run.
        seed: run seed.
    """
    kind = generator.spec.representation
    x0 = generator.encode(batch.motions[kind], batch.lengths_B)
    frames = generator.state_shape(x0.shape[1])[0]
    x0 = torch.nn.functional.pad(x0, (0, 0, 0, frames - x0.shape[1]))
    draw: tuple[Any, ...] = (seed, "pretrain", step)
    keys_B, steps = batch.keys_B, generator.spec.train_steps
    t_B = (keyed_uniform(keys_B, "t", *draw) * steps).long().clamp(max=steps - 1)
    keep_B = keyed_uniform(keys_B, "text", *draw) >= generator.config.text_dropout
    noise = keyed_normal(keys_B, tuple(x0.shape[1:]), "noise", *draw)
    x_t = add_noise(x0, noise, generator.alpha_bar.to(x0.device)[t_B])
    text = batch.text
    out = network(x_t, t_B, text.tokens_BLD, text.mask_BL, text.pooled_BD, keep_B, batch.lengths_B)

    mask_BT = valid_mask(batch.lengths_B, frames)
    error = out - x0
    x0_B = _mean_over_frames(error.square().mean(-1), mask_BT)
    positions = error[..., :_POSITION_CHANNELS] if kind == Representation.KINEMATIC else error
    change = positions[:, 1:] - positions[:, :-1]
    velocity_B = _mean_over_frames(change.square().mean(-1), mask_BT[:, 1:])
    loss_B = x0_B + generator.config.velocity_weight * velocity_B
    return loss_B, {"loss/x0": x0_B.detach().mean(), "loss/velocity": velocity_B.detach().mean()}


def _mean_over_frames(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, value_BT, 0.0).sum(1) / mask_BT.sum(1).clamp(min=1)
