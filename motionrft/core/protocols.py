"""What rooms may know of each other. `finetune`, `reward` and `generators` meet only here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from motionrft.core.types import Condition, Representation, RewardTerms

Item = TypeVar("Item")
Out = TypeVar("Out")


@dataclass(frozen=True)
class SolverTable:
    """One sampler as affine maps, one row per denoising step i (0 = noisiest), float64.

    x_prev = a*x + b*out + c*noise and x0_hat = p*x + q*out. Rewards can ask `noise_level` of a state times `scale`.
    """

    model_time: Tensor  # (S, ...) row i is what `predict` receives as t; (S,) unless a family needs more than a time
    a: Tensor
    b: Tensor
    c: Tensor
    p: Tensor
    q: Tensor
    noise_level: (
        Tensor  # (S + 1,) of the state before step i, sqrt(1 - alpha_bar); the last entry: after the final step
    )
    scale: Tensor | None = None
    """(S + 1,) factor by which a state becomes sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps. None = it is that already.
    """

    def __len__(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class GeneratorSpec:
    """What a checkpoint card says about a generator; checked, never guessed."""

    family: str
    representation: Representation
    fps: float
    max_frames: int
    text_encoder: str  # fingerprint of the frozen text encoder
    prediction: str  # "x0" | "eps" | "velocity"
    train_steps: int
    guidance_scale: float
    sampling_steps: int = 50  # denoising steps it is meant to be sampled with


@runtime_checkable
class MotionGenerator(Protocol):
    """A text-to-motion generator as fine-tuning sees it. The strategies cannot tell families apart.

    `network` is the trainable module and its forward is the guided prediction, so that an engine (DDP, ZeRO) can wrap
    it: network(x, t_B, condition tensors..., lengths_B) -> out. Everything else is free of parameters or frozen.
    """

    spec: GeneratorSpec
    network: nn.Module

    def state_shape(self, num_frames: int) -> tuple[int, ...]:
        """Shape of one sample's denoising state."""
        ...

    def solver(self, num_steps: int) -> SolverTable:
        """The family's sampler at `num_steps`."""
        ...

    def stochastic_solver(self, num_steps: int, noise: float) -> SolverTable:
        """A sampler with fresh noise at every step but perhaps the last; `noise` in (0, 1] says how much."""
        ...

    def predict(
        self, network: Callable[..., Tensor], x: Tensor, t: Tensor, condition: Condition, lengths_B: Tensor
    ) -> Tensor:
        """Guided native output for the state x at model time t, through `network` (bare module or engine)."""
        ...

    def conditional(
        self, network: Callable[..., Tensor], x: Tensor, t: Tensor, condition: Condition, lengths_B: Tensor
    ) -> Tensor:
        """Native output given the captions, without guidance: what training errors compare with noise or clean data."""
        ...

    def decode(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Physical features (B, T, D) of a clean state; differentiable; zeros beyond each length."""
        ...

    def encode(self, motion_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Clean state of physical features (B, T, D): what `decode` turns back. No gradient."""
        ...

    def state_mask(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        """Bool mask that broadcasts against a state, True where its entries belong to the clip."""
        ...


@runtime_checkable
class RewardModel(Protocol):
    """Named, per-sample, deterministic terms of a physical motion. Frozen; gradient through the motion only."""

    def encode_text(self, condition: Condition) -> Tensor:
        """Caption embeddings (B, E), computed once per prompt batch."""
        ...

    def embed(self, motion_BTD: Tensor, lengths_B: Tensor, representation: Representation) -> Tensor:
        """Motion embeddings (B, E) of clean motion, e.g. the similarity target."""
        ...

    def score(
        self,
        motion_BTD: Tensor,
        lengths_B: Tensor,
        representation: Representation,
        *,
        text_BE: Tensor,
        noise_level: float = 0.0,
        target_BE: Tensor | None = None,
        terms: Sequence[str],
    ) -> RewardTerms:
        """The named terms, each (B,)."""
        ...


@dataclass(frozen=True)
class StepInfo:
    """What one optimiser step did."""

    applied: bool  # False: refused because loss or gradient was not finite on some rank
    grad_norm: float  # global, before clipping
    lr: float


class Engine(Protocol):
    """How a step is taken. `engine(*args)` is a forward that may be differentiated; `module` the bare module."""

    module: nn.Module
    steps: int  # optimiser steps applied
    skipped: int  # optimiser steps refused because loss or gradient was not finite

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward through the wrapped module."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's mean loss; ranks are averaged at `step`."""
        ...

    def step(self) -> StepInfo:
        """Clip, check finiteness over all ranks, update, schedule, zero gradients."""
        ...

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Collective: whole trainable parameters by name, detached, on every rank (parameter averages read them)."""
        ...

    def export_state(self) -> dict[str, Tensor]:
        """Collective: full fp32 `param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` on CPU (rank 0; empty elsewhere)."""
        ...

    def import_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Collective: restore what `export_state` gave, whatever the world size or ZeRO stage, at optimiser `step`."""
        ...


class Collective(Protocol):
    """The few operations lower rooms need of a process group. One process: identity."""

    rank: int
    world: int

    def mean(self, value: Tensor) -> Tensor:
        """Average over ranks, no gradient."""
        ...

    def gather(self, value_B: Tensor) -> Tensor:
        """Concatenate over ranks along dim 0. Backward: the sum over ranks of what their losses want of the local rows.

        With an engine that averages gradients over ranks, a loss of the gathered rows that every rank computes whole
        then has the gradient one process would have: callers scale nothing.
        """
        ...

    def all_true(self, flag: bool) -> bool:
        """True iff every rank says True."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...


class Runtime(Collective, Protocol):
    """Where a stage runs: one process, a Ray Train worker, a Tune trial. The launcher chooses; nothing auto-detects."""

    device: torch.device

    def build_engine(self, module: nn.Module, optim: Any) -> Engine:
        """Wrap the trainable module with this runtime's backend (plain torch or DeepSpeed)."""
        ...

    def report(self, metrics: Mapping[str, float], checkpoint_dir: Path | None = None) -> None:
        """Tell the launcher of progress at checkpoint cadence (a barrier on Ray Train)."""
        ...


class Executor(Protocol):
    """Maps a function over shards, in this process or over a pool of Ray actors."""

    def map_shards(
        self, fn: Callable[[Item], Out], shards: Sequence[Item], after: Sequence[int | None] | None = None
    ) -> list[Out]:
        """Results in the order of `shards`, whatever the number of workers.

        `after[i]` names an earlier shard that must be finished before shard i starts.
        """
        ...
