"""Memory of fine-tuning against the number of denoising steps: EasyTune against backpropagation through all of them.

Each measurement runs in its own process, so that peak resident memory belongs to it alone. The generator is the small
MDM with its default sizes, the reward a differentiable toy: what grows with the steps is the generator's graph.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from motionrft.core.errors import NumericalError, explain
from motionrft.core.memory import SavedTensorMeter, peak_rss_bytes
from motionrft.core.protocols import StepInfo
from motionrft.core.rng import keyed_normal
from motionrft.core.types import Condition, MotionBatch, Representation, RewardTerms
from motionrft.finetune.step import Objective, rollout_step
from motionrft.finetune.strategies import DRaFT, EasyTune
from motionrft.finetune.strategy import Strategy
from motionrft.generators.registry import GeneratorConfig, TextSide, build_generator
from motionrft.representations.normalize import Normalizer

METHODS: dict[str, Strategy] = {
    "easytune": EasyTune(window=10, timesteps="last"),
    "full_backprop": DRaFT(last_steps=0),
}
NUM_STEPS = (10, 20, 50, 100)
_BATCH, _FRAMES, _TEXT = 2, 40, 32


def run(num_steps: Sequence[int] = NUM_STEPS) -> dict[str, Any]:
    """Return peak live saved bytes and peak resident bytes of one rollout, per method and number of steps.

    Keys: `easytune_saved_bytes`, `full_backprop_saved_bytes`, `easytune_peak_rss_bytes`,
    `full_backprop_peak_rss_bytes`, each {str(steps): bytes}; `parameters`, `batch` and `frames` say of what.

    Raises:
        NumericalError: a measuring process failed.
    """
    result: dict[str, Any] = {"parameters": 0, "batch": _BATCH, "frames": _FRAMES}
    for method in METHODS:
        for steps in num_steps:
            found = _in_process(method, steps)
            result["parameters"] = found["parameters"]
            for key in ("saved_bytes", "peak_rss_bytes"):
                result.setdefault(f"{method}_{key}", {})[str(steps)] = found[key]
    return result


def measure(method: str, num_steps: int) -> dict[str, int]:
    """Return saved_bytes, peak_rss_bytes and parameters of one rollout in this process."""
    torch.manual_seed(0)
    kind = Representation.KINEMATIC
    statistics = Normalizer(torch.zeros(kind.dim), torch.ones(kind.dim), kind)
    config = GeneratorConfig(max_frames=_FRAMES)
    generator = build_generator(config, statistics, TextSide("benchmark", _TEXT, _TEXT), fps=20.0)
    engine = _PlainEngine(generator.network)
    with SavedTensorMeter(ignore=generator.network.parameters()) as meter:
        rollout_step(
            engine,
            generator,
            None,
            _ToyReward(),
            _toy_batch(),
            objective=Objective(),
            strategy=METHODS[method],
            num_steps=num_steps,
            progress=1.0,
            step=0,
            seed=0,
            collective=_Alone(),
        )
    return {
        "saved_bytes": meter.peak_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "parameters": sum(p.numel() for p in generator.network.parameters()),
    }


def _in_process(method: str, steps: int) -> dict[str, int]:
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, method, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    if done.returncode != 0:
        raise NumericalError(
            explain(
                "a measurement",
                f"exit code {done.returncode}: {done.stderr.strip()[-400:]}",
                f"memory benchmark, {method} at {steps} steps",
                "Free some memory, or measure fewer steps.",
            )
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _toy_batch() -> MotionBatch:
    keys_B = torch.arange(_BATCH)
    pooled_BD = nn.functional.normalize(keyed_normal(keys_B, (_TEXT,), "benchmark-text"), dim=-1)
    return MotionBatch(
        item_ids=tuple(str(i) for i in range(_BATCH)),
        motions={},
        lengths_B=torch.full((_BATCH,), _FRAMES),
        fps=20.0,
        captions=("",) * _BATCH,
        text=Condition(pooled_BD[:, None], torch.ones(_BATCH, 1, dtype=torch.bool), pooled_BD),
        class_ids_B=torch.full((_BATCH,), -1),
        keys_B=keys_B,
    )


class _ToyReward:
    """Minus the squared distance between the mean frame and the caption's vector."""

    def encode_text(self, condition: Condition) -> Tensor:
        return condition.pooled_BD

    def embed(self, motion_BTD: Tensor, lengths_B: Tensor, representation: Representation) -> Tensor:
        return motion_BTD.mean(1)[:, :_TEXT]

    def score(
        self,
        motion_BTD: Tensor,
        lengths_B: Tensor,
        representation: Representation,
        *,
        text_BE: Tensor,
        noise_level: float = 0.0,
        target_BE: Tensor | None = None,
        terms: Sequence[str],
    ) -> RewardTerms:
        distance_B = (self.embed(motion_BTD, lengths_B, representation) - text_BE).square().mean(1)
        return RewardTerms(dict.fromkeys(terms, -distance_B))


class _PlainEngine:
    """The least that takes a step; engines proper live in rooms above this one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.steps = self.skipped = 0
        self._optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> StepInfo:
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), 1.0))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return StepInfo(applied=True, grad_norm=norm, lr=1e-5)

    def trainable_tensors(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def export_state(self) -> dict[str, Tensor]:
        raise NotImplementedError("the benchmark saves nothing")

    def import_state(self, state: Any, step: int) -> None:
        raise NotImplementedError("the benchmark saves nothing")


class _Alone:
    """The collective of one process."""

    rank, world = 0, 1

    def mean(self, value: Tensor) -> Tensor:
        return value.detach()

    def gather(self, value_B: Tensor) -> Tensor:
        return value_B

    def all_true(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        pass


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], int(sys.argv[2]))) + "\n")
