"""`motionrft tune`: a Ray Tune search over `finetune`; every trial is a run folder of its own."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.tune
import yaml

from motionrft.cli.common import command_line, required, start
from motionrft.cli.main import add_run_arguments
from motionrft.config.load import parse_flag, resolve, touched_sections, write_run_config
from motionrft.config.schema import RunConfig
from motionrft.core.errors import ConfigError
from motionrft.core.plain import to_plain
from motionrft.report.html import write_report
from motionrft.report.search_page import search_page
from motionrft.runtime.session import ray_session
from motionrft.runtime.tune import run_search
from motionrft.runtime.tune_analysis import analyse
from motionrft.runtime.tune_search import SearchConfig, corner_points
from motionrft.training.recipes.evaluate import validation_recipe
from motionrft.training.recipes.finetune import FinetuneJob
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.stages import Stage, run_local, write_json
from tune_spaces.space import load_space, space_names

_LOG = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("--space", default="easytune", help=f"search space: {', '.join(space_names())}")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=DISTRIBUTION",
        help="add or replace one field of the space, e.g. 'finetune.optim.lr={loguniform: [3e-6, 3e-5]}'; a plain "
        "value fixes it",
    )
    parser.add_argument(
        "--objective",
        metavar="METRIC:MODE[,METRIC:MODE]",
        help="what to search for, e.g. val/fid:min; several give a Pareto front, of which val/score picks one",
    )
    parser.add_argument("--search", choices=("random", "optuna"), help="how points are chosen (default: the space's)")
    parser.add_argument("--samples", type=int, help="trials (default: the space's)")
    parser.add_argument(
        "--concurrent", type=int, default=0, help="trials at a time; 0 = as many as CPUs and GPUs allow"
    )
    add_run_arguments(parser, "runs/tune")


def run(options: argparse.Namespace) -> int:
    """Search, then write results.csv, report.html and best_config.yaml."""
    config, launcher = start(options)
    if not launcher.distributed:
        raise ConfigError(
            "tune needs Ray: use --profile cpu2 (a local Ray) or another Ray profile, not --backend single"
        )
    space = load_space(options.space)
    config = _with_absolute_inputs(config)
    search = search_settings(space.search, options, config)
    folder = options.run_dir.resolve()
    base = to_plain(config)
    # Rounded up: a trial never reports more often than the scheduler was told, the last report included.
    every = math.ceil(config.finetune.batches / search.max_reports)
    base["finetune"] |= {"validate_every": every, "checkpoint_every": every}
    fields = space.resolved(base, dict(parse_flag(text) for text in options.vary))
    for point in corner_points(fields, np.random.RandomState(config.seed)):
        touched_sections(base, point)
    write_run_config(folder, config, command_line())
    with ray_session(config.hardware):
        result = run_search(
            partial(run_trial, base=base, folder=str(folder)),
            fields,
            search,
            folder,
            base_config=base,
            resume=options.resume,
        )
    importance, verdict = analyse(result.trials, fields, search.goals)
    summary = {
        "name": options.space,
        "question": space.question,
        "metric": search.metric,
        "mode": search.mode,
        "objectives": dict(search.objectives),
        "space": fields,
        "best": dict(result.best),
        "value": result.best_value,
        "trials": len(result.trials),
        "importance": importance,
        "verdict": verdict,
    }
    write_json(folder / "summary.json", summary)
    page, curves, notes = search_page(summary, result.trials)
    write_report(folder / "report.html", page, curves, [], (folder / "config.yaml").read_text("utf-8"), notes)
    _print(summary, result.trials)
    print(f"run the best alone: motionrft finetune --config {folder / 'best_config.yaml'} --backend single")
    return 0


def search_settings(search: SearchConfig, options: argparse.Namespace, config: RunConfig) -> SearchConfig:
    """Return the space's settings with what the command line and the hardware profile say."""
    workers = config.hardware.workers
    search = replace(
        search,
        num_samples=search.num_samples if options.samples is None else options.samples,
        search=options.search or search.search,
        sampler="tpe" if options.search == "random" else search.sampler,
        max_concurrent=options.concurrent,
        cpus_per_trial=workers.cpus_per_worker,
        gpus_per_trial=workers.gpus_per_worker,
        seed=config.seed,
    )
    if not options.objective:
        return search
    pairs = [text.rpartition(":") for text in options.objective.split(",")]
    if not all(metric and mode for metric, _, mode in pairs):
        raise ConfigError(f"--objective takes METRIC:MODE, e.g. val/fid:min, got {options.objective!r}")
    goals = {metric: mode for metric, _, mode in pairs}
    if len(goals) == 1:
        ((metric, mode),) = goals.items()
        return replace(search, metric=metric, mode=mode, objectives={})
    if search.scheduler == "asha":
        _LOG.info("several objectives: every trial runs to its end, because asha compares trials by one number")
    return replace(search, objectives=goals, scheduler="none")


def _print(summary: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> None:
    metrics = [*dict.fromkeys([summary["metric"], *summary["objectives"]])]
    print(f"{'trial':<40}" + "".join(f"{metric:>24}" for metric in metrics))
    for row in trials:
        values = {summary["metric"]: row["value"], **row["objectives"]}
        cells = ("failed" if values[m] is None else f"{values[m]:.4f}" for m in metrics)
        mark = "  front" if row["front"] else "" if row["finished"] else "  stopped"
        print(f"{row['trial']:<40}" + "".join(f"{cell:>24}" for cell in cells) + mark)
    print("\n".join(summary["verdict"]))
    best = yaml.safe_dump(dict(summary["best"]), default_flow_style=True).strip()
    print(f"best {summary['metric']} {summary['value']:.4f}: {best}")


def run_trial(overrides: Mapping[str, Any], report: Any, *, base: Mapping[str, Any], folder: str) -> dict[str, float]:
    """One trial: `finetune` in this process, in FOLDER/runs/TRIAL, with a config.yaml that reproduces it."""
    place = Path(folder) / "runs" / (ray.tune.get_context().get_trial_id() or "trial")
    place.mkdir(parents=True, exist_ok=True)
    source = place / "base.yaml"
    source.write_text(yaml.safe_dump(dict(base)), encoding="utf-8")
    config = resolve(files=[source], overrides=overrides)
    source.unlink()
    write_run_config(place, config, ["trial of", folder])

    def on_report(values: Mapping[str, float]) -> None:
        validated = {k: v for k, v in values.items() if k.startswith("val/")}
        if validated:  # a checkpoint between two validations is no report: schedulers count them
            report(validated)

    runtime = LocalRuntime("cuda" if config.hardware.workers.use_gpu else "cpu", on_report=on_report)
    stage = Stage(".", "motionrft.training.recipes.finetune:run", to_plain(finetune_job(config)))
    result = run_local([stage], runtime, place, resume=True)["."]
    values = {k: float(v) for k, v in result["validation"].items() if k.startswith("val/")}
    write_json(place / "summary.json", dict(result))
    return values


def finetune_job(config: RunConfig) -> FinetuneJob:
    """Return the fine-tuning job of a resolved configuration whose inputs are absolute."""
    inputs = config.inputs
    return FinetuneJob(
        inputs.dataset,
        inputs.generator,
        inputs.reward,
        config.seed,
        config.finetune,
        inputs.evaluators,
        validation_recipe(config.evaluate),
    )


def _with_absolute_inputs(config: RunConfig) -> RunConfig:
    """Trials run elsewhere: make every input absolute and make sure it is there."""
    inputs = config.inputs
    if not inputs.evaluators:
        raise ConfigError("a search needs an evaluator: give inputs.evaluators.A=PATH, made by `motionrft evaluator`")
    parts = vars(inputs.reward)
    reward = {k: required(v, f"inputs.reward.{k}", "`motionrft reward`") for k, v in parts.items() if v}
    return replace(
        config,
        inputs=replace(
            inputs,
            dataset=required(inputs.dataset, "inputs.dataset", "`motionrft prepare`"),
            generator=required(inputs.generator, "inputs.generator", "`motionrft pretrain`"),
            reward=type(inputs.reward)(**reward),
            evaluators={
                n: required(v, f"inputs.evaluators.{n}", "`motionrft evaluator`") for n, v in inputs.evaluators.items()
            },
        ),
    )
