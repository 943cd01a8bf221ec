"""Recipe: what a fine-tuning gradient meets in this generator's sampler, and how like clean motion noisy motion is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionrft.core.plain import from_plain
from motionrft.core.protocols import Runtime
from motionrft.core.rng import derive_seed
from motionrft.finetune.diagnostics import (
    jacobian_norms,
    noise_similarity,
    path_similarity,
    reward_gradients,
    sampling_path,
    spread_rows,
)
from motionrft.training.recipes.common import Split
from motionrft.training.recipes.evaluate import RewardFolders
from motionrft.training.recipes.generator_files import load_generator
from motionrft.training.recipes.reward import require_text_encoder


@dataclass(frozen=True)
class DiagnoseJob:
    """One generator with one reward, looked at on held-out clips."""

    dataset: str
    generator: str
    reward: RewardFolders
    seed: int = 0
    num_steps: int = 50
    """Denoising steps S."""
    clips: int = 16
    """Validation clips."""
    max_frames: int = 196
    """Longest clip."""
    probes: int = 2
    """Random directions per clip for the norms of Jacobians."""
    split: str = "val"
    """Which clips."""


def run(runtime: Runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: return {figure: rows of `report.charts.series_lines`}, one per denoising step. Ranks do the same."""
    job = from_plain(DiagnoseJob, config, "diagnose")
    generator = load_generator(job.generator, runtime.device)
    reward = job.reward.load(runtime.device)
    split = Split.open(job.dataset, job.split, data).prompting(generator.spec.text_encoder)
    require_text_encoder(reward, split)
    kind, seed = generator.spec.representation, derive_seed("diagnose", job.seed)
    rows = split.clips.rows(with_captions=True)[: job.clips]
    batch = split.batch(rows, [kind], min(job.max_frames, generator.spec.max_frames)).to(runtime.device)
    text_BE = reward.encode_text(batch.text)

    def embed(motion_BTD: Tensor, level: float) -> Tensor:
        del level  # embeddings are of clean motion; scores are told the level
        return reward.embed(motion_BTD, batch.lengths_B, kind)

    def score(motion_BTD: Tensor, level: float) -> Tensor:
        found = reward.score(motion_BTD, batch.lengths_B, kind, text_BE=text_BE, noise_level=level, terms=("semantic",))
        return found.values["semantic"]

    path = sampling_path(generator, batch, job.num_steps, seed)
    norms = jacobian_norms(path, job.probes, seed)
    gradients = reward_gradients(path, score)
    with torch.no_grad():
        clean = generator.encode(batch.motions[kind], batch.lengths_B)
    noisy, along = noise_similarity(generator, batch, clean, job.num_steps, embed, seed), path_similarity(path, embed)
    return {
        "steps": job.num_steps,
        "jacobian": [
            *spread_rows("one step", norms.step_SB, log=True),
            *spread_rows("all steps after it", norms.chain_SB, log=True),
        ],
        "reward_gradient": [
            *spread_rows("direct term (EasyTune)", gradients.direct_SB, log=True),
            *spread_rows("through the chain (DRaFT)", gradients.chain_SB, log=True),
        ],
        "noise_similarity": [
            *spread_rows("reward embedding", noisy["unlabelled"]),
            *spread_rows("motion features", noisy["features"]),
        ],
        "path_similarity": [
            *spread_rows("reward embedding", along["x0_hat"]),
            *spread_rows("motion features", along["features"]),
        ],
    }
