"""Recipe: what one rollout of each fine-tuning method costs on this model: seconds, network calls, live activations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionrft.core.memory import SavedTensorMeter, memory_trace
from motionrft.core.plain import from_plain
from motionrft.core.protocols import Runtime
from motionrft.core.rng import derive_seed
from motionrft.finetune.step import rollout_step
from motionrft.training.recipes.common import close
from motionrft.training.recipes.evaluate import RewardFolders
from motionrft.training.recipes.finetune import FinetuneRecipe, assemble


@dataclass(frozen=True)
class CostJob:
    """Which method, on which model."""

    dataset: str
    generator: str
    reward: RewardFolders
    seed: int = 0
    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    """Method, weights, batch size, steps, lengths."""
    rollouts: int = 3
    """Timed rollouts, after one that is not counted."""
    steps: tuple[int, ...] = ()
    """Numbers of denoising steps at which live activations are measured as well."""


def run(runtime: Runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: return seconds, activation memory and network calls of one rollout.

    Every rank takes part; what is returned is rank 0's. Keys: "seconds_per_rollout", "seconds_per_update",
    "updates_per_rollout", "network_rows", "network_rows_with_gradient" (both guidance branches count), "saved_bytes"
    (most live bytes that autograd keeps), "saved_bytes_by_steps" {S: bytes}, "trace" [[seconds, bytes], ...],
    "batch_size", "num_steps", and on CUDA "accelerator_bytes".
    """
    job = from_plain(CostJob, config, "cost")
    folder.mkdir(parents=True, exist_ok=True)
    return _measure(runtime, job, data)


def _measure(runtime: Runtime, job: CostJob, data: Mapping[str, Any]) -> dict[str, Any]:
    recipe, seed = job.recipe, derive_seed("cost", job.seed)
    parts = assemble(runtime, recipe, job.dataset, job.generator, job.reward, seed, data)
    generator, reference, reward = parts.generator, parts.reference, parts.reward
    # The rate is next to nothing: every method is measured on the model it would start from.
    optim = replace(recipe.optim, lr=1e-12, schedule="constant", total_steps=0)
    engine = runtime.build_engine(generator.network, optim)
    calls = _Calls(engine.module)
    # Weights are there whatever the method: only what a rollout adds is measured.
    modules = (engine.module, generator.frozen, reference.network, reference.frozen, reward)
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def rollout(step: int, num_steps: int) -> float:
        started = time.perf_counter()
        rollout_step(
            engine,
            generator,
            reference,
            reward,
            parts.batches(step),
            objective=parts.objective,
            strategy=recipe.strategy,
            num_steps=num_steps,
            progress=1.0,
            step=step,
            seed=seed,
            collective=runtime,
        )
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        return time.perf_counter() - started

    rollout(0, recipe.num_steps)
    calls.reset()
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    seconds = [rollout(1 + i, recipe.num_steps) for i in range(job.rollouts)]
    counted = {name: rows / job.rollouts for name, rows in calls.rows.items()}
    saved = [_saved(weights, partial(rollout, 1 + i, recipe.num_steps)) for i in range(job.rollouts)]
    trace = memory_trace(partial(rollout, 1, recipe.num_steps), weights, points=200)
    by_steps = {str(s): _saved(weights, partial(rollout, 1, s)) for s in job.steps}
    updates = recipe.strategy.updates_per_rollout(recipe.num_steps)
    measured: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "num_steps": recipe.num_steps,
        "seconds_per_rollout": sum(seconds) / len(seconds),
        "seconds_per_update": sum(seconds) / len(seconds) / updates,
        "updates_per_rollout": updates,
        "network_rows": counted["plain"] + counted["gradient"],
        "network_rows_with_gradient": counted["gradient"],
        "saved_bytes": max(saved),
        "trace": [list(point) for point in zip(*trace, strict=True)],
        "saved_bytes_by_steps": by_steps,
    }
    if runtime.device.type == "cuda":
        measured["accelerator_bytes"] = torch.cuda.max_memory_allocated(runtime.device)
    calls.remove()
    close(engine)
    return measured


def _saved(weights: Sequence[Tensor], rollout: Callable[[], object]) -> int:
    with SavedTensorMeter(ignore=weights) as meter:
        rollout()
    return meter.peak_bytes


class _Calls:
    """Rows that go through the network, with and without gradient."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.rows = {"plain": 0, "gradient": 0}
        self._handle = module.register_forward_pre_hook(self._count)

    def _count(self, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        tensor = next(value for value in inputs if isinstance(value, Tensor))
        self.rows["gradient" if torch.is_grad_enabled() else "plain"] += len(tensor)

    def reset(self) -> None:
        """Count from zero."""
        self.rows = dict.fromkeys(self.rows, 0)

    def remove(self) -> None:
        """Stop counting."""
        self._handle.remove()
