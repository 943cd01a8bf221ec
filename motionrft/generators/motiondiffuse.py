"""MotionDiffuse family: diffusion on normalised motion features with noise prediction, conditioned on text tokens.

Letters: B batch, T frames, D features, S denoising steps, ab alpha_bar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from motionrft.core.errors import ConfigError, explain
from motionrft.core.types import Condition, MotionBatch
from motionrft.diffusion.prediction import output_for
from motionrft.generators.base import Build, mean_over_frames
from motionrft.generators.motiondiffuse_network import OFFICIAL, MotionDiffuse, MotionDiffuseConfig
from motionrft.generators.raw import RawMotionGenerator

__all__ = ["OFFICIAL", "MotionDiffuse", "MotionDiffuseConfig", "MotionDiffuseGenerator"]


class MotionDiffuseGenerator(RawMotionGenerator):
    """Generator whose state is the normalised motion itself, (T, D), and whose network predicts the noise in it.

    Sampling in S < N steps walks the respaced chain; the published model samples all 1000 steps.

    Fine-tuning a network whose target is the noise (the published one): the one-step clean estimate is x0_hat =
    x / sqrt(ab) - sqrt(1 / ab - 1) eps, so at the noisiest step of N = 1000 an error of the network is multiplied by
    157 (50 respaced steps: by more than 10 in the first 16 of them, by less than 2 in the last 20). A reward of x0_hat
    says little there, and its gradient is as much too large:
    - respace: 50 denoising steps for the released model (finetune.num_steps), which samples 1000;
    - train the cleaner steps: EasyTune with timesteps=last, or a curriculum that leaves the noisy end early (small
      sweep_ratio, e.g. 0.03) and a window of at most a third of the steps; ReFL and DRaFT with few last steps do so by
      themselves;
    - or score="x_prev", which is not amplified, with a reward that knows noisy motion;
    - keep the gradient clip (optim.grad_clip), which bounds what a noisy step can do.
    With target="velocity", x0_hat = sqrt(ab) x - sqrt(1 - ab) v: nothing is amplified, every step can be trained.

    Args:
        build: identity, statistics, sampler; the size of the text tokens replaces the config's.
        config: sizes and variant of the network.
        guidance: overrides the spec's scale.
        network: an existing network to use; default: a new one from torch's global generator.

    Raises:
        ConfigError: more frames than positions, or guidance of a model trained with every caption.
    """

    schedule = "linear"
    config: MotionDiffuseConfig

    def __init__(
        self,
        build: Build,
        config: MotionDiffuseConfig,
        guidance: float | None = None,
        network: MotionDiffuse | None = None,
    ) -> None:
        config = replace(config, text_dim=build.token_dim)
        network = MotionDiffuse(build.normalizer.mean.shape[0], config) if network is None else network
        super().__init__(build, config, network, guidance=guidance)
        if self.spec.max_frames > config.positions:
            raise ConfigError(
                explain(
                    f"max_frames of at most {config.positions} (generator.model.positions)",
                    str(self.spec.max_frames),
                    "motiondiffuse generator",
                    "Raise positions of a new model, or shorten the motion.",
                )
            )
        if self.guidance != 1.0 and config.text_dropout == 0:
            raise ConfigError(
                explain(
                    "guidance 1: this model was trained with every caption and knows no empty one",
                    str(self.guidance),
                    "motiondiffuse generator",
                    "Set generator.guidance=1, or train a new model with generator.model.text_dropout=0.1.",
                )
            )

    def call(
        self,
        network: Callable[..., Tensor],
        x: Tensor,
        t_B: Tensor,
        condition: Condition,
        keep_B: Tensor,
        lengths_B: Tensor,
    ) -> Tensor:
        """Return the noise that the network predicts. See `Generator.call`.

        Source: eps = sqrt(1 - ab) x + sqrt(ab) v, Progressive Distillation (Salimans and Ho), appendix D.
        """
        out = super().call(network, x, t_B, condition, keep_B, lengths_B)
        if self.config.target == "noise":
            return out
        ab = self.alpha_bar.to(x.device)[t_B.long()].reshape(-1, 1, 1)
        return (1 - ab).sqrt().to(x.dtype) * x + ab.sqrt().to(x.dtype) * out

    def pretrain_loss(
        self, network: Callable[..., Tensor], batch: MotionBatch, step: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses (B,) of denoising training, and detached means for the log.

        Loss: mean over valid frames and features of (eps_hat - eps)^2, or of (v_hat - v)^2, the same divided by ab,
        with v = sqrt(ab) eps - sqrt(1 - ab) x0. Time and noise depend on (seed, step, sample key) only.

        Args:
            network: the model's network, or the engine around it.
            batch: clips in the generator's representation.
            step: batch index of the run.
            seed: run seed.

        Differs: the published training averages over the frames of a batch, so long clips count more; here clips count
        alike, and the loss of one does not depend on the others.
        """
        text = batch.prompt
        drawn = self.noisy(batch, step, seed)
        out = network(
            drawn.x_t, drawn.t_B, text.tokens_BLD, text.mask_BL, text.pooled_BD, drawn.keep_B, batch.lengths_B
        )
        name = "eps" if self.config.target == "noise" else "v"
        ab = self.alpha_bar.to(drawn.x0.device)[drawn.t_B].reshape(-1, 1, 1).to(drawn.x0.dtype)
        wanted = output_for(drawn.x0, drawn.noise, ab, name)
        loss_B = mean_over_frames((out - wanted).square().mean(-1), drawn.mask_BT)
        return loss_B, {f"loss/{name}": loss_B.detach().mean()}
