"""Plotly figures from rows of metrics. Plotly is optional and is only imported when a figure is drawn.

A row is {"step": n, "metric/path": value, ...} as the training loop writes it; a tuning row is one trial.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motionrft.core.errors import ConfigError
from motionrft.report.markup import number

Rows = Sequence[Mapping[str, Any]]

PALETTE = ("#2a78c2", "#d9732b", "#2f9e6e", "#a35bc4", "#c4475a", "#8a7a2f", "#3aa6b9", "#7d7d8a")
_BY_STEP = re.compile(r"^(?:optim/)?grad_norm(?:_by_step|/by_step|/step)?[/_]?(\d+)$")
_MAX_LINES = len(PALETTE)


@dataclass(frozen=True)
class Chart:
    """One figure with the sentence under it."""

    title: str
    caption: str
    figure: Mapping[str, Any]  # plotly JSON: data, layout


def plotly_js() -> str:
    """Return plotly's script for inlining.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError("charts need plotly: pip install 'motionrft[viz]', then write the report again") from error
    return get_plotlyjs()


def build_charts(curves: Mapping[str, Rows]) -> list[Chart]:
    """Return every chart the rows allow, stage by stage; `curves["tune"]` holds trials.

    Raises:
        ConfigError: plotly is not installed.
    """
    charts: list[Chart] = []
    for stage, rows in curves.items():
        if not rows:
            continue
        if stage == "tune":
            charts.append(parallel_coordinates(rows))
            continue
        if stage == "compare":
            titles = list(dict.fromkeys(str(row["chart"]) for row in rows))
            for title in titles:
                own = [row for row in rows if row["chart"] == title]
                charts.append((series_lines if "x" in own[0] else grouped_bars)(title, own))
            continue
        charts += [chart for make in _STAGE_CHARTS if (chart := make(stage, rows)) is not None]
    return charts


def line_chart(
    title: str, caption: str, rows: Rows, names: Mapping[str, str], y_title: str, log: bool = False
) -> Chart:
    """Return lines over training steps.

    Args:
        title: of the chart.
        caption: the sentence under it.
        rows: of one stage.
        names: metric path -> legend text.
        y_title: axis text with unit.
        log: logarithmic axis.
    """
    go = _graph_objects()
    figure = go.Figure()
    for i, (name, label) in enumerate(list(names.items())[:_MAX_LINES]):
        points = [(row.get("step", n), number(row[name])) for n, row in enumerate(rows) if name in row]
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y if math.isfinite(y) else None for _, y in points],
            mode="lines" if len(points) > 1 else "markers",
            name=label,
            line={"color": PALETTE[i % len(PALETTE)], "width": 2},
        )
    figure.update_layout(**_layout("training batch", y_title))
    if log:
        figure.update_yaxes(type="log")
    return Chart(title, caption, _plain(figure))


def reward_terms(stage: str, rows: Rows, kind: str) -> Chart | None:
    """Return the reward terms over training, `kind` "raw" or "weighted" (with the total)."""
    names = {n: n.split("/")[1] for n in _names(rows) if re.fullmatch(rf"reward/[^/]+/{kind}", n)}
    if kind == "weighted":
        names |= {n: "total" for n in _names(rows) if n in ("reward/total", "reward/total/weighted")}
    if not names:
        return None
    caption = (
        "Each term as the reward model gives it. A term that falls while the total rises is being traded away."
        if kind == "raw"
        else "Each term times its weight, and their sum: what the optimiser sees."
    )
    return line_chart(f"{stage}: reward terms, {kind}", caption, rows, names, "reward")


def losses(stage: str, rows: Rows) -> Chart | None:
    """Return loss curves."""
    found = sorted((n for n in _names(rows) if n.startswith("loss/")), key=lambda n: (n != "loss/total", n))
    names = {n: n.removeprefix("loss/") for n in found}
    if not names:
        return None
    return line_chart(
        f"{stage}: loss", "Training loss; lower is better.", rows, names, "loss", log=_spans_decades(rows, names)
    )


def gradient_norm(stage: str, rows: Rows) -> Chart | None:
    """Return the gradient norm over training; by denoising step as a heat map where that was recorded."""
    by_step = {int(m[1]): n for n in _names(rows) if (m := _BY_STEP.match(n))}
    if len(by_step) > 1:
        go = _graph_objects()
        kept = [row for row in rows if any(n in row for n in by_step.values())]
        order = sorted(by_step)
        grid = [[_finite(row.get(by_step[s])) for row in kept] for s in order]
        figure = go.Figure(
            go.Heatmap(
                x=[row.get("step", i) for i, row in enumerate(kept)],
                y=order,
                z=grid,
                colorscale="Viridis",
                colorbar={"title": {"text": "norm"}, "thickness": 12},
            )
        )
        figure.update_layout(**_layout("training batch", "denoising step (0 = noisiest)"))
        caption = "Gradient norm per denoising step. Dark bands receive no learning signal."
        return Chart(f"{stage}: gradient norm by denoising step", caption, _plain(figure))
    names = {n: "before clipping" for n in _names(rows) if n == "optim/grad_norm"}
    if not names:
        return None
    caption = "Global gradient norm before clipping. Spikes and zeros both deserve a look."
    return line_chart(f"{stage}: gradient norm", caption, rows, names, "norm", log=_spans_decades(rows, names))


def memory(stage: str, rows: Rows) -> Chart | None:
    """Return memory over training."""
    names = {n: n.removeprefix("memory/") for n in _names(rows) if n.startswith("memory/")}
    if not names:
        return None
    return line_chart(f"{stage}: memory", "Flat is good: no graph survives its step.", rows, names, "GiB")


def validation(stage: str, rows: Rows) -> Chart | None:
    """Return validation metrics between 0 and 1, and retrieval inside training batches."""
    names = {n: n for n in _names(rows) if n.startswith(("val/", "validation/", "retrieval/", "accuracy/"))}
    names = {n: label for n, label in names.items() if all(abs(number(row[n])) <= 1.0 for row in rows if n in row)}
    if not names:
        return None
    return line_chart(f"{stage}: accuracy and retrieval", "Shares between 0 and 1.", rows, names, "share")


def parallel_coordinates(trials: Rows) -> Chart:
    """Return one line per trial over its settings and its result, which is the key "objective" or the last column.

    Drawn as plain lines on axes scaled to 0..1, so that it prints and needs no graphics card.
    """
    go = _graph_objects()
    columns = [n for n in _names(trials) if n not in ("step", "trial", "trial_id")]
    columns = [c for c in columns if len({str(t.get(c)) for t in trials}) > 1 or c == "objective"]
    if "objective" in columns:
        columns = [c for c in columns if c != "objective"] + ["objective"]
    scaled, ends = zip(*(_scaled([t.get(c) for t in trials]) for c in columns)) if columns else ((), ())
    best = scaled[-1] if scaled else []
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
    layout = _layout("", "")
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
    return Chart("tune: what the search tried", caption, _plain(figure))


_STAGE_CHARTS: tuple[Callable[[str, Rows], Chart | None], ...] = (
    lambda stage, rows: reward_terms(stage, rows, "raw"),
    lambda stage, rows: reward_terms(stage, rows, "weighted"),
    losses,
    gradient_norm,
    validation,
    memory,
)


def grouped_bars(title: str, rows: Rows) -> Chart:
    """Return bars with intervals: one group per "group", one colour per "series"."""
    graph = _graph_objects()
    figure = graph.Figure()
    for i, series in enumerate(dict.fromkeys(str(row["series"]) for row in rows)):
        own = [row for row in rows if str(row["series"]) == series]
        figure.add_trace(
            graph.Bar(
                name=series,
                x=[str(row["group"]) for row in own],
                y=[number(row["value"]) for row in own],
                marker={"color": PALETTE[i % len(PALETTE)]},
                error_y=_whiskers(own),
            )
        )
    figure.update_layout(**_layout("", "percent"), barmode="group")
    return Chart(title, "Bars: mean; whiskers: 95 % interval.", _plain(figure))


def series_lines(title: str, rows: Rows) -> Chart:
    """Return a line per "series" over the number "x", with its interval where rows have one: a band, or whiskers.

    A row is {"series", "x", "value"} and perhaps "low" and "high". The first row may say how it is drawn: "x_title",
    "y_title", "caption"; "log" for a logarithmic value axis; "markers" for few measured points, drawn with whiskers.
    """
    graph = _graph_objects()
    figure = graph.Figure()
    look = rows[0]
    markers = bool(look.get("markers"))
    for i, series in enumerate(dict.fromkeys(str(row["series"]) for row in rows)):
        own = [row for row in rows if str(row["series"]) == series]
        x, color = [number(row["x"]) for row in own], PALETTE[i % len(PALETTE)]
        values, lows, highs = ([_finite(row.get(key)) for row in own] for key in ("value", "low", "high"))
        if not markers and all(v is not None for v in (*lows, *highs)):
            band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
            figure.add_scatter(x=x, y=lows, **band)
            figure.add_scatter(x=x, y=highs, fill="tonexty", fillcolor=_faint(color), **band)
        figure.add_scatter(
            x=x,
            y=values,
            mode="lines+markers" if markers else "lines",
            name=series,
            line={"color": color, "width": 2},
            error_y=_whiskers(own) if markers else None,
        )
    figure.update_layout(**_layout(str(look.get("x_title", "")), str(look.get("y_title", ""))))
    if look.get("log"):
        figure.update_yaxes(type="log")
    return Chart(title, str(look.get("caption", "")), _plain(figure))


def _whiskers(rows: Rows) -> dict[str, Any]:
    """Return error bars from "low" to "high"; none where they are missing."""
    values, lows, highs = ([number(row.get(key)) for row in rows] for key in ("value", "low", "high"))
    above, below = [h - v for h, v in zip(highs, values)], [v - low for low, v in zip(lows, values)]
    return {
        "type": "data",
        "array": [v if math.isfinite(v) else 0 for v in above],
        "arrayminus": [v if math.isfinite(v) else 0 for v in below],
    }


def _faint(color: str) -> str:
    """Return "#rrggbb" as a translucent colour."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _names(rows: Rows) -> list[str]:
    """Return all keys in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _spans_decades(rows: Rows, names: Mapping[str, str]) -> bool:
    """Return whether a logarithmic axis shows more: all values positive, largest 30 times the smallest."""
    found = [v for row in rows for n in list(names)[:_MAX_LINES] if n in row and math.isfinite(v := number(row[n]))]
    return bool(found) and min(found) > 0 and max(found) >= 30 * min(found)


def _finite(value: Any) -> float | None:
    found = number(value)
    return found if math.isfinite(found) else None


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


def _layout(x_title: str, y_title: str) -> dict[str, Any]:
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


def _graph_objects() -> Any:
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise ConfigError("charts need plotly: pip install 'motionrft[viz]', then write the report again") from error
    return graph_objects


def _plain(figure: Any) -> dict[str, Any]:
    """Return data and layout as plain JSON, without plotly's own template: the page themes it."""
    figure.update_layout(template="none")
    return json.loads(figure.to_json())
