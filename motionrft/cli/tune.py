"""`motionrft tune`: a Ray Tune search over `finetune`; every trial is a run folder of its own."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray.tune
import yaml

from motionrft.cli.common import command_line, required, start
from motionrft.cli.main import add_run_arguments
from motionrft.config.load import resolve, write_run_config
from motionrft.config.schema import RunConfig
from motionrft.core.errors import ConfigError
from motionrft.core.plain import to_plain
from motionrft.report.html import write_report
from motionrft.runtime.session import ray_session
from motionrft.runtime.tune import run_search
from motionrft.training.recipes.evaluate import validation_recipe
from motionrft.training.recipes.finetune import FinetuneJob
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.stages import Stage, run_local, write_json
from tune_spaces.space import load_space, space_names

_LOG = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("--space", default="easytune", help=f"search space: {', '.join(space_names())}")
    parser.add_argument("--samples", type=int, help="trials (default: the space's)")
    parser.add_argument("--concurrent", type=int, default=0, help="trials at a time; 0 = as many as the CPUs allow")
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
    search = replace(
        space.search,
        num_samples=options.samples or space.search.num_samples,
        max_concurrent=options.concurrent,
        gpus_per_trial=config.hardware.workers.gpus_per_worker,
        seed=config.seed,
    )
    folder = options.run_dir.resolve()
    write_run_config(folder, config, command_line())
    base = to_plain(config)
    every = max(1, config.finetune.batches // search.max_reports)
    base["finetune"] |= {"validate_every": every, "checkpoint_every": every}
    with ray_session(config.hardware):
        result = run_search(
            partial(run_trial, base=base, folder=str(folder)),
            space.fields,
            search,
            folder,
            base_config=base,
            resume=options.resume,
        )
    rows = [{"trial": r["trial"], search.metric: r["value"], **r["overrides"]} for r in result.trials]
    notes = [space.question, f"maximised: {search.metric} on the validation split"]
    write_report(folder / "report.html", {"title": f"Search: {options.space}"}, {"tune": rows}, [], "", notes)
    write_json(folder / "summary.json", {"best": dict(result.best), "value": result.best_value, "trials": len(rows)})
    print(f"{'trial':<40}{search.metric:>12}")
    for row in rows:
        value = row[search.metric]
        print(f"{row['trial']:<40}{'failed' if value is None else format(value, '12.4f'):>12}")
    print(f"best {result.best_value:.4f}: {yaml.safe_dump(dict(result.best), default_flow_style=True).strip()}")
    print(f"run it alone: motionrft finetune --config {folder / 'best_config.yaml'} --backend single")
    return 0


def run_trial(overrides: Mapping[str, Any], report: Any, *, base: Mapping[str, Any], folder: str) -> dict[str, float]:
    """One trial: `finetune` in this process, in FOLDER/runs/TRIAL, with a config.yaml that reproduces it."""
    place = Path(folder) / "runs" / (ray.tune.get_context().get_trial_id() or "trial")
    place.mkdir(parents=True, exist_ok=True)
    source = place / "base.yaml"
    source.write_text(yaml.safe_dump(dict(base)), encoding="utf-8")
    config = resolve(files=[source], overrides=overrides)
    source.unlink()
    write_run_config(place, config, ["trial of", folder])
    runtime = LocalRuntime(
        "cuda" if config.hardware.workers.use_gpu else "cpu",
        on_report=lambda values: report({k: v for k, v in values.items() if k.startswith("val/")}),
    )
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
