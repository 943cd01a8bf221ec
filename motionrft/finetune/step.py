"""One fine-tuning rollout: denoise by plan, decode, score, backpropagate, update.

Letters: B clips of this rank, T frames, D features, E reward embedding, S denoising steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, explain
from motionrft.core.protocols import Collective, Engine, MotionGenerator, RewardModel
from motionrft.core.rng import numpy_rng
from motionrft.core.types import MotionBatch, RewardTerms, StepOutput
from motionrft.diffusion.denoise import denoise, initial_noise, keyed_noise, sample
from motionrft.diffusion.solvers import skip_gains
from motionrft.finetune.plan import StepPlan, Strategy
from motionrft.finetune.snapshot import Snapshot

SHARED_PASS = ("semantic", "similarity")
SIMILARITY_TARGETS = ("reference", "ground_truth")


@dataclass(frozen=True)
class Objective:
    """What is maximised (Eq. 20) and what is only logged."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"semantic": 1.0})
    """Reward term -> weight."""
    terms: tuple[str, ...] = ()
    """Further terms to compute for the log, without gradient."""
    similarity_target: str = "reference"
    """"reference": the frozen generator's own sample from the same noise. "ground_truth": the batch's clip."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        rules = [
            (any(self.weights.values()), f"at least one weight must be non-zero, got {dict(self.weights)}"),
            (
                self.similarity_target in SIMILARITY_TARGETS,
                f"similarity_target must be one of {SIMILARITY_TARGETS}, got {self.similarity_target!r}",
            ),
        ]
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise ConfigError("reward: " + "; ".join(problems))

    @property
    def driving(self) -> tuple[str, ...]:
        """Terms that carry gradient."""
        return tuple(name for name, weight in self.weights.items() if weight != 0)

    @property
    def watched(self) -> tuple[str, ...]:
        """Terms that are only logged."""
        names = dict.fromkeys([*self.weights, *self.terms])
        return tuple(name for name in names if name not in self.driving)


def rollout_step(
    engine: Engine,
    generator: MotionGenerator,
    reference: MotionGenerator | None,
    reward: RewardModel,
    batch: MotionBatch,
    *,
    objective: Objective,
    strategy: Strategy,
    num_steps: int,
    progress: float,
    step: int,
    seed: int,
    collective: Collective,
) -> dict[str, float]:
    """Run one rollout with its updates and return metrics by path. A loop body may call it once per batch.

    Every rank follows the same plan and calls the engine equally often. Noise depends on (seed, step, sample key,
    denoising step) only. The loss of a scored step is minus the mean total reward over the global batch. The network
    runs in eval mode (no dropout) and is left in the mode it was in.

    Args:
        engine: takes the updates; its module is the trained network.
        generator: sampler, guidance, decoding of that network.
        reference: frozen generator; needed for `similarity` with target "reference".
        reward: frozen reward model.
        batch: this rank's clips; captions and lengths always, motions only for target "ground_truth".
        objective: weights and terms.
        strategy: makes the plan.
        num_steps: denoising steps S.
        progress: batches done / batches in the run, in [0, 1].
        step: batch index of the run.
        seed: run seed.
        collective: rank operations.

    Raises:
        ConfigError: `similarity` without a target, or a plan the engine cannot follow.
    """
    started = time.perf_counter()
    plan = strategy.plan(num_steps, progress, numpy_rng(seed, "plan", step))
    rollout = _Rollout(generator, reward, objective, batch, num_steps, seed, step)
    scorer = rollout.scorer(reference)
    clock = {"rollout": time.perf_counter() - started, "reward": 0.0, "update": 0.0}
    metrics = _Means()
    share = _batch_share(batch, collective)
    module = engine.module
    was_training = module.training
    module.eval()
    skipped = 0
    try:
        source: Snapshot | None = Snapshot(engine) if plan.snapshot else None
        steps = rollout.denoise(source or engine, plan)
        while True:
            began = time.perf_counter()
            output = next(steps, None)
            clock["rollout"] += time.perf_counter() - began
            if output is None:
                break
            if output.scored == "none":
                continue
            began = time.perf_counter()
            driving, watched = scorer(output)
            total_B = driving.total(objective.weights)
            metrics.add_rewards(output.index, driving, watched, total_B, objective.weights)
            clock["reward"] += time.perf_counter() - began
            began = time.perf_counter()
            loss = -total_B.sum() * (share * plan.actions[output.index].weight)
            (source.hand_over if source is not None else engine.backward)(loss)
            if output.update:
                info = engine.step()
                skipped += not info.applied
                metrics.add("optim/lr", info.lr)
                if info.applied:
                    metrics.add("optim/grad_norm", info.grad_norm)
                    metrics.add(f"optim/grad_norm_by_step/{output.index:02d}", info.grad_norm)
            clock["update"] += time.perf_counter() - began
            # Nothing of this step's graph may be alive while the next network call builds its own.
            del output, driving, watched, total_B, loss
    finally:
        module.train(was_training)
    return {
        **metrics.means(),
        "curriculum/window_start": float(plan.window_start),
        "optim/skipped": float(skipped),
        **{f"time/{name}_s": seconds for name, seconds in clock.items()},
    }


def _batch_share(batch: MotionBatch, collective: Collective) -> float:
    """Return 1 / (mean rows per rank): ranks are averaged, so uneven ranks still give the global mean."""
    if collective.world == 1:
        return 1.0 / len(batch)
    return 1.0 / float(collective.mean(torch.tensor(float(len(batch)), device=batch.lengths_B.device)))


class _Rollout:
    """The parts of a rollout that do not change while it runs."""

    def __init__(
        self,
        generator: MotionGenerator,
        reward: RewardModel,
        objective: Objective,
        batch: MotionBatch,
        num_steps: int,
        seed: int,
        step: int,
    ) -> None:
        self.generator, self.reward, self.objective, self.batch = generator, reward, objective, batch
        self.num_steps = num_steps
        self.shape = generator.state_shape(int(batch.lengths_B.max()))
        draw = (seed, "rollout", step)
        self.x_T = initial_noise(batch.keys_B, self.shape, *draw)
        self.noise = keyed_noise(batch.keys_B, self.shape, *draw)

    def denoise(self, network: Callable[..., Tensor], plan: StepPlan) -> Iterator[StepOutput]:
        table = self.generator.solver(self.num_steps)
        gains = skip_gains(table, self.generator.spec.prediction) if plan.through_solver else None
        return denoise(table, plan.actions, self._predict(self.generator, network), self.x_T, self.noise, gains)

    def scorer(self, reference: MotionGenerator | None) -> Callable[[StepOutput], tuple[RewardTerms, RewardTerms]]:
        """Return the function that gives (driving terms with gradient, watched terms without) of a step."""
        generator, reward, batch = self.generator, self.reward, self.batch
        text_BE = reward.encode_text(batch.text)
        target_BE = self._target(reference)
        kind = generator.spec.representation
        # Terms of one encoder pass: watching one of them costs nothing where another one drives.
        shared = set(SHARED_PASS) if set(SHARED_PASS) & set(self.objective.driving) else set()
        along = tuple(name for name in self.objective.watched if name in shared)
        apart = tuple(name for name in self.objective.watched if name not in shared)

        def terms(motion_BTD: Tensor, noise_level: float, names: Sequence[str]) -> RewardTerms:
            if not names:
                return RewardTerms({})
            return reward.score(
                motion_BTD,
                batch.lengths_B,
                kind,
                text_BE=text_BE,
                noise_level=noise_level,
                target_BE=target_BE,
                terms=names,
            )

        def score(output: StepOutput) -> tuple[RewardTerms, RewardTerms]:
            # Rewards know noise of variance-preserving diffusion only; a flow's state is brought to it.
            state = output.x0_hat if output.scored == "x0_hat" else output.scale * output.x_prev
            motion_BTD = generator.decode(state, batch.lengths_B)
            scored = terms(motion_BTD, output.noise_level, (*self.objective.driving, *along)).values
            with torch.no_grad():
                alone = terms(motion_BTD.detach(), output.noise_level, apart)
            watched = {name: scored[name].detach() for name in along} | dict(alone.values)
            return RewardTerms({name: scored[name] for name in self.objective.driving}), RewardTerms(watched)

        return score

    @torch.no_grad()
    def _target(self, reference: MotionGenerator | None) -> Tensor | None:
        """Return what the similarity term compares with, (B, E), or None when nobody asks."""
        if "similarity" not in (*self.objective.driving, *self.objective.watched):
            return None
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
        if reference is None:
            raise ConfigError(
                explain(
                    "a frozen reference generator",
                    "none",
                    "reward term 'similarity'",
                    "Pass the generator's frozen copy, or use similarity_target: ground_truth.",
                )
            )
        reference.network.eval()
        predict = self._predict(reference, reference.network)
        state = sample(reference.solver(self.num_steps), predict, self.x_T, self.noise)
        return self.reward.embed(reference.decode(state, batch.lengths_B), batch.lengths_B, kind)

    def _predict(
        self, generator: MotionGenerator, network: Callable[..., Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        text, lengths_B = self.batch.prompt, self.batch.lengths_B
        return lambda x, t: generator.predict(network, x, t, text, lengths_B)


class _Means:
    """Sums of metrics by name over the scored steps of a rollout."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        self._values.setdefault(name, []).append(value)

    def add_rewards(
        self, index: int, driving: RewardTerms, watched: RewardTerms, total_B: Tensor, weights: Mapping[str, float]
    ) -> None:
        for name, value_B in [*driving.values.items(), *watched.values.items()]:
            raw = value_B.detach().mean()
            self.add(f"reward/{name}/raw", raw)
            self.add(f"reward/{name}/weighted", weights.get(name, 0.0) * raw)
        self.add("reward/total", total_B.detach().mean())
        self.add(f"reward/by_step/{index:02d}", total_B.detach().mean())

    def means(self) -> dict[str, float]:
        """Return the averages. Tensors are read here, once, so that steps do not wait for the device."""
        return {name: float(sum(float(v) for v in values) / len(values)) for name, values in self._values.items()}


__all__ = ["SIMILARITY_TARGETS", "Objective", "rollout_step"]
