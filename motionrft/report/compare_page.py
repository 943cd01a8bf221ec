"""Tables and chart rows of a comparison of fine-tuning methods, from the plain summary that `compare` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MIB = 2**20
_QUALITY = {
    "r_precision_top1": ("R@1 ↑", 3),
    "r_precision_top2": ("R@2 ↑", 3),
    "r_precision_top3": ("R@3 ↑", 3),
    "fid": ("FID ↓", 2),
    "mm_dist": ("MM-Dist ↓", 3),
    "diversity": ("Diversity →", 2),
    "jerk": ("jerk →", 0),
    "reward_semantic": ("semantic", 3),
}
_BUDGET = {"updates": "equal updates", "seconds": "equal training time"}


def compare_tables(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return quality at either budget per evaluator, cost, the race, and what the ablations changed."""
    found = []
    for name, rows in summary["evaluators"].items():
        for budget, said in _BUDGET.items():
            found.append(_quality(summary, rows, budget, f"Quality at {said}, evaluator {name}"))
    return [*found, _cost(summary), _race(summary)]


def _quality(summary: Mapping[str, Any], rows: Mapping[str, Any], budget: str, title: str) -> dict[str, Any]:
    lines = [[label, "", "", *_cells(rows[key])] for key, label in (("real", "real motion"), ("before", "base"))]
    for name, method in summary["methods"].items():
        row = rows.get(f"{name}@{budget}")
        spent = method["spent"].get(budget) or {}
        if row is None and budget == "seconds":  # the method whose seconds are the budget
            row, spent = rows.get(f"{name}@updates"), method["spent"].get("updates") or {}
        if row is not None:
            paid = [_number(spent.get("updates"), 0), _number(spent.get("seconds"), 1)]
            lines.append([method["label"], *paid, *_cells(row)])
    over = "seeds; the base's are over noise seeds" if summary["seeds"] > 1 else "prompts: one seed"
    note = (
        f"Split {summary['split']}, fine-tuning seeds: {summary['seeds']}. 95 % intervals over {over}. Same prompts, "
        "noise and pools in every row. Seconds are training seconds on this machine."
    )
    columns = ["method", "updates", "seconds", *(label for label, _ in _QUALITY.values())]
    return {"title": title, "columns": columns, "rows": lines, "note": note}


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = []
    for key, (_, digits) in _QUALITY.items():
        cell = row.get(key) or {}
        mean, half = cell.get("mean"), cell.get("ci95")
        text = _number(mean, digits)
        cells.append(text + (f" ± {half:.{digits}f}" if mean is not None and half is not None else ""))
    return cells


def _cost(summary: Mapping[str, Any]) -> dict[str, Any]:
    cost = summary["cost"]
    one = next(iter(cost.values()))
    lines = [
        [
            summary["methods"][name]["label"],
            str(c["updates_per_rollout"]),
            _number(c["seconds_per_update"], 3),
            _number(c["seconds_per_rollout"], 3),
            _number(c["network_rows"], 0),
            _number(c["network_rows_with_gradient"], 0),
            _number(c["saved_bytes"] / _MIB, 1),
            _number(c["accelerator_bytes"] / _MIB, 1) if "accelerator_bytes" in c else "-",
        ]
        for name, c in cost.items()
    ]
    return {
        "title": "What one rollout costs",
        "columns": ["method", "updates", "s / update", "s / rollout", "network rows", "with gradient",
                    "activations, MiB", "accelerator peak, MiB"],
        "rows": lines,
        "note": f"{one['batch_size']} prompts, {one['num_steps']} denoising steps, on the base."
        " Activations: most bytes that autograd keeps at one time, parameters and optimiser apart. Network rows count "
        "both guidance branches.",
    }  # fmt: skip


def _race(summary: Mapping[str, Any]) -> dict[str, Any]:
    race, labels = summary["race"], {n: m["label"] for n, m in summary["methods"].items()}
    lines = []
    for row, columns in race.items():
        cells = []
        for found in columns.values():
            text = "never" if found["seconds"] is None else f"{found['seconds']:.1f} s"
            cells.append(text + (f" ({found['speedup']:.1f}x)" if found["speedup"] is not None else ""))
        lines.append([labels[row], *cells])
    return {
        "title": "Training seconds until a row reaches the best held-out reward of a column",
        "columns": ["method", *(f"level of {labels[name]}" for name in race)],
        "rows": lines,
        "note": "Semantic reward of clean samples of held-out prompts, mean over seeds. In brackets: the column's own "
        "time to its best over the row's time to the same level.",
    }


def compare_charts(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return rows for `charts.build_charts` under the key "compare"."""
    labels = {name: method["label"] for name, method in summary["methods"].items()}
    found: list[dict[str, Any]] = []
    for axis, title in (("seconds", "training seconds"), ("updates", "optimiser steps")):
        found += _curves(summary, labels, f"Held-out reward over {title}", axis, "total", title)
    for term in ("preference", "authenticity", "semantic"):
        found += _curves(summary, labels, f"Held-out {term} over optimiser steps", "updates", term, "optimiser steps")
    for name, rows in summary["evaluators"].items():
        found += _bars(summary, rows, labels, f"R-precision top-1 at equal time, evaluator {name}")
    found += _memory(summary, labels)
    found += _by_step(summary, labels)
    diagnosis = summary.get("diagnostics") or {}
    for key, (title, caption, y_title, log) in _DIAGNOSES.items():
        look = {"x_title": "denoising step (0 = noisiest)", "y_title": y_title, "caption": caption, "log": log}
        found += [{"chart": title, **look, **row} for row in diagnosis.get(key) or []]
    return found


_DIAGNOSES = {
    "jacobian": (
        "How much a gradient is stretched on its way back",
        "Root mean square singular value of one sampler step's Jacobian, and of the product of all steps after a state "
        "(Eq. 18): 1 passes gradients unchanged, towards 0 they vanish. Bands: spread over clips.",
        "factor",
        True,
    ),
    "reward_gradient": (
        "Reward gradient at each step's network output",
        "Norm of what each step's parameters are given: the direct term of a reward read there (Eq. 22), and the final "
        "sample's reward through all later steps (Eq. 17).",
        "norm",
        True,
    ),
    "noise_similarity": (
        "Similarity of noised to clean motion",
        "Cosine between a real clip and itself with the noise of each denoising step.",
        "cosine",
        False,
    ),
    "path_similarity": (
        "Similarity of each step's clean estimate to the finished sample",
        "Along the model's own sampling path: how early a one-step estimate looks like the result.",
        "cosine",
        False,
    ),
}


def _curves(
    summary: Mapping[str, Any], labels: Mapping[str, str], title: str, axis: str, term: str, x_title: str
) -> list[dict[str, Any]]:
    look = {"chart": title, "x_title": x_title, "y_title": "reward", "caption": "Mean over seeds; bands: their range."}
    rows: list[dict[str, Any]] = []
    for name, runs in summary["curves"].items():
        for points in zip(*runs):
            if any(point.get(term) is None for point in points):
                continue
            values = [point[term] for point in points]
            x = sum(point[axis] for point in points) / len(points)
            mean = sum(values) / len(values)
            rows.append(
                {**look, "series": labels[name], "x": x, "value": mean, "low": min(values), "high": max(values)}
            )
    return rows


def _bars(
    summary: Mapping[str, Any], rows: Mapping[str, Any], labels: Mapping[str, str], title: str
) -> list[dict[str, Any]]:
    found = []
    keys = {"before": "base", **{f"{name}@seconds": label for name, label in labels.items()}}
    for key, label in keys.items():
        cell = (rows.get(key) or rows.get(key.replace("@seconds", "@updates")) or {}).get("r_precision_top1") or {}
        if cell.get("mean") is not None:
            mean, half = 100 * cell["mean"], 100 * (cell.get("ci95") or 0.0)
            span = {"value": mean, "low": mean - half, "high": mean + half}
            found.append({"chart": title, "group": label, "series": "R@1", **span})
    return found


def _memory(summary: Mapping[str, Any], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    found = []
    for name, cost in summary["cost"].items():
        for steps, size in sorted(cost["saved_bytes_by_steps"].items(), key=lambda item: int(item[0])):
            found.append({
                "chart": "Activation memory over the number of denoising steps", "series": labels[name],
                "x": int(steps), "value": size / _MIB, "x_title": "denoising steps", "y_title": "MiB", "log": True,
                "markers": True, "caption": "Most bytes kept for backward during one rollout of this model.",
            })  # fmt: skip
    for name, cost in summary["cost"].items():
        for seconds, size in cost.get("trace") or []:
            found.append({
                "chart": "Activation memory during one rollout", "series": labels[name], "x": seconds,
                "value": size / _MIB, "x_title": "seconds", "y_title": "MiB",
                "caption": "A saw keeps one step's graph at a time; a mountain keeps them all.",
            })  # fmt: skip
    return found


def _by_step(summary: Mapping[str, Any], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "chart": "Gradient norm by the step that was scored", "series": labels[name], "x": int(step), "value": norm,
            "x_title": "denoising step (0 = noisiest)", "y_title": "norm before clipping", "log": True,
            "markers": True, "caption": "Mean over training of the parameters' gradient norm.",
        }
        for name, norms in summary["gradient_norms"].items()
        for step, norm in sorted(norms.items(), key=lambda item: int(item[0]))
    ]  # fmt: skip


def printed(summary: Mapping[str, Any], evaluator: str) -> Sequence[Sequence[str]]:
    """Return the table people look for first, as rows of words for a terminal."""
    tables = [t for t in compare_tables(summary) if t["title"].endswith(f"evaluator {evaluator}")]
    lines: list[Sequence[str]] = []
    for table in tables:
        lines += [[table["title"]], table["columns"], *table["rows"], []]
    return lines


def _number(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
