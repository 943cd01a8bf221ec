"""A reward term whose value is fine and whose gradient is not a number: once, on the process with rank 1."""

from __future__ import annotations

import os
from typing import ClassVar

from torch import Tensor

from motionrft.reward.terms import MotionView, register_term


@register_term
class Poison:
    """Zero; the first gradient on rank 1 is that of the square root at zero."""

    name: ClassVar[str] = "poison"
    calls: ClassVar[int] = 0

    def __call__(self, motion: MotionView) -> Tensor:
        """Return (B,)."""
        Poison.calls += 1
        zero_B = 0.0 * motion.motion_BTD.sum((1, 2))
        return zero_B.sqrt() if Poison.calls == 1 and os.environ["RANK"] == "1" else zero_B
