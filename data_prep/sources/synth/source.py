"""Captioned motion made by rule: no download, planted feet, exact rotations, and every byte fixed by the seed.

It is a stand-in that exercises everything real data does; it is far simpler than people moving.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.sources.base import SourceClip
from data_prep.sources.synth.actions import Body, Variation
from data_prep.sources.synth.body import pose_body
from data_prep.sources.synth.classes import Action, actions
from motionrft.core.errors import ConfigError
from motionrft.core.rng import numpy_rng

_PATTERN = ("train",) * 7 + ("val",) + ("test",) * 2


@dataclass(frozen=True)
class SyntheticConfig:
    """Size and seed."""

    num_clips: int = 2000
    """Clips over all splits: 70 % train, 10 % val, 20 % test, each class in the same proportion."""
    seed: int = 0
    """Fixes every byte; a clip depends on it and on its own number."""
    fps: float = 20.0
    """Frames per second."""
    min_frames: int = 48
    """Shortest clip."""
    max_frames: int = 81
    """Longest clip; kinematic features have one row less."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        problems = []
        if self.num_clips < 1:
            problems.append(f"num_clips must be >= 1, got {self.num_clips}")
        if not 16 <= self.min_frames <= self.max_frames:
            problems.append(f"16 <= min_frames <= max_frames is broken: {self.min_frames}, {self.max_frames}")
        if not 10 <= self.fps <= 120:
            problems.append(f"fps must be in 10..120, got {self.fps}")
        if problems:
            raise ConfigError("synthetic: " + "; ".join(problems))


class SyntheticSource:
    """Clip number i is of class i mod the number of classes; its round i // classes decides the split.

    Args:
        config: size and seed.
    """

    name = "synthetic"

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config

    def ids(self) -> list[str]:
        """Return all clip ids, sorted."""
        return [f"{index:06d}" for index in range(self.config.num_clips)]

    def known_problems(self) -> list:
        """Return nothing: made motion has no missing files."""
        return []

    def read(self, clip_id: str) -> SourceClip:
        """Return one clip; the same bytes in any process."""
        cfg, index = self.config, int(clip_id)
        action = actions()[index % len(actions())]
        # every class walks through the pattern from another place, so that each split holds nearly every class
        place = (index // len(actions()) + 3 * (index % len(actions()))) % len(_PATTERN)
        split = _PATTERN[place]
        rng = numpy_rng("synthetic", cfg.seed, index)
        joints, rotations = make_motion(action, draw_variation(cfg, rng))
        heading = rng.uniform(0, 2 * np.pi)
        cos, sin = np.cos(heading), np.sin(heading)
        turn = np.array([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
        rotations[:, 0] = turn @ rotations[:, 0]
        return SourceClip(
            clip_id=clip_id,
            split=split,
            joints_TJ3=(joints @ turn.T).astype(np.float32),
            fps=cfg.fps,
            captions=action.captions(split != "train", rng),
            class_name=action.name,
            source=self.name,
            rotations_TJ33=rotations.astype(np.float32),
            rot_source="body_model",
        )


def draw_variation(config: SyntheticConfig, rng: np.random.Generator) -> Variation:
    """Return what makes one clip differ from another of its class."""
    return Variation(
        frames=int(rng.integers(config.min_frames, config.max_frames + 1)),
        fps=config.fps,
        scale=float(rng.uniform(0.92, 1.08)),
        tempo=float(rng.uniform(0.92, 1.08)),
        amplitude=float(rng.uniform(0.88, 1.12)),
        phase=float(rng.uniform(0, 1)),
        wobble=rng.uniform(0, 1, 6),
    )


def make_motion(action: Action, variation: Variation) -> tuple[np.ndarray, np.ndarray]:
    """Return joints (T, 22, 3) in metres and local rotations (T, 22, 3, 3)."""
    body = Body(variation)
    action.move(body)
    return pose_body(body.pose(), variation.scale)
