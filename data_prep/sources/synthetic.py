"""Procedural captioned human motion: a source that needs no download, with rotations that are exact.

Clip i depends on the seed and on i alone, plus the class it is given (i modulo the number of classes). Bodies, speeds,
phases and amplitudes vary within a class. Classes differ in the motion itself, also left from right, once from twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.sources.base import Rejected, SourceClip
from data_prep.sources.synthetic_actions import ACTIONS
from data_prep.sources.synthetic_body import Body, solve
from data_prep.sources.synthetic_captions import draw_captions
from data_prep.sources.synthetic_classes import FAMILIES, ActionClass, all_classes
from data_prep.sources.synthetic_curves import Array, rotation, smooth_in_time
from data_prep.sources.synthetic_jumps import JUMPS
from data_prep.sources.synthetic_locomotion import LOCOMOTION
from data_prep.sources.synthetic_styles import STYLES
from data_prep.sources.synthetic_take import FLESH_S, Take
from motionrft.core.errors import ConfigError, DataError, explain
from motionrft.core.rng import numpy_rng
from motionrft.representations.skeleton import T2M

_PERFORM = {**LOCOMOTION, **JUMPS, **ACTIONS}
_SPLIT_OF_TEN = ("train",) * 7 + ("val",) + ("test",) * 2
_PREFIX = "synthetic_"


@dataclass(frozen=True)
class SyntheticConfig:
    """What to make."""

    num_clips: int = 2000
    """Clips in all splits together: about 70 % train, 10 % val, 20 % test of every class."""
    seed: int = 0
    """Fixes every byte."""
    fps: float = 20.0
    """Frames per second."""
    min_frames: int = 40
    """Shortest clip."""
    max_frames: int = 80
    """Longest clip. Counted actions ("three times") need about 60 frames at 20 fps to look unhurried."""
    captions_per_clip: int = 4
    """Paraphrases of each clip."""
    families: tuple[str, ...] = ()
    """Action families to use; empty = all."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: a value that cannot be used.
        """
        unknown = sorted(set(self.families) - set(FAMILIES))
        checks = (
            (self.num_clips >= 1, "num_clips >= 1", f"{self.num_clips}"),
            (5.0 <= self.fps <= 120.0, "fps in 5..120", f"{self.fps}"),
            (self.min_frames >= 2 * self.fps, "min_frames of two seconds or more", f"{self.min_frames}"),
            (self.max_frames >= self.min_frames, "max_frames >= min_frames", f"{self.max_frames}"),
            (1 <= self.captions_per_clip <= 8, "captions_per_clip in 1..8", f"{self.captions_per_clip}"),
            (not unknown, f"families among {', '.join(FAMILIES)}", f"{', '.join(unknown)}"),
        )
        for fine, expected, got in checks:
            if not fine:
                raise ConfigError(explain(expected, got, "synthetic source", "Change the data configuration."))


@dataclass(frozen=True)
class SyntheticSource:
    """Clips of `config`, made when they are read. Immutable and picklable."""

    config: SyntheticConfig = SyntheticConfig()
    name: str = "synthetic"

    @cached_property
    def classes(self) -> tuple[ActionClass, ...]:
        """The classes clips are drawn from, in the order they are dealt out."""
        return all_classes(self.config.families)

    def ids(self) -> list[str]:
        """Return all clip ids, sorted."""
        return [f"{_PREFIX}{i:06d}" for i in range(self.config.num_clips)]

    def read(self, clip_id: str) -> SourceClip | Rejected:
        """Return one clip.

        Raises:
            DataError: an id that `ids` does not list.
        """
        number = clip_id.removeprefix(_PREFIX)
        if not (clip_id.startswith(_PREFIX) and number.isdecimal() and int(number) < self.config.num_clips):
            raise DataError(
                explain(
                    f"an id from {_PREFIX}000000 to {_PREFIX}{self.config.num_clips - 1:06d}",
                    repr(clip_id),
                    "synthetic source",
                    "Take ids from ids().",
                )
            )
        index, cfg = int(number), self.config
        action, split = self.classes[index % len(self.classes)], self.split_of(index)
        joints, rotations = make_motion(action, cfg, index)
        words = numpy_rng("synthetic captions", cfg.seed, index)
        return SourceClip(
            clip_id=clip_id,
            split=split,
            joints_TJ3=joints.astype(np.float32),
            fps=cfg.fps,
            captions=draw_captions(action, split != "train", cfg.captions_per_clip, words),
            class_name=action.name,
            source=self.name,
            rotations_TJ33=rotations.astype(np.float32),
            rot_source="body_model",
        )

    def split_of(self, index: int) -> str:
        """Return the split of clip `index`: of any ten clips of a class in a row, seven, one and two."""
        block, place = divmod(index // len(self.classes), len(_SPLIT_OF_TEN))
        order = numpy_rng("synthetic split", self.config.seed, self.classes[index % len(self.classes)].name, block)
        return _SPLIT_OF_TEN[order.permutation(len(_SPLIT_OF_TEN))[place]]

    def known_problems(self) -> list[Rejected]:
        """Return nothing: made clips are whole."""
        return []


def make_motion(action: ActionClass, config: SyntheticConfig, index: int) -> tuple[Array, Array]:
    """Return joints (T, 22, 3) in metres and local rotations (T, 22, 3, 3) of performance number `index` of a class.

    Starts over the origin facing +Z, floor at y = 0. The same index of a left and a right class mirror each other.
    """
    rng = numpy_rng("synthetic motion", config.seed, index)
    num_frames = int(rng.integers(_fewest_frames(action, config), config.max_frames + 1))
    take = Take(action.authored, Body.draw(rng), rng, np.arange(num_frames) / config.fps)
    pose = _PERFORM[action.family](take)
    if style := action.get("style"):
        STYLES[style](pose, take)
    sigma = FLESH_S * config.fps
    for track in ("pelvis_T2", "spine_T3", "head_T3"):
        setattr(pose, track, smooth_in_time(getattr(pose, track), sigma, 0))
    pose.arms_2T5 = smooth_in_time(pose.arms_2T5, sigma, 1)
    joints, rotations = _facing_forward(*solve(pose, take.body))
    if action.mirrored:
        signs = np.array([-1.0, 1.0, 1.0])
        swap = list(T2M.mirror_permutation)
        joints, rotations = joints[:, swap] * signs, rotations[:, swap] * (signs[:, None] * signs)
    return joints, rotations


def _fewest_frames(action: ActionClass, config: SyntheticConfig) -> int:
    """Return the least number of frames a class needs to be told apart, within the configured range."""
    seconds = {"1": 2.2, "2": 2.8, "3": 3.2}.get(action.get("count"), 2.0)
    if action.family == "turn":
        seconds = {"quarter": 2.0, "half": 2.2, "full": 3.0}[action.get("angle")]
    if action.family in ("sit", "stand", "lunge", "stretch", "bow", "raise", "wave"):
        seconds = 2.8
    return min(max(config.min_frames, int(np.ceil(seconds * config.fps))), config.max_frames)


def _facing_forward(joints: Array, rotations: Array) -> tuple[Array, Array]:
    """Return the motion turned and moved so that frame 0 faces +Z over the origin; heights stay."""
    right_hip, left_hip, right_shoulder, left_shoulder = T2M.facing_joints
    across = joints[0, left_hip] - joints[0, right_hip] + joints[0, left_shoulder] - joints[0, right_shoulder]
    turn = rotation(1, np.arctan2(across[2], across[0]))
    shift = joints[0, 0] * np.array([1.0, 0.0, 1.0])
    rotations = rotations.copy()
    rotations[:, 0] = turn @ rotations[:, 0]
    return (joints - shift) @ turn.T, rotations
