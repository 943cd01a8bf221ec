"""MDM family: diffusion on normalised motion features with clean-motion prediction.

Letters: B batch, T frames, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from motionrft.core.types import MotionBatch, Representation
from motionrft.generators.base import Build, mean_over_frames
from motionrft.generators.mdm_network import MDM, OFFICIAL, MDMConfig
from motionrft.generators.raw import RawMotionGenerator
from motionrft.representations.kinematic_layout import layout_of

__all__ = ["MDM", "OFFICIAL", "MDMConfig", "MDMGenerator"]


class MDMGenerator(RawMotionGenerator):
    """Generator whose state is the normalised motion itself, (T, D).

    Args:
        build: identity, statistics, sampler; the size of the text features replaces the config's.
        config: sizes and variant of the network.
        guidance: overrides the spec's scale.
        network: an existing network to use; default: a new one from torch's global generator.
    """

    schedule = "cosine"
    config: MDMConfig

    def __init__(
        self, build: Build, config: MDMConfig, guidance: float | None = None, network: MDM | None = None
    ) -> None:
        config = replace(config, text_dim=build.token_dim if config.text == "tokens" else build.pooled_dim)
        network = MDM(build.normalizer.mean.shape[0], config) if network is None else network
        super().__init__(build, config, network, guidance=guidance)

    def _shape(self, num_frames: int) -> tuple[int, ...]:
        # Models without frame mask always run at their full number of frames.
        return super()._shape(num_frames if self.config.mask_frames else self.spec.max_frames)

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
        drawn = self.noisy(batch, step, seed)
        out = self.call(network, drawn.x_t, drawn.t_B, batch.prompt, drawn.keep_B, batch.lengths_B)
        error = out - drawn.x0
        x0_B = mean_over_frames(error.square().mean(-1), drawn.mask_BT)
        # Kinematic features begin with what says where the joints are; the rest follows from it.
        kinematic = self.spec.representation == Representation.KINEMATIC
        places = layout_of(self.features).joint_positions.stop if kinematic else self.features
        change = error[:, 1:, :places] - error[:, :-1, :places]
        velocity_B = mean_over_frames(change.square().mean(-1), drawn.mask_BT[:, 1:])
        loss_B = x0_B + self.config.velocity_weight * velocity_B
        return loss_B, {"loss/x0": x0_B.detach().mean(), "loss/velocity": velocity_B.detach().mean()}
