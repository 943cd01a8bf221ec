"""A number line per metric as inline SVG: where before, after and real lie, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from motionrft.report.markup import esc

_WIDTH, _HEIGHT, _MARGIN = 220.0, 34.0, 12.0


@dataclass(frozen=True)
class Mark:
    """One value on the line."""

    role: str  # colour: real | before | after | other
    label: str
    mean: float
    ci95: float  # NaN: no interval


def number_line(marks: Sequence[Mark], text: str) -> str:
    """Return an SVG of the marks on a common scale; empty text where nothing was measured.

    Args:
        marks: drawn in order, the last on top.
        text: what the picture shows, for screen readers.
    """
    shown = [m for m in marks if math.isfinite(m.mean)]
    if len(shown) < 2:
        return ""
    half = [m.ci95 if math.isfinite(m.ci95) else 0.0 for m in shown]
    low = min(m.mean - h for m, h in zip(shown, half))
    high = max(m.mean + h for m, h in zip(shown, half))
    width = (high - low) or 1.0

    def x(value: float) -> float:
        return _MARGIN + (value - low) / width * (_WIDTH - 2 * _MARGIN)

    middle = _HEIGHT / 2
    parts = [f'<line class="axis" x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{middle}" y2="{middle}"/>']
    for i, (mark, h) in enumerate(zip(shown, half)):
        y = middle + (i - (len(shown) - 1) / 2) * 6.0
        title = f"<title>{esc(mark.label)}: {mark.mean:.4g}" + (f" ± {h:.2g}" if h else "") + "</title>"
        bar = f'<line x1="{x(mark.mean - h):.1f}" x2="{x(mark.mean + h):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>' if h else ""
        dot = (
            f'<path d="M{x(mark.mean):.1f} {y - 5:.1f} l5 5 l-5 5 l-5 -5 z"/>'
            if mark.role == "real"
            else f'<circle cx="{x(mark.mean):.1f}" cy="{y:.1f}" r="4.2"/>'
        )
        parts.append(f'<g class="mark role-{esc(mark.role)}">{title}{bar}{dot}</g>')
    return (
        f'<svg class="line" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{esc(text)}">'
        f"{''.join(parts)}</svg>"
    )
