"""How well scores rank preferred above rejected motions, and tell captured from generated ones.

Letters: N pairs or clips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike


def preference_accuracy(preferred_N: ArrayLike, rejected_N: ArrayLike) -> float:
    """Return the share of pairs ranked right; a tie counts one half, so a constant scorer gets 0.5."""
    better, worse = (np.asarray(x, dtype=np.float64) for x in (preferred_N, rejected_N))
    if better.shape != worse.shape or better.size == 0:
        raise ValueError(f"scores must be paired and not empty, got shapes {better.shape} and {worse.shape}")
    return float((better > worse).mean() + 0.5 * (better == worse).mean())


def preference_cross_entropy(preferred_N: ArrayLike, rejected_N: ArrayLike) -> float:
    """Return the mean of -ln sigmoid(preferred - rejected)."""
    gap = np.asarray(preferred_N, dtype=np.float64) - np.asarray(rejected_N, dtype=np.float64)
    return float(np.logaddexp(0.0, -gap).mean())


def swapped_pairs(preferred_N: ArrayLike, rejected_N: ArrayLike, swap_N: ArrayLike) -> dict[str, float]:
    """Return accuracy, precision, recall and F1 of "was this pair swapped?", the published way to score preference.

    Up to ties the accuracy is `preference_accuracy` again, and precision and recall add only the noise of the swap:
    use it for comparison with printed tables alone.

    Args:
        preferred_N: scores.
        rejected_N: scores.
        swap_N: bool, pairs shown in reverse. A pair is called swapped if its left score is not the larger one.
    """
    better, worse = (np.asarray(x, dtype=np.float64) for x in (preferred_N, rejected_N))
    swapped = np.asarray(swap_N, dtype=bool)
    left, right = np.where(swapped, worse, better), np.where(swapped, better, worse)
    return confusion_scores(left <= right, swapped)


def confusion_scores(predicted_N: ArrayLike, true_N: ArrayLike) -> dict[str, float]:
    """Return tp, fp, fn, tn and the scores made of them; a ratio without cases is NaN."""
    predicted, true = np.asarray(predicted_N, dtype=bool), np.asarray(true_N, dtype=bool)
    tp, fp = int((predicted & true).sum()), int((predicted & ~true).sum())
    fn, tn = int((~predicted & true).sum()), int((~predicted & ~true).sum())
    recall, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
        "accuracy": _ratio(tp + tn, len(true)),
        "precision": _ratio(tp, tp + fp),
        "recall": recall,
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "mcc": _ratio(tp * tn - fp * fn, math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))),
        "prior": _ratio(tp + fn, len(true)),
    }


def auroc(score_N: ArrayLike, positive_N: ArrayLike) -> float:
    """Return the probability that a positive scores above a negative (ties one half): Mann-Whitney by mean ranks."""
    score, positive = np.asarray(score_N, dtype=np.float64), np.asarray(positive_N, dtype=bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        raise ValueError("AUROC needs both classes")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2.0
    rank_sum = mean_rank[inverse][positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2.0) / (num_positive * num_negative))


def average_precision(score_N: ArrayLike, positive_N: ArrayLike) -> float:
    """Return sum over thresholds of precision times the recall gained there; equal scores share one threshold."""
    score, positive = np.asarray(score_N, dtype=np.float64), np.asarray(positive_N, dtype=bool)
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.diff(score[order]) != 0, True)
    found = np.cumsum(positive[order])[last_of_tie]
    called = np.arange(1, len(score) + 1)[last_of_tie]
    gained = np.diff(found, prepend=0) / found[-1]
    return float((gained * found / called).sum())


def authenticity_scores(generated_logit_N: ArrayLike, generated_N: ArrayLike) -> Mapping[str, float]:
    """Return what to report of a detector: AUROC, AP and the confusion scores of the class "generated".

    Args:
        generated_logit_N: logit of "generated" minus logit of "real"; above 0 calls the clip generated.
        generated_N: bool truth.
    """
    logit = np.asarray(generated_logit_N, dtype=np.float64)
    return {
        "auroc": auroc(logit, generated_N),
        "average_precision": average_precision(logit, generated_N),
        **confusion_scores(logit > 0, generated_N),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
