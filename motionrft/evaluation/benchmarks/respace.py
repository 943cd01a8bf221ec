"""`motionrft bench respace`: whole rollouts of a 1000-step model at fewer steps."""

from __future__ import annotations

from motionrft.evaluation.benchmarks.generate import respace as run

__all__ = ["run"]
