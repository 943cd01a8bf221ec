"""Reward terms that need no network, by name. A new term is a small class and one decorator.

    @register_term
    class LowHead:
        name = "low_head"

        def __call__(self, motion_BTD, lengths_B, representation, normalizer):
            ...

Letters: B batch, T frames, D features.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, explain
from motionrft.core.types import Representation, valid_mask


class MotionScale(Protocol):
    """What a term may ask of a normaliser."""

    def normalise(self, x: Tensor) -> Tensor:
        """Return (x - mean) / std."""
        ...


class RewardTerm(Protocol):
    """One value per motion, differentiable with respect to it, independent of padding."""

    name: ClassVar[str]

    def __call__(
        self, motion_BTD: Tensor, lengths_B: Tensor, representation: Representation, normalizer: MotionScale
    ) -> Tensor:
        """Return (B,) for physical motion (B, T, D); larger is better."""
        ...


TERMS: dict[str, type[Any]] = {}
LEARNED_TERMS = ("semantic", "preference", "authenticity", "similarity")

Term = TypeVar("Term", bound=type[Any])


def register_term(term: Term) -> Term:
    """Make `term` available under its `name`.

    Raises:
        ConfigError: if the name is taken.
    """
    if term.name in TERMS or term.name in LEARNED_TERMS:
        raise ConfigError(explain("an unused term name", repr(term.name), "reward terms", "Choose another name."))
    TERMS[term.name] = term
    return term


def build_terms() -> dict[str, RewardTerm]:
    """Return one instance of every registered term."""
    return {name: term() for name, term in TERMS.items()}


def masked_mean(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over valid frames per row, (B,); 0 where no frame is valid."""
    return torch.where(mask_BT, value_BT, 0.0).sum(1) / mask_BT.sum(1).clamp(min=1)


def masked_second_difference(x_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return x[i+2] - 2 x[i+1] + x[i], (B, T-2, D), and the mask of those whose three frames are valid."""
    difference = x_BTD[:, 2:] - 2.0 * x_BTD[:, 1:-1] + x_BTD[:, :-2]
    return difference, valid_mask(lengths_B - 2, difference.shape[1])


@register_term
class Smoothness:
    """Minus the mean squared second difference of normalised root and position channels.

    Kinematic features count their first 67 channels (root and joint positions), the others all of theirs. Learned
    rewards are nearly blind to small jitter; without this guard fine-tuning raises it.
    """

    name: ClassVar[str] = "smoothness"

    def __call__(
        self, motion_BTD: Tensor, lengths_B: Tensor, representation: Representation, normalizer: MotionScale
    ) -> Tensor:
        """Return (B,), at most 0."""
        x = normalizer.normalise(motion_BTD)
        if representation == Representation.KINEMATIC:
            x = x[..., :67]
        difference, mask = masked_second_difference(x, lengths_B)
        return -masked_mean(difference.square().mean(-1), mask)
