"""What every source gives: clips in one frame and unit, or a reason why not.

Letters: T frames, J = 22 SMPL joints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

SPLITS = ("train", "val", "test")
"""Every clip belongs to exactly one."""

ROT_SOURCES = ("body_model", "bvh", "ik", "")
"""Where local rotations come from; "" = the source has none."""


@dataclass(frozen=True)
class SourceClip:
    """One clip as read: positions in metres, Y up, any place, heading, frame rate and body size.

    Sources do not check values: NaN frames, odd shapes and empty captions become reject rows in `validate`.
    """

    clip_id: str  # unique in its source, stable over runs
    split: str  # one of SPLITS
    joints_TJ3: np.ndarray  # (T, 22, 3) float32 metres, Y up, SMPL-22 order
    fps: float  # frames per second; not finite or <= 0 = unknown
    captions: tuple[str, ...]
    class_name: str  # attribute tuple such as "walk|forward|slow"; "" = unknown
    source: str  # name of the source
    rotations_TJ33: np.ndarray | None = None  # (T, 22, 3, 3) local joint rotations, root included, SMPL convention
    rot_source: str = ""  # one of ROT_SOURCES; "" iff there are no rotations
    kinematic_TD: np.ndarray | None = None  # (T, 263) released features, row-aligned with joints: kept as given


@dataclass(frozen=True)
class Rejected:
    """One clip (or caption line) that does not enter the dataset, and why."""

    clip_id: str
    split: str  # one of SPLITS, or "" where even that is unknown
    source: str
    reason_code: str  # UPPER_SNAKE, stable: counted in the quality report
    detail: str  # one sentence for a human


@runtime_checkable
class Source(Protocol):
    """A collection of clips. Picklable: parallel tasks read from it by id."""

    @property
    def name(self) -> str:
        """Short name, part of the dataset's manifest."""
        ...

    def ids(self) -> list[str]:
        """Return all clip ids, sorted. Cheap: reads no motion.

        Raises:
            DataError: the source as a whole cannot be used, e.g. a folder or split file is missing.
        """
        ...

    def read(self, clip_id: str) -> SourceClip | Rejected:
        """Return one clip, or why it cannot be read. Pure: the same bytes for the same id in any process."""
        ...

    def known_problems(self) -> list[Rejected]:
        """Return what is wrong beyond single clips, e.g. ids of a split file without data."""
        ...
