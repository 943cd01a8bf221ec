"""Plotly figures from rows of metrics. Plotly is optional and is only imported when a figure is drawn.

A row is {"step": n, "metric/path": value, ...} as the training loop writes it; a tuning row is one trial.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from motionrft.core.errors import ConfigError
from motionrft.report.markup import number
from motionrft.report.plotting import PALETTE, Chart, Rows, column_names, graph_objects, house_layout, plain_figure
from motionrft.report.search_charts import SEARCH_CHARTS

_BY_STEP = re.compile(r"^(?:optim/)?grad_norm(?:_by_step|/by_step|/step)?[/_]?(\d+)$")
_MAX_LINES = len(PALETTE)


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
    """Return every chart the rows allow, stage by stage; the keys of SEARCH_CHARTS and "compare" hold other rows.

    Raises:
        ConfigError: plotly is not installed.
    """
    charts: list[Chart] = []
    for stage, rows in curves.items():
        if not rows:
            continue
        if stage in SEARCH_CHARTS:
            charts.append(SEARCH_CHARTS[stage](rows))
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
    go = graph_objects()
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
    figure.update_layout(**house_layout("training batch", y_title))
    if log:
        figure.update_yaxes(type="log")
    return Chart(title, caption, plain_figure(figure))


def reward_terms(stage: str, rows: Rows, kind: str) -> Chart | None:
    """Return the reward terms over training, `kind` "raw" or "weighted" (with the total)."""
    names = {n: n.split("/")[1] for n in column_names(rows) if re.fullmatch(rf"reward/[^/]+/{kind}", n)}
    if kind == "weighted":
        names |= {n: "total" for n in column_names(rows) if n in ("reward/total", "reward/total/weighted")}
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
    found = sorted((n for n in column_names(rows) if n.startswith("loss/")), key=lambda n: (n != "loss/total", n))
    names = {n: n.removeprefix("loss/") for n in found}
    if not names:
        return None
    return line_chart(
        f"{stage}: loss", "Training loss; lower is better.", rows, names, "loss", log=_spans_decades(rows, names)
    )


def gradient_norm(stage: str, rows: Rows) -> Chart | None:
    """Return the gradient norm over training; by denoising step as a heat map where that was recorded."""
    by_step = {int(m[1]): n for n in column_names(rows) if (m := _BY_STEP.match(n))}
    if len(by_step) > 1:
        go = graph_objects()
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
        figure.update_layout(**house_layout("training batch", "denoising step (0 = noisiest)"))
        caption = "Gradient norm per denoising step. Dark bands receive no learning signal."
        return Chart(f"{stage}: gradient norm by denoising step", caption, plain_figure(figure))
    names = {n: "before clipping" for n in column_names(rows) if n == "optim/grad_norm"}
    if not names:
        return None
    caption = "Global gradient norm before clipping. Spikes and zeros both deserve a look."
    return line_chart(f"{stage}: gradient norm", caption, rows, names, "norm", log=_spans_decades(rows, names))


def memory(stage: str, rows: Rows) -> Chart | None:
    """Return memory over training."""
    names = {n: n.removeprefix("memory/") for n in column_names(rows) if n.startswith("memory/")}
    if not names:
        return None
    return line_chart(f"{stage}: memory", "Flat is good: no graph survives its step.", rows, names, "GiB")


def validation(stage: str, rows: Rows) -> Chart | None:
    """Return validation metrics between 0 and 1, and retrieval inside training batches."""
    names = {n: n for n in column_names(rows) if n.startswith(("val/", "validation/", "retrieval/", "accuracy/"))}
    names = {n: label for n, label in names.items() if all(abs(number(row[n])) <= 1.0 for row in rows if n in row)}
    if not names:
        return None
    return line_chart(f"{stage}: accuracy and retrieval", "Shares between 0 and 1.", rows, names, "share")


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
    graph = graph_objects()
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
    figure.update_layout(**house_layout("", "percent"), barmode="group")
    return Chart(title, "Bars: mean; whiskers: 95 % interval.", plain_figure(figure))


def series_lines(title: str, rows: Rows) -> Chart:
    """Return a line per "series" over the number "x", with its interval where rows have one: a band, or whiskers.

    A row is {"series", "x", "value"} and perhaps "low" and "high". The first row may say how it is drawn: "x_title",
    "y_title", "caption"; "log" for a logarithmic value axis; "markers" for few measured points, drawn with whiskers.
    """
    graph = graph_objects()
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
    figure.update_layout(**house_layout(str(look.get("x_title", "")), str(look.get("y_title", ""))))
    if look.get("log"):
        figure.update_yaxes(type="log")
    return Chart(title, str(look.get("caption", "")), plain_figure(figure))


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


def _spans_decades(rows: Rows, names: Mapping[str, str]) -> bool:
    """Return whether a logarithmic axis shows more: all values positive, largest 30 times the smallest."""
    found = [v for row in rows for n in list(names)[:_MAX_LINES] if n in row and math.isfinite(v := number(row[n]))]
    return bool(found) and min(found) > 0 and max(found) >= 30 * min(found)


def _finite(value: Any) -> float | None:
    found = number(value)
    return found if math.isfinite(found) else None
