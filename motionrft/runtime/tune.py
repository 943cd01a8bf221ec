"""Ray Tune over in-process trials: each trial is one plain process that reports metrics and may be stopped early.

A trial builds a `LocalRuntime(on_report=report)`, so the same stage runs alone, on Ray Train and as a trial. Trials
that start worker groups of their own need `ray.dashboard: true`: without it the workers of a stopped trial are never
freed and the next trial waits for ever.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.tune
import yaml
from ray.tune.search.optuna import OptunaSearch

from motionrft.config.load import apply_overrides, parents_first
from motionrft.core.errors import ClusterError, ConfigError, explain
from motionrft.runtime.tune_analysis import pareto_front
from motionrft.runtime.tune_search import SearchConfig, concurrent_trials, scheduler, searcher, stopper, to_domain

_LOG = logging.getLogger(__name__)
_FINISHED = "trial/finished"  # in the last report of a trial that nothing stopped

Report = Callable[[Mapping[str, float]], None]
TrialFn = Callable[[Mapping[str, Any], Report], Mapping[str, float]]


@dataclass(frozen=True)
class SearchResult:
    """The outcome: one row per trial, the best one first."""

    best: Mapping[str, Any]  # dotted field -> value
    best_value: float
    trials: Sequence[Mapping[str, Any]] = field(repr=False)  # as `results.json` has them, see `_rows`
    folder: Path  # results.csv, results.json, best_config.yaml, front/*.yaml


def run_search(
    trial: TrialFn,
    space: Mapping[str, Any],
    config: SearchConfig,
    run_dir: Path | str,
    *,
    base_config: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> SearchResult:
    """Run the trials inside the current Ray session and write the results table and the best configuration.

    Args:
        trial: trial(overrides, report) -> final metrics. It calls report at its own cadence; report may raise to stop
            it. Importable or picklable; paths inside must be absolute.
        space: dotted field -> distribution (see `to_domain`) or constant.
        config: metric, budget, scheduler.
        run_dir: folder of the search, on storage every node sees.
        base_config: nested configuration; best_config.yaml is it with the best overrides applied. With several
            objectives front/N.yaml are the members of the Pareto front, best first objective first.
        resume: continue an interrupted search with the points and budget it was started with, running again the trials
            that failed.

    Raises:
        ConfigError: unusable space, a folder in use without `resume`, or `resume` of another search.
        ClusterError: no trial produced the metrics, or none fits the cluster.
    """
    folder = Path(run_dir).resolve()
    name = "trials"
    where = folder / name
    trainable = as_trainable(trial, config)
    if resume and ray.tune.Tuner.can_restore(str(where)):
        _check_same(folder, space, config)
        tuner = ray.tune.Tuner.restore(str(where), trainable=trainable, resume_unfinished=True, resume_errored=True)
    elif where.exists() and any(where.iterdir()):
        raise ConfigError(f"{where} holds a search. Pass --resume to continue it, or choose another run folder")
    else:
        tuner = _new_tuner(trainable, space, config, folder, name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "search.json").write_text(_asked(space, config), encoding="utf-8")
    rows = _rows(tuner.fit(), config)
    planned = config.num_samples * math.prod(
        len(s["grid"]) for s in space.values() if isinstance(s, dict) and "grid" in s
    )
    if len(rows) < planned:
        _LOG.warning("interrupted: %d of %d trials were started; --resume runs the rest", len(rows), planned)
    if not rows or not _usable(rows[0], config):
        reason = next((row["error"] for row in rows if row["error"]), f"no trial reported {[*config.goals]}")
        raise ClusterError(f"none of {len(rows)} trials finished: {reason}. Logs are in {where}")
    _write_results(folder, rows, base_config or {}, config)
    return SearchResult(rows[0]["overrides"], rows[0]["value"], rows, folder)


def _asked(space: Mapping[str, Any], config: SearchConfig) -> str:
    return json.dumps({"space": dict(space), "goals": dict(config.goals), "search": config.search}, indent=1)


def _check_same(folder: Path, space: Mapping[str, Any], config: SearchConfig) -> None:
    """Refuse to continue a search with another space: Ray would take the former one and say nothing."""
    former, now = json.loads((folder / "search.json").read_text(encoding="utf-8")), json.loads(_asked(space, config))
    changed = [key for key in now if now[key] != former.get(key)]
    if changed:
        raise ConfigError(
            explain(
                f"the search that {folder} was started with",
                f"another {' and '.join(changed)}",
                str(folder / "search.json"),
                "Give the same options as then, or another --run-dir.",
            )
        )


def as_trainable(trial: TrialFn, config: SearchConfig) -> Any:
    """Return the trial as Tune runs it, with what it reserves of CPUs and GPUs (fractions allowed)."""
    return ray.tune.with_resources(_Trial(trial), {"CPU": config.cpus_per_trial, "GPU": config.gpus_per_trial})


class _Trial:
    """The function Tune runs: forwards reports, and makes the returned metrics the last one."""

    def __init__(self, trial: TrialFn) -> None:
        self._trial = trial
        self.__name__ = "trial"

    def __call__(self, overrides: dict[str, Any]) -> None:
        def report(metrics: Mapping[str, float]) -> None:
            ray.tune.report({key: float(value) for key, value in metrics.items()})

        report({**self._trial(dict(parents_first(overrides)), report), _FINISHED: 1.0})


def _new_tuner(
    trainable: Any, space: Mapping[str, Any], config: SearchConfig, folder: Path, name: str
) -> ray.tune.Tuner:
    concurrent = concurrent_trials(config, ray.cluster_resources())
    goals = ", ".join(f"{metric} ({mode})" for metric, mode in config.goals.items())
    how = config.search if config.search == "random" else f"{config.search} {config.sampler}"
    _LOG.info("search: %d samples (%s), %d at a time, for %s", config.num_samples, how, concurrent, goals)
    search_alg = searcher(config, space)
    several = isinstance(search_alg, OptunaSearch) and bool(config.objectives)  # then it knows metrics and modes itself
    return ray.tune.Tuner(
        trainable,
        param_space={key: to_domain(spec) for key, spec in space.items()},
        tune_config=ray.tune.TuneConfig(
            metric=None if several else config.metric,
            mode=None if several else config.mode,
            num_samples=config.num_samples,
            max_concurrent_trials=concurrent,
            scheduler=scheduler(config),
            search_alg=search_alg,
        ),
        run_config=ray.tune.RunConfig(
            name=name,
            storage_path=str(folder),
            stop=stopper(config),
            failure_config=ray.tune.FailureConfig(max_failures=config.max_failures),
            verbose=0,
        ),
    )


def _rows(grid: ray.tune.ResultGrid, config: SearchConfig) -> list[dict[str, Any]]:
    """Return one row per trial: the usable ones before the others, the front before the rest, finished before stopped.

    A stopped trial ranks behind every finished one: running its configuration would not stop where it did.
    """
    rows = []
    for result in (grid[index] for index in range(len(grid))):
        metrics = result.metrics or {}
        goals = {metric: _finite(metrics.get(metric)) for metric in config.goals}
        rows.append(
            {
                "trial": Path(result.path).name if result.path else "",
                "value": _finite(metrics.get(config.metric)),
                "objectives": goals if config.objectives else {},
                "front": False,
                "finished": bool(metrics.get(_FINISHED)),
                "reports": metrics.get("training_iteration", 0),
                "error": str(result.error).strip().splitlines()[-1] if result.error else "",
                "overrides": dict(result.config or {}),
            }
        )
    if config.objectives:
        values = [[np.nan if v is None else v for v in row["objectives"].values()] for row in rows]
        for row, on_front in zip(rows, pareto_front(np.array(values, dtype=np.float64), [*config.goals.values()])):
            row["front"] = bool(on_front and _usable(row, config))
    sign = 1.0 if config.mode == "min" else -1.0
    return sorted(
        rows,
        key=lambda row: (
            not _usable(row, config), not row["front"], not row["finished"], sign * (row["value"] or 0.0), row["trial"]
        ),
    )  # fmt: skip


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _usable(row: Mapping[str, Any], config: SearchConfig) -> bool:
    return row["value"] is not None and None not in row["objectives"].values()


def _write_results(folder: Path, rows: list[dict[str, Any]], base: Mapping[str, Any], config: SearchConfig) -> None:
    (folder / "results.json").write_text(json.dumps(rows, indent=1, default=str), encoding="utf-8")
    fields = sorted({key for row in rows for key in row["overrides"]})
    shown = ["trial", "value", "front", "finished", "reports", "error"]
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow([*shown, *config.objectives, *fields])
        for row in rows:
            values = [row["overrides"].get(key, "") for key in fields]
            writer.writerow([*(row[key] for key in shown), *row["objectives"].values(), *values])
    _write_config(folder / "best_config.yaml", base, rows[0]["overrides"])
    for stale in (folder / "front").glob("*.yaml"):
        stale.unlink()
    for index, member in enumerate(_front(rows, config)):
        _write_config(folder / "front" / f"{index}.yaml", base, member["overrides"])


def _front(rows: Sequence[Mapping[str, Any]], config: SearchConfig) -> list[Mapping[str, Any]]:
    """Return the rows on the Pareto front, the best in the first objective first."""
    if not config.objectives:
        return []
    metric, mode = next(iter(config.objectives.items()))
    found = [row for row in rows if row["front"]]
    return sorted(found, key=lambda row: row["objectives"][metric], reverse=mode == "max")


def _write_config(path: Path, base: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(apply_overrides(base, overrides), sort_keys=False), encoding="utf-8")
