"""`motionrft evaluate`: score generators on one split under every evaluator, with intervals."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from motionrft.cli.common import command_line, required, start
from motionrft.cli.console import table
from motionrft.cli.main import add_run_arguments
from motionrft.cli.quickstart import cells_of
from motionrft.cli.quickstart_verb import DIGITS, SHOWN
from motionrft.config.load import write_run_config
from motionrft.core.errors import ConfigError
from motionrft.training.recipes.evaluate import BASE, REAL, RewardFolders, RowSpec, evaluate_rows
from motionrft.training.stages import write_json


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("--split", choices=("val", "test"), help="which clips (default: evaluate.split)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_run_arguments(parser, "runs/evaluate")


def run(options: argparse.Namespace) -> int:
    """Score real motion, the reference ("before") and the generator ("after")."""
    config, launcher = start(options)
    inputs = config.inputs
    dataset = required(inputs.dataset, "inputs.dataset", "`motionrft prepare`")
    generator = required(inputs.generator, "inputs.generator", "`motionrft pretrain` or `motionrft finetune`")
    if not inputs.evaluators:
        raise ConfigError("inputs.evaluators is empty: give inputs.evaluators.A=PATH, made by `motionrft evaluator`")
    evaluators = {
        name: required(path, f"inputs.evaluators.{name}", "`motionrft evaluator`")
        for name, path in inputs.evaluators.items()
    }
    rows = [RowSpec(REAL, "real motion")]
    if inputs.reference:
        reference = required(inputs.reference, "inputs.reference", "`motionrft pretrain`")
        rows += [RowSpec(BASE, "before", (reference,)), RowSpec("after", "after", (generator,))]
    else:
        rows += [RowSpec(BASE, "generator", (generator,))]
    write_run_config(options.run_dir, config, command_line())
    recipe = replace(config.evaluate, split=options.split or config.evaluate.split)
    reward = RewardFolders(**{k: str(Path(v).resolve()) if v else "" for k, v in vars(inputs.reward).items()})
    with launcher.session():
        found = evaluate_rows(
            launcher.executor(),
            rows,
            dataset,
            evaluators,
            reward,
            config.finetune.weights,
            recipe,
            options.run_dir,
            config.finetune.term_modules,
        )
    summary: dict[str, Any] = {
        "split": recipe.split,
        "evaluators": {
            name: {key: cells_of(row) for key, row in by_row.items()} for name, by_row in found.rows.items()
        },
        "fid_floor": dict(found.fid_floor),
    }
    write_json(options.run_dir / "summary.json", summary)
    if options.json:
        print(json.dumps(summary))
        return 0
    for name, cells in summary["evaluators"].items():
        print(f"\nevaluator {name}, split {recipe.split}\n{table(cells, SHOWN, DIGITS)}")
    return 0
