"""`motionrft quickstart`: the whole way, small."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from motionrft.cli.common import command_line, start
from motionrft.cli.console import table
from motionrft.cli.main import add_run_arguments
from motionrft.cli.quickstart import TOY
from motionrft.cli.quickstart import run as run_quickstart
from motionrft.core.errors import ConfigError

SHOWN = {
    "r_precision_top1": "R-precision top-1",
    "r_precision_top3": "R-precision top-3",
    "fid": "FID (x100)",
    "mm_dist": "MM-Dist",
    "diversity": "diversity",
    "jerk": "jerk (m/s^3)",
    "foot_slide": "foot slide (m/s)",
    "foot_skate_ratio": "foot skate ratio",
    "bone_drift": "bone drift",
    "reward_semantic": "reward: semantic",
    "reward_preference": "reward: preference",
    "reward_authenticity": "reward: authenticity",
    "reward_similarity": "reward: similarity",
}
# Small collections of real takes: windows of whole takes for training, every take mirrored so that the held-out splits
# reach 40 classes, and enough of them held out to be scored. The base is stopped early: on the bundled mapping's data
# 600 batches already retrieve like real motion on validation, which would leave nothing to show.
FITTED = {
    "bvh": (
        "prepare.mirror=true",
        "prepare.mirror_held_out=true",
        "prepare.max_frames=200",
        "prepare.test_frac=0.3",
        "prepare.val_frac=0.12",
        "prepare.families=[]",
        "pretrain.train.steps=160",
        "evaluator.train.steps=200",
        "reward.train.steps=200",
        "preference.train.steps=100",
        "authenticity.train.steps=100",
        "finetune.strategy.window=3",
        "finetune.batches=40",
        "finetune.optim.lr=3e-5",
        "finetune.weights.foot_sliding=0",
    ),
    "humanml3d": ("prepare.families=[]",),
}
DIGITS = {"fid": 2, "jerk": 1, "bone_drift": 4}


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("--data", choices=("synthetic", "bvh", "humanml3d"), default="synthetic", help="kind of source")
    parser.add_argument("--path", default="", help="folder or archive of --data bvh or humanml3d")
    add_run_arguments(parser, "runs/quickstart")


def run(options: argparse.Namespace) -> int:
    """Run the quickstart and print the table."""
    if options.data != "synthetic":
        if not Path(options.path).exists() or not options.path:
            raise ConfigError(
                f"--data {options.data} needs --path to an existing folder or archive, got {options.path!r}"
            )
        chosen = [f"prepare.source={options.data}", f"prepare.path={Path(options.path).resolve()}"]
        options.fields = [*chosen, *FITTED[options.data], *options.fields]
    config, launcher = start(options, "quickstart")
    summary = run_quickstart(config, options.run_dir, launcher, options.resume, command_line())
    print(result_text(summary, options.run_dir))
    return 0


def result_text(summary: dict[str, Any], run_dir: Path) -> str:
    """Return the before/after table, the verdicts and where the report lies."""
    rows = {key: summary[key] for key in ("real", "before", "after", "control") if summary.get(key)}
    lines = ["", table(rows, SHOWN, DIGITS), "", "targets, fixed beforehand:"]
    marks = {True: "met   ", False: "MISSED", None: "?     "}
    lines += [
        f"  {marks[v['passed']]} {v['metric']}: {v['found']} (wanted: {v['target']})" for v in summary["verdicts"]
    ]
    other = summary["evaluator_b"]
    lines += ["", "the same under the second evaluator:"]
    shown = {key: SHOWN[key] for key in ("r_precision_top1", "fid", "mm_dist")}
    lines += [table({key: other[key] for key in rows if key in other}, shown, DIGITS)]
    lines += ["", TOY, f"{summary['wall_s']:.0f} s in all. Report: {run_dir / 'report.html'}"]
    return "\n".join(lines)
