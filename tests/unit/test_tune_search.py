"""What a search is made of: settings that contradict, shares of GPUs, early stopping, searchers, the command line."""

from __future__ import annotations

import argparse
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from ray.tune.search import BasicVariantGenerator

from motionrft.cli.tune import add_arguments, search_settings
from motionrft.config.load import resolve
from motionrft.config.profiles import load_profile
from motionrft.core.errors import ClusterError, ConfigError
from motionrft.runtime.tune import as_trainable
from motionrft.runtime.tune_search import SearchConfig, concurrent_trials, scheduler, searcher, stopper, to_domain
from tune_spaces.space import load_space

TWO = {"gain": "max", "cost": "min"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mode": "up"}, "mode must be min or max"),
        ({"objectives": {"a": "up", "b": "min"}, "scheduler": "none"}, "{'a': 'up'}"),
        ({"objectives": {"a": "min"}}, "two or more"),
        ({"objectives": TWO}, "asha compares trials by one number"),
        ({"search": "grid"}, "search must be"),
        ({"sampler": "nsga2"}, "needs search optuna"),
        ({"grace_reports": 5, "max_reports": 4}, "grace_reports <= max_reports"),
        ({"gpus_per_trial": 1.5}, "gpus_per_trial"),
        ({"plateau_reports": 1}, "plateau_reports"),
    ],
)
def test_contradicting_settings_are_named(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SearchConfig("gain", **changed)


def test_goals_are_the_objectives_or_the_one_metric() -> None:
    assert SearchConfig("gain", "max").goals == {"gain": "max"}
    assert SearchConfig("gain", "max", objectives=TWO, scheduler="none").goals == TWO


@pytest.mark.parametrize(
    ("cpus", "gpus", "limit", "resources", "fit"),
    [
        (1.0, 0.0, 0, {"CPU": 4}, 4),
        (2.0, 0.0, 0, {"CPU": 5}, 2),
        (1.0, 0.0, 3, {"CPU": 8}, 3),
        (1.0, 0.0, 9, {"CPU": 8}, 8),
        (1.0, 1.0, 0, {"CPU": 16, "GPU": 2}, 2),
        (1.0, 0.25, 0, {"CPU": 16, "GPU": 2}, 8),
        (1.0, 0.25, 0, {"CPU": 3, "GPU": 2}, 3),
        (1.0, 0.3, 0, {"CPU": 99, "GPU": 4}, 12),  # 13 shares would fit, but the last would span two GPUs
        (0.1, 0.1, 0, {"CPU": 2, "GPU": 1}, 10),  # 1 / 0.1 and 2 / 0.1 do not lose one to rounding
    ],
)
def test_trials_at_a_time_follow_cpus_and_gpus(cpus: float, gpus: float, limit: int, resources: dict, fit: int) -> None:
    config = SearchConfig("gain", cpus_per_trial=cpus, gpus_per_trial=gpus, max_concurrent=limit)
    assert concurrent_trials(config, resources) == fit


@pytest.mark.parametrize("resources", [{"CPU": 0.5, "GPU": 1}, {"CPU": 4}])
def test_a_trial_that_fits_nowhere_is_refused_with_numbers(resources: dict) -> None:
    with pytest.raises(ClusterError, match=r"1 CPUs and 0\.5 GPUs, the cluster has"):
        concurrent_trials(SearchConfig("gain", gpus_per_trial=0.5), resources)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser, "tune")
    return parser.parse_args(arguments)


def test_a_quarter_of_a_gpu_goes_from_the_profile_to_ray(tmp_path: Any) -> None:
    place = tmp_path / "shared.yaml"
    place.write_text(
        "launcher: ray\nworkers: {num_workers: 4, cpus_per_worker: 2, gpus_per_worker: 0.25, use_gpu: true}\n"
    )
    assert load_profile(str(place)).required_gpus == 1
    flags = ["hardware.workers.gpus_per_worker=0.25"]  # and as a flag over a shipped profile
    for config in (resolve("quickstart", str(place)), resolve("quickstart", "gpu1", flags=flags)):
        search = search_settings(load_space("easytune").search, options(), config)
        reserved = as_trainable(lambda overrides, report: {}, search)._resources.required_resources
        cpus = config.hardware.workers.cpus_per_worker
        assert reserved == {"CPU": cpus, "GPU": 0.25} and cpus in (2, 4)
        assert concurrent_trials(search, {"CPU": 16, "GPU": 1}) == 4
    with pytest.raises(ConfigError, match="at most 1"):
        resolve("quickstart", "gpu1", flags=["hardware.workers.gpus_per_worker=2"])


def run_asha(config: SearchConfig, gains: list[list[float]]) -> list[int]:
    """Return the reports each trial got out, one trial after the other."""
    asha = scheduler(config)
    assert asha is not None
    asha.set_search_properties(config.metric, config.mode)
    counts = []
    for number, values in enumerate(gains):
        trial: Any = SimpleNamespace(trial_id=str(number))
        asha.on_trial_add(None, trial)
        for step, gain in enumerate(values, 1):
            if asha.on_trial_result(None, trial, {"gain": gain, "training_iteration": step}) == "STOP":
                break
        counts.append(step)
    return counts


def test_asha_stops_at_rungs_what_validates_worse_than_the_best_third() -> None:
    config = SearchConfig("gain", "max", max_reports=4)
    good, middling, bad = [0.9] * 5, [0.8] * 5, [0.1] * 5
    assert run_asha(config, [good, middling, bad, good]) == [5, 1, 1, 5]  # 4 reports and the final one
    assert run_asha(replace(config, mode="min"), [good, middling, bad, good]) == [5, 5, 5, 1]
    assert run_asha(replace(config, grace_reports=3), [good, bad]) == [5, 3]
    late = [0.9, 0.9, 0.1, 0.1, 0.1]
    assert run_asha(config, [good, late]) == [5, 3]  # the second rung
    assert scheduler(replace(config, scheduler="none")) is None


def test_a_plateau_stops_a_trial_only_where_asked() -> None:
    config = SearchConfig("gain", "max", max_reports=9)
    assert stopper(config) is None
    stop = stopper(replace(config, plateau_reports=3))
    assert stop is not None
    moving, still = ([stop(name, {"gain": g}) for g in gains] for name, gains in
                     {"a": [0.1, 0.2, 0.3, 0.4], "b": [0.1, 0.3, 0.3, 0.3]}.items())  # fmt: skip
    assert moving == [False] * 4 and still == [False, False, False, True]


def test_searchers_are_seeded_and_optuna_refuses_what_it_cannot_draw() -> None:
    space = {"x": {"uniform": [0.0, 1.0]}, "k": {"choice": [1, 2]}, "c": 3}
    config = SearchConfig("gain", "max", objectives=TWO, search="optuna", scheduler="none", num_samples=12, seed=1)
    assert isinstance(searcher(SearchConfig("gain"), space), BasicVariantGenerator)

    def points(config: SearchConfig) -> list[dict]:
        found = searcher(config, space)
        found.set_search_properties(None, None, {k: to_domain(v) for k, v in space.items()})
        asked = []
        for number in range(10):
            asked.append(found.suggest(str(number)))
            gain, cost = asked[-1]["x"], (asked[-1]["x"] - 0.2) ** 2
            found.on_trial_complete(str(number), {"gain": gain, "cost": cost})
        return asked

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for sampler in ("tpe", "nsga2"):
        of = replace(config, sampler=sampler)
        assert points(of) == points(of) != points(replace(of, seed=2))
    assert points(config) != points(replace(config, sampler="nsga2"))
    with pytest.raises(ConfigError, match="change k"):
        searcher(config, {**space, "k": {"grid": [1, 2]}})


def test_the_command_line_names_objectives_searcher_and_budget() -> None:
    config = resolve("quickstart", "cpu2")
    space = load_space("easytune").search
    assert search_settings(space, options(), config) == replace(space, seed=config.seed)
    several = search_settings(space, options("--objective", "val/r_precision_top1:max,val/fid:min"), config)
    assert several.goals == {"val/r_precision_top1": "max", "val/fid": "min"} and several.metric == "val/score"
    assert several.scheduler == "none"
    one = search_settings(load_space("easytune_pareto").search, options("--objective", "val/fid:min"), config)
    assert (one.metric, one.mode, one.objectives) == ("val/fid", "min", {})
    more = search_settings(space, options("--search", "optuna", "--samples", "5", "--concurrent", "2"), config)
    assert (more.search, more.num_samples, more.max_concurrent, more.scheduler) == ("optuna", 5, 2, "asha")
    for wrong in ("val/fid", "val/fid:", "val/fid:down"):
        with pytest.raises(ConfigError, match=r"METRIC:MODE|min or max"):
            search_settings(space, options("--objective", wrong), config)
