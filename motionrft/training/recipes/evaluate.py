"""Recipe: score generators on one split. Rows and seeds are shards; the same code runs them here or on a Ray pool.

All rows use the same clips, captions, pools and per-sample noise, so that two rows differ by the generator alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, DataError
from motionrft.core.protocols import Executor, MotionGenerator
from motionrft.core.types import MotionBatch, Representation
from motionrft.data.sampler import eval_batches
from motionrft.evaluation.card import load_evaluator
from motionrft.evaluation.motions import MotionSet
from motionrft.evaluation.pools import retrieval_pools, too_small
from motionrft.evaluation.protocol import Reference, Row, Scores, paired_changes, score_motions, summarise
from motionrft.generators.sampling import generate
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.terms import LEARNED_TERMS, import_terms
from motionrft.training.recipes.common import Split
from motionrft.training.recipes.generator_files import load_generator
from motionrft.training.recipes.reward import load_reward, require_text_encoder

_LOG = logging.getLogger(__name__)

REAL = "real"
BASE = "before"


@dataclass(frozen=True)
class RewardFolders:
    """Where the parts of a trained reward lie."""

    backbone: str = ""
    """Folder of the semantic stage's model."""
    preference: str = ""
    """Folder of the adapter; "" = none."""
    authenticity: str = ""
    """Folder of the adapter; "" = none."""

    def load(self, device: Any = "cpu") -> MotionReward:
        """Return the reward, frozen.

        Raises:
            ConfigError: no backbone given.
        """
        if not self.backbone:
            raise ConfigError("no reward given: set inputs.reward.backbone to the model folder of `motionrft reward`")
        adapters = {n: f for n, f in (("preference", self.preference), ("authenticity", self.authenticity)) if f}
        return load_reward(self.backbone, adapters, device)

    @property
    def terms(self) -> tuple[str, ...]:
        """The learned terms these parts can compute."""
        have = {"semantic": True, "preference": self.preference, "authenticity": self.authenticity, "similarity": True}
        return tuple(name for name in LEARNED_TERMS if have[name])


@dataclass(frozen=True)
class EvaluateRecipe:
    """How rows are scored."""

    split: str = "test"
    """Which clips. `test` is read once, after every choice is made."""
    num_steps: int = 10
    """Denoising steps S of every row."""
    batch_size: int = 128
    """Clips generated at a time; the result does not depend on it."""
    max_frames: int = 196
    """Longest clip."""
    n_pools: int = 200
    """R-precision pools of 32 distinct classes."""
    seeds: int = 3
    """Noise seeds of rows that have one generator."""
    pool_seed: int = 0
    """Of the pools, the same for all rows."""


@dataclass(frozen=True)
class ScoreJob:
    """One shard: one generator (or the real clips) under one noise seed."""

    dataset: str
    row: str
    seed: int
    generator: str  # model folder, or "" for the real clips
    base_motions: str  # .npz of the base's motions under this seed: the similarity target; "" = these motions
    motions: str  # .npz to write
    evaluators: Mapping[str, str]
    reward: RewardFolders
    weights: Mapping[str, float]
    recipe: EvaluateRecipe
    term_modules: tuple[str, ...] = ()  # where terms of `weights` are defined


@dataclass(frozen=True)
class RowSpec:
    """One line of the table: generators in the order of their seeds."""

    key: str
    label: str
    generators: tuple[str, ...] = ()  # empty = the real clips
    note: str = ""
    seeds: int = 0  # noise seeds; 0 = as many as the recipe says


@dataclass(frozen=True)
class Evaluation:
    """Rows per evaluator, and what the report needs beside them."""

    rows: Mapping[str, Mapping[str, Row]]  # evaluator -> row key -> row
    specs: Sequence[RowSpec]
    fid_floor: Mapping[str, float]
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # evaluator -> metric -> after - before


def evaluate_rows(
    executor: Executor,
    specs: Sequence[RowSpec],
    dataset: str,
    evaluators: Mapping[str, str],
    reward: RewardFolders,
    weights: Mapping[str, float],
    recipe: EvaluateRecipe,
    folder: Path,
    term_modules: tuple[str, ...] = (),
) -> Evaluation:
    """Score every row under every evaluator; motions are kept in FOLDER/motions.

    Args:
        executor: where shards run.
        specs: rows; the motions of the one called "before" are the similarity target of all others, seed by seed.
        dataset: dataset folder.
        evaluators: name -> model folder.
        reward: for the reward columns.
        weights: of the reward total.
        recipe: split, steps, pools.
        folder: of the evaluation.
        term_modules: modules that register the user's terms among `weights`.
    """
    (folder / "motions").mkdir(parents=True, exist_ok=True)
    base = next((spec for spec in specs if spec.key == BASE), None)

    def jobs(spec: RowSpec) -> list[ScoreJob]:
        seeds = range(1) if not spec.generators else range(spec.seeds or max(recipe.seeds, 1))
        folders = spec.generators or ("",)
        if len(folders) not in (1, len(seeds)):
            raise ConfigError(f"row {spec.key} has {len(folders)} generators for {len(seeds)} seeds")
        return [
            ScoreJob(
                dataset=dataset,
                row=spec.key,
                seed=seed,
                generator=folders[seed % len(folders)],
                base_motions=_motions(folder, BASE, seed) if base is not None and spec.key != BASE else "",
                motions=_motions(folder, spec.key, seed),
                evaluators=evaluators,
                reward=reward,
                weights=weights,
                recipe=recipe,
                term_modules=term_modules,
            )
            for seed in seeds
        ]

    first = [job for spec in specs if spec.key == BASE for job in jobs(spec)]
    # by seed, so that while the last base job runs there is other work that needs only the first ones
    rest = sorted((job for spec in specs if spec.key != BASE for job in jobs(spec)), key=lambda job: job.seed)
    place = {job.motions: i for i, job in enumerate(first)}
    after = [None] * len(first) + [place.get(job.base_motions) for job in rest]
    found: dict[str, dict[str, list[Scores]]] = {name: {} for name in evaluators}
    for job, scores in zip([*first, *rest], executor.map_shards(score, [*first, *rest], after), strict=True):
        for name, value in scores.items():
            found[name].setdefault(job.row, []).append(value)
    rows = {name: {key: summarise(key, runs) for key, runs in by_row.items()} for name, by_row in found.items()}
    changes: dict[str, Any] = {}
    for name, by_row in found.items():
        if BASE in by_row and "after" in by_row:
            interval = paired_changes(by_row[BASE], by_row["after"])
            changes[name] = {key: asdict(value) for key, value in interval.items()}
    floors = {}
    split = _split(dataset, recipe.split)
    batch = _everything(dataset, recipe.split, recipe.max_frames)
    if reason := too_small(batch.class_ids_B.numpy()):
        _LOG.warning("split %s: %s; they are left out, everything else is reported", recipe.split, reason)
    elif any(not spec.generators for spec in specs):
        real = _real_set(batch, split)
        floors = {name: Reference.of(_evaluator(path), real).floor() for name, path in evaluators.items()}
    return Evaluation(rows, tuple(specs), floors, changes)


def _motions(folder: Path, row: str, seed: int) -> str:
    return str(folder / "motions" / f"{row}_{seed}.npz")


@torch.no_grad()
def score(job: ScoreJob) -> dict[str, Scores]:
    """Return the scores of one shard under every evaluator, and keep its motions."""
    split = _split(job.dataset, job.recipe.split)
    batch = _everything(job.dataset, job.recipe.split, job.recipe.max_frames)
    generator = load_generator(job.generator) if job.generator else None
    terms = _reward_terms(job, Representation.KINEMATIC if generator is None else generator.spec.representation)
    motions = _real_set(batch, split) if generator is None else _generated(job, generator, batch, split)
    Path(job.motions).parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        job.motions,
        motion=motions.motion_NTD.numpy(),
        lengths=motions.lengths_N.numpy(),
        representation=np.array(motions.representation.value),
        fps=np.array(motions.fps),
    )
    rewards = _rewards(job, terms, motions, batch)
    pools = _pools(batch, job.recipe)
    scores = {}
    for name, folder in job.evaluators.items():
        evaluator = _evaluator(folder)
        reference = Reference.of(evaluator, _real_set(batch, split))
        scores[name] = score_motions(evaluator, motions, batch.captions, reference, pools, batch.item_ids, rewards)
    return scores


def load_motions(path: str | Path) -> MotionSet:
    """Return motions that `score` kept."""
    with np.load(path, allow_pickle=False) as file:
        return MotionSet(
            torch.from_numpy(file["motion"]),
            torch.from_numpy(file["lengths"]),
            Representation(str(file["representation"])),
            float(file["fps"]),
        )


def _generated(job: ScoreJob, generator: MotionGenerator, batch: MotionBatch, split: Split) -> MotionSet:
    prompts = split.prompting(generator.spec.text_encoder).prompts
    motion = generate(
        generator,
        generator.network,
        batch.text if prompts is None else prompts.condition(batch.captions),
        batch.lengths_B,
        batch.keys_B,
        num_steps=job.recipe.num_steps,
        seed=job.seed,
        batch_size=job.recipe.batch_size,
    )
    return MotionSet(motion.float(), batch.lengths_B, generator.spec.representation, generator.spec.fps)


def _reward_terms(job: ScoreJob, representation: Representation) -> tuple[str, ...]:
    """Return the terms to compute, before the motions cost anything: none without a reward of this representation.

    Raises:
        RepresentationError: a term with a weight whose adapter was not trained on the representation: the total would
            mean something else than in other rows.
    """
    if not job.reward.backbone:
        return ()
    import_terms(job.term_modules, "finetune.term_modules")  # shards run in processes that parsed no configuration
    reward = _reward(job.reward, job.dataset, job.recipe.split)
    known = reward.terms_for(representation)
    if not known:
        return ()
    extra = [n for n, w in job.weights.items() if w and n not in LEARNED_TERMS]
    names = [n for n in job.reward.terms if n in known or job.weights.get(n)] + extra
    reward.check_terms(names, representation)
    return tuple(names)


def _rewards(job: ScoreJob, names: Sequence[str], motions: MotionSet, batch: MotionBatch) -> dict[str, np.ndarray]:
    """Return the named reward terms per clip and their weighted sum; nothing without terms."""
    if not names:
        return {}
    reward = _reward(job.reward, job.dataset, job.recipe.split)
    target = motions if not job.base_motions else load_motions(job.base_motions)
    parts: dict[str, list[Tensor]] = {n: [] for n in (*names, "total")}
    weights = {n: w for n, w in job.weights.items() if n in names}
    for rows in eval_batches(len(motions), job.recipe.batch_size):
        lengths = motions.lengths_N[rows]
        found = reward.score(
            motions.motion_NTD[rows],
            lengths,
            motions.representation,
            text_BE=reward.encode_text(batch.text.index(torch.tensor(rows))),
            target_BE=reward.embed(target.motion_NTD[rows], lengths, target.representation),
            terms=names,
        )
        for name in names:
            parts[name].append(found.values[name])
        parts["total"].append(found.total(weights))
    return {name: torch.cat(values).double().numpy() for name, values in parts.items()}


def _pools(batch: MotionBatch, recipe: EvaluateRecipe) -> np.ndarray | None:
    """Return the pools, or None for a split in which retrieval and FID mean nothing."""
    ids = batch.class_ids_B.numpy()
    return None if too_small(ids) else retrieval_pools(ids, recipe.pool_seed, recipe.n_pools)


def _real_set(batch: MotionBatch, split: Split) -> MotionSet:
    return MotionSet(
        batch.motions[Representation.KINEMATIC], batch.lengths_B, Representation.KINEMATIC, split.clips.fps
    )


# A process of the pool scores several shards: what they share is loaded once.


@lru_cache(maxsize=4)
def _split(dataset: str, split: str) -> Split:
    return Split.open(dataset, split, {})


@lru_cache(maxsize=4)
def _everything(dataset: str, split: str, max_frames: int) -> MotionBatch:
    opened = _split(dataset, split)
    rows = opened.clips.rows(with_captions=True)
    if not rows:
        raise DataError(f"split {split!r} of {dataset} has no clip with a caption: nothing can be evaluated")
    return opened.batch(rows, [Representation.KINEMATIC], max_frames)


@lru_cache(maxsize=4)
def _evaluator(folder: str) -> Any:
    return load_evaluator(Path(folder))[0]


@lru_cache(maxsize=2)
def _reward(folders: RewardFolders, dataset: str, split: str) -> MotionReward:
    reward = folders.load()
    require_text_encoder(reward, _split(dataset, split))
    return reward


def validation_recipe(recipe: EvaluateRecipe) -> EvaluateRecipe:
    """Return the recipe on the validation split, one seed."""
    return replace(recipe, split="val", seeds=1)
