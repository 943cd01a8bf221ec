"""Embedding metrics as pure functions: arrays in, floats out, float64 inside, randomness only by explicit generators.

Letters: N items, E embedding width, G groups, P pool size, K the numbers of nearest candidates looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from motionrft.core.errors import NumericalError, explain

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

_NEGATIVE_FID = 1e-3  # rounding below zero, relative to the total variance (at least 1), that is shown as zero


def finite_rows(x: ArrayLike, where: str, ids: Sequence[str] | None = None) -> Array:
    """Return `x` as a float64 matrix (N, E), refusing rows with NaN or infinity by name.

    Raises:
        NumericalError: a row is not finite. A broken motion fails the score; it is never replaced.
    """
    rows = np.asarray(x, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"{where}: embeddings must be (N, E), got shape {rows.shape}")
    broken = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(broken):
        named = [ids[i] if ids is not None else f"row {i}" for i in broken[:8]]
        raise NumericalError(
            explain(
                "finite embeddings",
                f"{len(broken)} of {len(rows)} rows with NaN or infinity: {', '.join(named)}",
                where,
                "Look at these motions; count them as failed generations instead of scoring them.",
            )
        )
    return rows


def distances(a: ArrayLike, b: ArrayLike) -> Array:
    """Return Euclidean distances (N, M) of rows (N, E) and (M, E), by direct differences.

    The expansion a^2 + b^2 - 2ab loses digits exactly where nearest neighbours are decided.
    """
    x, y = (torch.from_numpy(np.array(v, dtype=np.float64)) for v in (a, b))
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def hit_probability(cost_PP: ArrayLike, ks: Sequence[int] = (1, 2, 3)) -> Array:
    """Return for every query i the probability (..., P, K) that candidate i is among the k cheapest.

    Ties are broken at random: with `less` candidates strictly cheaper and `equal` as cheap (itself included),
    hit@k = clip((k - less) / equal, 0, 1). Identical candidates therefore score k / P, never 1.

    Args:
        cost_PP: (..., P, P), row = query, column = candidate; the diagonal holds the true pairs.
        ks: numbers of nearest candidates.
    """
    cost = np.asarray(cost_PP, dtype=np.float64)
    true = np.diagonal(cost, axis1=-2, axis2=-1)[..., None]
    less, equal = (cost < true).sum(-1), (cost == true).sum(-1)
    return np.clip((np.asarray(ks) - less[..., None]) / equal[..., None], 0.0, 1.0)


@dataclass(frozen=True)
class RPrecision:
    """Retrieval of each motion by its caption, inside fixed pools."""

    ks: tuple[int, ...]
    values: tuple[float, ...]  # mean over all queries of all pools, one per k
    hits_NK: Array  # summed hit probability of each item
    queries_N: Array  # how often each item was a query (float, 0 where it never was)


def r_precision(
    text_NE: ArrayLike, motion_NE: ArrayLike, groups_GP: ArrayLike, ks: Sequence[int] = (1, 2, 3)
) -> RPrecision:
    """Return R@k: how often a caption's own motion is among its k nearest of the P motions in its pool.

    Args:
        text_NE: caption embeddings; row i belongs to motion i.
        motion_NE: motion embeddings.
        groups_GP: item rows of every pool, see `pools`; they alone decide the protocol.
        ks: chance level is k / P.
    """
    text, motion = finite_rows(text_NE, "text embeddings"), finite_rows(motion_NE, "motion embeddings")
    groups = np.asarray(groups_GP, dtype=np.int64)
    if text.shape != motion.shape:
        raise ValueError(f"captions {text.shape} and motions {motion.shape} are not paired")
    if groups.ndim != 2 or groups.size == 0 or groups.min() < 0 or groups.max() >= len(text):
        raise ValueError(f"pools must be (G, P) rows in 0..{len(text) - 1}, got shape {groups.shape}")
    hits, queries = np.zeros((len(text), len(ks))), np.zeros(len(text))
    for rows in groups:
        np.add.at(hits, rows, hit_probability(distances(text[rows], motion[rows]), ks))
        np.add.at(queries, rows, 1.0)
    values = hits.sum(0) / queries.sum()
    return RPrecision(tuple(ks), tuple(float(v) for v in values), hits, queries)


def pair_distances(text_NE: ArrayLike, motion_NE: ArrayLike) -> Array:
    """Return the distance of each caption to its own motion, (N,)."""
    text, motion = finite_rows(text_NE, "text embeddings"), finite_rows(motion_NE, "motion embeddings")
    return np.linalg.norm(text - motion, axis=1)


def mm_dist(text_NE: ArrayLike, motion_NE: ArrayLike) -> float:
    """Return the mean distance of captions to their own motions (matching score); lower is better."""
    return float(pair_distances(text_NE, motion_NE).mean())


@dataclass(frozen=True)
class GaussianMoments:
    """Count, mean and centred scatter of embeddings; merging shards in any order gives the unsharded result."""

    count: int
    mean: Array  # (E,)
    scatter: Array  # (E, E) sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, rows: ArrayLike, where: str = "embeddings", ids: Sequence[str] | None = None) -> GaussianMoments:
        """Return the moments of rows (N, E)."""
        x = finite_rows(rows, where, ids)
        if len(x) == 0:
            raise ValueError(f"{where}: no rows")
        centred = x - x.mean(0)
        return cls(len(x), x.mean(0), centred.T @ centred)

    def merge(self, other: GaussianMoments) -> GaussianMoments:
        """Return the moments of both sets together."""
        count, delta = self.count + other.count, other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return GaussianMoments(count, self.mean + delta * (other.count / count), scatter)

    @property
    def covariance(self) -> Array:
        """(E, E), divided by count - 1."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two rows")
        return self.scatter / (self.count - 1)


def frechet_distance(a: GaussianMoments, b: GaussianMoments) -> float:
    """Return ||mean_a - mean_b||^2 + tr A + tr B - 2 tr (A B)^(1/2) of two Gaussians.

    The last term is the sum of square roots of the eigenvalues of H B H, where H is the symmetric root of A: real and
    symmetric, also where fewer rows than dimensions make the covariances singular.

    Raises:
        NumericalError: a result so far below zero that it is not rounding.
    """
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(cov_a)
    half = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ cov_b @ half), 0.0)).sum()
    variance = float(np.trace(cov_a) + np.trace(cov_b))
    result = float(((a.mean - b.mean) ** 2).sum() + variance - 2.0 * cross)
    if result < -_NEGATIVE_FID * max(1.0, variance):
        raise NumericalError(
            explain(
                "a Frechet distance of at least zero", f"{result:g}", "FID", "Check the embeddings for huge values."
            )
        )
    return max(result, 0.0)


def fid(generated_NE: ArrayLike, real_ME: ArrayLike, ids: Sequence[str] | None = None) -> float:
    """Return the Frechet distance of generated to real embeddings; lower is better.

    It is biased upwards for few rows: compare only equal N, and print `fid_floor` beside it.

    Args:
        generated_NE: embeddings of generated motions.
        real_ME: embeddings of real motions.
        ids: names of the generated rows, for messages.
    """
    return frechet_distance(
        GaussianMoments.of(generated_NE, "generated motions", ids), GaussianMoments.of(real_ME, "real motions")
    )


def fid_floor(real_NE: ArrayLike, rng: np.random.Generator, draws: int = 10) -> float:
    """Return the mean FID between two random halves of the real set: what a perfect generator of N/2 clips scores."""
    rows = finite_rows(real_NE, "real motions")
    half = len(rows) // 2
    if half < 2:
        raise ValueError(f"a floor needs at least 4 real motions, got {len(rows)}")
    orders = [rng.permutation(len(rows)) for _ in range(draws)]
    return float(np.mean([fid(rows[order[:half]], rows[order[half : 2 * half]]) for order in orders]))


def diversity_of_pairs(x_NE: ArrayLike, first: ArrayLike, second: ArrayLike) -> float:
    """Return the mean distance of the given pairs of rows."""
    rows = finite_rows(x_NE, "motion embeddings")
    gaps = rows[np.asarray(first, dtype=np.int64)] - rows[np.asarray(second, dtype=np.int64)]
    return float(np.linalg.norm(gaps, axis=1).mean())


def diversity(x_NE: ArrayLike, rng: np.random.Generator, num_pairs: int = 300) -> float:
    """Return the usual sampled diversity: two draws without replacement, independent of each other, paired up."""
    count = len(np.asarray(x_NE))
    if count < num_pairs:
        raise ValueError(f"diversity of {num_pairs} pairs needs as many motions, got {count}")
    first, second = (rng.choice(count, num_pairs, replace=False) for _ in range(2))
    return diversity_of_pairs(x_NE, first, second)


def expected_diversity(x_NE: ArrayLike) -> float:
    """Return the expectation of `diversity`: the mean distance over all N^2 ordered pairs. No randomness."""
    rows = finite_rows(x_NE, "motion embeddings")
    return float(distances(rows, rows).mean())


def multimodality_of_pairs(x_PGE: ArrayLike, first: ArrayLike, second: ArrayLike) -> float:
    """Return the mean distance between generations `first` and `second` of the same prompt; x is (prompts, G, E)."""
    x = np.asarray(x_PGE, dtype=np.float64)
    finite_rows(x.reshape(-1, x.shape[-1]), "repeated generations")
    gaps = x[:, np.asarray(first, dtype=np.int64)] - x[:, np.asarray(second, dtype=np.int64)]
    return float(np.linalg.norm(gaps, axis=-1).mean())


def multimodality(x_PGE: ArrayLike, rng: np.random.Generator, num_pairs: int = 10) -> float:
    """Return how far generations of one prompt lie apart; all prompts share the drawn pairs."""
    generations = np.asarray(x_PGE).shape[1]
    if generations < num_pairs:
        raise ValueError(f"multimodality of {num_pairs} pairs needs as many generations, got {generations}")
    first, second = (rng.choice(generations, num_pairs, replace=False) for _ in range(2))
    return multimodality_of_pairs(x_PGE, first, second)
