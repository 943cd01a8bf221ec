"""Who reaches which reward first: times read off curves of reward over training seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Curve = Sequence[tuple[float, float]]
"""(training seconds, reward) in order of time."""


def time_to_reach(curve: Curve, level: float) -> float | None:
    """Return when a curve first reaches a level, linear between its points; None if it never does."""
    for i, (seconds, reward) in enumerate(curve):
        if reward >= level:
            if i == 0:
                return seconds
            before, low = curve[i - 1]
            return before + (seconds - before) * (level - low) / (reward - low)
    return None


def best_of(curve: Curve) -> float:
    """Return the highest reward of a curve."""
    return max(reward for _, reward in curve)


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Return the pointwise mean of curves that were read equally often (one per seed); longer ones are cut."""
    shortest = min(len(curve) for curve in curves)
    return [
        (sum(c[i][0] for c in curves) / len(curves), sum(c[i][1] for c in curves) / len(curves))
        for i in range(shortest)
    ]


def race(curves: Mapping[str, Sequence[Curve]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return, for every pair of methods, when the row's mean curve reaches the best of the column's.

    Args:
        curves: method -> one curve per seed.

    Returns:
        row -> column -> {"seconds" to get there or None, "speedup": the column's own time over it, or None}.
    """
    means = {name: mean_curve(found) for name, found in curves.items()}
    levels = {name: best_of(curve) for name, curve in means.items()}
    own = {name: time_to_reach(curve, levels[name]) for name, curve in means.items()}
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for row, curve in means.items():
        found[row] = {}
        for column, level in levels.items():
            seconds, theirs = time_to_reach(curve, level), own[column]
            ratio = theirs / seconds if seconds and theirs else None
            found[row][column] = {"seconds": seconds, "speedup": ratio}
    return found
