"""What a finished search says: which trials nothing beats, and which parameter mattered. Needs no Ray."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

ENOUGH_TRIALS = 10
"""With fewer, five trials are half of all: the page then says that it cannot tell."""
SHUFFLES = 399
"""Searches without any effect that a field is compared with; the smallest chance that can be found is 1 in 400."""


@dataclass(frozen=True)
class FieldImportance:
    """How much one field had to do with one metric."""

    field: str
    """Dotted configuration field."""
    metric: str
    """Metric path."""
    share: float
    """Of what tells the best trials from the rest, beyond what chance gives; the shares of a metric sum to 1 or 0."""
    chance: float
    """How likely a field without any effect shows as large a share or as large a correlation."""
    correlation: float | None
    """Spearman's rank correlation of field and metric; positive: larger values go with a larger metric. None where the
    values have no order."""
    clear: bool
    """Whether the trials are enough and `chance`, times the number of fields looked at, is at most 5 %."""


def pareto_front(values_NM: np.ndarray, modes: Sequence[str]) -> np.ndarray:
    """Return which of N trials no other trial beats: none is as good in all M metrics and better in one.

    Args:
        values_NM: metrics; rows with a NaN are never on the front and beat nobody.
        modes: "min" or "max" per metric.

    Returns:
        Boolean (N,). Equal trials are on the front together.
    """
    if not len(values_NM):
        return np.zeros(0, dtype=bool)
    costs_NM = values_NM * np.array([1.0 if mode == "min" else -1.0 for mode in modes])
    as_good_NN = (costs_NM[:, None] <= costs_NM[None]).all(-1)  # [i, j]: i is as good as j; False with NaN
    better_NN = (costs_NM[:, None] < costs_NM[None]).any(-1)
    return ~(as_good_NN & better_NN).any(0) & np.isfinite(costs_NM).all(-1)


def rank_correlation(x_N: Sequence[float], y_N: Sequence[float]) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; 0 where one side does not vary."""
    ranks = [_mean_ranks(np.asarray(values, dtype=np.float64)) for values in (x_N, y_N)]
    a, b = (rank - rank.mean() for rank in ranks)
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else 0.0


def _mean_ranks(values_N: np.ndarray) -> np.ndarray:
    _, group_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group_N]


def importance(
    trials: Sequence[Mapping[str, Any]], space: Mapping[str, Any], metric: str, mode: str
) -> list[FieldImportance]:
    """Return the varied fields, the most important for reaching the best trials first.

    The measure is PED-ANOVA's (Watanabe, Bansal and Hutter 2023) as Optuna computes it: how differently a field is
    distributed among the best quarter of the trials (five at least) and among all of them. It sees optima inside a
    range, where a rank correlation is blind; the correlation adds the direction. In a few dozen trials the measure is
    large for fields without any effect too: its mean over results shuffled among the trials is taken off, and `chance`
    is how often a shuffle reaches it, or the correlation's own two-sided tail, doubled because the smaller one counts.

    Args:
        trials: "overrides" (dotted field -> value) and "metrics" (metric -> value); those without the metric are left
            out. A trial that was stopped counts with its last value.
        space: dotted field -> distribution, as the search had it.
        metric: whose importance.
        mode: "min" or "max".
    """
    rows = [t for t in trials if t["metrics"].get(metric) is not None and np.isfinite(t["metrics"][metric])]
    names = [n for n in space if len({_choice(t["overrides"].get(n)) for t in rows}) > 1]
    if not names:
        return []
    values_N = np.array([t["metrics"][metric] for t in rows], dtype=np.float64)
    columns = {name: [t["overrides"][name] for t in rows] for name in names}
    measured_SF = _divergences(columns, space, values_N if mode == "min" else -values_N)
    beyond_F = np.maximum(measured_SF[0] - measured_SF[1:].mean(0), 0.0)
    chance_F = (measured_SF >= measured_SF[0]).mean(0)
    total = float(beyond_F.sum()) or 1.0
    found = []
    for name, beyond, chance in zip(names, beyond_F.tolist(), chance_F.tolist()):
        ordered = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in columns[name])
        correlation = rank_correlation(columns[name], values_N.tolist()) if ordered else None
        if correlation is not None:
            chance = min(chance, _correlation_chance(correlation, len(rows)))
        chance = min(1.0, 2 * chance)
        clear = len(rows) >= ENOUGH_TRIALS and chance * len(names) <= 0.05
        found.append(FieldImportance(name, metric, beyond / total, chance, correlation, clear))
    return sorted(found, key=lambda f: (not f.clear, -f.share))


def _correlation_chance(correlation: float, count: int) -> float:
    """Return how likely independent ranks correlate as much: their correlation has variance 1 / (count - 1)."""
    return math.erfc(abs(correlation) * math.sqrt(max(count - 1, 1) / 2))


def _divergences(columns: Mapping[str, Sequence[Any]], space: Mapping[str, Any], costs_N: np.ndarray) -> np.ndarray:
    """Return PED-ANOVA's measure (1 + SHUFFLES, fields): of the costs as they are, then shuffled among the trials."""
    kinds = {name: _distribution(space[name], values) for name, values in columns.items()}
    study = optuna.create_study()
    for i, cost in enumerate(costs_N.tolist()):
        point = {
            name: _choice(columns[name][i]) if isinstance(kind, CategoricalDistribution) else float(columns[name][i])
            for name, kind in kinds.items()
        }
        study.add_trial(optuna.trial.create_trial(params=point, distributions=kinds, value=cost))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.25, 5 / len(costs_N))))
    rng = np.random.default_rng(0)
    measured = []
    for order in [np.arange(len(costs_N)), *(rng.permutation(len(costs_N)) for _ in range(SHUFFLES))]:
        shuffled = costs_N[order].tolist()
        found = optuna.importance.get_param_importances(
            study,
            evaluator=evaluator,
            params=[*columns],
            target=lambda trial, costs=shuffled: costs[trial.number],  # type: ignore[misc]
            normalize=False,
        )
        measured.append([found[name] for name in columns])
    return np.array(measured)


def _distribution(spec: Any, values: Sequence[Any]) -> BaseDistribution:
    """Return the distribution of a field: continuous within what was tried, or the choices."""
    ((kind, _),) = spec.items()
    if kind in ("choice", "grid"):
        return CategoricalDistribution(sorted({_choice(v) for v in values}, key=str))
    return FloatDistribution(float(min(values)), float(max(values)), log=kind.startswith("log"))


def _choice(value: Any) -> Any:
    """Return a value that can be a category: lists and mappings as text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, sort_keys=True)


def analyse(
    trials: Sequence[Mapping[str, Any]], space: Mapping[str, Any], goals: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the importance of every field for every metric as plain rows, and what it amounts to, a sentence each.

    Args:
        trials: as `results.json` has them.
        space: dotted field -> distribution.
        goals: metric -> "min" or "max"; where there is only one, it is each trial's "value".
    """
    rows = [{**t, "metrics": t["objectives"] or dict.fromkeys(goals, t["value"])} for t in trials]
    found: list[dict[str, Any]] = []
    sentences = []
    with _quiet_optuna():
        for metric, mode in goals.items():
            fields = importance(rows, space, metric, mode)
            found += [asdict(f) for f in fields]
            sentences.append(_sentence(fields, metric, sum(row["metrics"][metric] is not None for row in rows)))
    return found, sentences


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Silence one line per study, and warnings about too few trials: the report says so itself."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _sentence(fields: Sequence[FieldImportance], metric: str, count: int) -> str:
    if not fields:
        return f"{metric}: nothing varied, so nothing can be said."
    if count < ENOUGH_TRIALS:
        return f"{metric}: {count} trials are too few to tell which field mattered; the order may be chance."
    clear = [f for f in fields if f.clear]
    if not clear:
        return f"{metric}: in {count} trials no field stands out from chance."
    first, *others = clear
    text = f"{metric}: {first.field} mattered most"
    if first.correlation is not None and _correlation_chance(first.correlation, count) <= 0.05:
        way = "larger" if first.correlation > 0 else "smaller"
        text += f" (larger values go with {way} {metric}, rank correlation {first.correlation:+.2f})"
    return text + (f"; then {', '.join(f.field for f in others)}." if others else "; the others may be chance.")
