"""How good a reward model is: retrieval in pools and over the whole bank, preference, authenticity; with intervals.

Letters: N clips, P pairs, G pools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from motionrft.core.rng import numpy_rng
from motionrft.evaluation.intervals import Interval, bootstrap, resamples
from motionrft.evaluation.metrics import Array, IntArray, hit_probability
from motionrft.evaluation.pools import permutation_pools, retrieval_pools, too_small
from motionrft.evaluation.preference import auroc, confusion_scores
from motionrft.evaluation.retrieval import KS, cosine_matrix, ranks, similar_captions

DIRECTIONS = ("t2m", "m2t")
Measured = dict[str, Interval]


def retrieval(
    text_NE: ArrayLike,
    motion_NE: ArrayLike,
    sentence_NE: ArrayLike,
    class_ids_N: ArrayLike,
    clip_ids: Sequence[str],
    seed: int = 0,
    draws: int = 1000,
) -> dict[str, Measured]:
    """Return protocol -> {"t2m_R@1": percent, ...} with 95 % intervals over recordings.

    Protocols:
        pools32: pools of 32 distinct classes where all clips have classes, else 20 seeded permutations in groups of
            32, remainder dropped (the published way, without its duplicate captions counted right).
        all: every clip of the split competes.
        all_similar: as `all`, but any motion whose caption is nearly the query's counts as right (cosine above 0.9).

    Args:
        text_NE: caption embeddings.
        motion_NE: embeddings of the clips they describe.
        sentence_NE: embeddings of a sentence encoder, for `all_similar`.
        class_ids_N: semantic class; negative = unknown.
        clip_ids: recording of each clip: mirrored twins and segments are resampled together.
        seed: of pools and bootstrap.
        draws: bootstrap resamples.
    """
    sims = cosine_matrix(text_NE, motion_NE)
    count = len(sims)
    rows = resamples(count, numpy_rng("reward-quality", seed), draws, clip_ids)
    found: dict[str, Measured] = {}
    if not too_small(class_ids_N):
        groups = _pools(np.asarray(class_ids_N, dtype=np.int64), seed)
        found["pools32"] = _both(lambda s: _pooled_hits(s, groups), sims, rows)
    found["all"] = _both(lambda s: (_hits(ranks(s)), np.ones(count)), sims, rows)
    same = similar_captions(sentence_NE)
    found["all_similar"] = _both(lambda s: (_hits(ranks(s, same)), np.ones(count)), sims, rows)
    return found


def _pools(ids: IntArray, seed: int) -> IntArray:
    if (ids >= 0).all():
        return retrieval_pools(ids, seed)
    return np.concatenate([permutation_pools(len(ids), seed + i) for i in range(20)])


def _both(measure: Callable[[Array], tuple[Array, Array]], sims: Array, rows: Sequence[IntArray]) -> Measured:
    found: Measured = {}
    for direction, matrix in zip(DIRECTIONS, (sims, sims.T), strict=True):
        hits_NK, queries_N = measure(matrix)
        for column, k in enumerate(KS):
            hits = hits_NK[:, column]

            def recall(chosen: IntArray, hits: Array = hits, queries_N: Array = queries_N) -> float:
                asked = float(queries_N[chosen].sum())
                return 100.0 * float(hits[chosen].sum()) / asked if asked else float("nan")

            found[f"{direction}_R@{k}"] = bootstrap(recall, len(sims), rows)
    return found


def _pooled_hits(sims: Array, groups_GP: IntArray) -> tuple[Array, Array]:
    """Return hit probabilities summed per query (N, K), and how often each was asked (N,)."""
    hits = np.zeros((len(sims), len(KS)))
    asked = np.zeros(len(sims))
    pools = np.stack([sims[np.ix_(g, g)] for g in groups_GP])
    np.add.at(hits, groups_GP, hit_probability(-pools, KS))
    np.add.at(asked, groups_GP, 1.0)
    return hits, asked


def _hits(ranks_N: Array) -> Array:
    return (ranks_N[:, None] < np.array(KS)[None] + 1).astype(np.float64)


def average_recall(measured: Mapping[str, Interval]) -> float:
    """Return the mean of all ten recalls: the "Avg" of the paper's Table I."""
    return float(np.mean([measured[f"{d}_R@{k}"].value for d in DIRECTIONS for k in KS]))


def preference(preferred_P: ArrayLike, rejected_P: ArrayLike, clip_ids: Sequence[str], seed: int = 0) -> Measured:
    """Return accuracy, precision, recall and F1 in percent; half of the pairs are shown swapped, as published.

    Ties are wrong in accuracy. "Positive" is "the shown left motion is the rejected one".
    """
    better, worse = (np.asarray(x, dtype=np.float64) for x in (preferred_P, rejected_P))
    swapped = numpy_rng("reward-quality/swap", seed).random(len(better)) < 0.5
    left, right = np.where(swapped, worse, better), np.where(swapped, better, worse)
    called = left <= right
    rows = resamples(len(better), numpy_rng("reward-quality", seed), 1000, clip_ids)
    found = _confusion(called, swapped, rows, ("precision", "recall", "f1"))
    found["accuracy"] = bootstrap(lambda c: 100.0 * float((better[c] > worse[c]).mean()), len(better), rows)
    return found


def authenticity(
    generated_logit_N: ArrayLike, generated_N: ArrayLike, clip_ids: Sequence[str], seed: int = 0
) -> Measured:
    """Return accuracy, precision, recall, specificity, F1 and AUC in percent; the positive class is "generated"."""
    logit, truth = np.asarray(generated_logit_N, dtype=np.float64), np.asarray(generated_N, dtype=bool)
    rows = resamples(len(logit), numpy_rng("reward-quality", seed), 1000, clip_ids)
    found = _confusion(logit > 0, truth, rows, ("accuracy", "precision", "recall", "specificity", "f1"))

    def area(chosen: IntArray) -> float:
        both = 0 < truth[chosen].sum() < len(chosen)
        return 100.0 * auroc(logit[chosen], truth[chosen]) if both else float("nan")

    found["auc"] = bootstrap(area, len(logit), rows)
    return found


def length_buckets(lengths_N: ArrayLike, count: int = 3) -> dict[str, IntArray]:
    """Return "SHORTEST-LONGEST" in frames -> rows, from short to long: quantiles of length, tertiles by default.

    A detector that reads nothing but length is at chance (AUC) in a bucket where both classes have the same lengths,
    and calls the short bucket one thing and the long one the other (specificity, recall), whatever it reaches overall.
    Clips of one length share a bucket, so there may be fewer buckets than `count`.
    """
    lengths = np.asarray(lengths_N, dtype=np.int64)
    bucket_N = np.searchsorted(np.quantile(lengths, np.arange(1, count) / count), lengths, side="left")
    rows = [np.flatnonzero(bucket_N == b) for b in np.unique(bucket_N)]
    return {f"{lengths[r].min()}-{lengths[r].max()}": r for r in rows}


def _confusion(called_N: np.ndarray, true_N: np.ndarray, rows: Sequence[IntArray], names: Sequence[str]) -> Measured:
    def score(name: str) -> Callable[[IntArray], float]:
        return lambda chosen: 100.0 * confusion_scores(called_N[chosen], true_N[chosen])[name]

    return {name: bootstrap(score(name), len(called_N), rows) for name in names}


def plain(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return intervals as {"value", "low", "high"}, nested mappings kept."""
    return {
        name: {"value": found.value, "low": found.low, "high": found.high}
        if isinstance(found, Interval)
        else plain(found)
        for name, found in measured.items()
    }
