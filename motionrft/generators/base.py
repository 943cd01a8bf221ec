"""What generator families share: limits, guidance in one batch, frozen parts, and how a family is configured and built.

A family is a `ModelConfig` (sizes and variant), a network, and a `Generator` around it (state, sampler, decoding,
training objective); `registry` knows them by name. Letters: B batch, T frames, D features, S denoising steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from motionrft.core.errors import ConfigError, RepresentationError, explain
from motionrft.core.plain import variant_base
from motionrft.core.protocols import GeneratorSpec, SolverTable
from motionrft.core.rng import keyed_normal, keyed_uniform
from motionrft.core.types import Condition, MotionBatch, Representation, valid_mask
from motionrft.diffusion.guidance import double_rows, guide_captioned, guide_doubled
from motionrft.representations.normalize import Normalizer

Loss = Callable[[Callable[..., Tensor], MotionBatch, int, int], tuple[Tensor, dict[str, Tensor]]]
"""(network or engine, batch, step, seed) -> per-sample losses (B,) and detached means for the log. Every draw depends
on (seed, step, sample key) only."""


@dataclass(frozen=True)
class Training:
    """One stage of training a family from scratch: what learns, from which loss."""

    network: nn.Module
    """The module that learns; the engine wraps it."""
    loss: Loss
    """Its objective."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Further state that belongs in the stage's checkpoints (`training.loop.Stateful` by name), e.g. a target network.
    """
    after_step: Callable[[Mapping[str, Tensor], int], None] | None = None
    """Called with the whole trained tensors by name and the batches done after every optimiser step, e.g. to move a
    target network."""


@dataclass(frozen=True)
class Build:
    """What a family needs beside its sizes to make a generator."""

    spec: GeneratorSpec
    normalizer: Normalizer
    token_dim: int
    """Features per text token."""
    pooled_dim: int
    """Features of the sentence vector."""
    solver: str = ""
    """Name of the sampler; "" = the family's first."""
    eta: float = 0.0
    """Share of fresh noise of DDIM."""
    null: Condition | None = None
    """The empty caption, one row: what families without a learned or zero condition guide away from. A loaded
    checkpoint brings its own."""


@variant_base
@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variant of one family. Subclasses are the families; their defaults are the small model."""

    family: ClassVar[str]
    """Name of the family on command lines and cards."""
    representations: ClassVar[tuple[Representation, ...]]
    """What it can generate; the first is its own."""
    prediction: ClassVar[str]
    """What the network predicts: "x0", "eps" or "velocity"."""
    solvers: ClassVar[tuple[str, ...]]
    """Samplers it has; the first is the default."""
    default_guidance: ClassVar[float]
    """Guidance scale of the published model."""
    stages: ClassVar[tuple[str, ...]] = ("generator",)
    """Stages of training it from scratch, in order: "autoencoder", "generator", "distill"."""
    needs_null: ClassVar[bool] = False
    """Whether the empty caption is encoded as text (`Build.null`)."""
    lora_targets: ClassVar[Mapping[str, str]] = {}
    """Preset of low-rank fine-tuning -> regular expression that the whole name of a Linear of the network must match.
    The first is the default."""
    default_lora_rank: ClassVar[int] = 0
    """Rank of the adapters with which the family is fine-tuned unless told otherwise; 0 = all weights are."""
    kept_in_finetuning: ClassVar[tuple[str, ...]] = ()
    """Sub-modules of the network (name prefixes) that fine-tuning leaves as they are."""


class Generator(ABC):
    """Base of the families: `core.protocols.MotionGenerator` with what is the same everywhere.

    The network's forward is `network(x, t_B, tokens_BLC, mask_BL, pooled_BC, keep_B, lengths_B)`; keep_B False means
    the empty caption. `frozen` holds what is not trained with it (autoencoder, latent statistics, features of the empty
    caption) and is stored beside it.

    Args:
        build: identity (its guidance scale is the default one), statistics, sampler.
        config: sizes and variant.
        network: the trainable module.
        frozen: see above; default: nothing.
        guidance: overrides the spec's scale; 1 runs the network once per step, without the empty condition.

    Attributes:
        guidance_gradient: one of `diffusion.guidance.GRADIENTS`: which branches a gradient goes through.

    Raises:
        ConfigError: unknown solver or a spec this family cannot be.
        RepresentationError: normaliser and spec name different representations.
    """

    def __init__(
        self,
        build: Build,
        config: ModelConfig,
        network: nn.Module,
        *,
        frozen: nn.Module | None = None,
        guidance: float | None = None,
    ) -> None:
        spec, normalizer, where = build.spec, build.normalizer, f"{config.family} generator"
        solver = build.solver or config.solvers[0]
        if solver not in config.solvers:
            raise ConfigError(explain(f"a solver of {config.solvers}", repr(solver), where, "Correct the name."))
        if spec.prediction != config.prediction:
            raise ConfigError(
                explain(f"prediction {config.prediction!r}", repr(spec.prediction), where, "Correct the card.")
            )
        if spec.representation not in config.representations:
            names = [r.value for r in config.representations]
            raise RepresentationError(
                explain(f"one of {names}", repr(spec.representation.value), where, "Choose another family.")
            )
        if normalizer.representation != spec.representation:
            raise RepresentationError(
                explain(
                    f"statistics of {spec.representation.value!r}",
                    f"of {normalizer.representation.value!r}",
                    where,
                    "Load the normaliser the generator was trained with.",
                )
            )
        self.spec, self.normalizer, self.network = spec, normalizer, network
        self.config: Any = config
        self.frozen: nn.Module = (nn.Module() if frozen is None else frozen).eval().requires_grad_(False)
        self.guidance = spec.guidance_scale if guidance is None else guidance
        self.solver_name, self.eta = solver, build.eta
        self.guidance_gradient = "both"

    @property
    def features(self) -> int:
        """Feature count D of the motion."""
        return self.normalizer.mean.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """Move network, frozen parts and statistics; returns self."""
        self.network.to(device)
        self.frozen.to(device)
        self.normalizer = self.normalizer.to(device)
        return self

    def state_shape(self, num_frames: int) -> tuple[int, ...]:
        """Return the shape of one sample's state; what grows with frames comes first.

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
        return self._shape(num_frames)

    def solver(self, num_steps: int) -> SolverTable:
        """Return the sampler at S steps.

        Raises:
            ConfigError: a number of steps the sampler does not have.
        """
        self._check_steps(num_steps)
        return self._table(num_steps)

    def stochastic_solver(self, num_steps: int, noise: float) -> SolverTable:
        """Return a sampler at S steps with fresh noise at every step but perhaps the last, whatever `solver` is.

        Args:
            num_steps: S.
            noise: in (0, 1]: eta of DDIM, a of a flow's SDE; consistency sampling has its own noise.

        Raises:
            ConfigError: as `solver`.
        """
        self._check_steps(num_steps)
        return self._stochastic_table(num_steps, noise)

    def _check_steps(self, num_steps: int) -> None:
        if not 1 <= num_steps <= self.spec.train_steps:
            raise ConfigError(
                explain(
                    f"1 to {self.spec.train_steps} denoising steps",
                    str(num_steps),
                    f"generator {self.spec.family!r}",
                    "Choose fewer steps.",
                )
            )

    def state_lengths(self, lengths_B: Tensor) -> Tensor:
        """Return how many rows along the state's first axis hold a valid frame, (B,) int64."""
        return lengths_B

    def state_mask(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Return (B, L, 1, ...) bool, True where the first axis of a state (B, L, ...) belongs to the clip."""
        mask_BL = valid_mask(self.state_lengths(lengths_B), state.shape[1])
        return mask_BL.reshape(*mask_BL.shape, *[1] * (state.dim() - 2))

    def predict(
        self, network: Callable[..., Tensor], x: Tensor, t: Tensor, condition: Condition, lengths_B: Tensor
    ) -> Tensor:
        """Return the guided native output for state x (B, ...) at model time t (0-dim or (B,)).

        Caption and empty condition go through one network call of 2B rows; where a gradient is wanted and
        `guidance_gradient` is not "both", through two, the empty one without a graph.
        """
        if self.guidance == 1.0:
            return self.conditional(network, x, t, condition, lengths_B)
        t_B, keep_B = t.expand(len(x)), torch.ones(len(x), dtype=torch.bool, device=x.device)
        if self.guidance_gradient != "both" and torch.is_grad_enabled():
            with torch.no_grad():
                empty = self.call(network, x, t_B, condition, ~keep_B, lengths_B)
            captioned = self.call(network, x, t_B, condition, keep_B, lengths_B)
            return guide_captioned(captioned, empty, self.guidance, self.guidance_gradient == "caption_unscaled")
        doubled = Condition(
            double_rows(condition.tokens_BLD), double_rows(condition.mask_BL), double_rows(condition.pooled_BD)
        )
        out = self.call(
            network, double_rows(x), double_rows(t_B), doubled, torch.cat([keep_B, ~keep_B]), double_rows(lengths_B)
        )
        return guide_doubled(out, self.guidance)

    def conditional(
        self, network: Callable[..., Tensor], x: Tensor, t: Tensor, condition: Condition, lengths_B: Tensor
    ) -> Tensor:
        """Return the native output given the captions, without guidance. Arguments as `predict`."""
        keep_B = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return self.call(network, x, t.expand(len(x)), condition, keep_B, lengths_B)

    def call(
        self,
        network: Callable[..., Tensor],
        x: Tensor,
        t_B: Tensor,
        condition: Condition,
        keep_B: Tensor,
        lengths_B: Tensor,
    ) -> Tensor:
        """Return the network's output for rows with (keep_B True) and without their caption. Override to adapt.

        Lengths are those of the motion; the network is given those of the state.
        """
        # Engines in low precision round what is in single precision; networks may see a thousand times the flow time.
        t_B = t_B.double() if t_B.is_floating_point() else t_B
        rows_B = self.state_lengths(lengths_B)
        return network(x, t_B, condition.tokens_BLD, condition.mask_BL, condition.pooled_BD, keep_B, rows_B)

    def training(self, stage: str, teacher: Generator | None = None) -> Training:
        """Return how a stage of `config.stages` trains.

        Args:
            stage: its name.
            teacher: the generator that stage "distill" learns from.

        Raises:
            ConfigError: a stage this family does not have.
        """
        del teacher
        if stage != "generator":
            known = self.config.stages
            raise ConfigError(
                explain(f"a stage of {known}", repr(stage), f"{self.spec.family} generator", "Change it.")
            )
        return Training(self.network, self.pretrain_loss)

    def finish(self, stage: str, batches: list[MotionBatch]) -> None:
        """Measure what a finished stage leaves to measure (latent statistics), on some training batches."""
        del stage, batches
        return None

    def draws(self, x: Tensor, batch: MotionBatch, step: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what training draws: times (B,) in [0, 1), which captions are kept (B,), and noise like x.

        Each depends on (seed, step, sample key) only.
        """
        keys_B, draw = batch.keys_B, (seed, "pretrain", step)
        keep_B = keyed_uniform(keys_B, "text", *draw) >= self.config.text_dropout
        return keyed_uniform(keys_B, "t", *draw), keep_B, keyed_normal(keys_B, tuple(x.shape[1:]), "noise", *draw)

    def timesteps(self, u_B: Tensor) -> Tensor:
        """Return the training steps (B,) int64 that stand for uniform draws in [0, 1)."""
        steps = self.spec.train_steps
        return (u_B * steps).long().clamp(max=steps - 1)

    @abstractmethod
    def _shape(self, num_frames: int) -> tuple[int, ...]: ...

    @abstractmethod
    def _table(self, num_steps: int) -> SolverTable: ...

    @abstractmethod
    def _stochastic_table(self, num_steps: int, noise: float) -> SolverTable: ...

    @abstractmethod
    def decode(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Return physical features (B, T, D) of a clean state, zeros beyond each length; differentiable."""

    @abstractmethod
    def encode(self, motion_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the clean state (B, ...) of physical features (B, T, D) at the model's frame rate."""

    @abstractmethod
    def pretrain_loss(
        self, network: Callable[..., Tensor], batch: MotionBatch, step: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses (B,) of stage "generator" and detached means for the log. See `Loss`."""


def mean_over_frames(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each clip's mean over valid frames, (B,); 0 where there is none."""
    return torch.where(mask_BT, value_BT, 0.0).sum(1) / mask_BT.sum(1).clamp(min=1)
