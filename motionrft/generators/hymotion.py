"""HY-Motion family: flow matching on rotation features, conditioned on text tokens and a sentence vector.

Path x_t = (1 - t) noise + t x_1, velocity x_1 - noise, Euler steps from t = 0 to 1. Letters: B batch, T motion frames,
M model frames (those of the state; another number where the model's frame rate is another), D features of the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from motionrft.core.errors import ConfigError, explain
from motionrft.core.protocols import SolverTable
from motionrft.core.types import MotionBatch, Representation, valid_mask
from motionrft.diffusion.prediction import flow_remaining, flow_state
from motionrft.diffusion.solvers import flow_euler_table, flow_sde_table
from motionrft.generators.base import Build, Generator, mean_over_frames
from motionrft.generators.hymotion_network import FULL, LITE, HYMotion, HYMotionConfig
from motionrft.representations.layouts import rotation_to_hymotion
from motionrft.representations.normalize import Normalizer
from motionrft.representations.rotation import matrices_to_rotation, rotation_to_matrices

__all__ = ["FULL", "LITE", "FrozenFeatures", "HYMotion", "HYMotionConfig", "HYMotionGenerator"]

_CONSTANT = 1e-3
"""Features of the state with a smaller standard deviation are constant: always their mean, and not learned."""
_JOINT_STD_M = 0.3  # joints from the pelvis, where no statistics are known


class FrozenFeatures(nn.Module):
    """Statistics (D,) of the state, and the source features that released checkpoints hold and nothing here reads."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalizer: Normalizer, config: HYMotionConfig) -> None:
        super().__init__()
        mean, std = normalizer.mean.clone(), normalizer.std.clone()
        mean[:3] -= torch.tensor(config.rest_pelvis)
        extra = config.features - len(mean)
        if extra:
            mean, std = pad(mean, (0, extra)), pad(std, (0, extra), value=_JOINT_STD_M)
            std[len(normalizer.std) : len(normalizer.std) + 3] = 0.0  # the pelvis seen from the pelvis
            self.register_buffer("special_game_vtxt_feat", torch.zeros(1, 1, config.pooled_dim))
            self.register_buffer("special_game_ctxt_feat", torch.zeros(1, 1, config.token_dim))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @property
    def learned_D(self) -> Tensor:
        """(D,) bool: features that vary."""
        return self.std >= _CONSTANT

    def normalise(self, x: Tensor) -> Tensor:
        """Return features (..., D) as the network reads them; constant ones are only centred."""
        return (x - self.mean) / torch.where(self.learned_D, self.std, 1.0)

    def denormalise(self, x: Tensor) -> Tensor:
        """Return features (..., D) of a state; constant ones are their mean whatever the state says."""
        return x * torch.where(self.learned_D, self.std, 0.0) + self.mean


class HYMotionGenerator(Generator):
    """Generator whose state is the normalised motion at the model's frame rate, (M, D).

    Args:
        build: identity, statistics, sampler; the sizes of the text features replace the config's.
        config: sizes and variant of the network.
        guidance: overrides the spec's scale.
        network: an existing network to use; default: a new one from torch's global generator.

    Raises:
        ConfigError: also where motions can be longer than what the network is made for.
    """

    config: HYMotionConfig
    frozen: FrozenFeatures

    def __init__(
        self, build: Build, config: HYMotionConfig, guidance: float | None = None, network: HYMotion | None = None
    ) -> None:
        config = replace(config, token_dim=build.token_dim, pooled_dim=build.pooled_dim)
        network = HYMotion(config) if network is None else network
        frozen = FrozenFeatures(build.normalizer, config)
        super().__init__(build, config, network, frozen=frozen, guidance=guidance)
        same = config.native_fps == 0 or config.fps_mode == "upstream"
        self.rate = 1.0 if same else config.native_fps / self.spec.fps  # model frames per motion frame
        if round(self.rate * self.spec.max_frames) > config.train_frames:
            raise ConfigError(
                explain(
                    f"at most {int(config.train_frames / self.rate)} frames of {self.spec.fps:g} per second",
                    f"max_frames {self.spec.max_frames}",
                    f"hymotion with train_frames {config.train_frames}",
                    "Lower generator.max_frames, or train a model with more train_frames.",
                )
            )

    def state_lengths(self, lengths_B: Tensor) -> Tensor:
        """Return how many model frames stand for so many motion frames, int64."""
        scaled = (lengths_B.double() * self.rate).round().long()
        return scaled.clamp(self.config.min_frames, self.config.train_frames)

    def state_mask(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Return (B, M, D) bool, True in the clip's model frames for features that vary: constant ones are not read."""
        return super().state_mask(state, lengths_B) & self.frozen.learned_D

    def _shape(self, num_frames: int) -> tuple[int, ...]:
        return (int(self.state_lengths(torch.tensor(num_frames))), self.config.features)

    def _table(self, num_steps: int) -> SolverTable:
        return flow_euler_table(num_steps)

    def _stochastic_table(self, num_steps: int, noise: float) -> SolverTable:
        return flow_sde_table(num_steps, noise)

    def decode(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Return physical features (B, T, 135) of a clean state, zeros beyond each length; differentiable."""
        motion = self.frozen.denormalise(state)[..., : Representation.ROTATION.dim]
        motion = motion + pad(motion.new_tensor(self.config.rest_pelvis), (0, motion.shape[-1] - 3))
        frames = int(lengths_B.max())
        if self.rate == 1.0:
            motion = motion[:, :frames]
        else:
            motion = self._read(motion, frames, self.rate, self.state_lengths(lengths_B))
        return torch.where(valid_mask(lengths_B, motion.shape[1])[..., None], motion, 0.0)

    def encode(self, motion_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state (B, M, D) of motion, zeros beyond each clip's model frames.

        Model frame m is read at motion frame m / `rate`; the last frame is held until the last model frame.
        """
        frames = self._shape(motion_BTD.shape[1])[0]
        motion = self._read(motion_BTD, frames, 1.0 / self.rate, lengths_B)
        motion = motion - pad(motion.new_tensor(self.config.rest_pelvis), (0, motion.shape[-1] - 3))
        state = self.frozen.normalise(rotation_to_hymotion(motion) if self.config.joint_positions else motion)
        return torch.where(valid_mask(self.state_lengths(lengths_B), frames)[..., None], state, 0.0)

    def _read(self, motion: Tensor, frames: int, pace: float, lengths_B: Tensor) -> Tensor:
        """Return (B, frames, 135): frame i is frame `pace` i of the motion (B, ..., 135), held after `lengths_B`.

        Between frames it is linear, then rotations are made orthonormal again.
        """
        place_T = torch.arange(frames, device=motion.device, dtype=torch.float64) * pace
        last_B1 = (lengths_B - 1)[:, None]
        place_BT = torch.minimum(place_T[None], last_B1.double())
        before = place_BT.floor()
        share = (place_BT - before).to(motion.dtype)[..., None]
        index = before.long()[..., None].expand(-1, -1, motion.shape[2])
        after = torch.minimum(index + 1, last_B1[..., None])
        between = torch.lerp(motion.gather(1, index), motion.gather(1, after), share)
        return between if pace == 1.0 else matrices_to_rotation(*rotation_to_matrices(between))

    def pretrain_loss(
        self, network: Callable[..., Tensor], batch: MotionBatch, step: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses (B,) of flow matching, and detached means for the log.

        Loss: mean over valid model frames and varying features of (v - (x_1 - noise))^2 at x_t, t uniform in [0, 1).
        Time, noise and caption dropout depend on (seed, step, sample key) only.

        Args:
            network: the model's network, or the engine around it.
            batch: clips; brought to the model's frame rate.
            step: batch index of the run.
            seed: run seed.
        """
        x1 = self.encode(batch.motions[self.spec.representation], batch.lengths_B)
        t_B, keep_B, noise = self.draws(x1, batch, step, seed)
        x_t = flow_state(x1, noise, t_B)
        out = self.call(network, x_t, t_B, batch.prompt, keep_B, batch.lengths_B)
        clean = self.config.output == "clean"
        error = out * flow_remaining(out, t_B) - (x1 - x_t) if clean else out - (x1 - noise)
        error = error[..., self.frozen.learned_D]
        mask_BT = valid_mask(self.state_lengths(batch.lengths_B), x1.shape[1])
        value_B = mean_over_frames(error.square().mean(-1), mask_BT)
        change_B = mean_over_frames((error[:, 1:] - error[:, :-1]).square().mean(-1), mask_BT[:, 1:])
        loss_B = value_B + self.config.frame_weight * change_B
        return loss_B, {f"loss/{self.config.output}": value_B.detach().mean(), "loss/change": change_B.detach().mean()}
