"""How long training waits for data: a small pre-training run on a fresh dataset, timed by its own metrics."""

from __future__ import annotations

import tempfile
from pathlib import Path

from data_prep.pipeline import prepare
from motionrft.config.prepare import PrepareConfig
from motionrft.core.plain import to_plain
from motionrft.generators.registry import GeneratorConfig
from motionrft.training.metrics import read_metrics
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.common import TrainConfig
from motionrft.training.recipes.generator import PretrainJob, PretrainRecipe
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.stages import Stage, run_local


def run(num_clips: int = 256, steps: int = 30) -> dict[str, float]:
    """Return wait_frac (share of step time spent on data), and the seconds behind it.

    Args:
        num_clips: size of the dataset.
        steps: training batches of 64 clips at the quickstart's model size.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        report = prepare(PrepareConfig(out=str(root / "data"), num_clips=num_clips, text_encoder="stub", max_frames=80))
        optim = OptimConfig(lr=4e-4, schedule="constant")
        job = PretrainJob(
            dataset=str(root / "data"),
            generator=GeneratorConfig(max_frames=80),
            recipe=PretrainRecipe(TrainConfig(steps=steps, batch_size=64, log_every=1, optim=optim)),
        )
        stage = Stage("pretrain", "motionrft.training.recipes.generator:run_pretrain", to_plain(job))
        run_local([stage], LocalRuntime(), root)
        rows = read_metrics(root / "pretrain" / "metrics.jsonl")[2:]  # the first batches warm caches up
    data = sum(row["time/data_s"] for row in rows)
    total = sum(row["time/batch_s"] for row in rows)
    return {
        "wait_frac": data / total,
        "data_ms_per_batch": 1e3 * data / len(rows),
        "batch_ms": 1e3 * total / len(rows),
        "clips_per_s": 64 * len(rows) / total,
        "prepare_clips_per_s": sum(report.clips.values()) / report.seconds["clips"],
    }
