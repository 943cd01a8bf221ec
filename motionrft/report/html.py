"""One HTML file that explains a run: result, motions to watch, curves, how to read it, and where it came from.

Reads plain data only and trains nothing. The page needs no network: a content policy in it forbids any request.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motionrft.core.errors import ConfigError
from motionrft.evaluation.verdicts import Verdict, judge
from motionrft.report import charts, tables
from motionrft.report.clips import ClipView
from motionrft.report.glossary import GROUPS, HOW_TO_READ, LIMITS
from motionrft.report.markup import asset, esc, json_script, number
from motionrft.report.player import player_html, skeleton_data

_LOG = logging.getLogger(__name__)

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    clips: Sequence[ClipView],
    config_text: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write the page atomically and return its path.

    Args:
        path: of the HTML file.
        summary: plain data; every key may be missing:
            "title" and "subtitle" text; "headline" replaces the automatic sentence;
            "rows" list of {"key", "label", "metrics": {metric: {"mean", "ci95", "n", "method"}}, "note", "evaluator"};
            the keys "real", "before", "after" and "control" are known, others are shown as they are;
            "fid_floor" {evaluator: value};
            "gates" list of {"name", "accepted", "not_judged", "gates": [{"name", "passed", "required", "text"}]};
            "tables" list of {"title", "columns": [...], "rows": [[...]], "note"}, shown as they are;
            "timings" {stage: seconds}; "fingerprints" {what: hash}; "limits" list of further limits.
        curves: stage -> metric rows ({"step", "loss/total", ...}); "tune" -> one row per trial; "compare" -> bars
            ({"chart", "group", "series", "value", "low", "high"}), or lines where "x" stands for "group"
            (`charts.series_lines`).
        clips: motions to play.
        config_text: the resolved configuration.
        notes: remarks on this run.
    """
    path = Path(path)
    page = render_report(summary, curves, clips, config_text, notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(page)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
    return path


def render_report(
    summary: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    clips: Sequence[ClipView],
    config_text: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Return the page as text; see `write_report`."""
    rows = [row for row in summary.get("rows") or [] if row.get("metrics")]
    before, after = (tables.find_row(rows, key).get("metrics") or {} for key in ("before", "after"))
    verdicts = judge(before, after) if before and after else []
    title = str(summary.get("title") or "Fine-tuning report")
    drawn, script = _charts(curves)
    evaluator = str(tables.find_row(rows, "after").get("evaluator") or "A")
    floor = number((summary.get("fid_floor") or {}).get(evaluator))
    sections = [
        ("result", "Result", _result(summary, rows, verdicts)),
        ("watch", "Watch", _watch(clips)),
        ("rows", "All rows", _all_rows(summary, rows)),
        ("tables", "Tables", "".join(tables.plain_table(t) for t in summary.get("tables") or [])),
        ("curves", "Curves", drawn),
        ("gates", "Evaluator", _gates(summary.get("gates") or [])),
        ("read", "How to read this", _how_to_read(summary.get("limits") or [], notes)),
        ("origin", "Time and origin", _origin(summary, config_text)),
    ]
    shown = [(name, label, body) for name, label, body in sections if body]
    nav = "".join(f'<a href="#{name}">{esc(label)}</a>' for name, label, _ in shown)
    main = "".join(f'<section aria-labelledby="{n}"><h2 id="{n}">{esc(t)}</h2>{body}</section>' for n, t, body in shown)
    sentence = str(summary.get("headline") or tables.headline(rows, verdicts))
    subtitle = f'<p class="lead">{esc(summary["subtitle"])}</p>' if summary.get("subtitle") else ""
    players = f"{skeleton_data()}<script>{asset('player.js')}</script>" if clips else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{asset('report.css')}</style></head><body><div class='wrap'>"
        f'<header class="top"><div class="kicker"><span>{esc(title)}</span>'
        '<button type="button" id="theme">Light / dark</button></div>'
        f"<h1>{esc(sentence)}</h1>{subtitle}<nav aria-label='sections'>{nav}</nav>"
        f"{tables.cards(rows, verdicts, floor)}</header><main>{main}</main>"
        "<footer>Made by MotionRFT. This page is one file and asks nothing of the network.</footer></div>"
        f"{script}<script>{asset('report.js')}</script>{players}</body></html>\n"
    )


def _result(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    measured = [v for v in verdicts if v.passed is not None]
    met = sum(bool(v.passed) for v in measured)
    lead = (
        f"{met} of {len(measured)} targets met. They were fixed beforehand: retrieval must improve beyond doubt, "
        "and the motion must not get worse to watch."
    )
    floors = {str(k): number(v) for k, v in (summary.get("fid_floor") or {}).items()}
    floor = "; ".join(f"{v:.1f} (evaluator {k})" for k, v in floors.items() if math.isfinite(v))
    note = (
        f'<p class="note">FID floor, two halves of the real motions against each other: {esc(floor)}.</p>'
        if floor
        else ""
    )
    return f'<p class="lead">{esc(lead)}</p><div class="card">{tables.comparison_table(rows, verdicts)}{note}</div>'


def _watch(clips: Sequence[ClipView]) -> str:
    if not clips:
        return ""
    key = (
        '<div class="key"><span class="left"><i></i>left limbs</span><span class="right"><i></i>right limbs</span>'
        '<span class="foot-ok"><i></i>foot stands</span>'
        '<span class="foot-bad"><i></i>foot slides while on the floor</span></div>'
    )
    players = "".join(player_html(clip, i) for i, clip in enumerate(clips))
    return (
        '<p class="lead">The same prompt and the same noise before and after fine-tuning, on one clock. Drag to turn '
        "the camera. With a panel focused: arrow keys turn, + and − zoom, comma and full stop step, space plays, "
        f'r resets.</p>{key}<div class="players">{players}</div>'
        '<noscript><p class="note">The players need JavaScript.</p></noscript>'
    )


def _all_rows(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lead = (
        "Everything that was measured on the test split. Compare rows inside one block only. † marks intervals over "
        "prompts (one seed); the others are over seeds."
    )
    return f'<p class="lead">{esc(lead)}</p><div class="card">{tables.rows_table(rows)}</div>'


def _charts(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, str]:
    """Return (section, script); a missing plotly becomes a visible note, not a missing report."""
    if not any(curves.values()):
        return "", ""
    try:
        drawn, script = charts.build_charts(curves), charts.plotly_js()
    except ConfigError as error:
        _LOG.warning("report without charts: %s", error)
        return f'<p class="note">No charts: {esc(error)}.</p>', ""
    cards = "".join(
        f'<div class="card chart{" wide" if chart.title.startswith("tune") else ""}"><h3>{esc(chart.title)}</h3>'
        f'<div class="plot" role="img" aria-label="{esc(chart.title)}. {esc(chart.caption)}"></div>'
        f"<p>{esc(chart.caption)}</p>{json_script(chart.figure)}</div>"
        for chart in drawn
    )
    return (f'<div class="charts">{cards}</div>', f"<script>{script}</script>") if drawn else ("", "")


def _gates(reports: Sequence[Mapping[str, Any]]) -> str:
    if not reports:
        return ""
    lead = (
        "Before an evaluator may judge, it must notice known damage to real motion: added shaking, shuffled frames, "
        "wrong captions. A missed required gate refuses it."
    )
    parts = []
    for report in reports:
        lines = "".join(
            f"<tr><td>{esc(str(gate['name']).replace('_', ' '))}</td><td>{_gate_badge(gate)}</td>"
            f"<td>{esc(_typeset(gate.get('text', '')))}</td></tr>"
            for gate in report.get("gates") or []
        )
        if report.get("not_judged"):
            state = f'<span class="badge">not judged: {esc(str(report["not_judged"]))}</span>'
        elif report.get("accepted"):
            state = '<span class="badge pass">✓ accepted</span>'
        else:
            state = '<span class="badge fail">✗ refused</span>'
        parts.append(
            f'<div class="card"><h3>Evaluator {esc(report.get("name", ""))} {state}</h3>'
            f'<div class="scroll"><table><tbody>{lines}</tbody></table></div></div>'
        )
    return f'<p class="lead">{esc(lead)}</p><div class="players">{"".join(parts)}</div>'


def _typeset(text: object) -> str:
    """Gate texts are plain ASCII for terminals; the page has better signs."""
    return str(text).replace("->", "→").replace(">=", "≥")


def _gate_badge(gate: Mapping[str, Any]) -> str:
    if gate.get("passed"):
        return '<span class="badge pass">✓ pass</span>'
    return (
        '<span class="badge fail">✗ fail</span>' if gate.get("required", True) else '<span class="badge">noted</span>'
    )


def _how_to_read(limits: Sequence[str], notes: Sequence[str]) -> str:
    meanings = "".join(
        f"<dt>{esc(metric.label)}</dt><dd>{esc(metric.meaning)}</dd>" for _, group in GROUPS for metric in group
    )
    remarks = f"<h3>Notes on this run</h3>{_list(notes)}" if notes else ""
    return (
        f'<div class="columns"><div class="card"><h3>Reading the numbers</h3>{_list(HOW_TO_READ)}'
        f"<h3>Limits</h3>{_list([*LIMITS, *limits])}{remarks}</div>"
        f'<div class="card"><h3>What each metric means</h3><dl>{meanings}</dl></div></div>'
    )


def _origin(summary: Mapping[str, Any], config_text: str) -> str:
    parts = []
    timings = {str(k): number(v) for k, v in (summary.get("timings") or {}).items()}
    timings = {k: v for k, v in timings.items() if math.isfinite(v) and v >= 0}
    if timings:
        longest = max(max(timings.values()), 1e-9)
        bars = "".join(
            f'<span>{esc(stage)}</span><span><span class="bar" style="display:block;width:{100 * s / longest:.1f}%">'
            f'</span></span><span class="n">{_duration(s)}</span>'
            for stage, s in timings.items()
        )
        parts.append(
            f'<div class="card"><h3>Time per stage ({_duration(sum(timings.values()))} in all)</h3>'
            f'<div class="bars">{bars}</div></div>'
        )
    prints = summary.get("fingerprints") or {}
    if prints:
        lines = "".join(f"<tr><td>{esc(k)}</td><td><code>{esc(v)}</code></td></tr>" for k, v in prints.items())
        table = f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'
        parts.append(f'<div class="card"><h3>Fingerprints</h3>{table}</div>')
    columns = f'<div class="columns">{"".join(parts)}</div>' if parts else ""
    config = (
        f'<div class="card" style="margin-top:20px"><details><summary>Configuration that reproduces this run</summary>'
        f"<pre>{esc(config_text)}</pre></details></div>"
        if config_text
        else ""
    )
    return columns + config


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{esc(item)}</li>' for item in items)}</ul>"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
