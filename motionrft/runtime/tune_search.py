"""The parts of a search: its settings, its distributions, and what Ray Tune calls searcher, scheduler and stopper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
import ray.tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from ray.tune.stopper import TrialPlateauStopper

from motionrft.core.errors import ClusterError, ConfigError

MODES = ("min", "max")

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

    metric: str
    """A metric path that the trials report: it ranks them and picks the best configuration."""
    mode: str = "min"
    """min | max."""
    objectives: Mapping[str, str] = field(default_factory=dict)
    """Metric -> min | max. Two or more are searched for together; the result is their Pareto front, of which `metric`
    picks one."""
    num_samples: int = 8
    """Trials per grid point."""
    search: str = "random"
    """random | optuna (model-based: later trials are drawn where earlier ones did well)."""
    sampler: str = "tpe"
    """Of optuna: tpe, or nsga2 for several objectives and many trials."""
    max_concurrent: int = 0
    """Trials at a time; 0 = as many as CPUs and GPUs allow."""
    cpus_per_trial: float = 1.0
    """Logical CPUs reserved for a trial."""
    gpus_per_trial: float = 0.0
    """Share of one GPU: 0.25 puts four trials on each. Ray counts shares; GPU memory is not divided."""
    scheduler: str = "asha"
    """asha (stops the trials that validate worst at a rung) | none."""
    grace_reports: int = 1
    """Reports before a trial may be stopped."""
    max_reports: int = 100
    """Reports of a full trial."""
    reduction_factor: int = 3
    """One of so many trials survives a rung of asha."""
    plateau_reports: int = 0
    """Stop a trial whose last so many reports do not differ; 0 = never."""
    plateau_std: float = 0.001
    """Standard deviation of the metric below which reports do not differ."""
    max_failures: int = 1
    """Restarts of a trial whose process failed."""
    seed: int = 0
    """Of the points."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        modes = {self.metric: self.mode, **self.objectives}
        wrong = {metric: mode for metric, mode in modes.items() if mode not in MODES}
        rules = [
            (not wrong, f"mode must be min or max, got {wrong}"),
            (len(self.objectives) != 1, "objectives need two or more metrics; one objective is metric and mode"),
            (
                not self.objectives or self.scheduler == "none",
                "scheduler asha compares trials by one number: with several objectives use scheduler none",
            ),
            (self.search in ("random", "optuna"), f"search must be random or optuna, got {self.search!r}"),
            (self.sampler in ("tpe", "nsga2"), f"sampler must be tpe or nsga2, got {self.sampler!r}"),
            (self.sampler == "tpe" or self.search == "optuna", "sampler nsga2 needs search optuna"),
            (self.scheduler in ("asha", "none"), f"scheduler must be asha or none, got {self.scheduler!r}"),
            (self.num_samples >= 1, f"num_samples must be >= 1, got {self.num_samples}"),
            (self.max_concurrent >= 0, f"max_concurrent must be >= 0, got {self.max_concurrent}"),
            (self.cpus_per_trial > 0, f"cpus_per_trial must be > 0, got {self.cpus_per_trial}"),
            (0 <= self.gpus_per_trial <= 1, f"gpus_per_trial must be in [0, 1], got {self.gpus_per_trial}"),
            (
                1 <= self.grace_reports <= self.max_reports,
                f"need 1 <= grace_reports <= max_reports, got {self.grace_reports}, {self.max_reports}",
            ),
            (self.reduction_factor >= 2, f"reduction_factor must be >= 2, got {self.reduction_factor}"),
            (self.plateau_reports != 1 and self.plateau_reports >= 0, "plateau_reports must be 0, or 2 and more"),
            (self.plateau_std > 0, f"plateau_std must be > 0, got {self.plateau_std}"),
        ]
        problems = [text for holds, text in rules if not holds]
        if problems:
            raise ConfigError("search: " + "; ".join(problems))

    @property
    def goals(self) -> Mapping[str, str]:
        """Metric -> min | max: the objectives, or the one metric."""
        return self.objectives or {self.metric: self.mode}


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


def draw(space: Mapping[str, Any], rng: np.random.RandomState) -> dict[str, Any]:
    """Return one random point, dotted field -> value, without Ray: what a trial could be given."""
    point = {}
    for name, spec in space.items():
        domain = to_domain(spec)
        if isinstance(domain, dict):
            values = domain["grid_search"]
            domain = values[rng.randint(len(values))]
        point[name] = domain.sample(random_state=rng) if hasattr(domain, "sample") else domain
    return point


def corner_points(space: Mapping[str, Any], rng: np.random.RandomState) -> Iterator[dict[str, Any]]:
    """Yield a random point, then it with one field at a time at each of its choices or at an end of its range."""
    point = draw(space, rng)
    yield point
    for name, spec in space.items():
        if isinstance(spec, Mapping):
            ((kind, arguments),) = spec.items()
            values = list(arguments) if kind in ("choice", "grid") else list(arguments[:2])
            if kind in ("randint", "lograndint"):
                values[1] -= 1  # their upper end is excluded
            yield from ({**point, name: value} for value in values if kind != "normal")


def concurrent_trials(config: SearchConfig, resources: Mapping[str, float]) -> int:
    """Return how many trials run at a time.

    Args:
        config: what one trial reserves, and the user's own limit.
        resources: of the whole cluster, as `ray.cluster_resources()` gives them. A share of a GPU never spans two, so
            each GPU holds floor(1 / share) trials.

    Raises:
        ClusterError: not even one fits.
    """
    fit = [math.floor(resources.get("CPU", 0.0) / config.cpus_per_trial + 1e-9)]
    if config.gpus_per_trial:
        fit.append(math.floor(resources.get("GPU", 0.0)) * math.floor(1 / config.gpus_per_trial + 1e-9))
    if min(fit) < 1:
        raise ClusterError(
            f"a trial reserves {config.cpus_per_trial:g} CPUs and {config.gpus_per_trial:g} GPUs, the cluster has "
            f"{resources.get('CPU', 0.0):g} and {resources.get('GPU', 0.0):g}: lower "
            "hardware.workers.cpus_per_worker or gpus_per_worker, or choose another profile"
        )
    return min(*fit, config.max_concurrent or fit[0])


def searcher(config: SearchConfig, space: Mapping[str, Any]) -> Any:
    """Return what proposes the points, seeded; Tune limits how many run at a time.

    Raises:
        ConfigError: a distribution that optuna does not know.
    """
    if config.search == "random":
        return BasicVariantGenerator(random_state=config.seed)
    unknown = [name for name, spec in space.items() if isinstance(spec, Mapping) and {*spec} & {"grid", "normal"}]
    if unknown:
        raise ConfigError(f"search optuna knows neither grid nor normal: change {', '.join(unknown)}, or search random")
    if config.sampler == "nsga2":
        # Four generations: with Optuna's 50 a search of this size would never leave the first, which is random.
        sampler: Any = optuna.samplers.NSGAIISampler(population_size=max(2, config.num_samples // 4), seed=config.seed)
    else:
        start = min(10, max(3, config.num_samples // 3))  # random points before the model is asked
        sampler = optuna.samplers.TPESampler(n_startup_trials=start, seed=config.seed)
    if config.objectives:
        return OptunaSearch(metric=[*config.objectives], mode=[*config.objectives.values()], sampler=sampler)
    return OptunaSearch(sampler=sampler)  # metric and mode come from Tune


def scheduler(config: SearchConfig) -> ASHAScheduler | None:
    """Return what stops the trials that validate worst, or None.

    A full trial is never cut: its last report comes with its results, one report after `max_reports`.
    """
    if config.scheduler == "none":
        return None
    return ASHAScheduler(
        time_attr="training_iteration",
        grace_period=config.grace_reports,
        max_t=config.max_reports + 2,
        reduction_factor=config.reduction_factor,
    )


def stopper(config: SearchConfig) -> TrialPlateauStopper | None:
    """Return what stops a trial that has stopped moving, or None."""
    if not config.plateau_reports:
        return None
    return TrialPlateauStopper(
        config.metric,
        std=config.plateau_std,
        num_results=config.plateau_reports,
        grace_period=max(config.grace_reports, config.plateau_reports),
    )
