"""Recipe: fine-tune a generator on a reward with any strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, DataError, explain
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.protocols import Runtime
from motionrft.core.rng import derive_seed
from motionrft.core.types import Representation
from motionrft.evaluation.protocol import Scores
from motionrft.finetune.step import SIMILARITY_TARGETS, Objective, rollout_step
from motionrft.finetune.strategies import EasyTune, Strategy
from motionrft.generators.base import Generator
from motionrft.generators.lora import Adapter, adapter_for, add_adapter
from motionrft.reward.terms import LEARNED_TERMS, TERMS, import_terms, without_gradient
from motionrft.training.checkpoint import Card, CheckpointStore
from motionrft.training.loop import run_loop
from motionrft.training.metrics import MetricsWriter
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.common import BatchSource, Split, close, whole_parameters
from motionrft.training.recipes.evaluate import EvaluateRecipe, RewardFolders, ScoreJob, score, validation_recipe
from motionrft.training.recipes.generator_files import (
    Fixed,
    load_description,
    load_generator,
    save_adapter,
    save_weights,
)
from motionrft.training.recipes.reward import require_text_encoder


@dataclass(frozen=True)
class FinetuneRecipe:
    """How a generator is fine-tuned."""

    strategy: Strategy = field(default_factory=EasyTune)
    """Which denoising steps learn, and from what."""
    weights: dict[str, float] = field(
        default_factory=lambda: {"semantic": 1.0, "preference": 0.002, "authenticity": 0.002, "similarity": 1.0}
    )
    """Reward term -> weight. Terms with weight 0 are computed and logged where the reward has them. Defaults are the
    paper's."""
    term_modules: tuple[str, ...] = ()
    """Modules that register your own reward terms: imported by every process that reads this configuration."""
    similarity_target: str = "reference"
    """"reference": what the frozen generator makes of the same noise (paper). "ground_truth": the clip (released
    code)."""
    num_steps: int = 50
    """Denoising steps S."""
    batches: int = 200
    """Prompt batches; one batch takes as many updates as the strategy plans."""
    batch_size: int = 32
    """Prompts per batch over all workers."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-5, warmup_steps=10, grad_clip=1.0))
    """AdamW; its total_steps is filled in with the planned updates."""
    max_frames: int = 196
    """Longest motion."""
    lora_rank: int | None = None
    """Rank of low-rank adapters; 0 = the weights themselves are trained. None = as the generator's family prefers."""
    lora_alpha: float = 16.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_preset: str = ""
    """Which layers get adapters, by the family's name for the choice; "" = its first."""
    log_every: int = 1
    """Batches between metric rows."""
    checkpoint_every: int = 50
    """Batches between checkpoints."""
    validate_every: int = 0
    """Batches between validation scores (needs an evaluator); 0 = never."""

    def __post_init__(self) -> None:
        """Import the user's terms, then report every contradiction at once."""
        import_terms(self.term_modules, "finetune.term_modules")
        known = [*LEARNED_TERMS, *TERMS]
        unknown = [n for n in self.weights if n not in known]
        negative = [n for n, w in self.weights.items() if not w >= 0]
        flat = without_gradient(n for n, w in self.weights.items() if w)
        window = getattr(self.strategy, "window", 0)
        rules = [
            (not unknown, f"weights name unknown terms {unknown}; known: {known}"),
            (not negative, f"weights must not be negative: {negative}"),
            (
                not (flat and self.strategy.differentiates_reward),
                f"{type(self.strategy).__name__} differentiates the reward, but terms {flat} have no gradient: use "
                "strategy DDPO or FlowGRPO, or give them weight 0",
            ),
            (any(self.weights.values()), "every weight is zero: nothing to maximise"),
            (self.similarity_target in SIMILARITY_TARGETS, f"similarity_target must be one of {SIMILARITY_TARGETS}"),
            (self.num_steps >= 1, f"num_steps must be at least 1, got {self.num_steps}"),
            (
                window <= self.num_steps,
                f"strategy.window is {window}, more than the {self.num_steps} denoising steps: lower it, or raise "
                "num_steps",
            ),
            *((getattr(self, n) >= 1, f"{n} must be at least 1") for n in ("batches", "batch_size", "log_every")),
            (self.checkpoint_every >= 1, "checkpoint_every must be at least 1"),
            (self.validate_every >= 0, "validate_every must not be negative"),
            (self.lora_rank is None or self.lora_rank >= 0, f"lora_rank must not be negative, got {self.lora_rank}"),
            (self.lora_alpha > 0, f"lora_alpha must be positive, got {self.lora_alpha}"),
        ]
        problems = [text for holds, text in rules if not holds]
        if problems:
            raise ConfigError("finetune: " + "; ".join(problems))

    @property
    def updates(self) -> int:
        """Optimiser steps of the whole run."""
        return self.batches * self.strategy.updates_per_rollout(self.num_steps)


@dataclass(frozen=True)
class FinetuneJob:
    """One fine-tuning run."""

    dataset: str
    """Dataset folder."""
    generator: str
    """Model folder of the generator to start from; its frozen copy is the reference."""
    reward: RewardFolders
    """The reward."""
    seed: int = 0
    """Of prompts and noise."""
    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    """How."""
    evaluators: dict[str, str] = field(default_factory=dict)
    """Name -> model folder; the first one scores validation."""
    validation: EvaluateRecipe = field(default_factory=lambda: validation_recipe(EvaluateRecipe()))
    """How validation is scored."""


def run(runtime: Runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: fine-tune and write FOLDER/model; return the last metrics and validation scores."""
    job = from_plain(FinetuneJob, config, "finetune")
    recipe = job.recipe
    generator = load_generator(job.generator, runtime.device)
    split = Split.open(job.dataset, "train", data).prompting(generator.spec.text_encoder)
    reference = load_generator(job.generator, runtime.device)
    reference.network.requires_grad_(False)
    reward = job.reward.load(runtime.device)
    require_text_encoder(reward, split)
    # A weight of 0 asks for nothing: the term is watched where the reward has it, and not missed where it has not.
    known = reward.terms_for(generator.spec.representation)
    objective = Objective(
        weights={n: w for n, w in recipe.weights.items() if w or n in known},
        terms=tuple(n for n in job.reward.terms if n not in recipe.weights and n in known),
        similarity_target=recipe.similarity_target,
    )
    reward.check_terms(objective.driving, generator.spec.representation)
    kinds = [generator.spec.representation] if recipe.similarity_target == "ground_truth" else []
    seed = derive_seed("finetune", job.seed)
    frames = min(recipe.max_frames, generator.spec.max_frames)
    batches = BatchSource(split, kinds or [Representation.JOINT], frames, recipe.batch_size, seed, runtime)
    adapter = _prepare(generator, recipe, seed)
    engine = runtime.build_engine(generator.network, replace(recipe.optim, total_steps=recipe.updates))
    description, fixed = load_description(job.generator)
    card = Card(
        description.kind, {**description.config, "origin": {"finetune": to_plain(job)}}, description.fingerprints
    )
    _write_plan(recipe, folder, runtime)
    store = _Store(adapter, reference, card, fixed, Path(job.generator))
    validate = _Validation(job, folder, store) if recipe.validate_every else None

    def body(step: int) -> dict[str, float]:
        return rollout_step(
            engine,
            generator,
            reference,
            reward,
            batches(step),
            objective=objective,
            strategy=recipe.strategy,
            num_steps=recipe.num_steps,
            progress=step / recipe.batches,
            step=step,
            seed=seed,
            collective=runtime,
        )

    def on_step(done: int) -> Mapping[str, float] | None:
        if validate is None or (done % recipe.validate_every and done != recipe.batches):
            return None
        return validate(runtime, whole_parameters(engine, None), done, engine.steps)

    with MetricsWriter(folder / "metrics.jsonl", enabled=runtime.rank == 0) as metrics:
        outcome = run_loop(
            body,
            total_steps=recipe.batches,
            engine=engine,
            runtime=runtime,
            checkpoints=CheckpointStore(folder / "checkpoints", card),
            metrics=metrics,
            seed=seed,
            log_every=recipe.log_every,
            checkpoint_every=recipe.checkpoint_every,
            on_step=on_step,
            item_ids=batches.item_ids,
        )
    weights = whole_parameters(engine, None)
    if runtime.rank == 0:
        store.save(folder / "model", weights, outcome.step, outcome.optimizer_steps)
    close(engine)
    last = {name: value for name, value in outcome.metrics.items() if name.startswith(("reward/", "optim/"))}
    return {"updates": outcome.optimizer_steps, "last": last, **(validate.last if validate is not None else {})}


def _prepare(generator: Generator, recipe: FinetuneRecipe, seed: int) -> Adapter | None:
    """Leave trainable what this run trains: an adapter, or the network without the parts its family keeps."""
    model = generator.config
    rank = model.default_lora_rank if recipe.lora_rank is None else recipe.lora_rank
    if rank:
        adapter = adapter_for(model, rank, recipe.lora_alpha, recipe.lora_preset)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("lora", seed))
            add_adapter(generator.network, adapter)
        return adapter
    for name, parameter in generator.network.named_parameters():
        parameter.requires_grad_(not name.startswith(model.kept_in_finetuning or ("\0",)))
    return None


@dataclass(frozen=True)
class _Store:
    """How the tuned weights are kept: an adapter beside its base, or the whole model."""

    adapter: Adapter | None
    reference: Generator
    card: Card
    fixed: Fixed
    base: Path

    def save(self, place: Path, trained: Mapping[str, Tensor], done: int, steps: int) -> None:
        """Write the trained tensors (whole, by name) to PLACE."""
        if self.adapter is not None:
            save_adapter(place, trained, self.card, self.adapter, self.base, done, steps)
            return
        # What was not trained is what it was in the reference, which no engine has taken apart.
        weights = {**dict(self.reference.network.named_parameters()), **trained}
        save_weights(place, weights, self.card, self.fixed, done, steps)


def _write_plan(recipe: FinetuneRecipe, folder: Path, runtime: Runtime) -> None:
    """Keep what will be executed beside the run: the plan strips and the weights, as text people and tests read."""
    if runtime.rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.txt").write_text(show_plan(recipe), encoding="utf-8")


def show_plan(recipe: FinetuneRecipe, moments: int = 5) -> str:
    """Return plan strips at evenly spaced moments of the run, with the weights."""
    import numpy as np

    lines = [f"strategy {to_plain(recipe.strategy)}", f"weights {dict(recipe.weights)}"]
    lines += [f"{recipe.batches} batches of {recipe.batch_size} prompts, {recipe.updates} updates"]
    for index in range(moments):
        step = round(index * (recipe.batches - 1) / max(moments - 1, 1))
        rng = np.random.default_rng(step)
        sketch = recipe.strategy.sketch(recipe.num_steps, step / recipe.batches, rng)
        lines += [f"batch {step} of {recipe.batches} (noisiest step left):", sketch]
    return "\n".join(lines) + "\n"


class _Validation:
    """Scores the generator on validation clips; rank 0 does it, all ranks learn the values."""

    def __init__(self, job: FinetuneJob, folder: Path, store: _Store) -> None:
        if not job.evaluators:
            raise ConfigError("finetune.validate_every needs an evaluator: set inputs.evaluators, or set it to 0")
        self.job, self.folder, self.store = job, folder / "validation", store
        self.base: Scores | None = None
        self.last: dict[str, Any] = {}

    def __call__(
        self, runtime: Runtime, weights: Mapping[str, Any], done: int, optimizer_steps: int
    ) -> dict[str, float]:
        found = dict.fromkeys(("val/r_precision_top1", "val/fid", "val/jerk", "val/score"), 0.0)
        if runtime.rank == 0:
            if self.base is None:
                self.base = self._score("base", self.job.generator)
                if "fid" not in self.base.values:
                    raise DataError(
                        explain(
                            f"a {self.job.validation.split} split large enough for R-precision and FID",
                            "one that is too small",
                            self.job.dataset,
                            "Set finetune.validate_every=0, or prepare more clips.",
                        )
                    )
            place = self.folder / f"model_{done}"
            self.store.save(place, weights, done, optimizer_steps)
            tuned = self._score(f"tuned_{done}", str(place))
            keys = ("r_precision_top1", "fid", "jerk")
            found = {f"val/{key}": tuned.values[key] for key in keys}
            found["val/score"] = validation_score(self.base.values, tuned.values)
            base = {key: self.base.values[key] for key in keys}
            self.last = {"validation": {**found, "base": base, "batches": done}}
        # The loop averages over ranks; the others report the same by adding nothing but their share.
        return {name: value * runtime.world for name, value in found.items()} if runtime.world > 1 else found

    def _score(self, row: str, generator: str) -> Scores:
        name, folder = next(iter(self.job.evaluators.items()))
        job = ScoreJob(
            dataset=self.job.dataset,
            row=row,
            seed=0,
            generator=generator,
            base_motions="",
            motions=str(self.folder / f"{row}.npz"),
            evaluators={name: folder},
            reward=RewardFolders(),
            weights={},
            recipe=self.job.validation,
        )
        return score(job)[name]


def validation_score(base: Mapping[str, float], tuned: Mapping[str, float]) -> float:
    """Return the number a search maximises: R@1, minus what FID and jerk got worse, each as a share of the base's.

    Retrieval alone rewards shaking and drifting; the two penalties are the report's own targets.
    """
    worse = [max(0.0, tuned[key] / max(base[key], 1e-9) - 1.0) for key in ("fid", "jerk")]
    return tuned["r_precision_top1"] - sum(worse)
