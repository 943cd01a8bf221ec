"""MLD family: diffusion in the latent space of a motion autoencoder with noise prediction (MLD, MLD v1, MLD++).

Letters: B batch, T frames, D features, N latent tokens, d features per latent token, C text features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from motionrft.core.errors import ConfigError, explain
from motionrft.core.protocols import SolverTable
from motionrft.core.rng import keyed_normal
from motionrft.core.types import Condition, MotionBatch, Representation, valid_mask
from motionrft.diffusion.prediction import add_noise
from motionrft.diffusion.schedules import alpha_bars, spaced_timesteps
from motionrft.diffusion.solvers import ddim_table
from motionrft.generators.base import Build, Generator, ModelConfig, Training, mean_over_frames
from motionrft.generators.mld_network import LatentSizes, MLDDenoiser
from motionrft.generators.mld_vae import LatentSpace
from motionrft.representations.kinematic import kinematic_to_joints

__all__ = ["MLDPP", "OFFICIAL", "ORIGINAL", "LatentGenerator", "MLDConfig", "MLDGenerator"]

_LORA_TARGETS = {"blocks": r"encoder\..*\.(out_proj|linear1|linear2)", "all": ".*"}


@dataclass(frozen=True)
class MLDConfig(LatentSizes, ModelConfig):
    """Sizes and training. Defaults are the small model; published: `ORIGINAL` (CLIP), `OFFICIAL` (v1), `MLDPP`."""

    family = "mld"
    representations = (Representation.KINEMATIC,)
    prediction = "eps"
    solvers = ("ddim",)
    default_guidance = 7.5
    stages = ("autoencoder", "generator")
    needs_null = True
    lora_targets = _LORA_TARGETS

    text_dropout: float = 0.1
    """Probability of training a clip with the empty caption, for classifier-free guidance."""
    joint_weight: float = 1.0
    """Weight of the joint error in the autoencoder's loss. Joints have the data's unit: KIT-ML has about 640 per metre.
    """
    kl_weight: float = 1e-4
    """Weight of the divergence from a standard normal in the autoencoder's loss."""
    scale_latents: bool = True
    """Bring latents to unit variance, measured when the autoencoder is finished. Released models do not."""
    spare_positions: bool = False
    """Export the position table that files of the original MLD hold and nothing reads."""

    def problems(self) -> list[str]:
        """Return what contradicts itself."""
        weights = [(getattr(self, name), name) for name in ("joint_weight", "kl_weight")]
        rules = [(value >= 0, f"{name} must be >= 0, got {value}") for value, name in weights]
        rules += [(0 <= self.text_dropout < 1, f"text_dropout must be in [0, 1), got {self.text_dropout}")]
        return super().problems() + [message for holds, message in rules if not holds]


OFFICIAL = MLDConfig(
    latent_tokens=1,
    latent_dim=256,
    width=256,
    layers=9,
    heads=4,
    ff=1024,
    dropout=0.1,
    text_dim=768,
    text_gain=1.0,
    text_relu=True,
    time_dim=768,
    smooth_positions=False,
    scale_latents=False,
)
ORIGINAL = replace(OFFICIAL, spare_positions=True)
MLDPP = replace(OFFICIAL, latent_tokens=16, latent_dim=32, text_relu=False)


class LatentGenerator(Generator):
    """Base of the families whose state is a motion's latent, (N, d) whatever its length.

    The autoencoder, the latent scale and what else is not trained lie in `frozen`, a `LatentSpace`.

    Args:
        build: identity, statistics, sampler.
        config: sizes and variant.
        network: the denoiser.
        latents: the latent space.
        guidance: overrides the spec's scale.

    Raises:
        ConfigError: more frames than the autoencoder has positions for, or what `Generator` refuses.
    """

    def __init__(
        self,
        build: Build,
        config: LatentSizes,
        network: MLDDenoiser,
        latents: LatentSpace,
        guidance: float | None = None,
    ) -> None:
        super().__init__(build, config, network, frozen=latents, guidance=guidance)  # type: ignore[arg-type]
        self.latents = latents
        # Published models were trained on this rounding.
        self.alpha_bar = alpha_bars("scaled_linear", self.spec.train_steps, dtype=torch.float32)  # (N,) float64, CPU
        longest = config.frames_per_token * (config.positions - 2 * config.latent_tokens)
        if self.spec.max_frames > longest:
            raise ConfigError(
                explain(
                    f"at most {longest} frames",
                    f"max_frames {self.spec.max_frames}",
                    f"{self.spec.family} generator",
                    "Raise model.positions, or lower max_frames.",
                )
            )

    def _shape(self, num_frames: int) -> tuple[int, ...]:
        del num_frames  # only decoding knows the length
        return (self.config.latent_tokens, self.config.latent_dim)

    def state_mask(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Return all True, (B, 1, 1): every entry of a latent is read."""
        del lengths_B
        return torch.ones(len(state), 1, 1, dtype=torch.bool, device=state.device)

    def decode(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Return physical features (B, T, D) of latents, T the largest length, zeros beyond each; differentiable."""
        motion = self.latents.decode(state, lengths_B).to(torch.float32)
        return self.normalizer.denormalise(motion, valid_mask(lengths_B, motion.shape[1]))

    def encode(self, motion_BTD: Tensor, lengths_B: Tensor, noise_BNd: Tensor | None = None) -> Tensor:
        """Return states (B, N, d) of physical features: posterior samples, or means without noise."""
        mask_BT = valid_mask(lengths_B, motion_BTD.shape[1])
        return self.latents.encode(self.normalizer.normalise(motion_BTD, mask_BT), lengths_B, noise_BNd)

    @torch.no_grad()
    def sampled_states(self, batch: MotionBatch, *draw: int | str) -> Tensor:
        """Return posterior samples (B, N, d) of a batch, keyed by sample and `draw`."""
        noise = keyed_normal(batch.keys_B, self._shape(1), "latent", *draw)
        return self.encode(batch.motions[self.spec.representation], batch.lengths_B, noise)


class MLDGenerator(LatentGenerator):
    """Latent diffusion guided by the caption against the empty caption, whose features lie in `frozen`.

    Args:
        build: identity, statistics, sampler, empty caption; the size of its sentence vectors replaces the config's.
        config: sizes and training.
        guidance: overrides the spec's scale.
    """

    config: MLDConfig

    def __init__(self, build: Build, config: MLDConfig, guidance: float | None = None) -> None:
        config = replace(config, text_dim=build.pooled_dim)
        null_C = torch.zeros(build.pooled_dim) if build.null is None else build.null.pooled_BD[0]
        latents = LatentSpace(build.normalizer.mean.shape[0], config, null_C)
        super().__init__(build, config, MLDDenoiser(config), latents, guidance)

    def _table(self, num_steps: int) -> SolverTable:
        return self._stochastic_table(num_steps, self.eta)

    def _stochastic_table(self, num_steps: int, noise: float) -> SolverTable:
        timesteps = spaced_timesteps(self.spec.train_steps, num_steps, "leading")
        return ddim_table(self.alpha_bar, timesteps, "eps", noise, float(self.alpha_bar[0]))

    def call(
        self,
        network: Callable[..., Tensor],
        x: Tensor,
        t_B: Tensor,
        condition: Condition,
        keep_B: Tensor,
        lengths_B: Tensor,
    ) -> Tensor:
        """Return the noise estimate (B, N, d); rows whose keep is False read the empty caption."""
        del lengths_B
        return network(x, t_B, torch.where(keep_B[:, None], condition.pooled_BD, self.latents.null))

    def pretrain_loss(
        self, network: Callable[..., Tensor], batch: MotionBatch, step: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses (B,) of denoising training, the mean of (eps_hat - eps)^2, and means for the log.

        Latent sample, time, noise and caption dropout depend on (seed, step, sample key) only.
        """
        z = self.sampled_states(batch, seed, "pretrain", step)
        u_B, keep_B, noise = self.draws(z, batch, step, seed)
        t_B = self.timesteps(u_B)
        x_t = add_noise(z, noise, self.alpha_bar.to(z.device)[t_B])
        out = self.call(network, x_t, t_B, batch.prompt, keep_B, batch.lengths_B)
        loss_B = (out - noise).square().mean((1, 2))
        return loss_B, {"loss/noise": loss_B.detach().mean()}

    def training(self, stage: str, teacher: Generator | None = None) -> Training:
        """Return how a stage trains: "autoencoder" first, then "generator" on its latents."""
        if stage != "autoencoder":
            return super().training(stage, teacher)
        return Training(self.latents.vae.train(), self.autoencoder_loss)

    def autoencoder_loss(
        self, network: Callable[..., Any], batch: MotionBatch, step: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses (B,) of the autoencoder and means for the log.

        SmoothL1 of normalised features + `joint_weight` SmoothL1 of the joints they describe, both means over valid
        frames, + `kl_weight` KL(q(z | x) || N(0, 1)), mean over the latent. The latent sample is keyed.

        Args:
            network: the autoencoder, or the engine around it.
            batch: clips in the generator's representation.
            step: batch index of the run.
            seed: run seed.
        """
        motion, lengths_B = batch.motions[self.spec.representation], batch.lengths_B
        mask_BT = valid_mask(lengths_B, motion.shape[1])
        x = self.normalizer.normalise(motion, mask_BT)
        noise = keyed_normal(batch.keys_B, self._shape(1), "latent", seed, "autoencoder", step)
        out, mean, logvar = network(x, lengths_B, noise)
        features_B = mean_over_frames(smooth_l1_loss(out, x, reduction="none").mean(-1), mask_BT)
        found, real = (kinematic_to_joints(m).flatten(2) for m in (self.normalizer.denormalise(out), motion))
        joints_B = mean_over_frames(smooth_l1_loss(found, real, reduction="none").mean(-1), mask_BT)
        kl_B = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean((1, 2))
        loss_B = features_B + self.config.joint_weight * joints_B + self.config.kl_weight * kl_B
        parts = {"features": features_B, "joints": joints_B, "kl": kl_B}
        return loss_B, {f"loss/{name}": value.detach().mean() for name, value in parts.items()}

    @torch.no_grad()
    def finish(self, stage: str, batches: list[MotionBatch]) -> None:
        """Measure the scale that brings the latents of a finished autoencoder to unit variance."""
        if stage != "autoencoder" or not self.config.scale_latents:
            return
        vae = self.latents.vae
        was_training = vae.training
        vae.eval()
        means, variances = [], []
        for batch in batches:
            motion = batch.motions[self.spec.representation]
            x = self.normalizer.normalise(motion, valid_mask(batch.lengths_B, motion.shape[1]))
            mean, logvar = vae.encode(x, batch.lengths_B)
            means.append(mean)
            variances.append(logvar.exp())
        vae.train(was_training)
        variance = torch.cat(means).double().var(unbiased=False) + torch.cat(variances).double().mean()
        self.latents.scale.copy_(variance.rsqrt())
