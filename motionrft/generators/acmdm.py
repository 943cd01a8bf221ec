"""ACMDM family: a linear flow to joint positions, or to the latents of a causal auto-encoder, by velocity prediction.

Letters: B batch, T frames, L state frames (T, or latents of 4 frames), J joints, C channels per joint, D = 3 J.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from motionrft.core.errors import ConfigError, explain
from motionrft.core.protocols import SolverTable
from motionrft.core.types import MotionBatch, Representation, valid_mask
from motionrft.diffusion.prediction import flow_remaining, flow_state
from motionrft.diffusion.solvers import flow_euler_table, flow_sde_table
from motionrft.generators.acmdm_autoencoder import (
    FRAMES_PER_LATENT,
    ACMDMLatentConfig,
    CausalAutoencoder,
    LatentSpace,
    released_latent,
)
from motionrft.generators.acmdm_network import ACMDM, ACMDMConfig, released
from motionrft.generators.base import Build, Generator, Training, mean_over_frames
from motionrft.representations.normalize import Moments

__all__ = ["ACMDM", "ACMDMConfig", "ACMDMGenerator", "ACMDMLatentConfig", "released", "released_latent"]

_AXES = 3
_MIN_STD = 1e-6  # of a latent channel that never moves


class ACMDMGenerator(Generator):
    """Generator whose state is normalised joints (T, J, 3), or standardised latents (ceil(T / 4), J, C).

    With an `ACMDMLatentConfig` the auto-encoder and the statistics of its latents are frozen parts, and there is a
    stage "autoencoder". A noise-aware reward can read the noisy state of a raw model; that of a latent model reaches
    it decoded, which is not the noise such a reward was trained on: score latent models by `x0_hat`.

    Differs: the sampler is Euler's; the published adaptive one couples the samples of a batch and has no gradient.

    Args:
        build: identity, statistics, sampler; the size of the sentence vectors replaces the config's.
        config: sizes; its class says raw or latent.
        guidance: overrides the spec's scale.
        network: an existing network to use; default: a new one from torch's global generator.
    """

    config: ACMDMConfig

    def __init__(
        self, build: Build, config: ACMDMConfig, guidance: float | None = None, network: ACMDM | None = None
    ) -> None:
        config = replace(config, text_dim=build.pooled_dim)
        latent = isinstance(config, ACMDMLatentConfig)
        self.frames_per_state = FRAMES_PER_LATENT if latent else 1
        channels = config.latent_channels if isinstance(config, ACMDMLatentConfig) else _AXES
        if network is None:
            longest = -(-build.spec.max_frames // self.frames_per_state)
            network = ACMDM(build.normalizer.mean.shape[0] // _AXES, channels, longest, config)
        frozen = LatentSpace(config) if isinstance(config, ACMDMLatentConfig) else None
        super().__init__(build, config, network, frozen=frozen, guidance=guidance)
        self.joints, self.channels, self.is_latent = network.joints, channels, latent

    @property
    def space(self) -> LatentSpace:
        """The frozen latent space of a latent model."""
        return cast(LatentSpace, self.frozen)

    def state_lengths(self, lengths_B: Tensor) -> Tensor:
        """Return how many state frames hold a valid frame, (B,) int64."""
        return (lengths_B + self.frames_per_state - 1) // self.frames_per_state

    def _shape(self, num_frames: int) -> tuple[int, ...]:
        return (-(-num_frames // self.frames_per_state), self.joints, self.channels)

    def _table(self, num_steps: int) -> SolverTable:
        return flow_euler_table(num_steps)

    def _stochastic_table(self, num_steps: int, noise: float) -> SolverTable:
        return flow_sde_table(num_steps, noise)

    def decode(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Return joint positions (B, T, D) in metres, zeros beyond each length; differentiable.

        T is L for raw models, the largest length for latent ones.
        """
        if self.is_latent:
            state = self.space.decode(state)[:, : int(lengths_B.max())]
        return self.normalizer.denormalise(state.flatten(2), valid_mask(lengths_B, state.shape[1]))

    @torch.no_grad()
    def encode(self, motion_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the clean state (B, L, J, C) of joint positions in metres.

        Raw: zeros beyond each length. Latent: a last latent of fewer than 4 frames sees the last frame repeated.
        """
        if self.is_latent:
            return self.space.encode(self._held(motion_BTD, lengths_B))
        mask_BT = valid_mask(lengths_B, motion_BTD.shape[1])
        return self.normalizer.normalise(motion_BTD, mask_BT).unflatten(2, (-1, _AXES))

    def _held(self, motion_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return normalised joints (B, 4 L, J, 3) whose last valid frame stays until the end."""
        frames = FRAMES_PER_LATENT * self._shape(motion_BTD.shape[1])[0]
        index_BT = torch.arange(frames, device=lengths_B.device).minimum(lengths_B[:, None] - 1)
        x = self.normalizer.normalise(motion_BTD)
        return x.gather(1, index_BT[..., None].expand(-1, -1, x.shape[2])).unflatten(2, (-1, _AXES))

    def pretrain_loss(
        self, network: Callable[..., Tensor], batch: MotionBatch, step: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses (B,) of the flow, and detached means for the log.

        Loss: mean over valid state frames, joints and channels of (v - (x1 - noise))^2 at the state
        t x1 + (1 - t) noise, t uniform; networks that give a clean state are judged by its error instead. Added is
        `frame_weight` times the same of frame differences. Time, noise and caption dropout depend on (seed, step,
        sample key) only.

        Differs: upstream averages over the frames of the whole batch, so long clips count more; here clips count alike.

        Args:
            network: the model's network, or the engine around it.
            batch: clips as joint positions.
            step: batch index of the run.
            seed: run seed.
        """
        x1 = self.encode(batch.motions[Representation.JOINT], batch.lengths_B)
        t_B, keep_B, noise = self.draws(x1, batch, step, seed)
        x_t = flow_state(x1, noise, t_B)
        out = self.call(network, x_t, t_B, batch.prompt, keep_B, batch.lengths_B)
        clean = self.config.output == "clean"
        error = out * flow_remaining(out, t_B) - (x1 - x_t) if clean else out - (x1 - noise)
        mask_BL = valid_mask(self.state_lengths(batch.lengths_B), x1.shape[1])
        loss_B = mean_over_frames(error.square().mean((2, 3)), mask_BL)
        metrics = {f"loss/{self.config.output}": loss_B.detach().mean()}
        if self.config.frame_weight:
            change_B = mean_over_frames((error[:, 1:] - error[:, :-1]).square().mean((2, 3)), mask_BL[:, 1:])
            loss_B = loss_B + self.config.frame_weight * change_B
            metrics["loss/change"] = change_B.detach().mean()
        return loss_B, metrics

    def autoencoder_loss(
        self, network: Callable[..., Tensor], batch: MotionBatch, step: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses (B,) of stage "autoencoder" and detached means for the log.

        Loss: smooth L1 (quadratic below 1) of the reconstructed normalised joints, mean over valid frames. Arguments as
        `pretrain_loss`; nothing is drawn.
        """
        del step, seed
        motion = self._held(batch.motions[Representation.JOINT], batch.lengths_B)
        error_BT = smooth_l1_loss(network(motion), motion, reduction="none").mean((2, 3))
        loss_B = mean_over_frames(error_BT, valid_mask(batch.lengths_B, motion.shape[1]))
        return loss_B, {"loss/reconstruction": loss_B.detach().mean()}

    def training(self, stage: str, teacher: Generator | None = None) -> Training:
        """Return how a stage of `config.stages` trains.

        Raises:
            ConfigError: a stage this family does not have, or a variational auto-encoder.
        """
        if stage != "autoencoder" or not self.is_latent:
            return super().training(stage, teacher)
        if cast(ACMDMLatentConfig, self.config).variational:
            raise ConfigError(
                explain(
                    "a plain auto-encoder", "variational=true", "stage 'autoencoder'", "Train with variational=false."
                )
            )
        return Training(self.space.autoencoder, self.autoencoder_loss)

    @torch.no_grad()
    def finish(self, stage: str, batches: list[MotionBatch]) -> None:
        """Measure mean and std of the latents per channel, after stage "autoencoder"."""
        if stage != "autoencoder" or not self.is_latent:
            return
        autoencoder: CausalAutoencoder = self.space.autoencoder
        was_training = autoencoder.training
        autoencoder.eval()
        parts = []
        for batch in batches:
            z = autoencoder.encode(self._held(batch.motions[Representation.JOINT], batch.lengths_B))
            valid = z[valid_mask(self.state_lengths(batch.lengths_B), z.shape[1])]
            parts.append(Moments.of(valid.flatten(0, 1)))
        autoencoder.train(was_training)
        moments = Moments.merge_all(parts)
        self.space.mean.copy_(moments.mean)
        self.space.std.copy_(moments.std().clamp(min=_MIN_STD))
