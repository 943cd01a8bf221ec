"""Comparisons of reward trainings that differ in one thing, over several seeds; what `motionrft reward ablate` runs.

A question is a list of sides; every side is trained with the same seeds, data order and number of steps, and measured
alike. Differences are taken per seed, so what the seeds share cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from motionrft.core.errors import ConfigError
from motionrft.core.plain import to_plain
from motionrft.evaluation.intervals import ci95_student
from motionrft.training.recipes.evaluate import RewardFolders
from motionrft.training.recipes.reward import RefineRecipe, RewardJob
from motionrft.training.recipes.reward_quality import QualityJob
from motionrft.training.stages import Stage

QUESTIONS = ("spl", "representations", "noise")
_REWARD = "motionrft.training.recipes.reward:run_semantic"
_QUALITY = "motionrft.training.recipes.reward_quality:run"
NOISE_LEVELS = (0.0, 0.3, 0.6)


@dataclass(frozen=True)
class Side:
    """One way of training."""

    name: str
    job: RewardJob  # its seed is replaced


def sides(question: str, job: RewardJob, refine: RefineRecipe, backbone: str) -> list[Side]:
    """Return what is compared; the first side is what the others are held against.

    Args:
        question: "spl": refinement without and with SPL; "representations": one representation alone against all;
            "noise": trained on clean motion only against noise-aware.
        job: the configured training.
        refine: the configured refinement.
        backbone: trained backbone that "spl" starts from.

    Raises:
        ConfigError: unknown question, or "spl" without a backbone.
    """
    if question == "spl":
        if not backbone:
            raise ConfigError("question 'spl' refines a trained backbone: set inputs.reward.backbone")
        plain = replace(job, backbone=backbone, refine=replace(refine, spl=replace(refine.spl, weight=0.0)))
        found = [Side("without SPL", plain)]
        for mode in ("bank", "in_batch"):
            spl = replace(refine.spl, mode=mode)
            found.append(Side(f"SPL {mode}", replace(plain, refine=replace(refine, spl=spl))))
        return found
    recipe = job.recipe
    if question == "representations":
        alone = [
            Side(
                f"{name} alone",
                replace(job, recipe=replace(recipe, model=replace(recipe.model, representations=(name,)))),
            )
            for name in recipe.model.representations
        ]
        return [Side("shared", job), *alone]
    if question == "noise":
        clean = replace(recipe.semantic, noise=replace(recipe.semantic.noise, p_clean=1.0))
        return [Side("clean only", replace(job, recipe=replace(recipe, semantic=clean))), Side("noise-aware", job)]
    raise ConfigError(f"question must be one of {', '.join(QUESTIONS)}, got {question!r}")


def stages(question: str, compared: Sequence[Side], seeds: int, run_dir: Path, split: str) -> list[Stage]:
    """Return training and measuring stages: SIDE_SEED and SIDE_SEED_quality."""
    found = []
    levels = NOISE_LEVELS if question == "noise" else (0.0,)
    for side in compared:
        for seed in range(seeds):
            place = place_of(side.name, seed)
            job = replace(side.job, seed=side.job.seed + seed)
            found.append(Stage(place, _REWARD, to_plain(job)))
            model = str((run_dir / place / "model").resolve())
            quality = QualityJob(job.dataset, RewardFolders(model), split, "", job.recipe.max_frames, levels, job.seed)
            found.append(Stage(f"{place}_quality", _QUALITY, to_plain(quality)))
    return found


def place_of(side: str, seed: int) -> str:
    """Return the stage name of a side's training."""
    return f"{side.replace(' ', '_')}_{seed}"


def compare(
    compared: Sequence[Side], seeds: int, results: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return representation -> side -> metric -> {"mean", "ci95", "values"}, and "difference" to the first side.

    Metrics are recalls in pools of 32 where the split allows them, else among all clips, and their average.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for side in compared:
        runs = [results[f"{place_of(side.name, seed)}_quality"]["retrieval"] for seed in range(seeds)]
        for representation in runs[0]:
            protocol = "pools32" if "pools32" in runs[0][representation] else "all"
            per_metric = {
                metric: [run[representation][protocol][metric]["value"] for run in runs]
                for metric in runs[0][representation][protocol]
            }
            cells = {
                metric: {"mean": float(np.mean(values)), "ci95": ci95_student(values), "values": values}
                for metric, values in per_metric.items()
            }
            found.setdefault(representation, {})[side.name] = {"protocol": protocol, "metrics": cells}
    for by_side in found.values():
        names = list(by_side)
        reference = names[0]
        for name in names[1:]:
            if name.endswith(" alone"):  # measured on its own representation: what sharing gains over it
                pair = (by_side[name], by_side[reference])
            else:
                pair = (by_side[reference], by_side[name])
            gaps = {
                m: np.subtract(pair[1]["metrics"][m]["values"], pair[0]["metrics"][m]["values"])
                for m in pair[0]["metrics"]
            }
            by_side[name]["difference"] = {
                m: {"mean": float(g.mean()), "ci95": ci95_student(g)} for m, g in gaps.items()
            }
    return found
