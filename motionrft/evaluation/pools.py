"""Who competes with whom in retrieval: pools of distinct semantic classes, or seeded groups of everything.

Another take of the same action is not a wrong answer. Where clips have classes, a pool holds one clip per class; with
plain random pools even real motion scores far below 1, and a tuned model can look better than real.
Letters: N items, G pools, P pool size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from motionrft.core.errors import DataError, explain
from motionrft.core.rng import numpy_rng
from motionrft.evaluation.metrics import IntArray

POOL_SIZE = 32


def retrieval_pools(class_ids_N: ArrayLike, seed: int, n_pools: int = 200) -> IntArray:
    """Return class pools where every item has a class, else pools of one seeded permutation.

    Raises:
        DataError: too few items or classes (`too_small` says so beforehand).
    """
    ids = np.asarray(class_ids_N, dtype=np.int64)
    return class_pools(ids, seed, n_pools) if _classed(ids) else permutation_pools(len(ids), seed)


def too_small(class_ids_N: ArrayLike, pool: int = POOL_SIZE) -> str:
    """Return why R-precision and FID would mean nothing on these items; "" where they can be computed."""
    ids = np.asarray(class_ids_N, dtype=np.int64)
    if len(ids) < pool:
        return f"R-precision and FID need at least {pool} clips, this split has {len(ids)}"
    classes = len(np.unique(ids))
    if _classed(ids) and classes < pool:
        return f"R-precision and FID need clips of at least {pool} classes, this split has {classes}"
    return ""


def _classed(ids: IntArray) -> bool:
    return len(ids) > 0 and bool((ids >= 0).all())


def class_pools(class_ids_N: ArrayLike, seed: int, n_pools: int = 200, pool: int = POOL_SIZE) -> IntArray:
    """Return item rows (G, P): per pool P classes drawn without replacement, then one item of each.

    Args:
        class_ids_N: semantic class of each item; negative = unknown, never drawn.
        seed: the same seed and classes give the same pools everywhere.
        n_pools: G.
        pool: P.

    Raises:
        DataError: fewer than P classes have items.
    """
    ids = np.asarray(class_ids_N, dtype=np.int64)
    if n_pools < 1 or pool < 2:
        raise ValueError(f"at least one pool of two items, got {n_pools} pools of {pool}")
    members = [np.flatnonzero(ids == c) for c in np.unique(ids[ids >= 0])]
    if len(members) < pool:
        raise DataError(
            explain(
                f"items of at least {pool} distinct semantic classes",
                f"{len(members)} classes in {len(ids)} items",
                "R-precision pools",
                f"R-precision compares each caption with {pool} motions of {pool} different classes and needs more "
                "classes: prepare more data, or evaluate on a larger split.",
            )
        )
    rng = numpy_rng("pools/class", seed, pool)
    chosen = [rng.permutation(len(members))[:pool] for _ in range(n_pools)]
    return np.array([[members[c][rng.integers(len(members[c]))] for c in classes] for classes in chosen])


def permutation_pools(count: int, seed: int, pool: int = POOL_SIZE) -> IntArray:
    """Return item rows (floor(N / P), P) of one seeded permutation; the remainder is dropped.

    For data without classes, as the published tables do it: repeated captions then count as wrong answers.

    Raises:
        DataError: fewer than P items.
    """
    if count < pool:
        raise DataError(
            explain(
                f"at least {pool} items",
                str(count),
                "R-precision pools",
                "R-precision at this pool size needs more items: evaluate on a larger split.",
            )
        )
    order = numpy_rng("pools/permutation", seed, pool).permutation(count)
    return order[: count // pool * pool].reshape(-1, pool)
