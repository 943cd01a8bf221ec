"""What fine-tuning maximises (Eq. 20), and what holds it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from motionrft.core.errors import ConfigError
from motionrft.core.types import RewardTerms

SIMILARITY_TARGETS = ("reference", "ground_truth")


@dataclass(frozen=True)
class Objective:
    """What is maximised (Eq. 20), what is only logged, and what holds the model near the one it started from."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"semantic": 1.0})
    """Reward term -> weight."""
    terms: tuple[str, ...] = ()
    """Further terms to compute for the log, without gradient."""
    similarity_target: str = "reference"
    """"reference": the frozen generator's own sample from the same noise. "ground_truth": the batch's clip."""
    ceiling: float | None = None
    """Reward above which nothing is gained: r becomes min(r, ceiling), whose loss is ReFL's ReLU(margin - r)."""
    reference_pull: float = 0.0
    """Weight of the mean squared distance between the clean estimates of the running and the frozen network at the
    same state; up to a factor per step the KL divergence of the two sampler steps."""
    gradients_every: int = 0
    """Batches between measurements of every driving term's own gradient; 0 = never."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        rules = [
            (any(self.weights.values()), f"at least one weight must be non-zero, got {dict(self.weights)}"),
            (
                self.similarity_target in SIMILARITY_TARGETS,
                f"similarity_target must be one of {SIMILARITY_TARGETS}, got {self.similarity_target!r}",
            ),
            (self.reference_pull >= 0, f"reference_pull must not be negative, got {self.reference_pull}"),
            (self.gradients_every >= 0, f"gradients_every must not be negative, got {self.gradients_every}"),
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

    def total(self, terms: RewardTerms) -> Tensor:
        """Return the weighted sum (B,), cut at the ceiling."""
        total_B = terms.total(self.weights)
        return total_B if self.ceiling is None else total_B.clamp(max=self.ceiling)
