"""One motion set in, one row of numbers out; rows of several seeds summarised with honest intervals.

Letters: N clips, E latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from motionrft.core.rng import numpy_rng
from motionrft.evaluation import metrics
from motionrft.evaluation.evaluator import Evaluator
from motionrft.evaluation.gates import FID_SCALE
from motionrft.evaluation.intervals import Interval, bootstrap, ci95_student, paired_difference, resamples
from motionrft.evaluation.metrics import Array, IntArray
from motionrft.evaluation.motions import MotionSet
from motionrft.evaluation.quality import QualityConfig, clip_quality

SUMMARY_KEYS = (
    "r_precision_top1", "r_precision_top2", "r_precision_top3", "fid", "mm_dist", "diversity",
    "foot_skate_ratio", "foot_slide", "jerk", "bone_drift",
    "reward_total", "reward_semantic", "reward_preference", "reward_authenticity", "reward_similarity",
)  # fmt: skip
"""Keys of a summary row, always all of them; what was not measured is NaN."""

_TOP = ("r_precision_top1", "r_precision_top2", "r_precision_top3")


@dataclass(frozen=True)
class Reference:
    """Real motions as an evaluator sees them: embedded once, compared with often."""

    motion_NE: Array

    @classmethod
    def of(cls, evaluator: Evaluator, motions: MotionSet) -> Reference:
        """Embed the real motions."""
        return cls(metrics.finite_rows(evaluator.encode_motion(*motions.kinematic).numpy(), "real motions"))

    def floor(self, seed: int = 0) -> float:
        """Return the FID (scaled) between two random halves of the real motions."""
        return FID_SCALE * metrics.fid_floor(self.motion_NE, numpy_rng("evaluation/floor", seed))


@dataclass(frozen=True)
class Scores:
    """One motion set, one seed: values, and what they are averages of."""

    values: Mapping[str, float]
    per_clip: Mapping[str, Array]  # metric -> (N,), NaN where a clip says nothing
    weights: Mapping[str, Array]  # metric -> (N,) how often a clip counts; absent = once
    motion_NE: Array
    reference_ME: Array


def score_motions(
    evaluator: Evaluator,
    motions: MotionSet,
    captions: Sequence[str],
    reference: Reference,
    pools_GP: ArrayLike | None,
    item_ids: Sequence[str] | None = None,
    rewards: Mapping[str, ArrayLike] | None = None,
    quality: QualityConfig | None = None,
) -> Scores:
    """Return every metric of a motion set; nothing is drawn at random here.

    Args:
        evaluator: trained and accepted.
        motions: generated (or real) clips in physical units.
        captions: what each clip was generated for.
        reference: real clips of the same split, for FID.
        pools_GP: rows of `motions`, from `pools.class_pools`: the same for every model compared; None where there are
            too few clips for retrieval and FID, which are then left out.
        item_ids: names for messages.
        rewards: reward terms per clip, by name ("total", "semantic", ...), each (N,).
        quality: contact thresholds.

    Raises:
        NumericalError: a motion is not finite, so that its embedding is not either.
    """
    if len(captions) != len(motions):
        raise ValueError(f"{len(captions)} captions for {len(motions)} motions")
    text = evaluator.encode_text(captions).numpy()
    motion = metrics.finite_rows(evaluator.encode_motion(*motions.kinematic).numpy(), "generated motions", item_ids)
    per_clip: dict[str, Array] = {}
    weights: dict[str, Array] = {}
    if pools_GP is not None:
        retrieval = metrics.r_precision(text, motion, pools_GP)
        asked = np.where(retrieval.queries_N > 0, retrieval.queries_N, np.nan)
        per_clip = {key: retrieval.hits_NK[:, i] / asked for i, key in enumerate(_TOP)}
        weights = {key: retrieval.queries_N for key in _TOP}
    per_clip["mm_dist"] = metrics.pair_distances(text, motion)
    per_clip |= clip_quality(motions.joints_NTJ3.numpy(), motions.lengths_N.numpy(), motions.fps, quality)
    for name, value in (rewards or {}).items():
        per_clip[f"reward_{name}"] = np.asarray(value, dtype=np.float64)
    values = {key: _weighted_mean(x, weights.get(key)) for key, x in per_clip.items()}
    if pools_GP is not None:
        values["fid"] = FID_SCALE * metrics.fid(motion, reference.motion_NE, item_ids)
    values["diversity"] = metrics.expected_diversity(motion)
    return Scores(values, per_clip, weights, motion, reference.motion_NE)


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is."""

    mean: float
    ci95: float  # half width
    n: int  # seeds
    method: str  # "student_t" over seeds | "bootstrap" over prompts (one seed) | "none"

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.ci95

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.ci95


@dataclass(frozen=True)
class Row:
    """One line of the result table."""

    name: str
    metrics: Mapping[str, Estimate] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: every summary key under `metrics`, further metrics behind them."""
        missing = Estimate(math.nan, math.nan, 0, "none")
        keys = (*SUMMARY_KEYS, *(k for k in self.metrics if k not in SUMMARY_KEYS))
        return {"name": self.name, "metrics": {key: vars(self.metrics.get(key, missing)) for key in keys}}

    def means(self) -> dict[str, float]:
        """Return the summary keys as plain numbers."""
        return {key: self.metrics[key].mean if key in self.metrics else math.nan for key in SUMMARY_KEYS}


def summarise(
    name: str,
    runs: Sequence[Scores],
    seed: int = 0,
    draws: int = 300,
    clusters: Sequence[str] | None = None,
) -> Row:
    """Return mean and 95 % interval of every metric over seeds; a single seed gets a bootstrap over prompts.

    The Student interval covers generation noise only, the bootstrap the choice of prompts only: they are not to be
    mixed in one comparison, hence the `method` of each estimate.

    Args:
        name: of the row.
        runs: one per seed, the same prompts in each.
        seed: of the bootstrap.
        draws: bootstrap resamples.
        clusters: labels of prompts that are not independent (a clip and its mirrored twin).
    """
    if not runs:
        raise ValueError(f"row {name!r} has no scores")
    keys = list(runs[0].values)
    if len(runs) > 1:
        found = {key: np.array([run.values[key] for run in runs]) for key in keys}
        return Row(name, {k: Estimate(float(x.mean()), ci95_student(x), len(x), "student_t") for k, x in found.items()})
    run = runs[0]
    rows = resamples(len(run.motion_NE), numpy_rng("evaluation/bootstrap", seed), draws, clusters)
    intervals = {key: _bootstrapped(run, key, rows) for key in keys}
    return Row(name, {k: Estimate(run.values[k], i.half_width, 1, "bootstrap") for k, i in intervals.items()})


def paired_changes(
    before: Sequence[Scores],
    after: Sequence[Scores],
    seed: int = 0,
    draws: int = 1000,
    clusters: Sequence[str] | None = None,
) -> dict[str, Interval]:
    """Return after - before per metric that is a mean over clips, with an interval over prompts.

    Both sides used the same prompts, seeds and noise, so that the prompts' difficulty cancels.
    """
    count = len(before[0].motion_NE)
    rows = resamples(count, numpy_rng("evaluation/paired", seed), draws, clusters)
    shared = [key for key in before[0].per_clip if key in after[0].per_clip]
    return {key: paired_difference(_over_seeds(before, key), _over_seeds(after, key), rows) for key in shared}


def _over_seeds(runs: Sequence[Scores], key: str) -> Array:
    return np.mean([run.per_clip[key] for run in runs], axis=0)


def _bootstrapped(run: Scores, key: str, draws: Sequence[IntArray]) -> Interval:
    everything = len(run.motion_NE)
    if key == "fid":
        # one resampled FID costs two eigendecompositions: a third of the draws is enough for a half width
        return bootstrap(
            lambda rows: FID_SCALE * metrics.fid(run.motion_NE[rows], run.reference_ME),
            everything,
            draws[: max(len(draws) // 3, 1)],
        )
    if key == "diversity":
        gaps = metrics.distances(run.motion_NE, run.motion_NE)
        return bootstrap(lambda rows: float(gaps[np.ix_(rows, rows)].mean()), everything, draws)
    values, weights = run.per_clip[key], run.weights.get(key)
    return bootstrap(
        lambda rows: _weighted_mean(values[rows], None if weights is None else weights[rows]), everything, draws
    )


def _weighted_mean(values: Array, weights: Array | None) -> float:
    weight = np.ones_like(values) if weights is None else weights
    use = np.isfinite(values) & (weight > 0)
    return float((values[use] * weight[use]).sum() / weight[use].sum()) if use.any() else math.nan
