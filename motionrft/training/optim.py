"""AdamW settings, the learning-rate curve as a pure function, and the two parameter groups.

The curve is counted in optimiser steps that were applied: a batch that leads to k steps moves it k times, a refused
step does not move it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import Parameter

from motionrft.core.errors import ConfigError

SCHEDULES = ("cosine", "constant", "onecycle")
_ONECYCLE_RISE = 0.3  # fraction of the run spent rising
_ONECYCLE_START = 1 / 25  # first and peak learning rate differ by this factor
_ONECYCLE_END = 1e-4  # last learning rate, relative to the first


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up, a schedule and gradient clipping.

    `total_steps` counts optimiser steps; 0 means "not known yet" and is only valid with the constant schedule or until
    a recipe fills it in with `dataclasses.replace`.
    """

    lr: float = 1e-4  # peak learning rate
    weight_decay: float = 0.0  # decoupled; not applied to vectors (biases, norms)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0  # linear, first step at lr / warmup_steps; ignored by onecycle, which has its own rise
    total_steps: int = 0
    schedule: str = "cosine"  # cosine | constant | onecycle
    grad_clip: float = 1.0  # global 2-norm; 0 = no clipping

    def __post_init__(self) -> None:
        problems = []
        if not self.lr > 0:
            problems.append(f"lr must be > 0, got {self.lr}")
        if self.weight_decay < 0:
            problems.append(f"weight_decay must be >= 0, got {self.weight_decay}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            problems.append(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not self.eps > 0:
            problems.append(f"eps must be > 0, got {self.eps}")
        if self.schedule not in SCHEDULES:
            problems.append(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.warmup_steps < 0 or self.total_steps < 0:
            problems.append(f"warmup_steps and total_steps must be >= 0, got {self.warmup_steps}, {self.total_steps}")
        if self.total_steps and self.warmup_steps >= self.total_steps:
            problems.append(f"warmup_steps ({self.warmup_steps}) must be below total_steps ({self.total_steps})")
        if self.grad_clip < 0:
            problems.append(f"grad_clip must be >= 0, got {self.grad_clip}")
        if problems:
            raise ConfigError("optim: " + "; ".join(problems))

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of optimiser step `step` (0 = first) as a fraction of `lr`.

        Clamped after `total_steps`: the rate stays at its end instead of rising again.

        Raises:
            ConfigError: if the schedule needs `total_steps` and it is 0.
        """
        if self.schedule == "constant":
            return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.total_steps == 0:
            raise ConfigError(
                f"optim.schedule {self.schedule!r} needs optim.total_steps > 0; set it, or use 'constant'"
            )
        if self.schedule == "onecycle":
            return self._onecycle(step)
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return 0.5 * (1.0 + math.cos(math.pi * done))

    def _onecycle(self, step: int) -> float:
        """Cosine rise from 1/25 to 1 over 30 % of the steps, then cosine fall to 1e-4 of the start."""
        last = max(self.total_steps - 1, 1)
        peak = _ONECYCLE_RISE * self.total_steps - 1
        low, end = _ONECYCLE_START, _ONECYCLE_START * _ONECYCLE_END
        position = min(step, last)
        if peak > 0 and position <= peak:
            return _cosine_between(low, 1.0, position / peak)
        return _cosine_between(1.0, end, (position - max(peak, 0.0)) / max(last - max(peak, 0.0), 1e-12))


def _cosine_between(start: float, stop: float, progress: float) -> float:
    return stop + (start - stop) * 0.5 * (1.0 + math.cos(math.pi * progress))


def trainable(module: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Yield (name, parameter) of every parameter that requires a gradient, in registration order."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def param_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return AdamW parameter groups: matrices decay, vectors (biases, norms, gains) do not.

    Raises:
        ConfigError: if nothing in the module is trainable.
    """
    # ZeRO-3 replaces shapes by (0,), so `ndim` is read through the shape DeepSpeed remembers when it is there.
    decayed: list[Parameter] = []
    plain: list[Parameter] = []
    for _, p in trainable(module):
        (decayed if len(getattr(p, "ds_shape", p.shape)) >= 2 else plain).append(p)
    if not decayed and not plain:
        raise ConfigError("the module has no trainable parameter: nothing to optimise. Check which parts are frozen")
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
