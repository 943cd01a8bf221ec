"""`motionrft reward score | evaluate | ablate`: what a trained reward says, how good it is, and what made it so."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motionrft.cli.common import command_line, required, start
from motionrft.cli.main import add_run_arguments
from motionrft.config.load import write_run_config
from motionrft.config.schema import RunConfig
from motionrft.core.errors import ConfigError
from motionrft.core.plain import to_plain
from motionrft.evaluation.published import published
from motionrft.report.html import write_report
from motionrft.training.metrics import read_metrics
from motionrft.training.recipes import ablate
from motionrft.training.recipes.evaluate import RewardFolders
from motionrft.training.recipes.reward import RewardJob
from motionrft.training.recipes.reward_quality import QualityJob
from motionrft.training.recipes.score_motions import ScoreRequest, score_motions
from motionrft.training.stages import Stage, write_json

_QUALITY = "motionrft.training.recipes.reward_quality:run"
_RECALLS = ("R@1", "R@2", "R@3", "R@5", "R@10")


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    name = verb.split()[-1]
    if name == "score":
        text = "npz with motion (N, T, D) and lengths (N,), or a folder of such; may be repeated"
        parser.add_argument("--motions", type=Path, required=True, action="append", help=text)
        parser.add_argument("--captions", type=Path, help="text file, one caption per motion in order")
        parser.add_argument("--references", type=Path, help="npz of as many motions: the target of `similarity`")
        parser.add_argument("--representation", choices=("kinematic", "joint", "rotation"),
                            help="of the motions, where the file does not say")  # fmt: skip
        parser.add_argument("--terms", help="comma-separated; default: all the reward has")
        parser.add_argument("--text-encoder", default="minilm", help="minilm, or a sentence-transformer folder")
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    if name == "evaluate":
        parser.add_argument("--split", choices=("val", "test"), default="val", help="which clips (default val)")
        parser.add_argument("--noise-levels", default="0", help="comma-separated noise in [0, 1) for retrieval")
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    if name == "ablate":
        parser.add_argument(
            "--question", choices=ablate.QUESTIONS, required=True, help="what differs between the sides"
        )
        parser.add_argument("--seeds", type=int, default=3, help="trainings per side")
        parser.add_argument("--split", choices=("val", "test"), default="val", help="where it is measured")
    add_run_arguments(parser, f"runs/reward_{name}")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    name = options.verb.split()[-1]
    return {"score": _score, "evaluate": _evaluate, "ablate": _ablate}[name](options)


def _folders(config: RunConfig) -> RewardFolders:
    required(config.inputs.reward.backbone, "inputs.reward.backbone", "`motionrft reward`")
    return RewardFolders(**{k: str(Path(v).resolve()) if v else "" for k, v in vars(config.inputs.reward).items()})


def _score(options: argparse.Namespace) -> int:
    config, launcher = start(options)
    request = ScoreRequest(
        tuple(options.motions),
        options.captions,
        options.references,
        options.representation,
        tuple(t.strip() for t in options.terms.split(",")) if options.terms else (),
        options.text_encoder,
        {k: w for k, w in config.finetune.weights.items() if w},
        config.finetune.term_modules,
    )
    write_run_config(options.run_dir, config, command_line())
    with launcher.session():
        found = score_motions(launcher.executor(), _folders(config), request, options.run_dir / "scores.parquet")
    write_json(options.run_dir / "summary.json", found)
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{found['motions']} motions scored")
    for term, value in found["mean"].items():
        print(f"  {term:20}{value:10.4f}  (10 %: {found['p10'][term]:.4f}, 90 %: {found['p90'][term]:.4f})")
    print(f"per motion: {found['table']}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    config, launcher = start(options)
    dataset = required(config.inputs.dataset, "inputs.dataset", "`motionrft prepare`")
    try:
        levels = tuple(float(level) for level in options.noise_levels.split(","))
    except ValueError:
        raise ConfigError(f"--noise-levels takes numbers such as 0,0.3,0.6, got {options.noise_levels!r}") from None
    pairs = str(Path(config.inputs.pairs).resolve()) if config.inputs.pairs else ""
    job = QualityJob(dataset, _folders(config), options.split, pairs, config.reward.max_frames, levels, config.seed)
    write_run_config(options.run_dir, config, command_line())
    found = launcher.run([Stage(".", _QUALITY, to_plain(job))], options.run_dir, resume=options.resume)["."]
    write_json(options.run_dir / "summary.json", found)
    if options.json:
        print(json.dumps(found))
        return 0
    shown = quality_tables(found)
    for table in shown:
        print("\n" + table["title"])
        width = [max(len(str(r[i])) for r in [table["columns"], *table["rows"]]) for i in range(len(table["columns"]))]
        for row in [table["columns"], *table["rows"]]:
            print("  " + "  ".join(str(v).ljust(w) for v, w in zip(row, width, strict=True)))
        print("  " + table["note"])
    headline = f"Reward on {found['clips']} {found['split']} clips"
    page = {"title": "Reward quality", "headline": headline, "tables": shown}
    print(f"report: {write_report(options.run_dir / 'report.html', page, {}, [])}")
    return 0


def quality_tables(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of a measured reward, the paper's row beside ours."""
    made = []
    for direction, arrow in (("t2m", "text to motion"), ("m2t", "motion to text")):
        rows = []
        for name, protocols in found["retrieval"].items():
            for protocol, measured in protocols.items():
                cells = [_cell(measured[f"{direction}_{r}"]) for r in _RECALLS]
                rows.append([name, protocol, *cells, f"{measured['avg']['value']:.1f}"])
            printed = published("I", name)
            if printed:
                rows.append(
                    [name, "paper, HumanML3D", *(printed[f"{direction}_{r}"] for r in _RECALLS), printed["avg"]]
                )
        made.append({
            "title": f"Retrieval, {arrow} (percent)", "columns": ["representation", "protocol", *_RECALLS, "Avg"],
            "rows": rows,
            "note": "95 % intervals over recordings. pools32: 32 distinct classes a pool where clips have them, else "
            "seeded groups of 32. all: every clip competes. The paper's rows are from other data: no comparison unless "
            "you run on HumanML3D. Avg: both directions.",
        })  # fmt: skip
    for kind, table, names in (
        ("preference", "II", ("accuracy", "precision", "recall", "f1")),
        ("authenticity", "Fig8", ("accuracy", "precision", "recall", "specificity", "f1", "auc")),
    ):
        if kind not in found:
            continue
        rows = []
        for name, measured in found[kind].items():
            if name == "pairs":
                continue
            rows.append([name, "measured", *(_cell(measured[m]) for m in names)])
            printed = {k.lower(): v for k, v in published(table, name).items()}
            if printed:
                rows.append([name, "paper", *(printed.get(m, printed.get(m[:3], "-")) for m in names)])
        what = "pairs of corrupted motion" if kind == "preference" else "pairs of captured and generated motion"
        note = f"{found[kind]['pairs']} held-out {what}; the paper's are others."
        columns = ["representation", "source", *names]
        made.append({"title": f"{kind.capitalize()} (percent)", "columns": columns, "rows": rows, "note": note})
        if kind == "authenticity":
            made.append(_by_length(found[kind], names))
    return made


def _by_length(authenticity: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    rows = [
        [name, label, measured["clips"], *(_cell(measured[m]) for m in names)]
        for name, found in authenticity.items()
        if name != "pairs"
        for label, measured in found["by_length"].items()
    ]
    return {
        "title": "Authenticity by length (percent)", "columns": ["representation", "frames", "clips", *names],
        "rows": rows,
        "note": "Thirds of the clips by length, equal lengths together. A detector that only reads length has an AUC "
        "of 50 wherever both kinds have the same lengths; its specificity and recall change places between thirds.",
    }  # fmt: skip


def _cell(found: Mapping[str, float]) -> str:
    if math.isnan(found["value"]):
        return "-"
    return f"{found['value']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"


def _ablate(options: argparse.Namespace) -> int:
    if options.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {options.seeds}")
    config, launcher = start(options)
    dataset = required(config.inputs.dataset, "inputs.dataset", "`motionrft prepare`")
    backbone = config.inputs.reward.backbone
    backbone = required(backbone, "inputs.reward.backbone", "`motionrft reward`") if backbone else ""
    compared = ablate.sides(options.question, RewardJob(dataset, config.seed, config.reward), config.refine, backbone)
    write_run_config(options.run_dir, config, command_line())
    stages = ablate.stages(options.question, compared, options.seeds, options.run_dir, options.split)
    results = launcher.run(stages, options.run_dir, dataset, resume=options.resume)
    found = ablate.compare(compared, options.seeds, results)
    summary = {"question": options.question, "split": options.split, "seeds": options.seeds, "compared": found}
    write_json(options.run_dir / "summary.json", summary)
    rows, bars = [], []
    for representation, by_side in found.items():
        for side, cells in by_side.items():
            difference = cells.get("difference", {})
            shown = [f"{cells['metrics'][f't2m_{r}']['mean']:.1f}" for r in _RECALLS]
            gap = difference.get("avg")
            rows.append([representation, side, *shown, _signed(cells["metrics"]["avg"], ""), _signed(gap, "+")])
            for recall in ("R@3", "R@5", "R@10"):
                value = cells["metrics"][f"t2m_{recall}"]
                half = value["ci95"] if math.isfinite(value["ci95"]) else 0.0
                ends = {"low": value["mean"] - half, "high": value["mean"] + half}
                bars.append({"chart": f"Text to motion, {representation}", "group": recall, "series": side,
                             "value": value["mean"], **ends})  # fmt: skip
    columns = ["representation", "side", *(f"t2m {r}" for r in _RECALLS), "Avg", "Avg, difference"]
    note = (
        f"{options.split} split, mean over {options.seeds} seeds with Student 95 % intervals; the difference is paired "
        "by seed: against the first side, or what sharing gains over a representation alone."
    )
    table = {"title": f"What differs: {options.question}", "columns": columns, "rows": rows, "note": note}
    width = [max(len(str(r[i])) for r in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(str(v).ljust(w) for v, w in zip(row, width, strict=True)))
    curves: dict[str, Any] = {"compare": bars}
    for one in compared:
        name = ablate.place_of(one.name, 0)
        curves[name] = read_metrics(options.run_dir / name / "metrics.jsonl")
    page = {"title": "Reward ablation", "headline": f"Reward ablation: {options.question}", "tables": [table]}
    print(f"report: {write_report(options.run_dir / 'report.html', page, curves, [])}")
    return 0


def _signed(cell: Mapping[str, float] | None, sign: str) -> str:
    if cell is None:
        return ""
    half = "" if math.isnan(cell["ci95"]) else f" ± {cell['ci95']:.1f}"
    return f"{cell['mean']:{sign}.1f}{half}"
