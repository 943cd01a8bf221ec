"""One process of an engine comparison: `python -m tests.engine_worker JOBS.json`, with RANK and WORLD_SIZE set.

Trains a tiny module on fixed data and writes losses, norms and the final state for tests/invariants/test_engines.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from motionrft.training.optim import OptimConfig
from tests.processes import begin, end

GLOBAL_BATCH = 4


class TinyNet(nn.Module):
    """Odd sizes (shards need padding), a bias, a frozen part, and a parameter that some batches do not use."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.encode = nn.Linear(5, 7)
        self.project = nn.Linear(7, 3)
        self.rare = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=draw))

    def forward(self, x_BD: torch.Tensor, use_rare: bool) -> torch.Tensor:
        hidden = self.project(torch.tanh(self.encode(x_BD)))
        return self.frozen(hidden + self.rare) if use_rare else self.frozen(hidden)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return torch.randn(GLOBAL_BATCH, 5, generator=draw), torch.randn(GLOBAL_BATCH, 3, generator=draw)


def info_nce(z_BE: torch.Tensor, target_BE: torch.Tensor) -> torch.Tensor:
    """Couples every row of the global batch with every other."""
    logits = nn.functional.normalize(z_BE, dim=-1) @ nn.functional.normalize(target_BE, dim=-1).T / 0.2
    return nn.functional.cross_entropy(logits, torch.arange(len(z_BE)))


def train(engine, collective, first: int, last: int, poison_step: int = -1, micro: int = 1) -> list[list[float]]:
    """Two losses accumulated into one step per batch; returns [mean loss, norm, applied] rows."""
    rows = []
    share = GLOBAL_BATCH // collective.world
    mine = slice(collective.rank * share, (collective.rank + 1) * share)
    for step in range(first, last):
        x, y = batch(step)
        z = engine(x[mine], step % 2 == 0)
        coupled = info_nce(collective.gather(z), y)
        engine.backward(coupled)
        fitted = engine(x[mine], False)
        own = (fitted - y[mine]).square().mean()
        if step == poison_step and collective.rank == 0:
            own = own + float("inf")  # a non-finite loss with finite gradients
        if step == poison_step + 1 and poison_step >= 0 and collective.rank == 0:
            own = own + (0.0 * fitted).sum().sqrt()  # a finite loss with a NaN gradient
        engine.backward(own)
        info = engine.step()
        loss = collective.mean((coupled + own).detach())
        rows.append([float(loss), info.grad_norm if info.applied else 0.0, float(info.applied)])
    return rows


def build(kind: str, optim: OptimConfig, precision: str = "fp32"):
    if kind == "single":
        from motionrft.training.runtime_local import LocalRuntime

        runtime = LocalRuntime(precision=precision)
        return runtime.build_engine(TinyNet(), optim), runtime
    from motionrft.config.hardware import ZeroConfig
    from motionrft.runtime.collective import TorchCollective
    from motionrft.runtime.deepspeed_engine import DeepSpeedEngine

    engine = DeepSpeedEngine(TinyNet(), optim, ZeroConfig(stage=int(kind[-1]), precision=precision))
    return engine, TorchCollective()


def run(job: dict) -> None:
    optim = OptimConfig(**job["optim"])
    engine, collective = build(job["kind"], optim, job.get("precision", "fp32"))
    if job.get("load"):
        engine.import_state(load_file(job["load"]), job["first"])
    rows = train(engine, collective, job["first"], job["last"], job.get("poison_step", -1))
    state = engine.export_state()
    if collective.rank == 0:
        save_file(state, job["out"] + ".safetensors")
        Path(job["out"] + ".json").write_text(
            json.dumps({"rows": rows, "steps": engine.steps, "skipped": engine.skipped})
        )
    if hasattr(engine, "close"):
        engine.close()


if __name__ == "__main__":
    for one in begin():
        run(one)
    end()
