"""Policy gradients: a stochastic sampler is a chain of Gaussian decisions, and their log-probabilities are what learns.

Step i draws x_{i+1} from N(mu_i, c_i^2), with mu_i = a x_i + b out_i of the sampler's table. A rollout without gradient
records the steps and its final samples are scored; then the network is run again on the recorded states, one step at a
time, and made likelier to do what was better than its like. The reward needs no gradient.

Letters: B prompts of this rank, G samples per prompt, N = B G rows, S denoising steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, explain
from motionrft.core.protocols import MotionGenerator, SolverTable
from motionrft.diffusion.denoise import SAMPLE, StepAction, solver_step
from motionrft.finetune.rollout import Network, Rollout, Scored
from motionrft.finetune.strategy import Strategy

REDUCTIONS = ("mean", "sum")
BASELINES = ("prompt", "batch")
SCALES = ("prompt", "batch", "none")
_SMALL_STD = 1e-4  # added to the deviation of rewards (Flow-GRPO)


@dataclass(frozen=True)
class Decision:
    """One recorded denoising step of N samples."""

    index: int
    x: Tensor  # (N, ...) before it
    x_next: Tensor  # (N, ...) after it
    log_prob_N: Tensor  # (N,) float64, under the parameters that drew it


@dataclass(frozen=True)
class PolicyGradient(Strategy):
    """What DDPO and Flow-GRPO share; they differ in sampler noise and in how rewards become advantages.

    A batch samples `group` times its prompts, and stores two states per trained step of these rows (neighbours share
    one). Activations are those of one guided network call on prompts x `copies_per_call` rows, whatever S is. The last
    step, which adds no noise or next to none, is never trained.
    """

    differentiates_reward: ClassVar[bool] = False

    group: int = 8
    """Samples G per prompt."""
    noise: float = 1.0
    """Fresh noise of the sampler, in (0, 1]: eta of DDIM, a of a flow's SDE. Consistency models have their own."""
    baseline: str = "prompt"
    """What is subtracted from a reward: the mean over the prompt's samples ("prompt"), or over the global batch
    ("batch")."""
    scale: str = "prompt"
    """What it is then divided by: the deviation over the prompt's samples, over the global batch, or "none"."""
    advantage_clip: float = 5.0
    """Largest absolute advantage; 0 = no limit."""
    log_prob: str = "mean"
    """How a step's log-probability and its divergence from the reference count the valid entries of a state: "mean"
    (published code; comparable between clip lengths) or "sum" (the actual density; needs a larger clip_range)."""
    clip_range: float = 1e-4
    """The surrogate stops rewarding a probability ratio outside 1 +- this."""
    step_fraction: float = 1.0
    """Share of the first S - 1 steps that is trained, drawn anew for each batch."""
    equal_gain: bool = True
    """Weigh trained steps by the inverse of the factor |b| / c by which the network's output moves a step's mean in
    units of its noise. Where the network outputs the clean state it is 0.03 to 150 in one rollout, and without weights
    the late steps, whose noise hardly changes the reward, drown the others. False as published."""
    inner_epochs: int = 1
    """How often the recorded steps are gone through."""
    updates: int = 1
    """Optimiser steps per inner epoch, between which the trained steps are split; at most one per step."""
    kl_weight: float = 0.0
    """Weight of the KL divergence of each trained step from the frozen network's: |mu - mu_ref|^2 / (2 c^2)."""
    copies_per_call: int = 0
    """Samples per prompt that go through the network at once when learning; 0 = all. Fewer need less memory."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        alone = "prompt" in (self.baseline, self.scale) and self.group < 2
        rules = [
            (self.group >= 1, f"group must be >= 1, got {self.group}"),
            (not alone, f"group {self.group} has no deviation within a prompt: raise it, or use batch statistics"),
            (0 < self.noise <= 1, f"noise must be in (0, 1], got {self.noise}"),
            (self.baseline in BASELINES, f"baseline must be one of {BASELINES}, got {self.baseline!r}"),
            (self.scale in SCALES, f"scale must be one of {SCALES}, got {self.scale!r}"),
            (
                self.scale != "prompt" or self.baseline == "prompt",
                "scale prompt needs baseline prompt: a prompt whose samples are alike would get a boundless advantage",
            ),
            (self.advantage_clip >= 0, f"advantage_clip must be >= 0, got {self.advantage_clip}"),
            (self.log_prob in REDUCTIONS, f"log_prob must be one of {REDUCTIONS}, got {self.log_prob!r}"),
            (self.clip_range > 0, f"clip_range must be positive, got {self.clip_range}"),
            (0 < self.step_fraction <= 1, f"step_fraction must be in (0, 1], got {self.step_fraction}"),
            (self.inner_epochs >= 1, f"inner_epochs must be >= 1, got {self.inner_epochs}"),
            (self.updates >= 1, f"updates must be >= 1, got {self.updates}"),
            (self.kl_weight >= 0, f"kl_weight must be >= 0, got {self.kl_weight}"),
            (self.copies_per_call >= 0, f"copies_per_call must be >= 0, got {self.copies_per_call}"),
        ]
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise ConfigError(f"strategy {type(self).__name__}: " + "; ".join(problems))

    def trained_steps(self, num_steps: int) -> int:
        """Return how many of S denoising steps learn."""
        return max(1, round(self.step_fraction * (num_steps - 1)))

    def updates_per_rollout(self, num_steps: int) -> int:
        """Return how many optimiser steps one batch takes."""
        return self.inner_epochs * min(self.updates, self.trained_steps(num_steps))

    def sketch(self, num_steps: int, progress: float, rng: np.random.Generator) -> str:
        """Return what one rollout does as text."""
        trained, updates = self.trained_steps(num_steps), self.updates_per_rollout(num_steps)
        return f"{self.group} samples per prompt in {num_steps} steps, {trained} of them learn in {updates} updates"

    def learn(self, rollout: Rollout) -> None:
        """Sample every prompt G times, score, and replay the recorded steps.

        Raises:
            ConfigError: a sampler without fresh noise, or a restraint that belongs to other methods.
        """
        samples = rollout.repeated(self.group, rollout.generator.stochastic_solver(rollout.num_steps, self.noise))
        self._check(samples)
        rng, last = rollout.rng, rollout.num_steps - 1
        steps = rng.choice(last, self.trained_steps(rollout.num_steps), replace=False)
        decisions, scored = record(samples, {int(i) for i in steps}, self.log_prob)
        samples.metrics.add_rewards(scored, samples.objective.weights)
        advantage_N = self.advantages(scored.total_B, samples)
        weights = self.step_weights(samples.table, [d.index for d in decisions])
        for _ in range(self.inner_epochs):
            order = rng.permutation(len(decisions))
            for part in np.array_split(order, min(self.updates, len(decisions))):
                with samples.metrics.timed("update"):
                    for place in part:
                        self._replay(samples, decisions[place], advantage_N, weights[place] / len(part))
                    samples.update()

    def advantages(self, reward_N: Tensor, samples: Rollout) -> Tensor:
        """Return what each sample's rise in probability is worth, (N,) float32; exactly 0 where all of a group tie."""

        def global_mean(value: Tensor) -> Tensor:
            return samples.collective.mean(value.sum()) * samples.share

        reward_BG = reward_N.detach().double().reshape(-1, self.group)
        mean, mean_B1 = global_mean(reward_BG), reward_BG.mean(1, keepdim=True)
        std, std_B1 = global_mean((reward_BG - mean).square()).sqrt(), reward_BG.std(1, correction=0, keepdim=True)
        of_prompt = self.baseline == "prompt"
        tied_B1 = (reward_BG == reward_BG[:, :1]).all(1, keepdim=True) if of_prompt else (std == 0).expand_as(std_B1)
        advantage_BG = reward_BG - (mean_B1 if of_prompt else mean)
        if self.scale != "none":
            advantage_BG = advantage_BG / ((std_B1 if self.scale == "prompt" else std) + _SMALL_STD)
        if self.advantage_clip:
            advantage_BG = advantage_BG.clamp(-self.advantage_clip, self.advantage_clip)
        advantage_BG = advantage_BG.masked_fill(tied_B1, 0.0)
        samples.metrics.add("policy/zero_std_groups", tied_B1.double().mean())
        samples.metrics.add("policy/advantage_std", advantage_BG.std(correction=0))
        return advantage_BG.flatten().float()

    def step_weights(self, table: SolverTable, steps: list[int]) -> list[float]:
        """Return the weight of each trained step, mean 1."""
        inverse = (table.c / table.b.abs())[steps] if self.equal_gain else torch.ones(len(steps))
        return (inverse / inverse.mean()).tolist()  # type: ignore[no-any-return]

    def _replay(self, samples: Rollout, decision: Decision, advantage_N: Tensor, share: float) -> None:
        """Accumulate the gradient of one step's loss, some copies of every prompt at a time."""
        rows_BG = torch.arange(len(advantage_N), device=advantage_N.device).reshape(-1, self.group)
        for rows in rows_BG.split(self.copies_per_call or self.group, dim=1):
            samples.backward(self._loss(samples, decision, advantage_N, rows.flatten()), share)

    def _loss(self, samples: Rollout, decision: Decision, advantage_N: Tensor, rows: Tensor) -> Tensor:
        """Return what one step minimises for some rows, (R,): the clipped surrogate plus the divergence."""
        metrics, std = samples.metrics, float(samples.table.c[decision.index])
        mask = samples.generator.state_mask(decision.x, samples.batch.lengths_B)[rows]
        mean = _mean_of(samples, samples.generator, samples.engine, decision, rows)
        log_ratio_R = log_prob(decision.x_next[rows], mean, std, mask, self.log_prob) - decision.log_prob_N[rows]
        advantage_R = advantage_N[rows]
        loss_R = surrogate(log_ratio_R, advantage_R, self.clip_range)
        if self.kl_weight:
            reference = samples.reference(f"strategy {type(self).__name__} with kl_weight")
            with torch.no_grad():
                target = _mean_of(samples, reference, reference.network, decision, rows)
            kl_R = _reduced(((mean - target) / std).square() / 2, mask, self.log_prob)
            metrics.add("policy/kl_reference", kl_R.detach().mean())
            # Samples without an advantage are left out altogether, as in Flow-GRPO's code.
            loss_R = loss_R + self.kl_weight * torch.where(advantage_R == 0, 0.0, kl_R)
        with torch.no_grad():
            ratio_R = log_ratio_R.exp()
            metrics.add("policy/ratio", ratio_R.mean())
            metrics.add("policy/clip_fraction", ((ratio_R - 1).abs() > self.clip_range).double().mean())
            metrics.add("policy/approx_kl", 0.5 * log_ratio_R.square().mean())
        return loss_R.float()

    def _check(self, samples: Rollout) -> None:
        name, noisy = type(self).__name__, samples.table.c[:-1]
        if not len(noisy) or not bool((noisy > 0).all()):
            raise ConfigError(
                explain(
                    "a sampler with at least 2 denoising steps and fresh noise in all but the last",
                    f"{samples.num_steps} steps with noise {samples.table.c.tolist()}",
                    f"strategy {name}",
                    "Raise num_steps.",
                )
            )
        if samples.objective.reference_pull:
            raise ConfigError(
                explain(
                    "reference_pull 0",
                    str(samples.objective.reference_pull),
                    f"strategy {name}",
                    "It does not score single steps: use the strategy's kl_weight.",
                )
            )


def record(rollout: Rollout, steps: Collection[int], reduction: str = "mean") -> tuple[list[Decision], Scored]:
    """Return the chosen steps of a rollout, in order, and the rewards of its final states; nothing has a gradient."""
    decisions = []
    with rollout.metrics.timed("rollout"), torch.no_grad():
        actions = [SAMPLE] * (rollout.num_steps - 1) + [StepAction(score="x_prev")]
        for output in rollout.denoise(actions):
            if output.index in steps and output.mean is not None:
                mask = rollout.generator.state_mask(output.x_in, rollout.batch.lengths_B)
                std = float(rollout.table.c[output.index])
                log_prob_N = log_prob(output.x_prev, output.mean, std, mask, reduction)
                decisions.append(Decision(output.index, output.x_in, output.x_prev, log_prob_N))
    with rollout.metrics.timed("reward"), torch.no_grad():
        scored = rollout.score(output.scale * output.x_prev, output.noise_level)
    return decisions, scored


def log_prob(x: Tensor, mean: Tensor, std: float, mask: Tensor, reduction: str = "mean") -> Tensor:
    """Return log N(x; mean, std^2) per row of (N, ...) over the entries a broadcastable mask calls valid, (N,) float64.

    Ratios are differences of large sums: they are taken in float64.
    """
    return _reduced(-((x - mean) / std).square() / 2 - math.log(std) - 0.5 * math.log(2 * math.pi), mask, reduction)


def surrogate(log_ratio_N: Tensor, advantage_N: Tensor, clip_range: float) -> Tensor:
    """Return -min(A r, A clip(r, 1 - e, 1 + e)), (N,). Source: PPO (Schulman et al.), Eq. 7."""
    ratio_N = log_ratio_N.exp()
    return -torch.minimum(advantage_N * ratio_N, advantage_N * ratio_N.clamp(1 - clip_range, 1 + clip_range))


def _reduced(value: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Return the mean or sum over valid entries per row, (N,) float64."""
    valid = mask.expand_as(value).flatten(1)
    total_N = torch.where(valid, value.flatten(1), 0.0).sum(1, dtype=torch.float64)
    return total_N if reduction == "sum" else total_N / valid.sum(1).clamp(min=1)


def _mean_of(
    rollout: Rollout, generator: MotionGenerator, network: Network, decision: Decision, rows: Tensor
) -> Tensor:
    """Return mu of a recorded step for some rows under a network."""
    batch, table, i, x = rollout.batch, rollout.table, decision.index, decision.x[rows]
    time = table.model_time[i].to(x.device)
    out = generator.predict(network, x, time, batch.prompt.index(rows), batch.lengths_B[rows])
    return solver_step(table, i, x, out, None)[0]
