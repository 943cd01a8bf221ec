"""Small helpers for writing HTML by hand without ever trusting a text."""

from __future__ import annotations

import html
import json
import math
from importlib.resources import files
from typing import Any

import numpy as np


def esc(value: object) -> str:
    """Return text that is safe between tags and inside quoted attributes."""
    return html.escape(str(value), quote=True)


def json_script(value: Any, element_id: str = "", css_class: str = "") -> str:
    """Return a data block that scripts read; no text in it can end the block."""
    text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    attributes = (f' id="{esc(element_id)}"' if element_id else "") + (
        f' class="{esc(css_class)}"' if css_class else ""
    )
    return f'<script type="application/json"{attributes}>{text}</script>'


def asset(name: str) -> str:
    """Return the text of a file of `report/assets`."""
    return files("motionrft.report").joinpath("assets", name).read_text(encoding="utf-8")


def number(value: Any) -> float:
    """Return a float; what is missing or no number becomes NaN."""
    if value is None or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _plain(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
