"""Did fine-tuning help, and at what price? Fixed targets, judged metric by metric on two rows of plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_WORSE = 0.10
"""Foot skating, sliding and jerk may get worse by this share."""
MAX_BONE_DRIFT = 1.3
"""Bone drift may grow by this factor."""


@dataclass(frozen=True)
class Verdict:
    """One target and whether it was met."""

    metric: str
    passed: bool | None  # None: not measured
    target: str
    found: str


def judge(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """Return the verdict on each target metric.

    Args:
        before: metric -> {"mean", "ci95", ...} of the base model, as `Row.to_dict()["metrics"]` gives it.
        after: the same of the fine-tuned model.
    """
    return [
        _precision(before, after),
        _fid(before, after),
        *(_not_much_worse(key, before, after) for key in ("jerk", "foot_slide", "foot_skate_ratio")),
        _bones(before, after),
    ]


def _numbers(row: Mapping[str, Mapping[str, Any]], key: str) -> tuple[float, float]:
    cell = row.get(key) or {}
    return tuple(math.nan if cell.get(k) is None else float(cell[k]) for k in ("mean", "ci95"))  # type: ignore[return-value]


def _missing(metric: str, target: str) -> Verdict:
    return Verdict(metric, None, target, "not measured")


def _precision(before: Mapping[str, Any], after: Mapping[str, Any]) -> Verdict:
    key, target = "r_precision_top1", "higher, 95 % intervals apart"
    (old, old_ci), (new, new_ci) = _numbers(before, key), _numbers(after, key)
    if not all(map(math.isfinite, (old, old_ci, new, new_ci))):
        return _missing(key, target)
    apart = new - new_ci > old + old_ci
    how = "intervals apart" if apart else "intervals overlap" if new > old else "not higher"
    return Verdict(key, apart, target, f"{new - old:+.3f}, {how}")


def _fid(before: Mapping[str, Any], after: Mapping[str, Any]) -> Verdict:
    """Not worse: the rise, if any, stays inside the two half widths."""
    key, target = "fid", "not higher beyond the intervals"
    (old, old_ci), (new, new_ci) = _numbers(before, key), _numbers(after, key)
    if not (math.isfinite(old) and math.isfinite(new)):
        return _missing(key, target)
    room = sum(ci for ci in (old_ci, new_ci) if math.isfinite(ci))
    return Verdict(key, new <= old + room, target, f"{new - old:+.1f}")


def _not_much_worse(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Verdict:
    target = f"at most {MAX_WORSE:.0%} higher"
    (old, _), (new, _) = _numbers(before, key), _numbers(after, key)
    if not (math.isfinite(old) and math.isfinite(new)):
        return _missing(key, target)
    change = f"{new / old - 1:+.0%}" if old > 0 else f"{new - old:+.3g}"
    return Verdict(key, new <= old * (1 + MAX_WORSE) + 1e-12, target, change)


def _bones(before: Mapping[str, Any], after: Mapping[str, Any]) -> Verdict:
    key, target = "bone_drift", f"at most {MAX_BONE_DRIFT:g} x before"
    (old, _), (new, _) = _numbers(before, key), _numbers(after, key)
    if not (math.isfinite(old) and math.isfinite(new)):
        return _missing(key, target)
    found = f"{new / old:.2f} x" if old > 1e-9 else f"{new - old:+.2g}"
    return Verdict(key, new <= old * MAX_BONE_DRIFT + 1e-6, target, found)
