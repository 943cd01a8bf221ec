"""Recipe: train an evaluator, put it through its gates on validation motion, and keep it only if it passes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from motionrft.core.errors import ConfigError
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.protocols import Engine, Runtime
from motionrft.core.rng import derive_seed
from motionrft.core.types import MotionBatch, Representation
from motionrft.evaluation.card import make_card, save_evaluator
from motionrft.evaluation.evaluator import Evaluator, EvaluatorConfig, EvaluatorObjective
from motionrft.evaluation.gates import GateConfig, run_gates
from motionrft.evaluation.motions import MotionSet
from motionrft.evaluation.vocabulary import Vocabulary
from motionrft.training.checkpoint import Card
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.common import BatchSource, Split, TrainConfig, close, put_parameters, train
from motionrft.training.recipes.common import whole_parameters as parameters_of


@dataclass(frozen=True)
class EvaluatorRecipe:
    """How evaluators are made."""

    model: EvaluatorConfig = field(default_factory=EvaluatorConfig)
    """Size; the seed is set per evaluator."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=300, batch_size=128, optim=OptimConfig(lr=1e-3, schedule="onecycle", weight_decay=0.01)
        )
    )
    """Length and optimiser."""
    gates: GateConfig = field(default_factory=GateConfig)
    """What it must achieve on real motion."""
    max_frames: int = 80
    """Longest crop."""

    def __post_init__(self) -> None:
        """Refuse what would change the loss."""
        if self.train.micro_batches > 1:
            raise ConfigError("evaluator.train.micro_batches must be 1: its contrastive loss couples the whole batch")


@dataclass(frozen=True)
class EvaluatorJob:
    """One evaluator of a run."""

    dataset: str
    """Dataset folder."""
    name: str
    """Shown beside its numbers, e.g. "A"."""
    seed: int = 0
    """Of weights, data order and captions."""
    recipe: EvaluatorRecipe = field(default_factory=EvaluatorRecipe)
    """How it is made."""


def run(runtime: Runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: write FOLDER/model (see `evaluation.card`) and return its id, real scores and gates."""
    job = from_plain(EvaluatorJob, config, "evaluator")
    split = Split.open(job.dataset, "train", data)
    seed = derive_seed("evaluator", job.seed)
    normalizer = split.normalizer(Representation.KINEMATIC)
    vocabulary = Vocabulary.of([c for captions in split.clips.captions for c in captions])
    evaluator = Evaluator(replace(job.recipe.model, seed=seed % 2**31), vocabulary, normalizer)
    plain = copy.deepcopy(evaluator)
    objective = EvaluatorObjective(evaluator, runtime)
    batches = BatchSource(
        split, [Representation.KINEMATIC], job.recipe.max_frames, job.recipe.train.batch_size, seed, runtime
    )
    card = Card("evaluator", to_plain(job), {"normalizer/kinematic": normalizer.fingerprint})

    def learn(engine: Engine, batch: MotionBatch, step: int) -> Mapping[str, Tensor]:
        loss, metrics = engine(**objective.inputs(batch, step))
        engine.backward(loss)
        return metrics  # type: ignore[no-any-return]

    engine, ema, _ = train(
        runtime,
        objective,
        job.recipe.train,
        folder,
        card,
        seed,
        batches,
        learn,
    )
    weights = parameters_of(engine, ema)
    close(engine)
    result: dict[str, Any] = {}
    if runtime.rank == 0:
        put_parameters(plain, {n.removeprefix("evaluator."): w for n, w in weights.items() if "evaluator." in n})
        result = _judge_and_save(job, plain, split, folder, data)
    return result


def _judge_and_save(
    job: EvaluatorJob, evaluator: Evaluator, split: Split, folder: Path, data: Mapping[str, Any]
) -> dict[str, Any]:
    validation = Split.open(job.dataset, "val", data)
    everything = validation.batch(range(len(validation.clips)), [Representation.KINEMATIC], job.recipe.max_frames)
    motions = MotionSet(
        everything.motions[Representation.KINEMATIC], everything.lengths_B, Representation.KINEMATIC, everything.fps
    )
    known = bool((everything.class_ids_B >= 0).all())
    report = run_gates(
        evaluator.eval(), motions, everything.captions, everything.class_ids_B.numpy() if known else None,
        job.recipe.gates,
    )  # fmt: skip
    (folder / "gates.txt").write_text(report.to_text() + "\n", encoding="utf-8")
    made = make_card(
        evaluator, job.name, everything.fps, split.clips.item_ids, report.real, report.to_dict(), (job.dataset,)
    )
    save_evaluator(folder / "model", evaluator, made)
    report.require(job.name)
    return {"id": made.id, "real": dict(report.real), "gates": report.to_dict()}
