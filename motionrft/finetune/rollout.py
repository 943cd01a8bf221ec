"""One batch of prompts as a fine-tuning method sees it: keyed noise, sampling, scoring, backpropagation, updates.

A method (`strategy.Strategy`) decides what is sampled and what learns; everything here is the same for all of them.
Letters: B clips of this rank, T frames, D features, E reward embedding, S denoising steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from motionrft.core.errors import ConfigError, explain
from motionrft.core.protocols import Collective, Engine, MotionGenerator, RewardModel, SolverTable
from motionrft.core.rng import derive_seed, numpy_rng
from motionrft.core.types import MotionBatch, RewardTerms, StepOutput, valid_mask
from motionrft.diffusion.denoise import Predict, StepAction, denoise, initial_noise, keyed_noise, sample
from motionrft.diffusion.solvers import skip_gains
from motionrft.finetune.objective import Objective

SHARED_PASS = ("semantic", "similarity")
Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Scored:
    """Rewards of one batch of motions."""

    driving: RewardTerms  # with gradient, where the motion has one
    watched: RewardTerms  # without
    total_B: Tensor  # (B,), weighted


class Rollout:
    """The parts of learning from one batch that do not depend on the method.

    Every draw is keyed by (seed, step, sample key, denoising step): splitting a batch over ranks changes nothing.

    Args:
        engine: takes the updates; its module is the trained network.
        generator: sampler, guidance, decoding of that network.
        reference: frozen generator; needed by `similarity` to the reference, `reference_pull` and preference methods.
        reward: frozen reward model.
        batch: this rank's clips; captions and lengths always, motions only where a method or target asks for them.
        objective: weights, terms, restraints.
        num_steps: denoising steps S.
        progress: batches done / batches in the run, in [0, 1].
        step: batch index of the run.
        seed: run seed.
        collective: rank operations.
        metrics: where measurements go; default: a new collection.
        table: the sampler; default: the generator's own.
    """

    def __init__(
        self,
        engine: Engine,
        generator: MotionGenerator,
        reference: MotionGenerator | None,
        reward: RewardModel,
        batch: MotionBatch,
        *,
        objective: Objective,
        num_steps: int,
        progress: float,
        step: int,
        seed: int,
        collective: Collective,
        metrics: Metrics | None = None,
        table: SolverTable | None = None,
    ) -> None:
        self.engine, self.generator, self._reference, self.reward = engine, generator, reference, reward
        self.batch, self.objective, self.num_steps, self.progress = batch, objective, num_steps, progress
        self.step, self.seed, self.collective = step, seed, collective
        self.metrics = Metrics() if metrics is None else metrics
        self.table = generator.solver(num_steps) if table is None else table
        self.shape = generator.state_shape(int(batch.lengths_B.max()))
        self._draw = (seed, "rollout", step)
        self.x_T = initial_noise(batch.keys_B, self.shape, *self._draw)
        self.noise = keyed_noise(batch.keys_B, self.shape, *self._draw)

    @property
    def rng(self) -> np.random.Generator:
        """A new generator of the batch's random choices, the same on every rank."""
        return numpy_rng(self.seed, "plan", self.step)

    @cached_property
    def share(self) -> float:
        """1 / (mean rows per rank): ranks are averaged, so uneven ranks still give the global mean."""
        rows = torch.tensor(float(len(self.batch)), device=self.batch.lengths_B.device)
        return 1.0 / float(self.collective.mean(rows))

    def repeated(self, count: int, table: SolverTable | None = None) -> Rollout:
        """Return a rollout of every prompt `count` times, row by row, each with noise of its own.

        Rows of one prompt are neighbours: row b becomes rows b * count .. b * count + count - 1. Measurements go to
        the same collection. `table` replaces the sampler.
        """
        keys = [[derive_seed("repeat", int(key), copy) for copy in range(count)] for key in self.batch.keys_B.tolist()]
        keys_B = torch.tensor(keys, dtype=torch.int64, device=self.batch.keys_B.device).flatten()
        rows = torch.arange(len(self.batch), device=keys_B.device).repeat_interleave(count)
        return Rollout(
            self.engine,
            self.generator,
            self._reference,
            self.reward,
            replace(self.batch.index(rows), keys_B=keys_B),
            objective=self.objective,
            num_steps=self.num_steps,
            progress=self.progress,
            step=self.step,
            seed=self.seed,
            collective=self.collective,
            metrics=self.metrics,
            table=self.table if table is None else table,
        )

    def reference(self, what: str) -> MotionGenerator:
        """Return the frozen generator.

        Raises:
            ConfigError: there is none; the message says that `what` needs it.
        """
        if self._reference is None:
            hint = "Pass the generator's frozen copy" + (
                ", or use similarity_target: ground_truth." if "similarity" in what else "."
            )
            raise ConfigError(explain("a frozen reference generator", "none", what, hint))
        self._reference.network.eval()
        return self._reference

    def predict(self, network: Network | None = None, recompute: bool = False) -> Predict:
        """Return (state, model time) -> guided output for this batch's prompts, through `network` (default: engine).

        Args:
            network: the engine, its bare module, a copy of it.
            recompute: keep only the state of a call with gradient and run it again in the backward pass.
        """
        text, lengths_B, generator = self.batch.prompt, self.batch.lengths_B, self.generator
        through = self.engine if network is None else network

        def call(x: Tensor, t: Tensor) -> Tensor:
            return generator.predict(through, x, t, text, lengths_B)

        def call_again(x: Tensor, t: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return call(x, t)
            # Fine-tuning runs in eval mode: there is no random state to bring back.
            return checkpoint(call, x, t, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

        return call_again if recompute else call

    def denoise(
        self,
        actions: Sequence[StepAction],
        network: Network | None = None,
        *,
        through_solver: bool = False,
        recompute: bool = False,
    ) -> Iterator[StepOutput]:
        """Run THE denoising loop from this batch's noise. See `StepPlan` for the flags."""
        gains = skip_gains(self.table, self.generator.spec.prediction) if through_solver else None
        return denoise(self.table, actions, self.predict(network, recompute), self.x_T, self.noise, gains)

    def score(self, state: Tensor, noise_level: float = 0.0) -> Scored:
        """Return the rewards of a state whose noise the reward is told; gradient flows into `state`."""
        objective = self.objective
        motion_BTD = self.generator.decode(state, self.batch.lengths_B)
        # Terms of one encoder pass: watching one of them costs nothing where another one drives.
        shared = set(SHARED_PASS) if set(SHARED_PASS) & set(objective.driving) else set()
        along = tuple(name for name in objective.watched if name in shared)
        apart = tuple(name for name in objective.watched if name not in shared)
        scored = self._terms(motion_BTD, noise_level, (*objective.driving, *along)).values
        with torch.no_grad():
            alone = self._terms(motion_BTD.detach(), noise_level, apart)
        watched = {name: scored[name].detach() for name in along} | dict(alone.values)
        driving = RewardTerms({name: scored[name] for name in objective.driving})
        if motion_BTD.requires_grad and objective.gradients_every and self.step % objective.gradients_every == 0:
            self._measure_gradients(driving, motion_BTD)
        return Scored(driving, RewardTerms(watched), objective.total(driving))

    def pull(self, output: StepOutput) -> Tensor | None:
        """Return the weighted squared distance (B,) of a step's clean estimate to the frozen network's, or None."""
        if not self.objective.reference_pull:
            return None
        reference, i = self.reference("objective.reference_pull"), output.index
        with torch.no_grad():
            x = output.x_in.detach()
            time = self.table.model_time[i].to(x.device)
            out = reference.predict(reference.network, x, time, self.batch.prompt, self.batch.lengths_B)
            target = float(self.table.p[i]) * x + float(self.table.q[i]) * out
        mask = self.generator.state_mask(target, self.batch.lengths_B)
        distance_B = mean_square(output.x0_hat - target, mask)
        self.metrics.add("loss/reference_pull", distance_B.detach().mean())
        return self.objective.reference_pull * distance_B

    def backward(self, loss_B: Tensor, weight: float = 1.0, through: Callable[[Tensor], None] | None = None) -> None:
        """Accumulate the gradient of the mean over the global batch of per-clip losses (B,)."""
        (self.engine.backward if through is None else through)(loss_B.sum() * (self.share * weight))

    def update(self, name: str = "") -> bool:
        """Take an optimiser step; return whether it was applied. A name logs its gradient norm apart as well."""
        info = self.engine.step()
        self.metrics.add("optim/lr", info.lr)
        self.metrics.count("optim/skipped", 0.0 if info.applied else 1.0)
        if info.applied:
            self.metrics.add("optim/grad_norm", info.grad_norm)
            if name:
                self.metrics.add(f"optim/grad_norm_by_step/{name}", info.grad_norm)
        return info.applied

    def _measure_gradients(self, driving: RewardTerms, motion_BTD: Tensor) -> None:
        """Log the rms of d (weight x term) / d motion over valid entries: which term drives, in physical units."""
        mask_BT1 = valid_mask(self.batch.lengths_B, motion_BTD.shape[1])[..., None]
        for name, value_B in driving.values.items():
            weighted = self.objective.weights[name] * value_B.sum()
            gradient_BTD = torch.zeros_like(motion_BTD)
            if weighted.requires_grad:
                (gradient_BTD,) = torch.autograd.grad(weighted, motion_BTD, retain_graph=True, materialize_grads=True)
            self.metrics.add(f"reward/{name}/gradient", mean_square(gradient_BTD, mask_BT1).sqrt().mean())

    def _terms(self, motion_BTD: Tensor, noise_level: float, names: Sequence[str]) -> RewardTerms:
        if not names:
            return RewardTerms({})
        return self.reward.score(
            motion_BTD,
            self.batch.lengths_B,
            self.generator.spec.representation,
            text_BE=self._text_BE,
            noise_level=noise_level,
            target_BE=self._target_BE,
            terms=names,
        )

    @cached_property
    def _text_BE(self) -> Tensor:
        return self.reward.encode_text(self.batch.text)

    @cached_property
    def _target_BE(self) -> Tensor | None:
        """What the similarity term compares with, (B, E), or None when nobody asks."""
        if "similarity" not in (*self.objective.driving, *self.objective.watched):
            return None
        with torch.no_grad():
            return self._embedded_target()

    def _embedded_target(self) -> Tensor:
        batch, kind = self.batch, self.generator.spec.representation
        if self.objective.similarity_target == "ground_truth":
            if kind not in batch.motions:
                raise ConfigError(
                    explain(
                        f"clips in representation {kind.value!r}",
                        f"{[r.value for r in batch.motions]}",
                        "similarity to the ground truth",
                        "Load motions with the captions, or use similarity_target: reference.",
                    )
                )
            return self.reward.embed(batch.motions[kind], batch.lengths_B, kind)
        reference = self.reference("reward term 'similarity'")

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return reference.predict(reference.network, x, t, batch.prompt, batch.lengths_B)

        state = sample(self.table, predict, self.x_T, self.noise)
        return self.reward.embed(reference.decode(state, batch.lengths_B), batch.lengths_B, kind)


class Metrics:
    """Means and counts by path of what one batch does, and the seconds of its parts."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = {}
        self._counts: dict[str, float] = {}
        self._seconds = {"rollout": 0.0, "reward": 0.0, "update": 0.0}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part: "rollout" | "reward" | "update"."""
        began = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - began

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a value to the mean of a path."""
        self._values.setdefault(name, []).append(value)

    def count(self, name: str, value: float) -> None:
        """Add to the sum of a path."""
        self._counts[name] = self._counts.get(name, 0.0) + value

    def add_rewards(self, scored: Scored, weights: Mapping[str, float], name: str = "") -> None:
        """Add raw and weighted terms; a name (a denoising step) keeps the total apart as well."""
        for term, value_B in [*scored.driving.values.items(), *scored.watched.values.items()]:
            raw = value_B.detach().mean()
            self.add(f"reward/{term}/raw", raw)
            self.add(f"reward/{term}/weighted", weights.get(term, 0.0) * raw)
        self.add("reward/total", scored.total_B.detach().mean())
        if name:
            self.add(f"reward/by_step/{name}", scored.total_B.detach().mean())

    def values(self) -> dict[str, float]:
        """Return everything. Tensors are read here, once, so that steps do not wait for the device."""
        means = {name: float(sum(float(v) for v in found) / len(found)) for name, found in self._values.items()}
        return {**means, **self._counts, **{f"time/{part}_s": seconds for part, seconds in self._seconds.items()}}


def mean_square(difference: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of squares over a state's valid entries per row, (B,); the mask broadcasts, True = valid."""
    valid = mask.expand_as(difference).flatten(1)
    squares = torch.where(valid, difference.flatten(1), 0.0).square().sum(1)
    return squares / valid.sum(1).clamp(min=1)
