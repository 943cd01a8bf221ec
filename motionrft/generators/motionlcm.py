"""MotionLCM: latent consistency models distilled from MLD, one to a few steps, guidance as an input of the network.

Letters: B batch, N latent tokens, d features per latent token, S denoising steps, K points of the training grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, explain
from motionrft.core.protocols import SolverTable
from motionrft.core.types import Condition, MotionBatch, Representation
from motionrft.diffusion.solvers import lcm_table
from motionrft.generators.base import Build, Generator, ModelConfig, Training
from motionrft.generators.mld import MLDPP, LatentGenerator, MLDConfig, MLDGenerator
from motionrft.generators.mld import OFFICIAL as MLD_OFFICIAL
from motionrft.generators.mld_network import LatentSizes, MLDDenoiser, guidance_embedding
from motionrft.generators.mld_vae import LatentSpace
from motionrft.generators.motionlcm_distill import Distillation, grid_times

__all__ = ["LCM_V1", "LCM_V2", "MotionLCMConfig", "MotionLCMGenerator"]

# The last step of four is done twice at the same time, as published.
_TUNED_TIMES = {1: (799,), 2: (699, 299), 4: (699, 399, 299, 299)}
_TUNED_GUIDANCE = {1: 8.0, 2: 12.5, 4: 13.5}


@dataclass(frozen=True)
class MotionLCMConfig(LatentSizes, ModelConfig):
    """Sizes, sampling and distillation. Defaults are the small model; `LCM_V1` and `LCM_V2` are the published ones."""

    family = "motionlcm"
    representations = (Representation.KINEMATIC,)
    prediction = "eps"
    solvers = ("lcm",)
    default_guidance = 7.5
    stages = ("distill",)
    lora_targets = MLDConfig.lora_targets

    guidance_dim: int = 64
    """Size of the guidance embedding; 256 in the released models."""
    sampling: str = "grid"
    """"grid": S times spread over the training grid, one guidance scale. "tuned": the hand-picked times and scales of
    version 2, for 1, 2 or 4 steps; a guidance other than the family's default replaces the scales."""
    grid_points: int = 50
    """Points K of the training grid, N / K diffusion steps apart; 50 in version 1, 10 in version 2."""
    huber: float = 0.001
    """Width c of the pseudo-Huber distance sqrt(x^2 + c^2) - c; 0.5 in version 2."""
    target_decay: float = 0.95
    """Share that the target network keeps of itself at every step."""
    min_guidance: float = 5.0
    """Weakest guidance w = scale - 1 that is learned."""
    max_guidance: float = 15.0
    """Strongest guidance w = scale - 1 that is learned."""

    def problems(self) -> list[str]:
        """Return what contradicts itself."""
        rules = [
            (
                self.guidance_dim >= 4 and self.guidance_dim % 2 == 0,
                f"guidance_dim must be even and >= 4, got {self.guidance_dim}",
            ),
            (self.sampling in ("grid", "tuned"), f"sampling must be grid or tuned, got {self.sampling!r}"),
            (self.grid_points >= 1, f"grid_points must be >= 1, got {self.grid_points}"),
            (self.huber > 0, f"huber must be positive, got {self.huber}"),
            (0 <= self.target_decay < 1, f"target_decay must be in [0, 1), got {self.target_decay}"),
            (
                0 <= self.min_guidance <= self.max_guidance,
                f"need 0 <= min_guidance <= max_guidance, got {self.min_guidance} and {self.max_guidance}",
            ),
        ]
        return super().problems() + [message for holds, message in rules if not holds]


def _sizes(config: LatentSizes) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(LatentSizes)}


LCM_V1 = MotionLCMConfig(**_sizes(MLD_OFFICIAL), guidance_dim=256)
LCM_V2 = MotionLCMConfig(**_sizes(MLDPP), guidance_dim=256, sampling="tuned", grid_points=10, huber=0.5)


class MotionLCMGenerator(LatentGenerator):
    """Consistency model over latents. Each step's model time is a row (t, guidance scale): scales may depend on S.

    Args:
        build: identity, statistics, sampler; the size of its sentence vectors replaces the config's.
        config: sizes, sampling and distillation.
        guidance: overrides the spec's scale. It is an input of the network: no second call, whatever the scale.
    """

    config: MotionLCMConfig

    def __init__(self, build: Build, config: MotionLCMConfig, guidance: float | None = None) -> None:
        config = replace(config, text_dim=build.pooled_dim)
        latents = LatentSpace(build.normalizer.mean.shape[0], config)
        super().__init__(build, config, MLDDenoiser(config, config.guidance_dim), latents, guidance)
        steps = self.spec.train_steps
        if config.grid_points > steps or (config.sampling == "tuned" and steps != 1000):
            raise ConfigError(
                explain(
                    "1000 diffusion steps for sampling=tuned, and at least grid_points",
                    f"train_steps {steps}, grid_points {config.grid_points}",
                    f"{self.spec.family} generator",
                    "Change train_steps, model.sampling or model.grid_points.",
                )
            )

    def _table(self, num_steps: int) -> SolverTable:
        points, scale = self.config.grid_points, self.guidance
        if self.config.sampling == "tuned":
            self._require_steps(num_steps in _TUNED_TIMES, f"one of {tuple(_TUNED_TIMES)} denoising steps", num_steps)
            times = torch.tensor(_TUNED_TIMES[num_steps])
            scale = _TUNED_GUIDANCE[num_steps] if scale == self.config.default_guidance else scale
        else:
            self._require_steps(num_steps <= points, f"1 to {points} denoising steps", num_steps)
            times = grid_times(self.spec.train_steps, points).flip(0)[torch.arange(num_steps) * points // num_steps]
        rows = torch.stack([times.double(), torch.full((num_steps,), scale, dtype=torch.float64)], dim=-1)
        return replace(lcm_table(self.alpha_bar, times), model_time=rows[:, None])

    def _stochastic_table(self, num_steps: int, noise: float) -> SolverTable:
        del noise  # every step but the last makes all noise anew
        return self._table(num_steps)

    def _require_steps(self, holds: bool, expected: str, got: int) -> None:
        if not holds:
            where = f"{self.spec.family} generator, sampling={self.config.sampling}"
            raise ConfigError(explain(expected, str(got), where, "Change sampling_steps, or use model.sampling=grid."))

    def predict(
        self, network: Callable[..., Tensor], x: Tensor, t: Tensor, condition: Condition, lengths_B: Tensor
    ) -> Tensor:
        """Return the noise estimate (B, N, d).

        Args:
            network: module or engine to run.
            x: latents (B, N, d).
            t: rows (t, guidance scale), (1, 2) or (B, 2); or times alone, 0-dim or (B,), at the generator's own scale.
            condition: captions.
            lengths_B: not read; only decoding knows the length.
        """
        del lengths_B
        time, scale = t.unbind(-1) if t.dim() == 2 else (t, torch.full_like(t, self.guidance, dtype=torch.float64))
        guidance_BG = guidance_embedding((scale - 1.0).expand(len(x)), self.config.guidance_dim)
        return network(x, time.long().expand(len(x)), condition.pooled_BD, guidance_BG)

    def conditional(
        self, network: Callable[..., Tensor], x: Tensor, t: Tensor, condition: Condition, lengths_B: Tensor
    ) -> Tensor:
        """Return what `predict` does: guidance is an input of this network, which never learned to go without."""
        return self.predict(network, x, t, condition, lengths_B)

    def training(self, stage: str, teacher: Generator | None = None) -> Training:
        """Return how stage "distill" learns from an MLD generator, whose weights and latent space it starts with.

        Raises:
            ConfigError: another stage, or a teacher of another family, size, text encoder or statistics.
        """
        where = f"{self.spec.family} generator"
        if stage != "distill":
            raise ConfigError(explain(f"a stage of {self.config.stages}", repr(stage), where, "Change it."))
        if not isinstance(teacher, MLDGenerator):
            got = "none" if teacher is None else f"family {teacher.spec.family!r}"
            raise ConfigError(explain("a teacher of family 'mld'", got, where, "Name the folder of an MLD generator."))
        own, theirs = self._identity(self), self._identity(teacher)
        other = [name for name in own if own[name] != theirs[name]]
        if other:
            got = ", ".join(f"{name} {theirs[name]}" for name in other)
            expected = ", ".join(f"{name} {own[name]}" for name in other)
            raise ConfigError(explain(expected, got, f"teacher of the {where}", "Give both the same generator.model."))
        weights = self.network.state_dict()
        self.network.load_state_dict({**weights, **teacher.network.state_dict()})  # cond_proj stays at zero
        self.latents.load_state_dict(
            {name: t for name, t in teacher.latents.state_dict().items() if name != "null"}, strict=True
        )
        config = self.config
        distillation = Distillation(
            self.network,
            teacher,
            points=config.grid_points,
            huber=config.huber,
            decay=config.target_decay,
            guidance=(config.min_guidance, config.max_guidance),
            guidance_dim=config.guidance_dim,
        )
        return Training(self.network, distillation.loss, {"target": distillation}, distillation.after_step)

    @staticmethod
    def _identity(generator: LatentGenerator) -> dict[str, Any]:
        """Return what teacher and student must share: sizes, data statistics, text features, schedule."""
        only_training = ("dropout", "smooth_positions")
        sizes = {name: value for name, value in _sizes(generator.config).items() if name not in only_training}
        spec = generator.spec
        return {
            **sizes,
            "statistics": generator.normalizer.fingerprint[:12],
            "text encoder": spec.text_encoder,
            "train_steps": spec.train_steps,
        }

    def pretrain_loss(
        self, network: Callable[..., Tensor], batch: MotionBatch, step: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Refuse: a consistency model is distilled.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            explain("stage 'distill'", "'generator'", "motionlcm generator", "Train family mld first, then distil it.")
        )
