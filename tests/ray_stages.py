"""Stages that tests send to Ray Train workers; importable by name there."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from motionrft.core.errors import NumericalError
from motionrft.training.checkpoint import Card, CheckpointStore
from motionrft.training.loop import run_loop
from motionrft.training.metrics import MetricsWriter
from motionrft.training.optim import OptimConfig

BATCH = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.body = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=draw))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def coupled(runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """A tiny contrastive run on the global batch; optionally kills a worker once, or refuses deterministically."""
    engine = runtime.build_engine(Net(), OptimConfig(lr=0.05, total_steps=2 * config["batches"], grad_clip=1.0))
    share = BATCH // runtime.world
    mine = slice(runtime.rank * share, (runtime.rank + 1) * share)

    def body(step: int) -> dict[str, float]:
        if step == config.get("kill_at", -1) and runtime.rank == 1:
            marker = folder / "killed"
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if step == config.get("refuse_at", -1):
            if runtime.rank == 0:
                with (folder / "refused").open("a") as handle:
                    handle.write("x")
            raise NumericalError("reward is not finite for items walk_07")
        total = 0.0
        for inner in range(2):  # one batch, two engine steps
            draw = torch.Generator().manual_seed(10 * step + inner)
            x, y = torch.randn(BATCH, 4, generator=draw), torch.randn(BATCH, 3, generator=draw)
            logits = runtime.gather(engine(x[mine])) @ y.T
            loss = nn.functional.cross_entropy(logits, torch.arange(BATCH))
            engine.backward(loss)
            engine.step()
            total += float(runtime.mean(loss))
        return {"loss/total": total / 2}

    store = CheckpointStore(folder / "checkpoints", Card("test/coupled", {"batches": config["batches"]}))
    with MetricsWriter(folder / "metrics.jsonl", enabled=runtime.rank == 0) as metrics:
        result = run_loop(
            body,
            total_steps=config["batches"],
            engine=engine,
            runtime=runtime,
            checkpoints=store,
            metrics=metrics,
            seed=0,
            log_every=1,
            checkpoint_every=2,
        )
    if hasattr(engine, "close"):
        engine.close()
    rows = sum(table.num_rows for table in data["clips"]) if "clips" in data else 0
    return {"loss": result.metrics["loss/total"], "steps": result.optimizer_steps, "pid": os.getpid(), "rows": rows}
