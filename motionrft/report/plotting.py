"""What every chart shares: colours, layout, and plotly, which is optional and only imported when a figure is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motionrft.core.errors import ConfigError

Rows = Sequence[Mapping[str, Any]]

PALETTE = ("#2a78c2", "#d9732b", "#2f9e6e", "#a35bc4", "#c4475a", "#8a7a2f", "#3aa6b9", "#7d7d8a")


@dataclass(frozen=True)
class Chart:
    """One figure with the sentence under it."""

    title: str
    caption: str
    figure: Mapping[str, Any]  # plotly JSON: data, layout


def column_names(rows: Rows) -> list[str]:
    """Return all keys in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def house_layout(x_title: str, y_title: str) -> dict[str, Any]:
    """Return the shared look; the page adds the colours of the reader's theme."""
    return {
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "height": 300,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "xaxis": {"title": {"text": x_title}, "zeroline": False},
        "yaxis": {"title": {"text": y_title}, "zeroline": False},
    }


def graph_objects() -> Any:
    """Return plotly's module of figures.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise ConfigError("charts need plotly: pip install 'motionrft[viz]', then write the report again") from error
    return graph_objects


def plain_figure(figure: Any) -> dict[str, Any]:
    """Return data and layout as plain JSON, without plotly's own template: the page themes it."""
    figure.update_layout(template="none")
    return json.loads(figure.to_json())
