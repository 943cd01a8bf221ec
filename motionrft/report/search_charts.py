"""Charts of a search: what it tried, its Pareto front, and which field mattered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from motionrft.report.markup import number
from motionrft.report.plotting import PALETTE, Chart, Rows, column_names, graph_objects, house_layout, plain_figure


def parallel_coordinates(trials: Rows) -> Chart:
    """Return one line per trial over its settings and its result, which is the key "objective" or the last column.

    A result whose name ends in "↓" is better when lower.

    Drawn as plain lines on axes scaled to 0..1, so that it prints and needs no graphics card.
    """
    go = graph_objects()
    columns = [n for n in column_names(trials) if n not in ("step", "trial", "trial_id")]
    columns = [c for c in columns if len({str(t.get(c)) for t in trials}) > 1 or c == "objective"]
    if "objective" in columns:
        columns = [c for c in columns if c != "objective"] + ["objective"]
    scaled, ends = zip(*(_scaled([t.get(c) for t in trials]) for c in columns)) if columns else ((), ())
    best = scaled[-1] if scaled else []
    if columns and columns[-1].endswith("↓"):
        best = [1.0 - share for share in best]
    figure = go.Figure()
    for i, trial in enumerate(trials):
        share = best[i]
        shown = share if math.isfinite(share) else 0.0
        details = "<br>".join(f"{_short(c)}: {_value(trial.get(c))}" for c in columns)
        figure.add_scatter(
            x=list(range(len(columns))),
            y=[values[i] if math.isfinite(values[i]) else None for values in scaled],
            mode="lines+markers",
            line={"color": f"hsl({20 + 140 * shown:.0f},60%,45%)", "width": 1.5 + 1.5 * shown},
            opacity=0.45 + 0.55 * shown,
            hovertext=details,
            hoverinfo="text",
            showlegend=False,
        )
    layout = house_layout("", "")
    layout["xaxis"] |= {
        "tickvals": list(range(len(columns))),
        "ticktext": [f"{_short(c)}<br>{low} – {high}" for c, (low, high) in zip(columns, ends)],
        "showgrid": True,
        "range": [-0.3, len(columns) - 0.7],
    }
    layout["yaxis"] |= {"showticklabels": False, "range": [-0.08, 1.08]}
    figure.update_layout(**layout)
    caption = (
        "One line per trial; green reaches the best objective. Each axis runs from its lowest to its highest value."
    )
    return Chart("tune: what the search tried", caption, plain_figure(figure))


def pareto_front(trials: Rows) -> Chart:
    """Return the trials as points over the first two objectives, the front as a line.

    Args:
        trials: {"trial", "front", OBJECTIVE: value, OBJECTIVE: value, "settings": text}; the keys "trial", "front" and
            "settings" are known, the first two others are the axes.
    """
    go = graph_objects()
    x, y = [name for name in column_names(trials) if name not in ("trial", "front", "settings")][:2]
    figure = go.Figure()
    for front, label, colour in ((False, "beaten by another trial", PALETTE[7]), (True, "front", PALETTE[1])):
        own = sorted((row for row in trials if bool(row["front"]) == front), key=lambda row: number(row.get(x)))
        figure.add_scatter(
            x=[number(row.get(x)) for row in own],
            y=[number(row.get(y)) for row in own],
            mode="lines+markers" if front else "markers",
            name=label,
            line={"color": colour, "width": 2, "dash": "dot"},
            marker={"color": colour, "size": 9 if front else 6},
            hovertext=[f"{row['trial']}<br>{row.get('settings', '')}" for row in own],
            hoverinfo="x+y+text",
        )
    figure.update_layout(**house_layout(x, y))
    caption = "One point per trial. No trial beats one on the front in one objective without losing in another."
    return Chart(f"{_short(y)} against {_short(x)}", caption, plain_figure(figure))


def importance_bars(rows: Rows) -> Chart:
    """Return one bar per varied field and metric.

    Args:
        rows: {"field", "metric", "share", "clear"}, the most important field first.
    """
    go = graph_objects()
    figure = go.Figure()
    fields = list(dict.fromkeys(str(row["field"]) for row in rows))
    for i, metric in enumerate(dict.fromkeys(str(row["metric"]) for row in rows)):
        own = [row for row in rows if row["metric"] == metric]
        figure.add_bar(
            name=metric,
            orientation="h",
            y=[_short(str(row["field"])) for row in own],
            x=[number(row["share"]) for row in own],
            marker={"color": PALETTE[i % len(PALETTE)], "opacity": [1.0 if row["clear"] else 0.35 for row in own]},
        )
    layout = house_layout("share of what tells the best trials from the rest", "")
    layout["xaxis"] |= {"range": [0, 1]}
    layout["yaxis"] |= {"categoryorder": "array", "categoryarray": [_short(f) for f in reversed(fields)]}
    layout["margin"] |= {"l": 110}
    figure.update_layout(**layout, barmode="group")
    return Chart("which field mattered", "Pale bars could be chance.", plain_figure(figure))


SEARCH_CHARTS: Mapping[str, Callable[[Rows], Chart]] = {
    "tune": parallel_coordinates,
    "tune front": pareto_front,
    "tune importance": importance_bars,
}


def _scaled(values: Sequence[Any]) -> tuple[list[float], tuple[str, str]]:
    """Return values scaled to 0..1 (words by their order) and the axis ends as text."""
    numbers = [number(v) for v in values]
    finite = [v for v in numbers if math.isfinite(v)]
    if not finite:
        words = sorted({str(v) for v in values})
        return [words.index(str(v)) / max(len(words) - 1, 1) for v in values], (words[0], words[-1])
    low, high = min(finite), max(finite)
    logarithmic = low > 0 and high / low >= 20
    shape = math.log if logarithmic else float
    width = (shape(high) - shape(low)) or 1.0
    return [(shape(v) - shape(low)) / width if math.isfinite(v) else v for v in numbers], (_value(low), _value(high))


def _value(value: Any) -> str:
    found = number(value)
    return f"{found:.3g}" if math.isfinite(found) else str(value)[:24]


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[-1]
