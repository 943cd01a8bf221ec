"""`motionrft bench NAME`: measurements, as ratios within one run."""

from __future__ import annotations

import argparse
import importlib
import json

BENCHMARKS = {
    "memory": "motionrft.evaluation.benchmarks.memory",
    "convert": "motionrft.evaluation.benchmarks.convert",
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
    for key, value in found.items():
        print(f"{key:<28}{value}")
    return 0
