"""`motionrft compare`: fine-tuning methods side by side on one model, at equal updates and at equal training time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from motionrft.cli.common import command_line, required, start
from motionrft.cli.main import add_run_arguments
from motionrft.cli.quickstart import cells_of
from motionrft.config.load import dump, write_run_config
from motionrft.config.schema import RunConfig
from motionrft.core.errors import ConfigError
from motionrft.core.plain import to_plain
from motionrft.evaluation.races import race
from motionrft.finetune.strategies.names import known_names
from motionrft.report.compare_page import compare_charts, compare_tables, printed
from motionrft.report.html import write_report
from motionrft.training.metrics import read_metrics
from motionrft.training.recipes.compare import ABLATIONS, BUDGETS, Comparison, Entry, entries
from motionrft.training.recipes.diagnose import DiagnoseJob
from motionrft.training.recipes.evaluate import RewardFolders, evaluate_rows
from motionrft.training.stages import Stage, write_json

_PROBE = "probe/reward/"


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options; what is not given comes from the configuration's `compare`."""
    parser.add_argument("--methods", help=f"comma-separated: motionrft, {', '.join(known_names())}")
    parser.add_argument("--model", help="model folder of the generator to start from (inputs.generator)")
    parser.add_argument("--ablate", help=f"comma-separated parts of motionrft to switch: {', '.join(ABLATIONS)}")
    parser.add_argument("--updates", type=int, help="optimiser steps per method")
    parser.add_argument("--seconds", type=float, help="training seconds per method (default: the first method's)")
    parser.add_argument("--seeds", type=int, help="fine-tuning seeds per method")
    parser.add_argument("--split", choices=("val", "test"), help="where models are scored")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_run_arguments(parser, "runs/compare")


def run(options: argparse.Namespace) -> int:
    """Train, score and measure every method; write summary.json and report.html."""
    config, launcher = start(options)
    config = _with_options(config, options)
    comparison = _comparison(config, options.run_dir.resolve())
    write_run_config(options.run_dir, config, command_line())
    stages = [*comparison.stages(), _diagnosis(comparison)]
    with launcher.session():
        results = launcher.run(stages, comparison.run_dir, comparison.dataset, resume=options.resume)
        found = evaluate_rows(
            launcher.executor(),
            comparison.rows(results),
            comparison.dataset,
            comparison.evaluators,
            comparison.entries[0].reward,
            config.finetune.weights,
            replace(config.evaluate, split=config.compare.split, seeds=config.compare.seeds),
            comparison.run_dir / "evaluation",
            config.finetune.term_modules,
        )
    rows = {name: {key: cells_of(row) for key, row in by_row.items()} for name, by_row in found.rows.items()}
    summary = summarise(comparison, results, rows)
    write_json(comparison.run_dir / "summary.json", summary)
    page = {
        "title": "Fine-tuning methods side by side",
        "headline": headline(summary),
        "tables": compare_tables(summary),
    }
    report = comparison.run_dir / "report.html"
    write_report(report, page, {"compare": compare_charts(summary)}, [], dump(config), notes(comparison))
    if options.json:
        print(json.dumps(summary))
        return 0
    _print(printed(summary, next(iter(rows))))
    print(f"{headline(summary)}\nreport: {report}")
    return 0


def _with_options(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """Return the configuration with the verb's own options in it, so that it reproduces the run."""
    given = {
        "methods": _words(options.methods),
        "ablate": _words(options.ablate),
        **{name: getattr(options, name) for name in ("updates", "seconds", "seeds", "split")},
    }
    given = {name: value for name, value in given.items() if value is not None}
    inputs = replace(config.inputs, generator=options.model) if options.model else config.inputs
    return replace(config, inputs=inputs, compare=replace(config.compare, **given))


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _comparison(config: RunConfig, run_dir: Path) -> Comparison:
    inputs = config.inputs
    if not inputs.evaluators:
        raise ConfigError("compare needs an evaluator: give inputs.evaluators.A=PATH, made by `motionrft evaluator`")
    required(inputs.reward.backbone, "inputs.reward.backbone", "`motionrft reward`")
    reward = RewardFolders(**{k: str(Path(v).resolve()) if v else "" for k, v in vars(inputs.reward).items()})
    evaluators = {
        name: required(path, f"inputs.evaluators.{name}", "`motionrft evaluator`")
        for name, path in inputs.evaluators.items()
    }
    compare = config.compare
    if compare.without_spl:
        bare = required(compare.without_spl, "compare.without_spl", "`motionrft reward --stage semantic`")
        compare = replace(compare, without_spl=bare)
    return Comparison(
        compare,
        entries(compare, config.finetune, reward),
        required(inputs.dataset, "inputs.dataset", "`motionrft prepare`"),
        required(inputs.generator, "--model", "`motionrft pretrain` or `motionrft import`"),
        evaluators,
        config.evaluate,
        config.seed,
        run_dir,
    )


def _diagnosis(comparison: Comparison) -> Stage:
    first = comparison.entries[0]
    job = DiagnoseJob(
        comparison.dataset,
        comparison.generator,
        first.reward,
        comparison.seed,
        first.recipe.num_steps,
        max_frames=first.recipe.max_frames,
    )
    return Stage("diagnostics", "motionrft.training.recipes.diagnose:run", to_plain(job))


def summarise(
    comparison: Comparison, results: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything the report shows, as plain data."""
    seeds = range(comparison.compare.seeds)
    logs = {
        entry.name: [
            read_metrics(comparison.run_dir / comparison.stage_name(entry, seed) / "metrics.jsonl") for seed in seeds
        ]
        for entry in comparison.entries
    }
    curves = {name: [_curve(rows_of) for rows_of in found] for name, found in logs.items()}
    semantic = {
        name: [[(point["seconds"], point["semantic"]) for point in curve] for curve in runs]
        for name, runs in curves.items()
    }
    return {
        "split": comparison.compare.split,
        "seeds": comparison.compare.seeds,
        "methods": {entry.name: _described(comparison, entry, results) for entry in comparison.entries},
        "evaluators": rows,
        "cost": {entry.name: results[f"cost_{entry.name}"] for entry in comparison.entries},
        "curves": curves,
        "race": race(semantic),
        "gradient_norms": {name: _norms(found) for name, found in logs.items()},
        "diagnostics": results["diagnostics"],
    }


def _described(comparison: Comparison, entry: Entry, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    spent = {}
    for budget in BUDGETS:
        positions = [position for _, position in comparison.kept(results, entry, budget)]
        if positions:
            keys = ("updates", "seconds", "batches")
            spent[budget] = {key: sum(p[key] for p in positions) / len(positions) for key in keys}
    return {
        "label": entry.label,
        "note": entry.note,
        "strategy": to_plain(entry.recipe.strategy),
        "weights": dict(entry.recipe.weights),
        "rate": entry.recipe.optim.lr,
        "spent": spent,
    }


def _curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the probes of one run: seconds, updates and the reward's terms."""
    points = []
    for row in rows:
        if f"{_PROBE}total" not in row:
            continue
        terms = {name.removeprefix(_PROBE).removesuffix("/raw"): row[name] for name in row if name.startswith(_PROBE)}
        points.append({"seconds": row["probe/train_seconds"], "updates": row["probe/updates"], **terms})
    return points


def _norms(logs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Return denoising step -> mean gradient norm over training and seeds."""
    found: dict[str, list[float]] = {}
    for rows in logs:
        for row in rows:
            for name, value in row.items():
                if name.startswith("optim/grad_norm_by_step/"):
                    found.setdefault(name.rsplit("/", 1)[1], []).append(value)
    return {step: sum(values) / len(values) for step, values in found.items()}


def headline(summary: Mapping[str, Any]) -> str:
    """Return who retrieves best at equal training time, with its neighbour, as one sentence."""
    rows = next(iter(summary["evaluators"].values()))
    scored = []
    for name, method in summary["methods"].items():
        cell = (rows.get(f"{name}@seconds") or rows.get(f"{name}@updates") or {}).get("r_precision_top1") or {}
        if cell.get("mean") is not None:
            scored.append((cell["mean"], cell.get("ci95") or 0.0, method["label"]))
    if not scored:
        return "R-precision was not measured: the split is too small."
    scored.sort(reverse=True)
    base = (rows.get("before") or {}).get("r_precision_top1") or {}
    start = f"base R@1 {base['mean']:.3f}; " if base.get("mean") is not None else ""
    (best, half, label), *others = scored
    text = f"At equal training time: {start}{label} {best:.3f} ± {half:.3f}"
    if not others:
        return text + "."
    second, other, next_label = others[0]
    tie = " (a tie within intervals)" if best - second < half + other else ""
    return f"{text}, then {next_label} {second:.3f} ± {other:.3f}{tie}."


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader must know to trust the tables."""
    first = comparison.entries[0]
    rates = {entry.label: entry.recipe.optim.lr for entry in comparison.entries}
    return [
        f"Budgets: {comparison.updates} optimiser steps, and the training seconds that {first.label} took for them "
        "(validation, probes and checkpoints apart)."
        if not comparison.compare.seconds
        else f"Budgets: {comparison.updates} optimiser steps, and {comparison.compare.seconds:g} training seconds.",
        f"Learning rates, constant after warm-up: {rates}. Methods that make few updates per rollout may want larger "
        "ones: `motionrft tune --space METHOD` finds them, `compare.rates` sets them.",
        f"Weights of single-task rows: {dict(first.recipe.weights)}.",
    ]


def _print(lines: Sequence[Sequence[str]]) -> None:
    width = 10
    for line in lines:
        if len(line) == 1:
            print(f"\n{line[0]}")
        elif line:
            print(f"  {line[0]:24}" + "".join(f"{cell:>{width + 6}}" for cell in line[1:]))
