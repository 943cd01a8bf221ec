"""The whole way once: prepare, pre-train, reward, fine-tune, evaluate, report. One command, one Ray session.

Two groups of workers run everything that trains. Between them stand the pairs, which need generated motion. Every
choice is in the configuration before anything runs; the test split is read by the single evaluation at the end.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.pairs import build_authenticity_pairs, build_preference_pairs
from data_prep.pipeline import prepare
from motionrft.cli.console import progress_line
from motionrft.cli.launch import Launcher
from motionrft.config.load import dump, write_run_config
from motionrft.config.schema import PAPER_WEIGHTS, RunConfig
from motionrft.core.errors import DataError, explain
from motionrft.core.plain import to_plain
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.data.tables import ClipTable
from motionrft.evaluation.card import load_evaluator
from motionrft.evaluation.protocol import Row
from motionrft.evaluation.verdicts import judge
from motionrft.report.clips import ClipView
from motionrft.report.html import write_report
from motionrft.training.metrics import read_metrics
from motionrft.training.recipes.evaluate import (
    BASE,
    REAL,
    Evaluation,
    RewardFolders,
    RowSpec,
    evaluate_rows,
    load_motions,
)
from motionrft.training.recipes.evaluators import EvaluatorJob
from motionrft.training.recipes.finetune import FinetuneJob
from motionrft.training.recipes.generator import GenerateJob, PretrainJob
from motionrft.training.recipes.reward import AdapterJob, RewardJob
from motionrft.training.stages import Stage, read_json, seconds_of, write_json

_LOG = logging.getLogger(__name__)
_RECIPES = "motionrft.training.recipes"
EVALUATORS = ("A", "B")


@dataclass
class Clock:
    """Wall time per part of the run, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part and announce it."""
        began = time.monotonic()
        _LOG.info("== %s (%.0f s so far)", name, began - self.started)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


@dataclass(frozen=True)
class Plan:
    """Folders and stages of a quickstart run, all decided before anything starts."""

    config: RunConfig
    run_dir: Path
    dataset: str

    @property
    def pairs(self) -> Path:
        """Folder of the pair tables."""
        return self.run_dir / "pairs"

    def model(self, stage: str, name: str = "model") -> str:
        """Model folder of a stage."""
        return str(self.run_dir / stage / name)

    @property
    def reward(self) -> RewardFolders:
        """The trained reward's parts."""
        return RewardFolders(self.model("reward"), self.model("preference"), self.model("authenticity"))

    @property
    def evaluators(self) -> dict[str, str]:
        """Name -> model folder."""
        return {name: self.model(f"evaluator_{name}") for name in EVALUATORS}

    @property
    def seeds(self) -> range:
        """Fine-tuning seeds."""
        return range(self.config.quickstart.seeds)

    def first(self) -> list[Stage]:
        """Generator, evaluators, semantic reward, generated clips."""
        cfg, seed = self.config, self.config.seed
        pretrain = PretrainJob(self.dataset, seed, cfg.generator, cfg.pretrain)
        reward = RewardJob(self.dataset, seed, cfg.reward)
        fakes = GenerateJob(
            dataset=self.dataset,
            generator=self.model("pretrain"),
            clips=cfg.pairs.authenticity_clips,
            num_steps=cfg.evaluate.num_steps,
            seed=seed,
        )
        evaluators = [
            Stage(
                f"evaluator_{name}",
                f"{_RECIPES}.evaluators:run",
                to_plain(EvaluatorJob(self.dataset, name, seed + 101 + index, cfg.evaluator)),
            )
            for index, name in enumerate(EVALUATORS)
        ]
        return [
            *evaluators,
            Stage("pretrain", f"{_RECIPES}.generator:run_pretrain", to_plain(pretrain)),
            Stage("reward", f"{_RECIPES}.reward:run_semantic", to_plain(reward)),
            Stage("generated", f"{_RECIPES}.generator:run_generate", to_plain(fakes)),
        ]

    def second(self) -> list[Stage]:
        """Adapters, fine-tuning, controls."""
        cfg = self.config
        stages = [
            Stage(
                name,
                f"{_RECIPES}.reward:run_adapter",
                to_plain(AdapterJob(name, self.model("reward"), str(self.pairs), cfg.seed, recipe)),
            )
            for name, recipe in (("preference", cfg.preference), ("authenticity", cfg.authenticity))
        ]
        stages += [self._finetune(f"finetune_{s}", self.model("pretrain"), s) for s in self.seeds]
        if cfg.quickstart.paper_row:
            stages.append(self._finetune("finetune_paper", self.model("pretrain"), 0, PAPER_WEIGHTS))
        if self.has_long:
            stages.append(self._finetune("finetune_long", self.model("pretrain", "model_long"), 0))
        if cfg.quickstart.control:
            stages += [self._control(s) for s in self.seeds]
        return stages

    @property
    def has_long(self) -> bool:
        """Is there a base that was trained longer?"""
        return self.config.quickstart.long_base and self.config.pretrain.longer > 1.0

    def _finetune(self, name: str, base: str, seed: int, weights: Mapping[str, float] | None = None) -> Stage:
        recipe = self.config.finetune
        if weights is not None:
            recipe = replace(recipe, weights=dict(weights), similarity_target="reference")
        job = FinetuneJob(self.dataset, base, self.reward, self.config.seed + seed, recipe, self.evaluators)
        return Stage(name, f"{_RECIPES}.finetune:run", to_plain(job))

    def _control(self, seed: int) -> Stage:
        job = PretrainJob(
            self.dataset,
            self.config.seed + seed,
            self.config.generator,
            self.config.pretrain,
            continue_from=str(self.run_dir / "pretrain"),
            seconds_of=str(self.run_dir / f"finetune_{seed}"),
        )
        return Stage(f"control_{seed}", f"{_RECIPES}.generator:run_pretrain", to_plain(job))

    def rows(self) -> list[RowSpec]:
        """What the one evaluation scores."""
        cfg = self.config
        factor = f"{cfg.pretrain.longer:g}"
        rows = [
            RowSpec(REAL, "real motion"),
            RowSpec(BASE, "base", (self.model("pretrain"),)),
            RowSpec("after", "EasyTune", tuple(self.model(f"finetune_{s}") for s in self.seeds)),
        ]
        if cfg.quickstart.control:
            note = "the same seconds spent on more pre-training"
            rows.append(RowSpec("control", "control", tuple(self.model(f"control_{s}") for s in self.seeds), note))
        if cfg.quickstart.paper_row:
            note = f"reward weights {PAPER_WEIGHTS}, one fine-tuning seed"
            rows.append(RowSpec("paper", "EasyTune, paper weights", (self.model("finetune_paper"),), note, seeds=1))
        if self.has_long:
            note = f"pre-trained {factor} x as long"
            rows.append(RowSpec("long", f"base x {factor}", (self.model("pretrain", "model_long"),), note, seeds=1))
            note = f"fine-tuned from the base pre-trained {factor} x as long, one fine-tuning seed"
            rows.append(
                RowSpec("long_after", f"EasyTune from base x {factor}", (self.model("finetune_long"),), note, seeds=1)
            )
        return rows


def run(config: RunConfig, run_dir: Path, launcher: Launcher, resume: bool, command: Sequence[str]) -> dict[str, Any]:
    """Run everything in RUN_DIR and return the summary (also RUN_DIR/summary.json and report.html).

    Args:
        config: resolved; `inputs.dataset` skips the preparation.
        run_dir: new, or the folder of an interrupted run with `resume`.
        launcher: single process or Ray.
        resume: keep what is finished.
        command: what the user typed.
    """
    run_dir = run_dir.resolve()
    clock = Clock()
    write_run_config(run_dir, config, command)
    with launcher.session():
        with clock.part("prepare"):
            dataset = config.inputs.dataset or _prepare(config, run_dir / "data", launcher)
        config = fitted(config, dataset)
        write_run_config(run_dir, config, command)
        plan = Plan(config, run_dir, str(Path(dataset).resolve()))
        with clock.part("pretrain, evaluators, reward"):
            launcher.run(plan.first(), run_dir, plan.dataset, resume=resume)
        with clock.part("pairs"):
            _pairs(plan)
        with clock.part("adapters, finetune, control"):
            launcher.run(plan.second(), run_dir, plan.dataset, resume=resume)
        with clock.part("evaluate"):
            found = evaluate_rows(
                launcher.executor(),
                plan.rows(),
                plan.dataset,
                plan.evaluators,
                plan.reward,
                config.finetune.weights,
                replace(config.evaluate, seeds=config.quickstart.seeds),
                run_dir / "evaluation",
                config.finetune.term_modules,
            )
    with clock.part("report"):
        summary = _summary(plan, found, clock)
        _report(plan, found, summary)
    summary["stages"].append({"name": "report", "seconds": clock.seconds["report"]})
    summary["wall_s"] = clock.total
    write_json(run_dir / "summary.json", summary)
    return summary


def fitted(config: RunConfig, dataset: str) -> RunConfig:
    """Return the configuration with batches no larger than the training split, and say what was changed."""
    clips = ClipTable.open(Dataset.open(dataset), "train")
    usable, workers = len(clips.rows(with_captions=True)), max(config.hardware.workers.num_workers, 1)
    largest = max(usable // workers, 1) * workers
    changed = {}
    for name in ("pretrain", "evaluator", "reward"):
        part = getattr(config, name)
        if part.train.batch_size > largest:
            changed[name] = replace(part, train=replace(part.train, batch_size=largest))
    if config.finetune.batch_size > largest:
        changed["finetune"] = replace(config.finetune, batch_size=largest)
    if changed:
        _LOG.warning("%d training clips: batches of %s lowered to %d", usable, ", ".join(changed), largest)
    return replace(config, **changed)


def _prepare(config: RunConfig, out: Path, launcher: Launcher) -> str:
    """Write the dataset, or take the one that is there already."""
    settings = replace(config.prepare, out=str(out), workers=launcher.prepare_workers)
    if (out / "manifest.json").is_file():
        manifest = Dataset.open(out).manifest
        if dict(manifest.options) == json.loads(json.dumps(settings.options())):
            _LOG.info("dataset %s is there already", out)
            return str(out)
        raise DataError(
            explain("a dataset prepared with this configuration", "another one", str(out), "Choose another run folder.")
        )
    with progress_line("prepare") as tell:
        report = prepare(settings, tell)
    _LOG.info("%s", report.summary.strip())
    return str(out)


def _pairs(plan: Plan) -> None:
    """Build both pair tables once; a finished folder is kept."""
    done = plan.pairs / "stage.json"
    if done.is_file():
        return
    began = time.monotonic()
    dataset, sizes = Dataset.open(plan.dataset), plan.config.pairs
    for split in ("train", "val"):
        clips = ClipTable.open(dataset, split)
        build_preference_pairs(
            clips,
            plan.pairs,
            split,
            seed=plan.config.seed,
            per_clip=sizes.preference_per_clip,
            max_clips=sizes.preference_clips,
        )
        rows, motions, lengths = _generated(plan.run_dir / "generated", split)
        build_authenticity_pairs(
            clips, rows, motions, lengths, Representation.KINEMATIC, plan.pairs, split, seed=plan.config.seed
        )
    write_json(done, {"seconds": time.monotonic() - began})


def _generated(folder: Path, split: str) -> tuple[list[int], list[np.ndarray], list[int]]:
    """Return (row, motion, length) of generated clips in row order, whatever the number of ranks that made them."""
    found = []
    for path in sorted(folder.glob(f"{split}_*.npz")):
        with np.load(path, allow_pickle=False) as file:
            found += list(zip(file["rows"].tolist(), file["motion"], file["lengths"].tolist()))
    found.sort(key=lambda entry: entry[0])
    return [r for r, _, _ in found], [m for _, m, _ in found], [n for _, _, n in found]


# ------------------------------------------------------------------------------------------------- summary and report


def _summary(plan: Plan, found: Evaluation, clock: Clock) -> dict[str, Any]:
    main, other = (found.rows[name] for name in EVALUATORS)
    cells = {key: cells_of(row) for key, row in main.items()}
    names = [s.name for s in (*plan.first(), *plan.second())]
    grouped: dict[str, float] = {"prepare": clock.seconds["prepare"]}
    for name in names:
        group = name.rstrip("0123456789").rstrip("_")
        grouped[group] = grouped.get(group, 0.0) + seconds_of(plan.run_dir / name)
    grouped["pairs"] = clock.seconds["pairs"]
    grouped["evaluate"] = clock.seconds["evaluate"]
    waiting = sum(clock.seconds.values()) - sum(grouped.values())
    grouped["worker start and data transfer"] = max(waiting, 0.0)
    return {
        **{key: cells.get(key, {}) for key in ("before", "after", "control", "real")},
        "further_rows": {key: cell for key, cell in cells.items() if key not in ("before", "after", "control", "real")},
        "evaluator_b": {key: cells_of(row) for key, row in other.items()},
        "stages": [{"name": name, "seconds": seconds} for name, seconds in grouped.items()],
        "wall_s": clock.total,
        "fid_floor": dict(found.fid_floor),
        "verdicts": [vars(v) for v in judge(cells["before"], cells["after"])],
        "verdicts_b": [vars(v) for v in judge(cells_of(other[BASE]), cells_of(other["after"]))],
        "changes": _clean(found.changes),
    }


def cells_of(row: Row) -> dict[str, Any]:
    """Return a row as JSON: metric -> mean, ci95, n, method; null where not measured."""
    return _clean(row.to_dict()["metrics"])


def _clean(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, Mapping):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    if isinstance(value, (np.floating, np.integer)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report(plan: Plan, found: Evaluation, summary: Mapping[str, Any]) -> None:
    rows = []
    for name in EVALUATORS:
        for spec in found.specs:
            entry = {"key": spec.key if name == EVALUATORS[0] else f"{spec.key}_{name}", "label": spec.label}
            rows.append({**entry, "note": spec.note, **found.rows[name][spec.key].to_dict(), "evaluator": name})
    cards = {name: load_evaluator(Path(folder))[1] for name, folder in plan.evaluators.items()}
    page = {
        "title": "MotionRFT quickstart",
        "subtitle": subtitle(plan.config),
        "rows": rows,
        "fid_floor": dict(found.fid_floor),
        "gates": [{"name": name, **card.gates} for name, card in cards.items()],
        "timings": {stage["name"]: stage["seconds"] for stage in summary["stages"]},
        "fingerprints": {
            "dataset": Dataset.open(plan.dataset).manifest.fingerprint[:16],
            **{f"evaluator {name}": card.id for name, card in cards.items()},
        },
        "limits": [TOY],
    }
    curves = {}
    for stage in ("pretrain", "reward", "preference", "authenticity", *(f"finetune_{s}" for s in plan.seeds)):
        path = plan.run_dir / stage / "metrics.jsonl"
        if path.is_file():
            curves[stage] = read_metrics(path)
    write_report(plan.run_dir / "report.html", page, curves, clip_views(plan, found), dump(plan.config), notes(plan))


TOY = (
    "A toy of this size shows that the reward moves a generator, by how much on held-out captions, and what it costs "
    "the motion; it cannot show how large the gain is for a generator trained to convergence on a large dataset."
)


def subtitle(config: RunConfig) -> str:
    """Return one sentence that says what was compared with what."""
    return (
        f"{config.prepare.num_clips if config.prepare.source == 'synthetic' else 'Captured'} clips, "
        f"{config.pretrain.train.steps} pre-training batches, then {config.finetune.batches} batches of EasyTune, "
        f"{config.quickstart.seeds} seeds. Intervals are 95 %, over seeds."
    )


def notes(plan: Plan) -> list[str]:
    """Return remarks that a reader needs to judge this run."""
    weights = yaml.safe_dump(dict(plan.config.finetune.weights), default_flow_style=True).strip()
    lines = [
        f"Reward weights of EasyTune: {weights}. Row 'paper weights' uses {PAPER_WEIGHTS}.",
        "The length of pre-training is part of the preset, chosen on validation clips among bases that were fine-tuned "
        "there: read the gain together with the control and the longer base.",
        "Motions were chosen by class name, not by looking at them.",
    ]
    for name in ("preference", "authenticity"):
        record = read_json(plan.run_dir / name / "stage.json")
        if record:
            scores = {k: round(v, 3) for k, v in record["result"]["validation"].items() if "accuracy" in k}
            lines.append(f"Held-out accuracy of the {name} adapter: {scores}.")
    return lines


def clip_views(plan: Plan, found: Evaluation) -> list[ClipView]:
    """Return prompts of different classes with the motions before and after, and the real one."""
    folder = plan.run_dir / "evaluation" / "motions"
    sets = {key: load_motions(folder / f"{key}_0.npz") for key in (BASE, "after", REAL)}
    clips = ClipTable.open(Dataset.open(plan.dataset), plan.config.evaluate.split)
    rows = clips.rows(with_captions=True)
    titles = {BASE: "before", "after": "after", REAL: "real"}
    families: dict[str, int] = {}
    for position, row in enumerate(rows):
        families.setdefault(clips.class_names[row].split("|")[0] or str(position), position)
    chosen = sorted(families.items())
    stride = max(1, len(chosen) // max(plan.config.quickstart.report_clips, 1))
    views = []
    for _, position in chosen[::stride][: plan.config.quickstart.report_clips]:
        panels = []
        for key, title in titles.items():
            length = int(sets[key].lengths_N[position])
            panels.append((title, sets[key].joints_NTJ3[position, :length].numpy(), sets[key].fps))
        views.append(ClipView(clips.captions[rows[position]][0], panels))
    return views
