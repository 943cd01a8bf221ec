"""`motionrft report`: one HTML page of any run folder that has metrics or a summary, or its curves for TensorBoard."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motionrft.core.errors import ConfigError, DataError
from motionrft.report.html import write_report
from motionrft.report.search_page import search_page
from motionrft.training.metrics import read_metrics
from motionrft.training.stages import RECORD, read_json


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("run_dir", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="HTML file (default: RUN_DIR/report.html)")
    parser.add_argument("--tensorboard", type=Path, help="write the curves as TensorBoard logs to this new folder too")


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
    if options.tensorboard:
        write_tensorboard(options.tensorboard, curves)
    summary = read_json(folder / "summary.json") or {}
    if not curves and not summary:
        raise DataError(f"{folder} holds neither metrics.jsonl nor summary.json: give the folder of a run")
    page: dict[str, Any] = {"title": f"Run {folder.name}", "rows": _rows(summary), "timings": timings}
    notes: list[str] = []
    if "importance" in summary:  # a search: its own page, not the curves of every trial
        page, curves, notes = search_page(summary, json.loads((folder / "results.json").read_text(encoding="utf-8")))
    config = folder / "config.yaml"
    out = options.out or folder / "report.html"
    write_report(out, page, curves, [], config.read_text(encoding="utf-8") if config.is_file() else "", notes)
    print(f"report: {out}")
    return 0


def write_tensorboard(folder: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write one TensorBoard run per stage.

    Raises:
        DataError: the folder is in use: events would appear twice.
        ConfigError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError("--tensorboard needs tensorboardX: pip install 'motionrft[tracking]'") from error
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: TensorBoard would show every point twice. Choose another folder")
    for stage, rows in curves.items():
        with SummaryWriter(str(folder / stage)) as writer:
            for row in rows:
                for name, value in row.items():
                    if name != "step":
                        writer.add_scalar(name, float(value), int(row["step"]))


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
