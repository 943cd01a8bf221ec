"""Pareto front, rank correlation and importance against their definitions; the tables, files and page of a search."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from motionrft.cli.main import main
from motionrft.report import search_charts
from motionrft.report.html import render_report
from motionrft.report.search_page import search_page
from motionrft.runtime import tune, tune_analysis
from motionrft.runtime.tune_analysis import ENOUGH_TRIALS, analyse, pareto_front, rank_correlation
from motionrft.runtime.tune_search import SearchConfig, draw
from tests.unit.test_tune_search import TWO

SPACE = {
    "finetune.optim.lr": {"loguniform": [1e-6, 1e-4]},
    "finetune.strategy.window": {"choice": [1, 2, 3, 4]},
    "finetune.strategy.mode": {"choice": ["a", "b"]},
    "finetune.batches": 5,
}
CONFIG = SearchConfig("gain", "max", objectives=TWO, scheduler="none")


@pytest.fixture(autouse=True)
def fewer_shuffles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_analysis, "SHUFFLES", 199)  # enough for three fields, in half the time


def test_the_front_is_what_nothing_beats() -> None:
    values = np.array([[1.0, 1.0], [2.0, 2.0], [2.0, 2.0], [0.5, 3.0], [3.0, 0.0], [np.nan, 9.0], [2.0, 1.0]])
    assert pareto_front(values, ["max", "max"]).tolist() == [False, True, True, True, True, False, False]
    assert pareto_front(values, ["min", "max"]).tolist() == [False, False, False, True, False, False, False]
    assert pareto_front(values[:0], ["min", "max"]).tolist() == []
    rng = np.random.default_rng(0)
    for modes in itertools.product(("min", "max"), repeat=3):
        values = rng.integers(0, 4, (30, 3)).astype(float)
        signed = values * [1 if mode == "min" else -1 for mode in modes]
        beaten = [any((b <= a).all() and (b < a).any() for b in signed) for a in signed]
        assert pareto_front(values, modes).tolist() == [not b for b in beaten]


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == 0.0
    x, y = [3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]
    ranks_x, ranks_y = [4, 1.5, 5, 1.5, 6, 7, 3], [3.5, 5, 1.5, 6.5, 3.5, 6.5, 1.5]  # ties at their mean
    assert rank_correlation(x, y) == pytest.approx(np.corrcoef(ranks_x, ranks_y)[0, 1])


def trials(count: int, gain: Any, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.RandomState(seed)
    points = [draw(SPACE, rng) for _ in range(count)]
    return [{"overrides": p, "objectives": {}, "value": float(gain(p, rng))} for p in points]


def rate(point: dict[str, Any]) -> float:
    """Return the learning rate's place in its range, 0 to 1."""
    return (np.log10(point["finetune.optim.lr"]) + 6) / 2


@pytest.mark.parametrize(
    ("gain", "first", "correlation"),
    [
        (lambda p, rng: rate(p) + 0.05 * rng.randn(), "finetune.optim.lr", 0.9),
        (lambda p, rng: -((rate(p) - 0.5) ** 2), "finetune.optim.lr", None),  # an optimum inside: no direction
        (lambda p, rng: -p["finetune.strategy.window"] + 0.3 * rng.randn(), "finetune.strategy.window", -0.9),
        (lambda p, rng: (p["finetune.strategy.mode"] == "b") + 0.1 * rng.randn(), "finetune.strategy.mode", None),
    ],
)
def test_the_field_that_matters_comes_first_and_the_others_are_not_clear(
    gain: Any, first: str, correlation: float | None
) -> None:
    rows = trials(40, gain)
    for mode, sign in (("max", 1.0), ("min", -1.0)):
        signed = [{**row, "value": sign * row["value"]} for row in rows]
        found, (sentence,) = analyse(signed, SPACE, {"gain": mode})
        assert [row["field"] for row in found if row["clear"]] == [first] == [found[0]["field"]]
        assert {row["field"] for row in found} == {*SPACE} - {"finetune.batches"}  # a constant has no importance
        assert sum(row["share"] for row in found) == pytest.approx(1.0) and found[0]["share"] > 0.5
        assert f"{first} mattered most" in sentence
        if correlation is not None:
            assert found[0]["correlation"] * sign * np.sign(correlation) > 0.85
            assert ("larger values go with larger" in sentence) == (correlation * sign > 0)
        else:
            assert "larger values" not in sentence


def test_what_chance_gives_is_taken_off_the_shares() -> None:
    few = trials(20, lambda p, rng: (p["finetune.strategy.mode"] == "b") + 0.1 * rng.randn(), seed=2)
    shares = {row["field"]: row["share"] for row in analyse(few, SPACE, {"gain": "max"})[0]}
    assert shares["finetune.strategy.mode"] > 0.9  # 0.47 as measured: the rate has 0.44


def test_noise_is_called_noise_and_few_trials_too_few() -> None:
    for seed in range(2):
        found, (sentence,) = analyse(trials(30, lambda p, rng: rng.randn(), seed), SPACE, {"gain": "max"})
        assert not any(row["clear"] for row in found) and "no field stands out from chance" in sentence
    few = trials(ENOUGH_TRIALS - 1, lambda p, rng: rate(p))
    found, (sentence,) = analyse(few, SPACE, {"gain": "max"})
    assert len(found) == 3 and not any(row["clear"] for row in found) and "9 trials are too few to tell" in sentence
    same = [{**t, "overrides": few[0]["overrides"]} for t in few]
    assert analyse(same, SPACE, {"gain": "max"}) == ([], ["gain: nothing varied, so nothing can be said."])
    failed = [{**t, "value": None} for t in few]
    assert analyse(failed, SPACE, {"gain": "max"})[0] == []


def result(name: str, x: float, **metrics: float) -> SimpleNamespace:
    return SimpleNamespace(path=f"/t/{name}", metrics=metrics, error=None, config={"a.x": x, "a.kind": "K"})


def rows_of(results: list[SimpleNamespace], config: SearchConfig) -> list[dict[str, Any]]:
    return tune._rows(results, config)  # type: ignore[arg-type]


def test_finished_trials_rank_before_stopped_ones_and_failed_ones_last() -> None:
    done = {tune._FINISHED: 1.0}
    results = [
        result("stopped", 1, gain=9.0),
        result("nan", 2, gain=float("nan"), **done),
        result("low", 3, gain=1.0, **done),
        result("high", 4, gain=2.0, **done),
        SimpleNamespace(path="/t/failed", metrics={}, error=RuntimeError("x\nlast line"), config={}),
    ]
    rows = rows_of(results, SearchConfig("gain", "max"))
    assert [row["trial"] for row in rows] == ["high", "low", "stopped", "nan", "failed"]
    assert [row["trial"] for row in rows_of(results, SearchConfig("gain", "min"))][:2] == ["low", "high"]
    assert rows[4]["error"] == "last line" and not any(row["front"] for row in rows)


def test_a_front_is_marked_written_and_its_stale_files_go(tmp_path: Path) -> None:
    done = {tune._FINISHED: 1.0}
    results = [
        result("beaten", 0.1, gain=1.0, cost=5.0, **done),
        result("cheap", 0.2, gain=1.0, cost=1.0, **done),
        result("good", 0.3, gain=3.0, cost=4.0, **done),
        result("blind", 0.4, gain=9.0, **done),
    ]
    rows = rows_of(results, CONFIG)
    assert [(row["trial"], row["front"]) for row in rows][:3] == [("good", True), ("cheap", True), ("beaten", False)]
    assert not rows[3]["front"]  # it lacks one objective
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "7.yaml").touch()
    tune._write_results(tmp_path, rows, {"seed": 4, "a": {"y": 1}}, CONFIG)
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    table = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [line["front"] for line in table] == ["True", "True", "False", "False"] and table[0]["cost"] == "4.0"
    assert sorted(path.name for path in (tmp_path / "front").iterdir()) == ["0.yaml", "1.yaml"]
    first, second = (yaml.safe_load((tmp_path / "front" / f"{i}.yaml").read_text()) for i in (0, 1))
    assert first == {"seed": 4, "a": {"y": 1, "x": 0.3, "kind": "K"}} and second["a"]["x"] == 0.2
    assert yaml.safe_load((tmp_path / "best_config.yaml").read_text()) == first


def searched(count: int, objectives: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return summary and rows as `motionrft tune` writes them."""
    rng = np.random.RandomState(1)
    results = []
    for number in range(count):
        point = draw(SPACE, rng)
        metrics = {"gain": rate(point), "cost": rate(point) ** 2 + point["finetune.strategy.window"]}
        found = result(f"trial_{number}", 0, **metrics, **({tune._FINISHED: 1.0} if number else {}))
        found.config = point
        results.append(found)
    config = SearchConfig("gain", "max", objectives=objectives, scheduler="none")
    rows = rows_of(results, config)
    importance, verdict = analyse(rows, SPACE, config.goals)
    summary = {"name": "toy", "question": "What?", "metric": "gain", "mode": "max", "objectives": objectives,
               "best": rows[0]["overrides"], "value": rows[0]["value"], "importance": importance,
               "verdict": verdict}  # fmt: skip
    return summary, rows


def test_the_page_shows_what_mattered_and_the_front() -> None:
    pytest.importorskip("plotly")
    summary, rows = searched(16, TWO)
    page, curves, notes = search_page(summary, rows)
    text = render_report(page, curves, [], "", notes)
    count = sum(row["front"] for row in rows)
    assert f"{count} of 16 trials are on the Pareto front of gain and cost." in text
    assert "gain: finetune.optim.lr mattered most" in text and "cost: finetune.strategy.window mattered most" in text
    assert "Which field mattered" in text and "could be chance" in text and f"front/{count - 1}.yaml" in text
    assert "15 of 16 trials ran to their end" in text and "cost against gain" in text
    chart = search_charts.pareto_front(curves["tune front"])
    beaten, front = chart.figure["data"]
    assert len(beaten["x"]) == 16 - count and len(front["x"]) == count
    assert front["x"] == sorted(front["x"]) and front["y"] == sorted(front["y"])  # more gain costs more
    assert "lr" in front["hovertext"][0] and "batches" not in front["hovertext"][0]
    bars = search_charts.importance_bars(curves["tune importance"])
    assert [bar["name"] for bar in bars.figure["data"]] == ["gain", "cost"]


def test_the_page_of_a_small_search_for_one_metric_says_that_it_cannot_tell() -> None:
    pytest.importorskip("plotly")
    summary, rows = searched(6, {})
    page, curves, notes = search_page(summary, rows)
    text = render_report(page, curves, [], "", notes)
    assert f"Best of 6 trials: gain {rows[0]['value']:.4f}." in text and "6 trials are too few to tell" in text
    assert "front" not in [table["title"] for table in page["tables"]] and curves["tune front"] == []
    assert curves["tune"][0]["gain"] == rows[0]["value"] and list(curves["tune"][0])[-1] == "gain"


def test_lines_are_greenest_at_the_best_of_a_metric_that_should_fall() -> None:
    pytest.importorskip("plotly")
    lines = search_charts.parallel_coordinates(
        [{"trial": "a", "x": 1, "fid ↓": 2.0}, {"trial": "b", "x": 2, "fid ↓": 1.0}]
    )
    assert [line["line"]["width"] for line in lines.figure["data"]] == [1.5, 3.0]


def test_report_writes_the_page_of_a_searched_folder(tmp_path: Path) -> None:
    summary, rows = searched(6, {})
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert main(["report", str(tmp_path)]) == 0
    assert "Which field mattered" in (tmp_path / "report.html").read_text(encoding="utf-8")
