"""Two-way retrieval tables from a similarity matrix: small pools, whole set, near-duplicate captions.

Letters: N items, K ranks looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from motionrft.evaluation.metrics import Array, hit_probability

KS = (1, 2, 3, 5, 10)


def cosine_matrix(text_NE: ArrayLike, motion_NE: ArrayLike) -> Array:
    """Return cosine similarities (N, N), row = caption, column = motion."""
    text, motion = (np.asarray(x, dtype=np.float64) for x in (text_NE, motion_NE))
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    motion = motion / np.linalg.norm(motion, axis=1, keepdims=True)
    return text @ motion.T


def pooled_recall(sims_NN: ArrayLike, groups_GP: ArrayLike, ks: Sequence[int] = KS) -> Array:
    """Return R@k in percent (2, K) inside pools: text to motion, then motion to text. Ties are shared fairly."""
    sims = np.asarray(sims_NN, dtype=np.float64)
    pools = np.stack([sims[np.ix_(rows, rows)] for rows in np.asarray(groups_GP, dtype=np.int64)])
    both = (hit_probability(-pools, ks), hit_probability(-pools.swapaxes(-1, -2), ks))
    return 100.0 * np.stack([hits.mean((0, 1)) for hits in both])


def ranks(sims_NN: ArrayLike, same_NN: ArrayLike | None = None) -> Array:
    """Return the 1-based rank (N,) of each row's true column among all; tied columns share their mean rank.

    Args:
        sims_NN: row = query; the diagonal holds the true pairs.
        same_NN: further right answers per query (bool); then the best rank among them counts.
    """
    sims = np.asarray(sims_NN, dtype=np.float64)
    if same_NN is None:
        true = np.diagonal(sims)
    else:
        right = np.asarray(same_NN, dtype=bool) | np.eye(len(sims), dtype=bool)
        true = np.where(right, sims, -np.inf).max(1)
    better = (sims > true[:, None]).sum(1)
    tied = (sims == true[:, None]).sum(1)
    return 1.0 + better + ((tied - 1) / 2.0 if same_NN is None else 0.0)


def recall_table(ranks_N: ArrayLike, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return R@k in percent under "R01", "R02", ... and the median rank under "MedR".

    A shared mean rank counts at k if it lies below k + 1, as in the published tables.
    """
    found = np.asarray(ranks_N, dtype=np.float64)
    return {f"R{k:02d}": float(100.0 * (found < k + 1).mean()) for k in ks} | {"MedR": float(np.median(found))}


def similar_captions(sentence_NE: ArrayLike, threshold: float = 0.95) -> np.ndarray:
    """Return the bool mask (N, N) of captions so close (cosine rescaled to [0, 1]) that either motion is right."""
    return cosine_matrix(sentence_NE, sentence_NE) > 2.0 * threshold - 1.0
