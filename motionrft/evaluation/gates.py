"""May this evaluator be believed? Known damage to real validation motion must cost score.

An evaluator that misses a required gate is refused. The two advisory gates depend on the data: a bow played backwards
is still a bow, and only captions that say left or right can notice a mirrored clip.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from motionrft.core.errors import DataError, explain
from motionrft.core.rng import numpy_rng
from motionrft.evaluation import metrics
from motionrft.evaluation.evaluator import Evaluator
from motionrft.evaluation.motions import MotionSet, damaged, joint_noise, mirrored, reversed_time, shuffled_frames
from motionrft.evaluation.pools import POOL_SIZE, retrieval_pools, too_small

_LOG = logging.getLogger(__name__)

FID_SCALE = 100.0
"""FID of unit-norm embeddings is at most 4; results show it times 100."""


@dataclass(frozen=True)
class GateConfig:
    """What an evaluator must achieve on real validation motion."""

    min_top3_over_chance: float = 5.0
    """Real R@3 must be this many times chance."""
    min_top1: float = 0.9
    """Real R@1, in pools of distinct classes."""
    noise_m: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    """Joint noise levels, metres per axis."""
    slack: float = 2e-3
    """Mean similarity may rise by this between neighbouring noise levels."""
    n_pools: int = 200
    """Pools of 32 distinct classes."""
    advisory: tuple[str, ...] = ("time_reversal", "left_right_swap")
    """Gates that are reported but do not refuse the evaluator."""
    seed: int = 0
    """Of pools and damage."""


@dataclass(frozen=True)
class Gate:
    """One question about an evaluator."""

    name: str
    passed: bool
    required: bool
    text: str  # what was measured against what, for people


@dataclass(frozen=True)
class Reaction:
    """What the evaluator makes of one version of the real motion."""

    name: str
    similarity: float  # mean cosine of captions and their motions
    top1: float
    fid: float  # times FID_SCALE, against the undamaged motion


@dataclass(frozen=True)
class GateReport:
    """All gates of one evaluator, and the measurements behind them."""

    gates: tuple[Gate, ...]
    reactions: tuple[Reaction, ...]
    real: dict[str, float] = field(default_factory=dict)  # r_precision_top1/2/3, mm_dist, diversity, fid_floor
    not_judged: str = ""  # why there are no gates; "" where there are

    @property
    def accepted(self) -> bool:
        """True iff there are gates and every required one is passed."""
        return not self.not_judged and all(g.passed for g in self.gates if g.required)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the card and the report."""
        return {"accepted": self.accepted, **asdict(self)}

    def to_text(self) -> str:
        """Return a readable report, one line per gate."""
        if self.not_judged:
            return f"evaluator NOT JUDGED: {self.not_judged}"
        mark = {(True, True): "pass", (True, False): "pass", (False, True): "FAIL", (False, False): "note"}
        lines = [f"evaluator {'accepted' if self.accepted else 'REFUSED'}"]
        lines += [f"  [{mark[g.passed, g.required]}] {g.name}: {g.text}" for g in self.gates]
        lines += [f"  {'damage':<18} similarity   R@1    FIDx{FID_SCALE:.0f}"]
        lines += [f"  {r.name:<18} {r.similarity:>10.4f} {r.top1:>6.3f} {r.fid:>8.2f}" for r in self.reactions]
        return "\n".join(lines)

    def require(self, name: str) -> None:
        """Stop if a gate was missed; an evaluator that could not be judged passes with a warning.

        Raises:
            DataError: a required gate failed; says which.
        """
        if self.not_judged:
            _LOG.warning("evaluator %s was not judged, trust none of its numbers: %s", name, self.not_judged)
        elif not self.accepted:
            raise DataError(
                explain(
                    "an evaluator that passes every required gate",
                    "; ".join(f"{g.name}: {g.text}" for g in self.gates if g.required and not g.passed),
                    f"evaluator {name}",
                    "Train it longer or on more data; its numbers would mean nothing.",
                )
            )


def run_gates(
    evaluator: Evaluator,
    motions: MotionSet,
    captions: Sequence[str],
    class_ids: ArrayLike | None,
    config: GateConfig | None = None,
) -> GateReport:
    """Return what the evaluator makes of real validation motion and of known damage to it.

    Every version, the undamaged one included, takes the same way through joints, so that only the damage differs.

    Args:
        evaluator: trained.
        motions: real clips of the validation split.
        captions: one per clip.
        class_ids: semantic class per clip; None = no classes, plain pools.
        config: thresholds.
    """
    cfg = config or GateConfig()
    ids = np.full(len(motions), -1) if class_ids is None else np.asarray(class_ids)
    if reason := too_small(ids):
        return GateReport((), (), not_judged=reason)
    pools = retrieval_pools(ids, cfg.seed, cfg.n_pools)
    text = evaluator.encode_text(captions).numpy()
    clean = evaluator.encode_motion(*damaged(motions, lambda joints, _: joints, cfg.seed).kinematic).numpy()

    def reaction(name: str, motion_NE: np.ndarray, text_NE: np.ndarray = text) -> Reaction:
        cosine = float((text_NE.astype(np.float64) * motion_NE).sum(1).mean())
        top1 = metrics.r_precision(text_NE, motion_NE, pools, ks=(1,)).values[0]
        return Reaction(name, cosine, top1, FID_SCALE * metrics.fid(motion_NE, clean))

    def embedded(damage: Any) -> np.ndarray:
        return evaluator.encode_motion(*damaged(motions, damage, cfg.seed).kinematic).numpy()

    noisy = [reaction(f"noise {1e3 * s:.0f} mm", embedded(joint_noise(s))) for s in cfg.noise_m]
    order = numpy_rng("gates/captions", cfg.seed).permutation(len(captions))
    others = {
        "frame_shuffling": reaction("frames shuffled", embedded(shuffled_frames)),
        "time_reversal": reaction("played backwards", embedded(reversed_time)),
        "left_right_swap": reaction("left-right swap", embedded(mirrored)),
        "text_permutation": reaction("captions permuted", clean, text[order]),
    }
    base = reaction("real", clean)
    precision = metrics.r_precision(text, clean, pools)
    floor = FID_SCALE * metrics.fid_floor(clean, numpy_rng("gates/floor", cfg.seed))
    gates = [
        *_retrieval_gates(precision.values, cfg),
        *_noise_gates(base, noisy, cfg),
        *(
            Gate(
                name,
                found.similarity < base.similarity,
                name not in cfg.advisory,
                f"similarity {base.similarity:.3f} -> {found.similarity:.3f}, R@1 {base.top1:.3f} -> {found.top1:.3f}",
            )
            for name, found in others.items()
        ),
    ]
    real = {f"r_precision_top{k}": v for k, v in zip(precision.ks, precision.values)}
    real |= {"mm_dist": metrics.mm_dist(text, clean), "diversity": metrics.expected_diversity(clean)}
    return GateReport(tuple(gates), (base, *noisy, *others.values()), {**real, "fid_floor": floor})


def _retrieval_gates(values: Sequence[float], cfg: GateConfig) -> list[Gate]:
    top1, top3, chance = values[0], values[2], 3 / POOL_SIZE
    wanted = cfg.min_top3_over_chance * chance
    return [
        Gate(
            "real_top3",
            top3 >= wanted,
            True,
            f"R@3 of real motion {top3:.3f}, wanted >= {wanted:.3f} ({cfg.min_top3_over_chance:g} x chance)",
        ),
        Gate("real_top1", top1 >= cfg.min_top1, True, f"R@1 of real motion {top1:.3f}, wanted >= {cfg.min_top1:.2f}"),
    ]


def _noise_gates(base: Reaction, noisy: Sequence[Reaction], cfg: GateConfig) -> list[Gate]:
    similar = [base.similarity, *(r.similarity for r in noisy)]
    distance = [r.fid for r in noisy]
    falls = all(b < a + cfg.slack for a, b in itertools.pairwise(similar)) and similar[-1] < similar[0] - cfg.slack
    levels = ", ".join(f"{1e3 * s:.0f}" for s in cfg.noise_m)
    return [
        Gate(
            "noise_similarity",
            falls,
            "noise_similarity" not in cfg.advisory,
            f"similarity under 0, {levels} mm joint noise: {' -> '.join(f'{v:.3f}' for v in similar)}",
        ),
        Gate(
            "noise_fid",
            all(b > a for a, b in zip([0.0, *distance], distance)),
            "noise_fid" not in cfg.advisory,
            f"FIDx{FID_SCALE:.0f} under {levels} mm joint noise: {' -> '.join(f'{v:.2f}' for v in distance)}",
        ),
    ]
