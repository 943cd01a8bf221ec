"""Which rows make batch number k: a pure function of (seed, step), so that any run resumes by its step alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionrft.core.errors import ConfigError, DataError, explain
from motionrft.core.rng import numpy_rng


@dataclass(frozen=True)
class EpochSampler:
    """Global batches from one seeded permutation per epoch; each rank takes a contiguous slice.

    All ranks together see exactly the rows one worker would see, in the same order; rows left over at the end of an
    epoch are dropped (other rows each time).

    Raises:
        ConfigError: a batch that the workers cannot share evenly, or a rank outside the world.
        DataError: fewer rows than one batch.
    """

    n: int  # rows
    batch_size: int  # rows of the global batch
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise ConfigError(
                explain("0 <= rank < world", f"rank {self.rank} of {self.world}", "sampler", "Check the launcher.")
            )
        if self.batch_size < 1 or self.batch_size % self.world:
            raise ConfigError(
                explain(
                    f"a global batch divisible by {self.world} workers",
                    str(self.batch_size),
                    "sampler",
                    "Change the batch size or the number of workers.",
                )
            )
        if self.n < self.batch_size:
            raise DataError(
                explain(
                    f"at least {self.batch_size} rows for one batch",
                    str(self.n),
                    "sampler",
                    "Lower the batch size, prepare more clips, or relax the length filter.",
                )
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return self.n // self.batch_size

    def epoch(self, step: int) -> int:
        """Return the epoch that `step` belongs to."""
        return step // self.steps_per_epoch

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the order of all rows in an epoch, (n,) int64."""
        return numpy_rng("epoch", self.seed, epoch).permutation(self.n)

    def global_batch(self, step: int) -> list[int]:
        """Return the rows of all ranks at `step`, counted over all epochs from 0."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        start = (step % self.steps_per_epoch) * self.batch_size
        return self.permutation(self.epoch(step))[start : start + self.batch_size].tolist()

    def batch(self, step: int) -> list[int]:
        """Return this rank's rows at `step`."""
        share = self.batch_size // self.world
        return self.global_batch(step)[self.rank * share : (self.rank + 1) * share]


def eval_batches(n: int, batch_size: int) -> list[list[int]]:
    """Return all rows in order, in batches; the last one may be smaller."""
    return [list(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]
