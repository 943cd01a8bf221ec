"""Recipe: measure a trained reward on a split; and the same refinement with and without SPL, for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, DataError
from motionrft.core.plain import from_plain
from motionrft.core.protocols import Runtime
from motionrft.core.rng import keyed_normal
from motionrft.core.types import Representation
from motionrft.data.pairs import KINDS, PairTable, pair_file
from motionrft.data.sampler import eval_batches
from motionrft.evaluation import reward_quality as quality
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.noise import mix
from motionrft.training.recipes.common import Split
from motionrft.training.recipes.evaluate import RewardFolders
from motionrft.training.recipes.reward import require_text_encoder

_BATCH = 128


@dataclass(frozen=True)
class QualityJob:
    """What is measured, and on what."""

    dataset: str
    """Dataset folder."""
    reward: RewardFolders
    """The reward."""
    split: str = "val"
    """Which clips; keep `test` for the last look."""
    pairs: str = ""
    """Folder of pair tables; "" leaves preference and authenticity out."""
    max_frames: int = 196
    """Longest clip."""
    noise_levels: tuple[float, ...] = (0.0,)
    """Retrieval is repeated with motion that carries this much noise (0 clean .. 1 pure noise)."""
    seed: int = 0
    """Of pools, noise and bootstrap."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.split not in ("train", "val", "test"):
            raise ConfigError(f"split must be train, val or test, got {self.split!r}")
        if not all(0.0 <= level < 1.0 for level in self.noise_levels):
            raise ConfigError(f"noise_levels must lie in [0, 1), got {self.noise_levels}")


def run(runtime: Runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: return `measure` as plain data; rank 0 works, the others wait."""
    job = from_plain(QualityJob, config, "quality")
    return measure(job, runtime.device) if runtime.rank == 0 else {}


@torch.no_grad()
def measure(job: QualityJob, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return {"retrieval": {representation: {protocol: ...}}, "preference": ..., "authenticity": ...} with intervals.

    Authenticity is also told by bucket of length ("by_length"): a detector that only reads length is seen there.

    Raises:
        DataError: the split has no clip with a caption.
        CheckpointError: the reward cannot be read.
        ConfigError: it was trained on another text encoder's features.
    """
    reward = job.reward.load(device)
    split = Split.open(job.dataset, job.split, {})
    require_text_encoder(reward, split)
    rows = split.clips.rows(with_captions=True)
    if not rows:
        raise DataError(f"split {job.split!r} of {job.dataset} has no clip with a caption: nothing can be retrieved")
    found: dict[str, Any] = {"split": job.split, "clips": len(rows), "retrieval": {}}
    for name in reward.config.representations:
        for level in job.noise_levels:
            text, motion, sentence = _embedded(reward, split, rows, Representation(name), level, job, device)
            measured = quality.retrieval(
                text,
                motion,
                sentence,
                split.clips.class_ids.numpy()[rows],
                [split.clips.clip_ids[r] for r in rows],
                job.seed,
            )
            key = name if level == 0 else f"{name} noise {level:g}"
            found["retrieval"][key] = {p: quality.plain(m) for p, m in measured.items()}
            for protocol, m in measured.items():
                found["retrieval"][key][protocol]["avg"] = {"value": quality.average_recall(m)}
    for kind in KINDS:
        has = getattr(job.reward, kind)
        if job.pairs and has and pair_file(Path(job.pairs), kind, job.split).is_file():
            found[kind] = _pairs(reward, PairTable.open(Path(job.pairs), kind, job.split), job, device)
    return found


def _embedded(
    reward: MotionReward,
    split: Split,
    rows: Sequence[int],
    representation: Representation,
    level: float,
    job: QualityJob,
    device: torch.device | str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    text, motion, sentence = [], [], []
    for chosen in eval_batches(len(rows), _BATCH):
        batch = split.batch([rows[i] for i in chosen], [representation], job.max_frames).to(device)
        text.append(reward.encode_text(batch.text))
        sentence.append(batch.text.pooled_BD)
        clips = batch.motions[representation]
        if level > 0:
            scale = reward.normalizers[representation.value]
            noise = keyed_normal(batch.keys_B, tuple(clips.shape[1:]), "quality-noise", job.seed)
            share = torch.full((len(clips),), 1.0 - level**2, device=clips.device)
            clips = scale.denormalise(mix(scale.normalise(clips), noise, share))  # type: ignore[attr-defined]
        motion.append(reward.embed(clips, batch.lengths_B, representation, level))
    return tuple(torch.cat(parts).double().cpu().numpy() for parts in (text, motion, sentence))  # type: ignore[return-value]


def _pairs(reward: MotionReward, table: PairTable, job: QualityJob, device: torch.device | str) -> dict[str, Any]:
    """Return the scores of a pair table per representation the adapter was trained on, on clean motion."""
    found: dict[str, Any] = {"pairs": len(table)}
    trained = reward.config.representations if reward.trained_on is None else reward.trained_on.get(table.name, ())
    for name in trained:
        kind = Representation(name)
        parts: list[list[Tensor]] = [[], []]
        for rows in eval_batches(len(table), _BATCH):
            lengths = table.lengths[rows].to(device)
            for side, member in enumerate(("first", "second")):
                motion = table.motions(rows, member, [kind], device)[name]
                parts[side].append(reward.head_outputs(table.name, motion, lengths, kind))
        first, second = (torch.cat(p).double().cpu().numpy() for p in parts)
        if table.name == "preference":
            found[name] = quality.plain(quality.preference(first[:, 0], second[:, 0], table.pair_ids, job.seed))
        else:
            logits = np.concatenate([first, second])
            found[name] = _authenticity(logits[:, 1] - logits[:, 0], table, job.seed)
    return found


def _authenticity(generated_logit_N: np.ndarray, table: PairTable, seed: int) -> dict[str, Any]:
    """Return the scores of a detector on captured, then generated members: on all, and by bucket of length."""
    truth = np.repeat([False, True], len(table))
    ids = np.array([*table.pair_ids] * 2)

    def scores(rows: np.ndarray) -> dict[str, Any]:
        return quality.plain(quality.authenticity(generated_logit_N[rows], truth[rows], ids[rows].tolist(), seed))

    buckets = quality.length_buckets(np.tile(table.lengths.numpy(), 2))
    by_length = {label: {"clips": len(rows), **scores(rows)} for label, rows in buckets.items()}
    return {**scores(np.arange(len(truth))), "by_length": by_length}
