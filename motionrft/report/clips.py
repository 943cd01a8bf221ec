"""Motions to be watched in a page: one prompt, several panels, joints packed as millimetres in 16 bits.

Letters: T frames, J joints.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from motionrft.core.errors import DataError, explain
from motionrft.representations.skeleton import T2M

_LIMIT_MM = 32767


@dataclass(frozen=True)
class Panel:
    """One motion of a clip view."""

    title: str
    joints_TJ3: np.ndarray  # (T, 22, 3) metres, Y up
    fps: float


class ClipView:
    """A prompt and the motions made for it, shown side by side on one clock.

    Args:
        prompt: the caption.
        panels: (title, joints (T, 22, 3) in metres, fps) each; titles such as "before", "after", "real".

    Raises:
        DataError: no panel, or joints that cannot be drawn.
    """

    def __init__(self, prompt: str, panels: Sequence[tuple[str, ArrayLike, float]]) -> None:
        self.prompt = prompt
        self.panels = tuple(Panel(title, np.asarray(joints, dtype=np.float64), fps) for title, joints, fps in panels)
        if not self.panels:
            raise DataError(f"the clip {prompt!r} has no motion to show")
        for panel in self.panels:
            shape = panel.joints_TJ3.shape
            drawable = len(shape) == 3 and shape[0] > 0 and shape[1:] == (T2M.num_joints, 3) and panel.fps > 0
            if not drawable or not np.isfinite(panel.joints_TJ3).all():
                raise DataError(
                    explain(
                        f"finite joints (T, {T2M.num_joints}, 3) in metres and a positive frame rate",
                        f"shape {shape}, {panel.fps} fps",
                        f"panel {panel.title!r} of clip {prompt!r}",
                        "Convert the motion with representations.convert.to_joints and cut it to its length.",
                    )
                )


def pack_joints(joints_TJ3: ArrayLike) -> str:
    """Return base64 of little-endian int16 millimetres, frame-major; beyond 32.7 m values stick to the limit."""
    millimetres = np.rint(np.asarray(joints_TJ3, dtype=np.float64) * 1000.0)
    return base64.b64encode(np.clip(millimetres, -_LIMIT_MM, _LIMIT_MM).astype("<i2").tobytes()).decode("ascii")


def unpack_joints(text: str, num_joints: int = T2M.num_joints) -> np.ndarray:
    """Return joints (T, J, 3) float64 in metres of `pack_joints`' text."""
    return np.frombuffer(base64.b64decode(text), dtype="<i2").reshape(-1, num_joints, 3) / 1000.0
