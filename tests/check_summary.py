"""`python -m tests.check_summary RUN_DIR`: a finished quickstart folder holds everything its contract names."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from motionrft.evaluation.protocol import SUMMARY_KEYS

ROWS = ("before", "after", "control", "real")


def problems(run_dir: Path) -> list[str]:
    """Return what is missing or not finite."""
    found: list[str] = []
    for name in ("config.yaml", "summary.json", "report.html", "log.txt"):
        if not (run_dir / name).is_file():
            found.append(f"no {name}")
    if found:
        return found
    summary = json.loads((run_dir / "summary.json").read_text())
    for row in ROWS:
        found += [f"{row}: {text}" for text in _row_problems(summary.get(row) or {})]
    for row in ("before", "after"):
        found += [f"evaluator_b.{row}: {text}" for text in _row_problems(summary["evaluator_b"].get(row) or {})]
    names = [stage["name"] for stage in summary["stages"]]
    for name in ("prepare", "pretrain", "evaluator", "reward", "preference", "finetune", "evaluate", "report"):
        if not any(found_name.startswith(name) for found_name in names):
            found.append(f"no stage {name} in {names}")
    if not summary["wall_s"] > 0:
        found.append("wall_s is not positive")
    for stage in ("pretrain", "reward", "preference", "authenticity", "finetune_0"):
        for name in ("stage.json", "metrics.jsonl", "checkpoints"):
            if not (run_dir / stage / name).exists():
                found.append(f"no {stage}/{name}")
    return found + _shared_weights(run_dir)


def _shared_weights(run_dir: Path) -> list[str]:
    """Return weights that an evaluator has in common with the reward or with the other evaluator."""
    seen: dict[bytes, str] = {}
    found: list[str] = []
    for stage in ("reward", "preference", "authenticity", "evaluator_A", "evaluator_B"):
        files = sorted((run_dir / stage / "model").rglob("model*.safetensors"))
        if not files:
            found.append(f"no weights in {stage}/model")
        for path in files:
            for name, tensor in load_file(path).items():
                # biases start at 0 and norms at 1, and statistics describe the data: neither was learned from anybody
                if tensor.ndim < 2 or len(tensor.unique()) < 8:
                    continue
                digest = hashlib.sha256(tensor.float().numpy().tobytes()).digest()
                other = seen.setdefault(digest, f"{stage}/{name}")
                if other.split("/")[0] != stage and stage.startswith("evaluator"):
                    found.append(f"{stage}/{name} equals {other}")
    return found


def _row_problems(row: dict[str, Any]) -> list[str]:
    found = []
    for key in SUMMARY_KEYS:
        cell = row.get(key)
        if not isinstance(cell, dict) or {"mean", "ci95"} - set(cell):
            found.append(f"no {key}")
        elif cell["mean"] is None or cell["ci95"] is None:
            found.append(f"{key} is not a number: {cell}")
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or "summary complete")
    sys.exit(1 if wrong else 0)
