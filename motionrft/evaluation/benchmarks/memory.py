"""Memory of fine-tuning against the number of denoising steps, for every strategy and for sampling without gradient.

Each measurement runs in its own process, so that peak resident memory belongs to it alone. The generator is the small
MDM with its default sizes, the reward a differentiable toy: what grows with the steps is the generator's graph.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from motionrft.core.errors import NumericalError, explain
from motionrft.core.memory import SavedTensorMeter, memory_trace, peak_rss_bytes
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.protocols import StepInfo
from motionrft.core.rng import keyed_normal
from motionrft.core.types import Condition, MotionBatch, Representation, RewardTerms
from motionrft.finetune.step import Objective, rollout_step
from motionrft.finetune.strategies import AlignProp, DRaFT, DRaFTLV, DRTune, EasyTune, ReFL
from motionrft.finetune.strategy import Strategy
from motionrft.generators.registry import GeneratorConfig, TextSide, build_generator
from motionrft.generators.sampling import generate
from motionrft.representations.normalize import Normalizer

METHODS: dict[str, Strategy | None] = {
    "easytune": EasyTune(window=10, timesteps="last"),
    "full_backprop": DRaFT(last_steps=0),
    "draft": DRaFT(),
    "draft_lv": DRaFTLV(),
    "alignprop": AlignProp(),
    "drtune": DRTune(),
    "refl": ReFL(),
    "sampling": None,
}
"""What is measured by default; None samples without gradient."""
NUM_STEPS = (10, 20, 50, 100)
_BATCH, _FRAMES, _TEXT = 2, 40, 32


@dataclass(frozen=True)
class _Case:
    """One measurement, as its process is told."""

    num_steps: int
    strategy: Strategy | None = None


def run(num_steps: Sequence[int] = NUM_STEPS, methods: Mapping[str, Strategy | None] = METHODS) -> dict[str, Any]:
    """Return peak live saved bytes and peak resident bytes of one rollout, per method and number of steps.

    Keys: `METHOD_saved_bytes` and `METHOD_peak_rss_bytes`, each {str(steps): bytes}; `growth` {METHOD: most over least
    saved bytes; 1 = the steps do not matter} and `bytes_per_step` {METHOD: slope of the line through the saved bytes};
    `parameters`, `batch` and `frames` say of what.

    Args:
        num_steps: numbers of denoising steps.
        methods: name -> strategy; None = sampling without gradient.

    Raises:
        NumericalError: a measuring process failed.
    """
    result: dict[str, Any] = {"parameters": 0, "batch": _BATCH, "frames": _FRAMES}
    growth: dict[str, float] = {}
    slopes: dict[str, float] = {}
    for method, strategy in methods.items():
        found = {steps: _in_process(method, _Case(steps, strategy)) for steps in num_steps}
        for key in ("saved_bytes", "peak_rss_bytes"):
            result[f"{method}_{key}"] = {str(steps): one[key] for steps, one in found.items()}
        result["parameters"] = found[num_steps[0]]["parameters"]
        saved = [found[steps]["saved_bytes"] for steps in num_steps]
        growth[method] = max(saved) / max(min(saved), 1) if any(saved) else 1.0
        slopes[method] = _slope(num_steps, saved)
    return {**result, "growth": growth, "bytes_per_step": slopes}


def measure(method: str | Strategy | None, num_steps: int) -> dict[str, int]:
    """Return saved_bytes, peak_rss_bytes and parameters of one rollout in this process.

    Args:
        method: a name in `METHODS`, a strategy, or None = sampling without gradient.
        num_steps: denoising steps S.
    """
    rollout, weights = _rollout(method, num_steps)
    with SavedTensorMeter(ignore=weights) as meter:
        rollout()
    return {
        "saved_bytes": meter.peak_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "parameters": sum(p.numel() for p in weights),
    }


def trace(method: str | Strategy | None, num_steps: int) -> tuple[list[float], list[int]]:
    """Return (seconds, saved bytes) over one rollout in this process; arguments as `measure`. Source: Fig. 9."""
    rollout, weights = _rollout(method, num_steps)
    return memory_trace(rollout, ignore=weights)


def _rollout(method: str | Strategy | None, num_steps: int) -> tuple[Callable[[], object], list[nn.Parameter]]:
    """Return what is measured, and the weights of the network it runs."""
    strategy = METHODS[method] if isinstance(method, str) else method
    torch.manual_seed(0)
    kind = Representation.KINEMATIC
    statistics = Normalizer(torch.zeros(kind.dim), torch.ones(kind.dim), kind)
    config = GeneratorConfig(max_frames=_FRAMES)
    generator = build_generator(config, statistics, TextSide("benchmark", _TEXT, _TEXT), fps=20.0)
    weights, batch = list(generator.network.parameters()), _toy_batch()
    if strategy is None:
        return partial(generate, generator, None, batch.prompt, batch.lengths_B, batch.keys_B, num_steps, 0), weights
    return (
        partial(
            rollout_step,
            _PlainEngine(generator.network),
            generator,
            None,
            _ToyReward(),
            batch,
            objective=Objective(),
            strategy=strategy,
            num_steps=num_steps,
            progress=1.0,
            step=0,
            seed=0,
            collective=_Alone(),
        ),
        weights,
    )


def _slope(x: Sequence[int], y: Sequence[int]) -> float:
    """Return the least-squares slope; 0 for one point."""
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((v - middle_x) ** 2 for v in x)
    return sum((v - middle_x) * (w - middle_y) for v, w in zip(x, y)) / spread if spread else 0.0


def _in_process(method: str, case: _Case) -> dict[str, int]:
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, json.dumps(to_plain(case))]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    if done.returncode != 0:
        raise NumericalError(
            explain(
                "a measurement",
                f"exit code {done.returncode}: {done.stderr.strip()[-400:]}",
                f"memory benchmark, {method} at {case.num_steps} steps",
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
    told = from_plain(_Case, json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps(measure(told.strategy, told.num_steps)) + "\n")
