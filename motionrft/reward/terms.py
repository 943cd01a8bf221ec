"""Reward terms that need no network, by name. A new term is a small class and one decorator.

    @register_term
    class RaisedHands:
        name = "raised_hands"

        def __call__(self, motion):
            height_BTJ = motion.joints_BTJ3[..., 1]
            return masked_mean(height_BTJ[..., 20:].mean(-1), motion.mask_BT)

Letters: B batch, T frames, D features, J joints.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, explain
from motionrft.core.types import Representation, valid_mask
from motionrft.representations.convert import to_joints
from motionrft.representations.kinematic_layout import layout_of


class MotionScale(Protocol):
    """What a term may ask of a normaliser."""

    def normalise(self, x: Tensor) -> Tensor:
        """Return (x - mean) / std."""
        ...


@dataclass(frozen=True)
class MotionView:
    """The scored batch as terms read it. What several terms need is computed when the first one asks, and once."""

    motion_BTD: Tensor  # (B, T, D) physical; what stands beyond a length is never read
    lengths_B: Tensor  # (B,) int64, 1 <= length <= T
    representation: Representation
    normalizer: MotionScale

    @cached_property
    def mask_BT(self) -> Tensor:
        """(B, T) bool, True = real frame."""
        return valid_mask(self.lengths_B, self.motion_BTD.shape[1])

    @cached_property
    def normalised_BTD(self) -> Tensor:
        """(B, T, D) in units of the statistics, zero beyond each length."""
        return torch.where(self.mask_BT[..., None], self.normalizer.normalise(self.motion_BTD), 0.0)

    @cached_property
    def joints_BTJ3(self) -> Tensor:
        """(B, T, 22, 3) positions in metres, Y up, floor at 0; some pose beyond each length.

        Raises:
            RepresentationError: the motion is not one of 22 joints (KIT-ML features have another body and unit).
        """
        # Zeros first: a non-finite number in the padding would make the gradient of valid frames non-finite.
        motion_BTD = torch.where(self.mask_BT[..., None], self.motion_BTD, 0.0)
        return to_joints(motion_BTD, self.representation)


class RewardTerm(Protocol):
    """One value per motion, independent of padding, and differentiable with respect to it.

    A term without a gradient (a count, a simulator) has `differentiable: ClassVar[bool] = False`; only methods that
    do not differentiate the reward can maximise it.
    """

    name: ClassVar[str]

    def __call__(self, motion: MotionView) -> Tensor:
        """Return (B,); larger is better."""
        ...


TERMS: dict[str, type[Any]] = {}
LEARNED_TERMS = ("semantic", "preference", "authenticity", "similarity")

Term = TypeVar("Term", bound=type[Any])


def register_term(term: Term) -> Term:
    """Make `term` available under its `name`; the same class defined again (a notebook cell) replaces itself.

    Raises:
        ConfigError: if another term has the name.
    """
    former = TERMS.get(term.name)
    again = former is not None and (former.__module__, former.__qualname__) == (term.__module__, term.__qualname__)
    if term.name in LEARNED_TERMS or (former is not None and not again):
        raise ConfigError(explain("an unused term name", repr(term.name), "reward terms", "Choose another name."))
    TERMS[term.name] = term
    return term


def without_gradient(names: Iterable[str]) -> list[str]:
    """Return the terms among `names` that say they are not differentiable."""
    return [name for name in names if not getattr(TERMS.get(name), "differentiable", True)]


def import_terms(modules: Iterable[str], where: str) -> None:
    """Import the modules that register a user's terms. Every process that names such a term calls this first.

    Args:
        modules: names as in an import statement.
        where: the configuration field they come from, for the message.

    Raises:
        ConfigError: a module that this process cannot import.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                explain(
                    "a module that Python can import",
                    f"{module!r}: {error}",
                    where,
                    "Give a name as in an import statement, and put the module where every worker finds it: "
                    "PYTHONPATH=$PWD on one machine, an installed package or `ray job submit --working-dir` on more.",
                )
            ) from error


def masked_mean(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over valid frames per row, (B,); 0 where no frame is valid."""
    return torch.where(mask_BT, value_BT, 0.0).sum(1) / mask_BT.sum(1).clamp(min=1)


@register_term
class Smoothness:
    """Minus the mean squared second difference of normalised root and position channels.

    Kinematic features count their root and joint positions (the first 67 of 263 channels), the others all of theirs.
    Learned rewards are nearly blind to small jitter; without this guard fine-tuning raises it.
    """

    name: ClassVar[str] = "smoothness"

    def __call__(self, motion: MotionView) -> Tensor:
        """Return (B,), at most 0."""
        x = motion.normalised_BTD
        if motion.representation == Representation.KINEMATIC:
            x = x[..., : layout_of(x.shape[-1]).joint_positions.stop]
        difference = x[:, 2:] - 2.0 * x[:, 1:-1] + x[:, :-2]
        return -masked_mean(difference.square().mean(-1), valid_mask(motion.lengths_B - 2, difference.shape[1]))
