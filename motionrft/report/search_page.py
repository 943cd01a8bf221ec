"""The page of a search, from what `motionrft tune` leaves: summary.json and results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def search_page(
    summary: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], list[str]]:
    """Return the arguments summary, curves and notes of `html.write_report`.

    Args:
        summary: "name", "question", "metric", "mode", "objectives" {metric: mode}, "best" {field: value}, "value",
            "importance" rows and "verdict" sentences (`runtime.tune_analysis.analyse`).
        trials: rows of results.json, the best one first.
    """
    metric, objectives = summary["metric"], summary["objectives"]
    finished = sum(trial["finished"] for trial in trials)
    headline = f"Best of {len(trials)} trials: {metric} {summary['value']:.4f}."
    if objectives:
        count = sum(trial["front"] for trial in trials)
        headline = f"{count} of {len(trials)} trials are on the Pareto front of {' and '.join(objectives)}."
    page = {
        "title": f"Search: {summary['name']}",
        "subtitle": f"{summary['question']}. {' '.join(summary['verdict'])}",
        "headline": headline,
        "tables": [
            *([_front_table(trials, objectives)] if objectives else []),
            *([_importance_table(summary)] if summary["importance"] else []),
        ],
    }
    arrow = " ↓" if summary["mode"] == "min" else ""
    rows = [{"trial": t["trial"], **t["overrides"], f"{metric}{arrow}": t["value"]} for t in trials]
    points = [
        {"trial": t["trial"], "front": t["front"], **t["objectives"], "settings": _settings(t["overrides"], summary)}
        for t in trials
    ]
    curves = {
        "tune": rows,
        "tune front": points if objectives else [],
        "tune importance": [dict(row) for row in summary["importance"]],
    }
    notes = [
        f"{_way(summary['mode'])}: {metric}, on the validation split",
        *(f"objective, {_way(mode)}: {name}" for name, mode in objectives.items()),
        f"{finished} of {len(trials)} trials ran to their end; the others count with their last validation, and none "
        "of them is called best while a finished one exists",
    ]
    return page, curves, notes


def _way(mode: str) -> str:
    return "maximised" if mode == "max" else "minimised"


def _settings(overrides: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    varied = {row["field"] for row in summary["importance"]} or set(overrides)
    return ", ".join(f"{name.rsplit('.', 1)[-1]} {_text(overrides[name])}" for name in overrides if name in varied)


def _front_table(trials: Sequence[Mapping[str, Any]], objectives: Mapping[str, str]) -> dict[str, Any]:
    first, mode = next(iter(objectives.items()))
    front = sorted((t for t in trials if t["front"]), key=lambda t: t["objectives"][first], reverse=mode == "max")
    fields = [n for n in front[0]["overrides"] if len({str(t["overrides"].get(n)) for t in trials}) > 1]
    return {
        "title": "The Pareto front",
        "columns": ["configuration", *objectives, *(name.removeprefix("finetune.") for name in fields)],
        "rows": [
            [f"front/{i}.yaml", *map(_text, t["objectives"].values()), *(_text(t["overrides"].get(n)) for n in fields)]
            for i, t in enumerate(front)
        ],
        "note": "No trial beats one of these in one objective without losing in another.",
    }


def _importance_table(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "title": "Which field mattered",
        "columns": ["field", "metric", "share", "rank correlation", "chance", "verdict"],
        "rows": [
            [
                row["field"],
                row["metric"],
                f"{row['share']:.0%}",
                "–" if row["correlation"] is None else f"{row['correlation']:+.2f}".replace("-", "−"),
                f"{row['chance']:.2g}",
                "clear" if row["clear"] else "could be chance",
            ]
            for row in summary["importance"]
        ],
        "note": "Share: of what tells the best trials from the rest (PED-ANOVA), beyond what shuffled results show. "
        "Rank correlation (Spearman): positive when larger values go with a larger metric. Chance: how likely a field "
        "without any effect looks like this. One search, one seed per trial.",
    }


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
