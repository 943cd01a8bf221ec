"""A search that was interrupted ends as if nothing had happened, the model of Optuna's searcher included."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from motionrft.config.hardware import HardwareConfig, RayConfig, WorkersConfig
from motionrft.core.errors import ConfigError
from motionrft.runtime.session import ray_session
from motionrft.runtime.tune import run_search
from motionrft.runtime.tune_search import SearchConfig

SPACE: dict[str, Any] = {
    "toy.kind": "plain",
    "toy.x": {"uniform": [0.0, 1.0]},
    "toy.y": {"uniform": [0.0, 1.0]},
}
FRONT = SearchConfig(
    "gain",
    "max",
    objectives={"gain": "max", "cost": "min"},
    num_samples=8,
    search="optuna",
    scheduler="none",
    max_concurrent=1,  # with two at a time the order of results, and so the model, depends on the machine
    seed=3,
)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    hardware = HardwareConfig("ray", WorkersConfig(num_workers=1), ray=RayConfig(extra_cpus=1))
    with ray_session(hardware):
        yield


def toy(log: Path, interrupt: Callable[[int], None] | None = None) -> Callable[..., dict[str, float]]:
    """Return a trial whose gain costs: only y = 0 is on the front. It keeps a line per finished run."""

    def trial(overrides: Mapping[str, Any], report: Callable[[Mapping[str, float]], None]) -> dict[str, float]:
        assert next(iter(overrides)) == "toy.kind"
        started = len(log.read_text().splitlines()) if log.exists() else 0
        if interrupt is not None:
            interrupt(started)
        x, y = overrides["toy.x"], overrides["toy.y"]
        values = {"gain": x - y, "cost": x * x}
        report(values)
        with log.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(dict(overrides)) + "\n")
        return values

    return trial


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_search_draws_the_points_of_an_uninterrupted_one(session: None, tmp_path: Path) -> None:
    driver = os.getpid()

    def interrupt(finished: int) -> None:
        if finished == 5:
            os.kill(driver, signal.SIGINT)  # Ctrl-C, with three trials to go and the model already asked
            time.sleep(60)

    straight = run_search(toy(tmp_path / "a.log"), SPACE, FRONT, tmp_path / "a", base_config={"seed": 1})
    broken = run_search(toy(tmp_path / "b.log", interrupt), SPACE, FRONT, tmp_path / "b", base_config={"seed": 1})
    assert sum(row["finished"] for row in broken.trials) == 5
    with pytest.raises(ConfigError, match="another space"):
        run_search(toy(tmp_path / "b.log"), {**SPACE, "toy.y": 0.5}, FRONT, tmp_path / "b", resume=True)
    resumed = run_search(toy(tmp_path / "b.log"), SPACE, FRONT, tmp_path / "b", base_config={"seed": 1}, resume=True)
    runs = [(tmp_path / name).read_text().splitlines() for name in ("a.log", "b.log")]
    assert len(runs[0]) == 8 and runs[0] == runs[1]  # no finished trial ran again, and every later point is the same
    assert resumed.best == straight.best
    points = [[(row["overrides"], row["objectives"], row["front"]) for row in r.trials] for r in (straight, resumed)]
    assert sorted(points[0], key=str) == sorted(points[1], key=str)

    front = [row for row in resumed.trials if row["front"]]
    files = sorted((tmp_path / "b" / "front").iterdir())
    assert len(files) == len(front) >= 1 and all(row["finished"] for row in resumed.trials)
    first = yaml.safe_load(files[0].read_text())
    best_gain = max(row["objectives"]["gain"] for row in front)
    assert first["seed"] == 1 and first["toy"]["x"] - first["toy"]["y"] == pytest.approx(best_gain)
    assert "front" in (tmp_path / "b" / "results.csv").read_text().splitlines()[0]


@pytest.mark.ray
@pytest.mark.slow
def test_asha_stops_bad_trials_and_lets_full_ones_end_by_themselves(session: None, tmp_path: Path) -> None:
    def trial(overrides: Mapping[str, Any], report: Callable[[Mapping[str, float]], None]) -> dict[str, float]:
        for step in range(4):
            report({"gain": overrides["toy.x"] * (step + 1)})
            time.sleep(0.2)
        return {"gain": overrides["toy.x"] * 4}

    config = SearchConfig("gain", "max", num_samples=1, max_reports=4, max_concurrent=1)
    space = {"toy.x": {"grid": [1.0, 0.9, 0.1, 0.05]}}  # the best first: each later one is below the cut
    result = run_search(trial, space, config, tmp_path)
    reports = {row["overrides"]["toy.x"]: (row["reports"], row["finished"]) for row in result.trials}
    assert reports[1.0] == (5, True)
    assert all(not finished and count < 4 for x, (count, finished) in reports.items() if x < 0.5)
    assert result.best == {"toy.x": 1.0}
