"""`motionrft bench NAME`: measurements, as ratios within one run."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

BENCHMARKS = {
    "memory": "motionrft.evaluation.benchmarks.memory",
    "convert": "motionrft.evaluation.benchmarks.convert",
    "reward-train": "motionrft.evaluation.benchmarks.reward_train",
    "reward-score": "motionrft.evaluation.benchmarks.reward_score",
    "generate": "motionrft.evaluation.benchmarks.generate",
    "respace": "motionrft.evaluation.benchmarks.respace",
    "ingest": "motionrft.cli.bench_ingest",
}


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(options: argparse.Namespace) -> int:
    """Run a benchmark and print its figures."""
    found = importlib.import_module(BENCHMARKS[options.name]).run()
    if options.json:
        print(json.dumps(found))
        return 0
    for key, value in _flat(found):
        print(f"{key:<48}{value:.6g}" if isinstance(value, float) else f"{key:<48}{value}")
    return 0


def _flat(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested figures."""
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
