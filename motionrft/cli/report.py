"""`motionrft report`: one HTML page of any run folder that has metrics or a summary."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from motionrft.core.errors import DataError
from motionrft.report.html import write_report
from motionrft.training.metrics import read_metrics
from motionrft.training.stages import RECORD, read_json


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("run_dir", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="HTML file (default: RUN_DIR/report.html)")


def run(options: argparse.Namespace) -> int:
    """Write the page: curves of every stage in the folder, rows of its summary, the configuration."""
    folder: Path = options.run_dir
    if not folder.is_dir():
        raise DataError(f"{folder} is not a run folder: it does not exist")
    curves = {}
    timings = {}
    for path in sorted(folder.glob("**/metrics.jsonl")):
        name = path.parent.relative_to(folder).as_posix()
        name = folder.name if name == "." else name
        curves[name] = read_metrics(path)
        record = read_json(path.parent / RECORD)
        if record:
            timings[name] = float(record["seconds"])
    summary = read_json(folder / "summary.json") or {}
    if not curves and not summary:
        raise DataError(f"{folder} holds neither metrics.jsonl nor summary.json: give the folder of a run")
    page = {"title": f"Run {folder.name}", "rows": _rows(summary), "timings": timings}
    config = folder / "config.yaml"
    out = options.out or folder / "report.html"
    write_report(out, page, curves, [], config.read_text(encoding="utf-8") if config.is_file() else "")
    print(f"report: {out}")
    return 0


def _rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    by_evaluator = summary.get("evaluators") or {
        "A": {k: summary.get(k) for k in ("real", "before", "after", "control")}
    }
    rows = []
    for index, (name, cells) in enumerate(by_evaluator.items()):
        for key, metrics in cells.items():
            if metrics:
                shown = key if index == 0 else f"{key}_{name}"
                rows.append({"key": shown, "label": key, "metrics": metrics, "evaluator": name})
    return rows
