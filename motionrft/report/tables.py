"""The headline, the cards and the tables of a report, from plain rows.

A row is {"key", "label", "metrics": {metric: {"mean", "ci95", "n", "method"}}} with optional "note" and "evaluator".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from motionrft.evaluation.verdicts import Verdict
from motionrft.report.glossary import CARD_KEYS, GROUPS, METRICS, TABLE_KEYS, MetricText
from motionrft.report.markup import esc, number
from motionrft.report.picture import Mark, number_line
from motionrft.report.player import role_of

Row = Mapping[str, Any]


def find_row(rows: Sequence[Row], key: str) -> Row:
    """Return the row of that key, or an empty one."""
    return next((row for row in rows if row.get("key") == key), {})


def value(row: Row, metric: str) -> tuple[float, float]:
    """Return (mean, half width) of a cell; NaN where it was not measured."""
    cell = (row.get("metrics") or {}).get(metric) or {}
    if not isinstance(cell, Mapping):
        return number(cell), math.nan
    return number(cell.get("mean")), number(cell.get("ci95"))


def headline(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> str:
    """Return the result in one sentence, the bad news included."""
    before, after, real = (find_row(rows, key) for key in ("before", "after", "real"))
    (old, _), (new, _), (best, _) = (value(row, "r_precision_top1") for row in (before, after, real))
    if not (math.isfinite(old) and math.isfinite(new)):
        return "No before/after comparison was measured in this run."
    outcome = {v.metric: v for v in verdicts}
    numbers = f"R@1 {old:.3f} → {new:.3f}" + (f", real motion {best:.3f}" if math.isfinite(best) else "")
    found = outcome.get("r_precision_top1")
    if found is None or not found.passed:
        start = "No clear gain" if new >= old else "Worse than before"
        start += f": {numbers}"
    else:
        start = f"After fine-tuning, motions match their captions more often ({numbers})"
    failed = [v for v in verdicts if v.passed is False and v.metric != "r_precision_top1"]
    if failed:
        price = ", ".join(_phrase(v) for v in failed)
        return f"{start}, but at a price: {price}."
    clean = [_phrase(v) for v in verdicts if v.metric in ("jerk", "foot_slide") and v.passed]
    return f"{start}, without getting rougher ({', '.join(clean)})." if clean else f"{start}."


def badge(verdict: Verdict | None, words: tuple[str, str] = ("met", "missed")) -> str:
    """Return a coloured word for a verdict."""
    if verdict is None:
        return ""
    if verdict.passed is None:
        return '<span class="badge">not measured</span>'
    css, word = ("pass", f"✓ {words[0]}") if verdict.passed else ("fail", f"✗ {words[1]}")
    return f'<span class="badge {css}">{word}</span>'


def cards(rows: Sequence[Row], verdicts: Sequence[Verdict], fid_floor: float = math.nan) -> str:
    """Return the few numbers that matter most, large; FID is shown against its floor, real motion has 0 by making."""
    before, after, real = (find_row(rows, key) for key in ("before", "after", "real"))
    outcome = {v.metric: v for v in verdicts}
    parts = []
    for key in CARD_KEYS:
        metric, (old, _), (new, _) = METRICS[key], value(before, key), value(after, key)
        if not (math.isfinite(old) and math.isfinite(new)):
            continue
        best, aim = (fid_floor, "floor") if key == "fid" else (value(real, key)[0], "real motion")
        unit = f" {esc(metric.unit)}" if metric.unit else ""
        parts.append(
            f'<div class="card"><div class="name"><span>{esc(metric.label)}{unit}</span>'
            f'{badge(outcome.get(key))}</div><div class="values"><span class="old">{metric.show(old)}</span> '
            f'<span class="to">→</span> <span class="new">{metric.show(new)}</span></div>'
            f"<small>{esc(_relative(old, new))}, {esc(metric.arrow)}"
            + (f" · {aim} {metric.show(best)}" if math.isfinite(best) else "")
            + "</small></div>"
        )
    return f'<div class="cards">{"".join(parts)}</div>' if parts else ""


def comparison_table(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> str:
    """Return before and after side by side, one metric per line, with intervals, picture and verdict."""
    roles = ("real", "control", "before", "after")
    picked = {role: find_row(rows, role) for role in roles}
    outcome = {v.metric: v for v in verdicts}
    body = []
    for title, group in GROUPS:
        lines = [_comparison_line(metric, picked, outcome.get(metric.key)) for metric in group]
        lines = [line for line in lines if line]
        if lines:
            body.append(f'<tr class="group"><th colspan="6" scope="colgroup">{esc(title)}</th></tr>' + "".join(lines))
    shown = [(role, picked[role]) for role in ("before", "after", "real", "control") if picked[role]]
    key = "".join(
        f'<span class="role-{esc(role_of(role))}"><i></i>{esc(row.get("label", role))}</span>' for role, row in shown
    )
    return (
        f'<div class="key">{key}</div><div class="scroll"><table><thead><tr><th scope="col">Metric</th>'
        '<th scope="col" class="n">Before</th><th scope="col" class="n">After</th><th scope="col" class="n">Change</th>'
        '<th scope="col">On one scale</th><th scope="col">Target</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _comparison_line(metric: MetricText, picked: Mapping[str, Row], verdict: Verdict | None) -> str:
    (old, _), (new, _) = (value(picked[role], metric.key) for role in ("before", "after"))
    if not (math.isfinite(old) or math.isfinite(new)):
        return ""
    marks = [
        Mark(role_of(role), str(row.get("label", role)), *value(row, metric.key)) for role, row in picked.items() if row
    ]
    target = f'{badge(verdict)}<span class="hint">{esc(verdict.target)}</span>' if verdict else ""
    unit = f", {metric.unit}" if metric.unit else ""
    change = metric.show(new - old, signed=True)
    picture = number_line(marks, f"{metric.label}: before {metric.show(old)}, after {metric.show(new)}")
    return (
        f'<tr><td>{esc(metric.label)}<span class="hint">{esc(metric.arrow + unit)}</span></td>'
        f'<td class="n">{cell(picked["before"], metric)}</td><td class="n">{cell(picked["after"], metric)}</td>'
        f'<td class="n">{change}<span class="hint">{esc(_relative(old, new))}</span></td>'
        f"<td>{picture}</td><td>{target}</td></tr>"
    )


def rows_table(rows: Sequence[Row]) -> str:
    """Return every row against the main metrics, one block per evaluator: their numbers must not be mixed."""
    keys = [k for k in TABLE_KEYS if any(math.isfinite(value(row, k)[0]) for row in rows)]
    heads = "".join(
        f'<th scope="col" class="n" title="{esc(METRICS[k].meaning)}">{esc(METRICS[k].label)}<br>'
        f"{ {1: '↑', -1: '↓', 0: '→ real'}[METRICS[k].better] }</th>"
        for k in keys
    )
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(str(row.get("evaluator") or "A"), []).append(row)
    body = []
    for name, block in blocks.items():
        if len(blocks) > 1:
            body.append(
                f'<tr class="group"><th colspan="{len(keys) + 1}" scope="colgroup">Judged by evaluator {esc(name)}'
                "</th></tr>"
            )
        for row in block:
            role = role_of(str(row.get("key", "")))
            main = " main" if row.get("key") in ("before", "after") else ""
            note = f'<span class="hint">{esc(row["note"])}</span>' if row.get("note") else ""
            cells = "".join(f'<td class="n">{cell(row, METRICS[k])}</td>' for k in keys)
            label = esc(row.get("label", row.get("key", "")))
            body.append(f'<tr class="role-{esc(role)}{main}"><td>{label}{note}</td>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="compact"><thead><tr><th scope="col">Row</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def plain_table(table: Mapping[str, Any]) -> str:
    """Return a table given as title, columns and rows of text, with an optional note."""
    head = "".join(f"<th>{esc(c)}</th>" for c in table["columns"])
    body = "".join(
        "<tr>" + "".join(f"<{t}>{esc(v)}</{t}>" for t, v in zip(["th", *["td"] * len(row)], row)) + "</tr>"
        for row in table["rows"]
    )
    note = f"<p>{esc(table['note'])}</p>" if table.get("note") else ""
    return (
        f'<h3>{esc(table["title"])}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def cell(row: Row, metric: MetricText) -> str:
    """Return mean ± half width; a dagger marks an interval over prompts instead of seeds."""
    mean, half = value(row, metric.key)
    if not math.isfinite(mean):
        return "–"
    if not math.isfinite(half) or half == 0:
        return metric.show(mean)
    method = (row.get("metrics") or {})[metric.key].get("method")
    dagger = "†" if method == "bootstrap" else ""
    return f'{metric.show(mean)} <span class="ci">± {metric.show(half)}{dagger}</span>'


def _phrase(verdict: Verdict) -> str:
    return f"{METRICS[verdict.metric].label.lower()} {verdict.found}".replace(" -", " −")


def _relative(old: float, new: float) -> str:
    if not (math.isfinite(old) and math.isfinite(new)) or abs(old) < 1e-9:
        return ""
    share = (new - old) / abs(old)
    return f"{share:+.0%}".replace("-", "−") if abs(share) >= 0.005 else "unchanged"
