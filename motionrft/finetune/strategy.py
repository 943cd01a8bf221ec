"""What a fine-tuning method is: it learns from one rollout. Most follow a plan of the denoising loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from motionrft.core.plain import variant_base
from motionrft.core.protocols import SolverTable
from motionrft.core.types import StepOutput
from motionrft.diffusion.denoise import read_at, solver_step
from motionrft.finetune.plan import StepPlan
from motionrft.finetune.rollout import Rollout
from motionrft.finetune.snapshot import Snapshot


@variant_base
@dataclass(frozen=True)
class Strategy(ABC):
    """A fine-tuning method. Subclasses are frozen dataclasses of plain hyper-parameters."""

    differentiates_reward: ClassVar[bool] = True
    """Whether the reward's gradient is used. Other methods can maximise rewards that have none."""
    needs_reference: ClassVar[bool] = False
    """Whether it compares with the frozen copy of the generator."""
    needs_motions: ClassVar[bool] = False
    """Whether it reads the clips of a batch, not only their captions."""

    @abstractmethod
    def updates_per_rollout(self, num_steps: int) -> int:
        """Return how many optimiser steps one batch takes; learning-rate schedules are counted in these."""

    @abstractmethod
    def learn(self, rollout: Rollout) -> None:
        """Sample, score, accumulate gradients and update; measurements go to `rollout.metrics`.

        Every rank makes the same engine calls. The network is in eval mode.
        """

    def sketch(self, num_steps: int, progress: float, rng: np.random.Generator) -> str:
        """Return what one rollout does as text."""
        del progress, rng
        return f"{num_steps} denoising steps, {self.updates_per_rollout(num_steps)} updates"


@dataclass(frozen=True)
class PlannedStrategy(Strategy):
    """Backpropagates the reward along a plan: which denoising steps learn, and from what."""

    @abstractmethod
    def plan(self, num_steps: int, progress: float, rng: np.random.Generator) -> StepPlan:
        """Return the plan of one rollout.

        Args:
            num_steps: denoising steps S >= 1. Windows longer than S are shortened to S.
            progress: batches done / batches in the run, in [0, 1].
            rng: the same on every rank, so that all ranks follow one plan.
        """

    def updates_per_rollout(self, num_steps: int) -> int:
        """Return how many optimiser steps one rollout takes; learning-rate schedules are counted in these."""
        return sum(a.update for a in self.plan(num_steps, 1.0, np.random.default_rng(0)).actions)

    def learn(self, rollout: Rollout) -> None:
        """Follow the plan of this batch."""
        follow(self.plan(rollout.num_steps, rollout.progress, rollout.rng), rollout)

    def sketch(self, num_steps: int, progress: float, rng: np.random.Generator) -> str:
        """Return the plan's strips."""
        return self.plan(num_steps, progress, rng).strip()


def follow(plan: StepPlan, rollout: Rollout, update: bool = True, share: float = 1.0) -> Tensor:
    """Run a plan: denoise, score what it scores, backpropagate, update where it updates.

    Args:
        plan: of this batch.
        rollout: the batch.
        update: False accumulates gradients only; the caller updates.
        share: factor of every loss.

    Returns:
        The last state, detached.
    """
    source = Snapshot(rollout.engine) if plan.snapshot else None
    weights = step_weights(plan, rollout.table)
    steps = rollout.denoise(plan.actions, source, through_solver=plan.through_solver, recompute=plan.recompute)
    final = rollout.x_T
    while True:
        with rollout.metrics.timed("rollout"):
            output = next(steps, None)
        if output is None:
            break
        final = output.x_prev.detach()
        if output.scored != "none":
            loss_B = _loss(output, rollout)
            with rollout.metrics.timed("update"):
                through = None if source is None else source.hand_over
                rollout.backward(loss_B, share * weights[output.index], through)
                if output.update and update:
                    rollout.update(f"{output.index:02d}")
            del loss_B
        # Nothing of this step's graph may be alive while the next network call builds its own.
        del output
    rollout.metrics.add("curriculum/window_start", float(plan.window_start))
    return final


def replay(plan: StepPlan, rollout: Rollout, steps_per_call: int) -> None:
    """Run a plan of independent scored steps with one update: first the states, without gradient, then what learns.

    Equal to following the plan up to the order of sums. The second pass is an ordinary loss over stored states:
    `steps_per_call` denoising steps go through the network at once.
    """
    table, batch, metrics = rollout.table, rollout.batch, rollout.metrics
    weights = step_weights(plan, table)
    with metrics.timed("rollout"):
        plain = [replace(action, grad=False) for action in plan.actions]
        stored = [(output.index, output.x_in) for output in rollout.denoise(plain) if output.scored != "none"]
    B = len(batch)
    for start in range(0, len(stored), steps_per_call):
        part = stored[start : start + steps_per_call]
        rows = torch.arange(B, device=batch.lengths_B.device).repeat(len(part))
        times = [table.model_time[i].to(x.device) for i, x in part]
        with metrics.timed("rollout"):
            out = rollout.generator.predict(
                rollout.engine,
                torch.cat([x for _, x in part]),
                torch.cat([t.reshape(-1, *t.shape[1:]).expand(B, *t.shape[1:]) for t in times]),
                batch.prompt.index(rows),
                batch.lengths_B[rows],
            )
        losses = []
        for (i, x), out_B in zip(part, out.split(B), strict=True):
            action = plan.actions[i]
            states = solver_step(table, i, x, out_B, rollout.noise)
            read = read_at(table, i, action.score)
            losses.append(_loss(StepOutput(i, x, *states, action.score, action.update, *read), rollout) * weights[i])
        with metrics.timed("update"):
            rollout.backward(torch.stack(losses).sum(0))
        del out, out_B, states, losses
    with metrics.timed("update"):
        rollout.update()
    metrics.add("curriculum/window_start", float(plan.window_start))


def _loss(output: StepOutput, rollout: Rollout) -> Tensor:
    """Return what a scored step minimises, (B,): minus its reward, plus the pull to the reference."""
    with rollout.metrics.timed("reward"):
        # Rewards know noise of variance-preserving diffusion only; a flow's state is brought to it.
        state = output.x0_hat if output.scored == "x0_hat" else output.scale * output.x_prev
        scored = rollout.score(state, output.noise_level)
        rollout.metrics.add_rewards(scored, rollout.objective.weights, f"{output.index:02d}")
        pull_B = rollout.pull(output)
        return -scored.total_B if pull_B is None else pull_B - scored.total_B


def step_weights(plan: StepPlan, table: SolverTable) -> list[float]:
    """Return each action's share of its loss.

    With `equal_gain`, scored steps are weighed by the inverse of the factor by which the network's output reaches what
    the reward reads (|q| or |b| of the sampler), with mean 1 over them.
    """
    shares = [action.weight for action in plan.actions]
    if not plan.equal_gain:
        return shares
    gain = {"x0_hat": table.q.abs().tolist(), "x_prev": table.b.abs().tolist()}
    inverse = {i: 1.0 / max(gain[a.score][i], 1e-6) for i, a in enumerate(plan.actions) if a.score != "none"}
    mean = sum(inverse.values()) / len(inverse)
    return [share * inverse.get(i, mean) / mean for i, share in enumerate(shares)]
