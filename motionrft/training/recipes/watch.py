"""What a fine-tuning run does beside learning: it keeps the time, probes the reward, saves models and validates them.

Everything here happens between two batches and depends on their number, the updates and the training seconds, which are
the same on every rank; none of it changes what is learnt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, DataError, explain
from motionrft.core.protocols import Collective, Engine, RewardModel, Runtime
from motionrft.evaluation.protocol import Scores
from motionrft.finetune.objective import Objective
from motionrft.generators.base import Generator
from motionrft.generators.lora import Adapter
from motionrft.generators.sampling import generate
from motionrft.training.checkpoint import Card, latest, load_checkpoint, save_checkpoint
from motionrft.training.ema import Ema
from motionrft.training.loop import mean_over_ranks
from motionrft.training.recipes.common import Split
from motionrft.training.recipes.evaluate import EvaluateRecipe, RewardFolders, ScoreJob, score
from motionrft.training.recipes.generator_files import Fixed, save_adapter, save_weights
from motionrft.training.stages import read_json, write_json

clock = time.perf_counter
_POSITION = "position.json"
VALIDATED = ("r_precision_top1", "fid", "jerk")
"""Held-out metrics of a validation."""


@dataclass(frozen=True)
class Store:
    """How tuned weights are kept: an adapter beside its base, or the whole model."""

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


class Stopwatch:
    """Seconds of training: from a batch's `start` to its `stop`, averaged over ranks, so that all ranks agree.

    Checkpoints, probes and validation lie outside. A `training.loop.Stateful`: a resumed run counts on.
    """

    def __init__(self, collective: Collective, device: torch.device) -> None:
        self.seconds = 0.0
        self._collective, self._device = collective, device
        self._started = 0.0

    def start(self) -> None:
        """A batch begins."""
        self._started = clock()

    def stop(self) -> None:
        """It is over."""
        passed = torch.tensor(clock() - self._started, dtype=torch.float64, device=self._device)
        self.seconds += float(self._collective.mean(passed))

    def export_state(self) -> dict[str, Tensor]:
        """Return the seconds."""
        return {"seconds": torch.tensor([self.seconds], dtype=torch.float64)}

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore them."""
        self.seconds = float(state["seconds"][0])


class Snapshots:
    """Says which models to keep on the way: the first batch boundary at or after a number of updates or seconds."""

    def __init__(self, folder: Path, updates: Sequence[int], seconds: Sequence[float]) -> None:
        self._marks = [(folder / f"updates_{n}", "updates", float(n)) for n in updates]
        self._marks += [(folder / f"seconds_{s:g}", "seconds", float(s)) for s in seconds]

    def crossed(self, before: Mapping[str, float], now: Mapping[str, float]) -> list[Path]:
        """Return the folders due between two positions {"updates": u, "seconds": s}."""
        return [place for place, unit, mark in self._marks if before[unit] < mark <= now[unit]]

    def all_reached(self, now: Mapping[str, float]) -> bool:
        """Return whether no model is still to be kept."""
        return all(mark <= now[unit] for _, unit, mark in self._marks)


def save_once(
    store: Store, place: Path, trained: Mapping[str, Tensor], done: int, position: Mapping[str, float]
) -> None:
    """Write a model and its position unless PLACE has them: after a crash, seconds pass at other batches."""
    if (place / _POSITION).exists():
        return
    if latest(place) is None:
        store.save(place, trained, done, int(position["updates"]))
    write_json(place / _POSITION, {"batches": done, **position})


def kept_snapshots(folder: Path) -> dict[str, Any]:
    """Return name -> {"batches", "updates", "seconds"} of the models kept on the way."""
    return {place.parent.name: read_json(place) for place in sorted(folder.glob(f"*/{_POSITION}"))}


def copy_model(source: Path, place: Path) -> None:
    """Write the newest model of a folder to another one."""
    found = load_checkpoint(source)
    save_checkpoint(place, found.snapshot, found.card)


class Probe:
    """Rewards of final samples for the same held-out prompts from the same noise, guided as in use, without gradient.

    The total is the weighted sum without the objective's ceiling. Ranks share the prompts, each with equally many
    engine calls. Weights are the average's where there is one.

    Args:
        engine: runs the network.
        ema: average of its parameters.
        generator: sampler and decoding.
        reference: frozen generator, for similarity to it.
        reward: what is probed.
        objective: weights, terms, similarity target.
        split: of held-out clips.
        clips: prompts: its first ones.
        num_steps: denoising steps S.
        max_frames: longest motion.
        runtime: shares the prompts.

    Raises:
        ConfigError: an average of parameters that the engine shards.
    """

    def __init__(
        self,
        engine: Engine,
        ema: Ema | None,
        generator: Generator,
        reference: Generator,
        reward: RewardModel,
        objective: Objective,
        split: Split,
        *,
        clips: int,
        num_steps: int,
        max_frames: int,
        runtime: Runtime,
    ) -> None:
        if ema is not None and any(p.numel() == 0 for p in engine.module.parameters()):
            raise ConfigError(
                explain(
                    "whole parameters on every rank",
                    "sharded ones (ZeRO stage 3)",
                    "finetune.probe_every with finetune.ema_decay",
                    "Use ZeRO stage 0 to 2, or switch one of the two off.",
                )
            )
        self.engine, self.ema, self.generator, self.reference = engine, ema, generator, reference
        self.reward, self.objective, self.num_steps, self.runtime = reward, objective, num_steps, runtime
        rows = split.clips.rows(with_captions=True)[:clips]
        if not rows:
            raise DataError("the validation split has no clip with a caption: set finetune.probe_every=0")
        share = math.ceil(len(rows) / runtime.world)
        mine = rows[runtime.rank * share :][:share]
        self.clips = len(rows)
        # Every rank runs the engine equally often; repeated rows do not count.
        self.counts_B = torch.tensor([1.0] * len(mine) + [0.0] * (share - len(mine)), dtype=torch.float64)
        padded = [*mine, *[rows[0]] * (share - len(mine))]
        self.batch = split.batch(padded, [generator.spec.representation], max_frames).to(runtime.device)
        self._target_BE: Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return probe/reward/total, its standard error over prompts, and probe/reward/TERM/raw. Collective."""
        if self.ema is None:
            motion_BTD = self._sample(self.generator, self.engine)
        else:
            with self.ema.applied(self.engine.module):
                motion_BTD = self._sample(self.generator, self.engine)
        names = (*self.objective.driving, *self.objective.watched)
        terms = self.reward.score(
            motion_BTD,
            self.batch.lengths_B,
            self.generator.spec.representation,
            text_BE=self.reward.encode_text(self.batch.text),
            target_BE=self._target() if "similarity" in names else None,
            terms=names,
        )
        total_B = terms.total(self.objective.weights)
        sums = {f"{name}/raw": self._sum(value_B) for name, value_B in terms.values.items()}
        sums |= {"total": self._sum(total_B), "square": self._sum(total_B.double() ** 2)}
        found = {name: value * self.runtime.world for name, value in mean_over_ranks(sums, self.runtime).items()}
        variance = max(found.pop("square") - found["total"] ** 2, 0.0)
        found["total_error"] = math.sqrt(variance / max(self.clips - 1, 1))
        return {f"probe/reward/{name}": value for name, value in found.items()}

    def _sum(self, value_B: Tensor) -> float:
        """Return this rank's part of the mean over all prompts."""
        return float((value_B.double().cpu() * self.counts_B).sum()) / self.clips

    def _sample(self, generator: Generator, network: Any) -> Tensor:
        batch = self.batch
        return generate(
            generator, network, batch.prompt, batch.lengths_B, batch.keys_B, num_steps=self.num_steps, seed=0
        )

    def _target(self) -> Tensor:
        if self._target_BE is None:
            kind = self.generator.spec.representation
            truth = self.objective.similarity_target == "ground_truth"
            motion_BTD = self.batch.motions[kind] if truth else self._sample(self.reference, self.reference.network)
            self._target_BE = self.reward.embed(motion_BTD, self.batch.lengths_B, kind)
        return self._target_BE


class Validation:
    """Scores generators on validation clips; rank 0 does it, all ranks learn the values.

    Args:
        dataset: dataset folder.
        generator: model folder that the run starts from.
        evaluators: name -> model folder; the first one scores.
        recipe: split, denoising steps, pools.
        folder: of the stage.
        store: writes what is scored.
        runtime: of this process.
    """

    def __init__(
        self,
        dataset: str,
        generator: str,
        evaluators: Mapping[str, str],
        recipe: EvaluateRecipe,
        folder: Path,
        store: Store,
        runtime: Runtime,
    ) -> None:
        if not evaluators:
            raise ConfigError("finetune.validate_every needs an evaluator: set inputs.evaluators, or set it to 0")
        self.dataset, self.generator, self.evaluator = dataset, generator, next(iter(evaluators.items()))
        self.recipe, self.folder, self.store, self.runtime = recipe, folder / "validation", store, runtime

    def place(self, done: int) -> Path:
        """Return the model folder of what was validated after `done` batches."""
        return self.folder / f"model_{done}"

    def base(self) -> dict[str, float]:
        """Return the metrics of the model the run starts from, and the clips behind them. Collective.

        Raises:
            DataError: too few clips for R-precision and FID.
        """
        found = self._metrics(self._score("base", self.generator)) if self.runtime.rank == 0 else {}
        return self._shared(found)

    def __call__(self, weights: Mapping[str, Tensor], done: int, optimizer_steps: int) -> dict[str, float]:
        """Return the same of whole trained weights, which are kept in `place(done)`. Collective."""
        found: dict[str, float] = {}
        if self.runtime.rank == 0:
            self.store.save(self.place(done), weights, done, optimizer_steps)
            found = self._metrics(self._score(f"tuned_{done}", str(self.place(done))))
        return self._shared(found)

    def _metrics(self, scores: Scores) -> dict[str, float]:
        if "fid" not in scores.values:
            raise DataError(
                explain(
                    f"a {self.recipe.split} split large enough for R-precision and FID",
                    "one that is too small",
                    self.dataset,
                    "Set finetune.validate_every=0, or prepare more clips.",
                )
            )
        asked = int(np.isfinite(scores.per_clip["r_precision_top1"]).sum())
        return {**{key: float(scores.values[key]) for key in VALIDATED}, "clips": float(asked)}

    def _shared(self, found: Mapping[str, float]) -> dict[str, float]:
        """Return rank 0's values on every rank: a mean to which the others add nothing."""
        world = self.runtime.world
        return mean_over_ranks({n: found.get(n, 0.0) * world for n in (*VALIDATED, "clips")}, self.runtime)

    def _score(self, row: str, generator: str) -> Scores:
        name, folder = self.evaluator
        job = ScoreJob(
            dataset=self.dataset,
            row=row,
            seed=0,
            generator=generator,
            base_motions="",
            motions=str(self.folder / f"{row}.npz"),
            evaluators={name: folder},
            reward=RewardFolders(),
            weights={},
            recipe=self.recipe,
        )
        return score(job)[name]


def validation_score(base: Mapping[str, float], tuned: Mapping[str, float]) -> float:
    """Return the number a search maximises: R@1, minus what FID and jerk got worse, each as a share of the base's.

    Retrieval alone rewards shaking and drifting; the two penalties are the report's own targets.
    """
    worse = [max(0.0, tuned[key] / max(base[key], 1e-9) - 1.0) for key in ("fid", "jerk")]
    return tuned["r_precision_top1"] - sum(worse)
