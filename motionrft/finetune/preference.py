"""Learning from pairs of clean states: the network's error at recovering them from noise ranks them (DPO, SoPo).

Letters: B prompts of this rank, K samples per prompt, N noise levels of a grid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from motionrft.core.errors import ConfigError, explain
from motionrft.core.protocols import MotionGenerator, SolverTable
from motionrft.core.rng import keyed_normal, keyed_uniform
from motionrft.core.types import Condition
from motionrft.diffusion.denoise import sample
from motionrft.finetune.rollout import Rollout, mean_square
from motionrft.finetune.strategy import Strategy

TIMES = ("uniform", "logit_normal", "sampler")
ERRORS = ("output", "clean")


@dataclass(frozen=True)
class Levels:
    """A noise level per row, float64 (B,): state = clean x0 + noise eps, and what a perfect network makes of it."""

    time: Tensor  # (B, ...) model time
    clean_B: Tensor
    noise_B: Tensor
    target_clean_B: Tensor  # its output is target_clean x0 + target_noise eps
    target_noise_B: Tensor
    gain_B: Tensor  # |d x0_hat / d output|


def levels_at(table: SolverTable, rows_B: Tensor) -> Levels:
    """Return the levels of rows (B,) of a sampler's table, whatever its network predicts.

    With x0_hat = p x + q out, the output that gives x0 is (x0 - p x) / q. In x0 and eps it is eps for noise
    prediction, x0 for clean prediction, sqrt(ab) eps - sqrt(1 - ab) x0 for v and x0 - eps for the velocity of a flow.

    Raises:
        ValueError: a row where the clean estimate does not depend on the output.
    """
    rows_B = rows_B.to(table.q.device)
    level, p, q = table.noise_level[rows_B], table.p[rows_B], table.q[rows_B]
    if bool((q == 0).any()):
        raise ValueError("a network's error needs noise levels where x0_hat depends on its output (q != 0)")
    scale = 1.0 if table.scale is None else table.scale[rows_B]
    clean, noise = (1.0 - level**2).clamp(min=0).sqrt() / scale, level / scale
    time = table.model_time[rows_B]
    time = time.reshape(len(rows_B), *table.model_time.shape[2:])
    return Levels(time, clean, noise, (1.0 - p * clean) / q, -p * noise / q, q.abs())


def denoising_error(
    generator: MotionGenerator,
    network: Callable[..., Tensor],
    prompt: Condition,
    lengths_B: Tensor,
    x0: Tensor,
    noise: Tensor,
    levels: Levels,
    of: str = "output",
) -> Tensor:
    """Return each row's mean squared error over its valid entries, (B,), of the network's unguided prediction.

    Args:
        generator: calls the network, knows which entries are valid.
        network: engine or module.
        prompt: captions, B rows.
        lengths_B: frames.
        x0: clean states (B, ...).
        noise: standard normal, shaped like x0.
        levels: how much of it.
        of: "output" (eps, x0 or velocity: the error of pre-training) or "clean" (the one-step clean estimate).
    """

    def mixed(clean_B: Tensor, noise_B: Tensor) -> Tensor:
        return _rows(clean_B, x0) * x0 + _rows(noise_B, x0) * noise

    state = mixed(levels.clean_B, levels.noise_B)
    out = generator.conditional(network, state, levels.time.to(x0.device), prompt, lengths_B)
    difference = out - mixed(levels.target_clean_B, levels.target_noise_B)
    if of == "clean":
        difference = _rows(levels.gain_B, x0) * difference
    return mean_square(difference, generator.state_mask(x0, lengths_B))


@dataclass(frozen=True)
class Group:
    """K samples of every prompt of a batch, without gradient."""

    rollout: Rollout  # of the B K rows
    states: Tensor  # (B, K, ...) clean
    reward_BK: Tensor

    def pick(self, index_B: Tensor) -> Tensor:
        """Return one state per prompt, (B, ...)."""
        return self.states[torch.arange(len(self.states), device=self.states.device), index_B]


def sample_group(rollout: Rollout, count: int, guided: bool) -> Group:
    """Return `count` rewarded samples per prompt, with noise of their own, with or without guidance."""
    group = rollout.repeated(count)
    batch = group.batch

    def unguided(x: Tensor, t: Tensor) -> Tensor:
        return group.generator.conditional(group.engine, x, t, batch.prompt, batch.lengths_B)

    with rollout.metrics.timed("rollout"):
        state = sample(group.table, group.predict() if guided else unguided, group.x_T, group.noise)
    with rollout.metrics.timed("reward"), torch.no_grad():
        scored = group.score(state)
        rollout.metrics.add_rewards(scored, rollout.objective.weights)
    return Group(group, state.unflatten(0, (-1, count)), scored.total_B.unflatten(0, (-1, count)))


@dataclass(frozen=True)
class Pairs:
    """A better and a worse clean state per prompt, and what their terms count."""

    preferred: Tensor  # (B, ...)
    rejected: Tensor  # (B, ...)
    preferred_weight_B: Tensor
    rejected_weight_B: Tensor
    weight_B: Tensor  # of the pair's loss: 0 drops it, NaN (a reward that is not finite) refuses the update


@dataclass(frozen=True)
class PreferenceStrategy(Strategy):
    """Prefers one state over another through -log sigmoid(-beta (w_w d_w - w_l d_l)), d = e - e of the reference.

    e is `denoising_error` of the preferred (w) and the rejected (l) state. All four errors of a pair share time and
    noise, keyed by the prompt, so that only what is compared differs.

    Source: Diffusion-DPO (Wallace et al.), whose bound it is.
    """

    needs_reference = True
    differentiates_reward = False
    name: ClassVar[str]
    """Group of its metrics."""

    beta: float = 1.0
    """How fast a preference saturates; the pull to the reference grows with it."""
    draws: int = 4
    """Times and noises per pair."""
    accumulate: bool = False
    """One update with the mean gradient of all draws, instead of one update per draw."""
    times: str = "uniform"
    """Where errors are compared: "uniform" over the training schedule, "logit_normal" over it (middle more often, as
    flows are trained), or "sampler": the denoising steps of the rollout, for models that have no other (MotionLCM)."""
    error: str = "output"
    """"output": error of what the network gives, as in pre-training. "clean": error of the clean estimate, for flow
    networks that give a clean state, whose velocity errors explode near the data."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        problems = [message for holds, message in self.rules() if not holds]
        if problems:
            raise ConfigError(f"strategy {type(self).__name__}: " + "; ".join(problems))

    def rules(self) -> list[tuple[bool, str]]:
        """Return (holds, message) of what settings must fulfil."""
        return [
            (self.beta > 0, f"beta must be positive, got {self.beta}"),
            (self.draws >= 1, f"draws must be >= 1, got {self.draws}"),
            (self.times in TIMES, f"times must be one of {TIMES}, got {self.times!r}"),
            (self.error in ERRORS, f"error must be one of {ERRORS}, got {self.error!r}"),
        ]

    @abstractmethod
    def pairs(self, rollout: Rollout) -> Pairs:
        """Return the pairs of a batch, without gradient."""

    def updates_per_rollout(self, num_steps: int) -> int:
        """Return the draws, or 1 where they are accumulated."""
        del num_steps
        return 1 if self.accumulate else self.draws

    def learn(self, rollout: Rollout) -> None:
        """Make pairs, then learn from each of their draws.

        Raises:
            ConfigError: no reference, no clips where they are needed, or a pull to the reference beside beta's.
        """
        where = f"strategy {type(self).__name__}"
        reference = rollout.reference(where)
        if rollout.objective.reference_pull:
            got = f"{rollout.objective.reference_pull:g}"
            raise ConfigError(explain("reference_pull 0", got, where, "Its beta holds it near the reference already."))
        grid = self.grid(rollout.generator, rollout.num_steps)
        pairs = self.pairs(rollout)
        share = 1.0 / self.draws if self.accumulate else 1.0
        for draw in range(self.draws):
            with rollout.metrics.timed("update"):
                loss_B = self._loss(rollout, reference, pairs, grid, draw)
                rollout.backward(loss_B, share)
                del loss_B
                if draw == self.draws - 1 or not self.accumulate:
                    rollout.update()

    def grid(self, generator: MotionGenerator, num_steps: int) -> SolverTable:
        """Return the sampler whose rows are the noise levels that may be drawn.

        Raises:
            ConfigError: the whole schedule of a model whose sampler cannot visit it.
        """
        if self.times == "sampler":
            return generator.solver(num_steps)
        spec = generator.spec
        try:
            return generator.solver(spec.train_steps)
        except ConfigError:
            expected, where = f"a sampler over all {spec.train_steps} training steps", f"generator {spec.family!r}"
            message = explain(expected, "one of fewer", where, "Set finetune.strategy.times=sampler.")
            raise ConfigError(message) from None

    def rows(self, keys_B: Tensor, count: int, *key: int | str) -> Tensor:
        """Return a row of a grid of `count` levels per sample key, (B,) int64."""
        if self.times == "logit_normal":
            place_B = keyed_normal(keys_B, (), "time", *key).double().sigmoid()
        else:
            place_B = keyed_uniform(keys_B, "time", *key).double()
        return (place_B * count).long().clamp(max=count - 1)

    def _loss(self, rollout: Rollout, reference: MotionGenerator, pairs: Pairs, grid: SolverTable, draw: int) -> Tensor:
        generator, batch, keys_B = rollout.generator, rollout.batch, rollout.batch.keys_B
        key = ("preference", rollout.seed, rollout.step, draw)
        twice = torch.arange(len(batch), device=keys_B.device).repeat(2)
        prompt, lengths_B = batch.prompt.index(twice), batch.lengths_B[twice]
        levels = levels_at(grid, self.rows(keys_B, len(grid), *key)[twice])
        noise = keyed_normal(keys_B, rollout.shape, "noise", *key)[twice]
        both = torch.cat([pairs.preferred, pairs.rejected])
        # What a sampler leaves in the padding would tell samples from clips, where a network reads it.
        x0 = torch.where(generator.state_mask(both, lengths_B), both, 0.0)
        with torch.no_grad():
            frozen_B = denoising_error(reference, reference.network, prompt, lengths_B, x0, noise, levels, self.error)
        own_B = denoising_error(generator, rollout.engine, prompt, lengths_B, x0, noise, levels, self.error)
        preferred_B, rejected_B = (own_B - frozen_B).chunk(2)
        margin_B = self.beta * (pairs.rejected_weight_B * rejected_B - pairs.preferred_weight_B * preferred_B)
        self._measure(rollout, pairs, margin_B.detach(), preferred_B.detach(), rejected_B.detach())
        return preference_loss(margin_B, pairs.weight_B)

    def _measure(
        self, rollout: Rollout, pairs: Pairs, margin_B: Tensor, preferred_B: Tensor, rejected_B: Tensor
    ) -> None:
        weight_B, add = pairs.weight_B, rollout.metrics.add
        total = weight_B.sum().clamp(min=1)
        add(f"{self.name}/implicit_accuracy", ((margin_B > 0) * weight_B).sum() / total)
        add(f"{self.name}/margin", (margin_B * weight_B).sum() / total)
        add(f"{self.name}/error_change_preferred", (preferred_B * weight_B).sum() / total)
        add(f"{self.name}/error_change_rejected", (rejected_B * weight_B).sum() / total)
        add(f"loss/{self.name}", preference_loss(margin_B, weight_B).sum() / total)


def preference_loss(margin_B: Tensor, weight_B: Tensor) -> Tensor:
    """Return -log sigmoid of the margins, weighted, (B,)."""
    return -logsigmoid(margin_B) * weight_B


def counted(holds_B: Tensor, reward_B: Tensor) -> Tensor:
    """Return weights (B,): 1 where it holds, 0 where not, NaN where a reward is not finite."""
    return torch.where(reward_B.isfinite(), holds_B.to(reward_B.dtype), torch.nan)


def _rows(value_B: Tensor, like: Tensor) -> Tensor:
    return value_B.to(like.device, like.dtype).reshape(-1, *[1] * (like.dim() - 1))
