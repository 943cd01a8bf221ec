"""One batch of fine-tuning with any method."""

from __future__ import annotations

from motionrft.core.protocols import Collective, Engine, MotionGenerator, RewardModel
from motionrft.core.types import MotionBatch
from motionrft.finetune.objective import SIMILARITY_TARGETS, Objective
from motionrft.finetune.rollout import Rollout
from motionrft.finetune.strategy import Strategy


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
    """Let a method learn from one batch and return metrics by path. A loop body calls it once per batch.

    Every rank does the same and calls the engine equally often. Noise depends on (seed, step, sample key, denoising
    step) only. The loss of a scored step is minus the mean total reward over the global batch. The network runs in
    eval mode (no dropout) and is left in the mode it was in. Arguments as `Rollout`; `strategy` is the method.

    Raises:
        ConfigError: `similarity` without a target, or a method the engine cannot follow.
    """
    module = engine.module
    was_training = module.training
    module.eval()
    try:
        rollout = Rollout(
            engine,
            generator,
            reference,
            reward,
            batch,
            objective=objective,
            num_steps=num_steps,
            progress=progress,
            step=step,
            seed=seed,
            collective=collective,
        )
        strategy.learn(rollout)
    finally:
        module.train(was_training)
    return rollout.metrics.values()


__all__ = ["SIMILARITY_TARGETS", "Objective", "rollout_step"]
