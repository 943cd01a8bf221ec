"""`motionrft pretrain | evaluator | reward | finetune`: one training stage, or the reward's three, in a run folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.pairs import build_preference_pairs
from motionrft.cli.common import command_line, configuration, required, start
from motionrft.cli.main import add_run_arguments
from motionrft.config.load import write_run_config
from motionrft.config.schema import RunConfig
from motionrft.core.plain import to_plain
from motionrft.data.manifest import Dataset
from motionrft.data.tables import ClipTable
from motionrft.training.recipes.evaluate import validation_recipe
from motionrft.training.recipes.evaluators import EvaluatorJob
from motionrft.training.recipes.finetune import FinetuneJob, show_plan
from motionrft.training.recipes.generator import PretrainJob
from motionrft.training.recipes.reward import AdapterJob, RewardJob
from motionrft.training.stages import Stage, write_json

_RECIPES = "motionrft.training.recipes"
_DATASET = ("inputs.dataset", "`motionrft prepare`")


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    if verb == "finetune":
        parser.add_argument("--show-plan", action="store_true", help="print which steps learn, and stop")
    if verb == "reward":
        parser.add_argument(
            "--stage",
            choices=("semantic", "spl", "preference", "authenticity"),
            default="semantic",
            help="what to train; all but semantic need inputs.reward.backbone, authenticity also inputs.pairs",
        )
    add_run_arguments(parser, f"runs/{verb}")


def run(options: argparse.Namespace) -> int:
    """Run the stage and print where its result lies."""
    if getattr(options, "show_plan", False):
        print(show_plan(configuration(options).finetune))
        return 0
    config, launcher = start(options)
    stage, dataset = _stage(options, config)
    write_run_config(options.run_dir, config, command_line())
    results = launcher.run([stage], options.run_dir, dataset, resume=options.resume)
    summary = {"verb": options.verb, **results["."]}
    write_json(options.run_dir / "summary.json", summary)
    print(json.dumps(summary, indent=1))
    print(f"model: {options.run_dir / 'model'}")
    return 0


def _stage(options: argparse.Namespace, config: RunConfig) -> tuple[Stage, str]:
    """Return the stage of a verb, in the run folder itself, and the dataset it reads."""
    verb, seed, inputs = options.verb, config.seed, config.inputs
    dataset = required(inputs.dataset, *_DATASET)
    job: Any
    if verb == "pretrain":
        job = PretrainJob(
            dataset,
            seed,
            config.generator,
            config.pretrain,
            autoencoder=str(Path(inputs.autoencoder).resolve()) if inputs.autoencoder else "",
            teacher=str(Path(inputs.teacher).resolve()) if inputs.teacher else "",
        )
        return Stage(".", f"{_RECIPES}.generator:run_pretrain", to_plain(job)), dataset
    if verb == "evaluator":
        job = EvaluatorJob(dataset, "A", seed, config.evaluator)
        return Stage(".", f"{_RECIPES}.evaluators:run", to_plain(job)), dataset
    if verb == "finetune":
        generator = required(inputs.generator, "inputs.generator", "`motionrft pretrain` or `motionrft import`")
        required(inputs.reward.backbone, "inputs.reward.backbone", "`motionrft reward`")
        reward = type(inputs.reward)(**{k: str(Path(v).resolve()) if v else "" for k, v in vars(inputs.reward).items()})
        evaluators = {name: required(path, f"inputs.evaluators.{name}", "`motionrft evaluator`")
                      for name, path in inputs.evaluators.items()}  # fmt: skip
        job = FinetuneJob(
            dataset, generator, reward, seed, config.finetune, evaluators, validation_recipe(config.evaluate)
        )
        return Stage(".", f"{_RECIPES}.finetune:run", to_plain(job)), dataset
    if options.stage == "semantic":
        return Stage(".", f"{_RECIPES}.reward:run_semantic", to_plain(RewardJob(dataset, seed, config.reward))), dataset
    backbone = required(inputs.reward.backbone, "inputs.reward.backbone", "`motionrft reward --stage semantic`")
    if options.stage == "spl":
        job = RewardJob(dataset, seed, config.reward, backbone, config.refine)
        return Stage(".", f"{_RECIPES}.reward:run_semantic", to_plain(job)), dataset
    recipe = {"preference": config.preference, "authenticity": config.authenticity}[options.stage]
    pairs = inputs.pairs or str((options.run_dir / "pairs").resolve())
    if options.stage == "preference" and not inputs.pairs:
        build_corruption_pairs(dataset, Path(pairs), config)
    required(pairs, "inputs.pairs", "`motionrft quickstart` (its pairs folder)")
    job = AdapterJob(options.stage, backbone, pairs, seed, recipe)
    return Stage(".", f"{_RECIPES}.reward:run_adapter", to_plain(job)), dataset


def build_corruption_pairs(dataset: str, folder: Path, config: RunConfig) -> Mapping[str, int]:
    """Build preference pairs of graded corruptions, unless they are there."""
    counts = {}
    opened = Dataset.open(dataset)
    for split in ("train", "val"):
        if not any(folder.glob(f"preference*{split}*")):
            clips = ClipTable.open(opened, split)
            sizes = config.pairs
            counts[split] = build_preference_pairs(
                clips, folder, split, seed=config.seed, per_clip=sizes.preference_per_clip,
                max_clips=sizes.preference_clips,
            )  # fmt: skip
    return counts
