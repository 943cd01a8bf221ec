"""How sure a number is: Student intervals over seeds, bootstrap over prompts, paired differences.

Letters: N prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from motionrft.evaluation.metrics import IntArray

_T_975 = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
    2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272,
)  # fmt: skip
_Z_975 = 1.959963984540054


def student_t_975(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t (two-sided 95 %), to 1e-5."""
    if degrees < 1:
        raise ValueError("Student's t needs at least one degree of freedom")
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z, n = _Z_975, float(degrees)  # Cornish-Fisher expansion, exact enough above 30
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def ci95_student(values: ArrayLike) -> float:
    """Return the half width t * sd / sqrt(n) (sd with n - 1) of the 95 % interval of the mean; NaN for one value."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return math.nan
    return student_t_975(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))


def ci95_normal(values: ArrayLike) -> float:
    """Return 1.96 * sd / sqrt(n) (sd with n), the usual published half width. Too narrow for few values."""
    x = np.asarray(values, dtype=np.float64)
    return 1.96 * float(x.std()) / math.sqrt(len(x))


@dataclass(frozen=True)
class Interval:
    """A value with its percentile bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2.0

    @property
    def excludes_zero(self) -> bool:
        """True iff the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def resamples(
    count: int, rng: np.random.Generator, draws: int = 1000, clusters: Sequence[str] | ArrayLike | None = None
) -> list[IntArray]:
    """Return `draws` lists of rows in 0..count-1, drawn with replacement; rows of one cluster come together.

    Args:
        count: number of prompts.
        rng: seeded generator.
        draws: number of resamples.
        clusters: (count,) labels of rows that are not independent, e.g. a clip and its mirrored twin.
    """
    if clusters is None:
        return [rng.integers(0, count, count) for _ in range(draws)]
    _, label = np.unique(np.asarray(clusters), return_inverse=True)
    members = [np.flatnonzero(label == c) for c in range(int(label.max()) + 1)]
    return [np.concatenate([members[c] for c in rng.integers(0, len(members), len(members))]) for _ in range(draws)]


def bootstrap(statistic: Callable[[IntArray], float], count: int, draws: Sequence[IntArray]) -> Interval:
    """Return the 95 % percentile interval of `statistic(rows)` over resampled rows."""
    found = np.array([statistic(rows) for rows in draws])
    found = found[np.isfinite(found)]
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (math.nan, math.nan)
    return Interval(float(statistic(np.arange(count))), float(low), float(high))


def paired_difference(before_N: ArrayLike, after_N: ArrayLike, draws: Sequence[IntArray]) -> Interval:
    """Return the mean of after - before on the same prompts and noise, with its bootstrap interval over prompts.

    Prompts where either value is NaN are left out.
    """
    gap = np.asarray(after_N, dtype=np.float64) - np.asarray(before_N, dtype=np.float64)

    def mean(rows: IntArray) -> float:
        chosen = gap[rows]
        chosen = chosen[np.isfinite(chosen)]
        return float(chosen.mean()) if len(chosen) else math.nan

    return bootstrap(mean, len(gap), draws)
