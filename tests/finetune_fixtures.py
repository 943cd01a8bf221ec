"""A reward whose maximum is known, and one batch of fine-tuning on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motionrft.core.protocols import Engine
from motionrft.core.types import Condition, MotionBatch, Representation, RewardTerms, valid_mask
from motionrft.finetune.step import Objective, rollout_step
from motionrft.finetune.strategy import Strategy
from motionrft.generators.base import Generator
from motionrft.training.runtime_local import LocalRuntime

_RUNTIME = LocalRuntime()


class Toy:
    """semantic: mean frame near the caption's vector. similarity: near the target's. preference: mean of everything.

    Remembers what it was asked.

    Args:
        features: which features of a frame the caption describes.
    """

    def __init__(self, features: slice = slice(12)) -> None:
        self.features = features
        self.noise_levels: list[float] = []
        self.calls: list[tuple[tuple[str, ...], bool]] = []
        self.motions: list[Tensor] = []

    def encode_text(self, condition: Condition) -> Tensor:
        return condition.pooled_BD

    def embed(self, motion_BTD: Tensor, lengths_B: Tensor, representation: Representation) -> Tensor:
        mask = valid_mask(lengths_B, motion_BTD.shape[1])[..., None]
        return torch.where(mask, motion_BTD, 0.0).sum(1)[:, self.features] / lengths_B[:, None]

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
        self.noise_levels.append(noise_level)
        self.calls.append((tuple(terms), motion_BTD.requires_grad))
        self.motions.append(motion_BTD.detach())
        z = self.embed(motion_BTD, lengths_B, representation)
        values = {"semantic": -(z - text_BE).square().mean(1), "preference": motion_BTD.mean((1, 2))}
        if target_BE is not None:
            values["similarity"] = -(z - target_BE).square().mean(1)
        return RewardTerms({name: values[name] for name in terms})


def roll(
    engine: Engine,
    generator: Generator,
    reward: Toy,
    batch: MotionBatch,
    strategy: Strategy,
    num_steps: int,
    progress: float = 1.0,
    step: int = 0,
) -> dict[str, float]:
    """Fine-tune on one batch with the default objective."""
    return rollout_step(
        engine,
        generator,
        None,
        reward,
        batch,
        objective=Objective(),
        strategy=strategy,
        num_steps=num_steps,
        progress=progress,
        step=step,
        seed=0,
        collective=_RUNTIME,
    )
