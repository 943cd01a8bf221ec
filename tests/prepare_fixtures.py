"""A small source of moving bodies, good and broken, and the dataset made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_prep.pipeline import PrepareReport, prepare
from data_prep.sources.base import Rejected, SourceClip
from motionrft.config.prepare import PrepareConfig
from motionrft.core.rng import numpy_rng
from motionrft.representations.kinematics import forward_kinematics
from motionrft.representations.rotations import rotvec_to_matrix
from motionrft.representations.skeleton import T2M


def moving_clip(
    clip_id: str, frames: int = 40, split: str = "train", fps: float = 20.0, scale: float = 1.0, with_rotations=True
) -> SourceClip:
    """Return a body that sways and walks off in some direction, from some place."""
    rng = numpy_rng("moving", clip_id)
    time = np.arange(frames) / fps
    phase, amplitude = rng.uniform(0, 6, (22, 3)), 0.2 * rng.standard_normal((22, 3))
    angles = amplitude * np.sin(3.0 * time[:, None, None] + phase)
    angles[:, 0] = [0.0, 1.0, 0.0] * (angles[:, 0] + rng.uniform(-2, 2))
    rotations = rotvec_to_matrix(torch.from_numpy(angles))
    speed, place = rng.uniform(-1, 1, 2), rng.uniform(-3, 3, 2)
    root = np.stack([place[0] + speed[0] * time, 0.93 + 0 * time, place[1] + speed[1] * time], axis=1)
    joints, _ = forward_kinematics(rotations, torch.from_numpy(root), scale * T2M.standard_offsets())
    side = "left" if int(rng.integers(2)) else "right"
    return SourceClip(
        clip_id=clip_id,
        split=split,
        joints_TJ3=joints.numpy().astype(np.float32),
        fps=fps,
        captions=(f"a person sways to the {side}", f"someone moves {side} slowly"),
        class_name=f"sway|{side}",
        source="moving",
        rotations_TJ33=rotations.numpy().astype(np.float32) if with_rotations else None,
        rot_source="body_model" if with_rotations else "",
    )


class MovingSource:
    """Clips c000, c001, ...; `changes` replaces fields of some of them, or the whole result."""

    name = "moving"

    def __init__(self, count: int, changes: dict[str, dict | Rejected] | None = None, **options) -> None:
        self._count, self._changes, self._options = count, changes or {}, options

    def ids(self) -> list[str]:
        return [f"c{i:03d}" for i in range(self._count)]

    def known_problems(self) -> list[Rejected]:
        return []

    def read(self, clip_id: str) -> SourceClip | Rejected:
        number = int(clip_id[1:])
        split = ("train", "train", "train", "val", "test")[number % 5]
        change = self._changes.get(clip_id, {})
        if isinstance(change, Rejected):
            return change
        if "raise" in change:
            raise RuntimeError(change["raise"])
        return replace(moving_clip(clip_id, 30 + number % 11, split, **self._options), **change)


def config(out: Path, **changes) -> PrepareConfig:
    """Return a quick configuration."""
    return PrepareConfig(**{"out": str(out), "text_encoder": "stub", "max_reject_frac": 1.0, **changes})


def make_dataset(out: Path, count: int = 20, changes: dict | None = None, **options) -> PrepareReport:
    """Prepare a small dataset in this process."""
    return prepare(config(out, **options), source=MovingSource(count, changes))


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Return relative path -> bytes of every file."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
