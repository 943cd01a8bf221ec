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
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.tune
import yaml
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from motionrft.config.load import set_field
from motionrft.core.errors import ClusterError, ConfigError

_LOG = logging.getLogger(__name__)

Report = Callable[[Mapping[str, float]], None]
TrialFn = Callable[[Mapping[str, Any], Report], Mapping[str, float]]

_DOMAINS: dict[str, Callable[..., Any]] = {
    "uniform": ray.tune.uniform,
    "loguniform": ray.tune.loguniform,
    "quniform": ray.tune.quniform,
    "randint": ray.tune.randint,
    "lograndint": ray.tune.lograndint,
    "normal": ray.tune.randn,
}


@dataclass(frozen=True)
class SearchConfig:
    """What to optimise and how many trials to spend."""

    metric: str  # a metric path that the trials report
    mode: str = "min"
    num_samples: int = 8  # per grid point
    max_concurrent: int = 0  # 0 = as many as the CPUs allow; the log prints it
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    scheduler: str = "asha"  # asha | none
    grace_reports: int = 1  # reports before a trial may be stopped
    max_reports: int = 100  # reports of a full trial
    reduction_factor: int = 3
    max_failures: int = 1  # restarts of a trial whose process failed
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.mode not in ("min", "max"):
            problems.append(f"mode must be min or max, got {self.mode!r}")
        if self.scheduler not in ("asha", "none"):
            problems.append(f"scheduler must be asha or none, got {self.scheduler!r}")
        if self.num_samples < 1:
            problems.append(f"num_samples must be >= 1, got {self.num_samples}")
        if self.max_concurrent < 0:
            problems.append(f"max_concurrent must be >= 0, got {self.max_concurrent}")
        if not 1 <= self.grace_reports <= self.max_reports:
            problems.append(f"need 1 <= grace_reports <= max_reports, got {self.grace_reports}, {self.max_reports}")
        if self.reduction_factor < 2:
            problems.append(f"reduction_factor must be >= 2, got {self.reduction_factor}")
        if problems:
            raise ConfigError("search: " + "; ".join(problems))


@dataclass(frozen=True)
class SearchResult:
    """The outcome: one row per trial, the best one first."""

    best: Mapping[str, Any]  # dotted field -> value
    best_value: float
    trials: Sequence[Mapping[str, Any]] = field(repr=False)  # trial, value, reports, error, and the overrides
    folder: Path  # results.csv, results.json, best_config.yaml


def to_domain(spec: Any) -> Any:
    """Return Tune's distribution for a YAML one: {choice: [..]}, {grid: [..]}, {uniform: [lo, hi]} ...

    Anything that is not a mapping is a constant.

    Raises:
        ConfigError: unknown distribution or wrong arguments.
    """
    if not isinstance(spec, Mapping):
        return spec
    if len(spec) != 1:
        raise ConfigError(f"a distribution has one key, got {dict(spec)!r}")
    ((name, arguments),) = spec.items()
    if not isinstance(arguments, (list, tuple)) or not arguments:
        raise ConfigError(f"distribution {name!r} takes a list, got {arguments!r}")
    if name == "choice":
        return ray.tune.choice(list(arguments))
    if name == "grid":
        return ray.tune.grid_search(list(arguments))
    if name not in _DOMAINS:
        raise ConfigError(f"unknown distribution {name!r}; known: choice, grid, {', '.join(_DOMAINS)}")
    try:
        return _DOMAINS[name](*arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"distribution {name}{tuple(arguments)}: {error}") from error


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
        base_config: nested configuration; best_config.yaml is it with the best overrides applied.
        resume: continue an interrupted search, running again the trials that failed.

    Raises:
        ConfigError: unusable space, or a folder in use without `resume`.
        ClusterError: no trial produced the metric.
    """
    folder = Path(run_dir).resolve()
    name = "trials"
    where = folder / name
    trainable = ray.tune.with_resources(_Trial(trial), {"CPU": config.cpus_per_trial, "GPU": config.gpus_per_trial})
    if resume and ray.tune.Tuner.can_restore(str(where)):
        tuner = ray.tune.Tuner.restore(str(where), trainable=trainable, resume_unfinished=True, resume_errored=True)
    elif where.exists() and any(where.iterdir()):
        raise ConfigError(f"{where} holds a search. Pass --resume to continue it, or choose another run folder")
    else:
        tuner = _new_tuner(trainable, space, config, folder, name)
    grid = tuner.fit()
    rows = _rows(grid, config)
    usable = [row for row in rows if row["value"] is not None]
    if not usable:
        reason = next((row["error"] for row in rows if row["error"]), f"no trial reported {config.metric!r}")
        raise ClusterError(f"none of {len(rows)} trials finished: {reason}. Logs are in {where}")
    overrides = {key: usable[0]["overrides"][key] for key in space}
    _write_results(folder, rows, overrides, base_config or {})
    return SearchResult(overrides, usable[0]["value"], rows, folder)


class _Trial:
    """The function Tune runs: forwards reports, and makes the returned metrics the last one."""

    def __init__(self, trial: TrialFn) -> None:
        self._trial = trial
        self.__name__ = "trial"

    def __call__(self, overrides: dict[str, Any]) -> None:
        def report(metrics: Mapping[str, float]) -> None:
            ray.tune.report({key: float(value) for key, value in metrics.items()})

        report(self._trial(overrides, report))


def _new_tuner(
    trainable: Any, space: Mapping[str, Any], config: SearchConfig, folder: Path, name: str
) -> ray.tune.Tuner:
    concurrent = config.max_concurrent or max(1, int(ray.cluster_resources().get("CPU", 1) // config.cpus_per_trial))
    _LOG.info(
        "search: %d samples, %d at a time, metric %s (%s)", config.num_samples, concurrent, config.metric, config.mode
    )
    scheduler = None
    if config.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="training_iteration",
            grace_period=config.grace_reports,
            max_t=config.max_reports,
            reduction_factor=config.reduction_factor,
        )
    return ray.tune.Tuner(
        trainable,
        param_space={key: to_domain(spec) for key, spec in space.items()},
        tune_config=ray.tune.TuneConfig(
            metric=config.metric,
            mode=config.mode,
            num_samples=config.num_samples,
            scheduler=scheduler,
            search_alg=BasicVariantGenerator(random_state=config.seed, max_concurrent=concurrent),
        ),
        run_config=ray.tune.RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=ray.tune.FailureConfig(max_failures=config.max_failures),
            verbose=0,
        ),
    )


def _rows(grid: ray.tune.ResultGrid, config: SearchConfig) -> list[dict[str, Any]]:
    """Return one row per trial, best first, trials without a value last."""
    rows = []
    for result in (grid[index] for index in range(len(grid))):
        metrics = result.metrics or {}
        value = metrics.get(config.metric)
        rows.append(
            {
                "trial": Path(result.path).name if result.path else "",
                "value": float(value) if value is not None and math.isfinite(value) else None,
                "reports": metrics.get("training_iteration", 0),
                "error": str(result.error).strip().splitlines()[-1] if result.error else "",
                "overrides": dict(result.config or {}),
            }
        )
    sign = 1.0 if config.mode == "min" else -1.0
    return sorted(rows, key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0), row["trial"]))


def _write_results(folder: Path, rows: list[dict[str, Any]], best: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(rows, indent=1, default=str), encoding="utf-8")
    fields = sorted({key for row in rows for key in row["overrides"]})
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["trial", "value", "reports", "error", *fields])
        for row in rows:
            values = [row["overrides"].get(key, "") for key in fields]
            writer.writerow([row["trial"], row["value"], row["reports"], row["error"], *values])
    text = yaml.safe_dump(apply_overrides(base, best), sort_keys=False)
    (folder / "best_config.yaml").write_text(text, encoding="utf-8")


def apply_overrides(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a nested configuration with dotted fields set; missing levels are created."""
    result = deepcopy(dict(base))
    for dotted, value in overrides.items():
        set_field(result, dotted, value)
    return result
