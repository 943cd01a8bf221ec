"""The paper's own numbers, to stand beside measured ones. They come from other data unless you run on HumanML3D."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml


@lru_cache(maxsize=1)
def _everything() -> dict[str, Any]:
    text = files("motionrft.evaluation").joinpath("published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def published(table: str, group: str, method: str = "MotionReward") -> dict[str, Any]:
    """Return metric -> number (or [number, interval]) of a printed row; empty where the paper prints none."""
    return dict(_everything().get(table, {}).get(group, {}).get(method, {}))
