"""The readable reference engine: one process, plain torch AdamW. DeepSpeed must give the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from motionrft.core.errors import ConfigError
from motionrft.core.protocols import StepInfo
from motionrft.training.optim import OptimConfig, param_groups, trainable
from motionrft.training.precision import cast_floats
from motionrft.training.state_dict import MOMENTS, check_engine_state, cpu_copy


class SingleEngine:
    """`core.protocols.Engine` on one process.

    Trainable parameters without a gradient count as zero gradient (weight decay and moments still apply), as they do
    when gradients are averaged over ranks: otherwise layouts would differ on conditionally unused parameters.

    Attributes:
        module: the bare module.
        steps: optimiser steps applied.
        skipped: optimiser steps refused because loss or gradient was not finite.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, precision: str = "fp32") -> None:
        if precision not in ("fp32", "autocast"):
            raise ConfigError(
                f"precision {precision!r} needs ZeRO stage 1 to 3 (an fp32 master copy); "
                "one plain process supports 'fp32' and 'autocast'"
            )
        self.module = module
        self.steps = 0
        self.skipped = 0
        self._config = optim
        self._autocast = precision == "autocast"
        self._optimizer = torch.optim.AdamW(
            param_groups(module, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0
        )
        self._params = [p for _, p in trainable(module)]
        self._refused = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward through the module; floating-point outputs are fp32 whatever happened inside."""
        device_type = self._params[0].device.type
        with torch.autocast(device_type, torch.bfloat16) if self._autocast else nullcontext():
            output = self.module(*args, **kwargs)
        return cast_floats(output, torch.float32) if self._autocast else output

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar loss; a non-finite loss refuses the coming step."""
        if not torch.isfinite(loss.detach()):
            self._refused = True
            return
        loss.backward()

    def step(self) -> StepInfo:
        """Clip, check finiteness, update, schedule, zero gradients."""
        lr = self._config.lr * self._config.lr_factor(self.steps)
        for p in self._params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = float("inf") if self._refused else float(clip_gradients(self._params, self._config.grad_clip))
        applied = norm not in (float("inf"), float("-inf")) and norm == norm
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self.steps += 1
        else:
            self.skipped += 1
        self._optimizer.zero_grad(set_to_none=True)
        self._refused = False
        return StepInfo(applied=applied, grad_norm=norm if applied else float("inf"), lr=lr)

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return the current trainable parameters by name, detached views."""
        return {name: p.detach() for name, p in trainable(self.module)}

    def export_state(self) -> dict[str, Tensor]:
        """Return full fp32 `param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` on CPU."""
        state = {}
        for name, p in trainable(self.module):
            state[f"param/{name}"] = cpu_copy(p)
            moments = self._optimizer.state.get(p, {})
            for key in MOMENTS:
                state[f"{key}/{name}"] = cpu_copy(moments.get(key, torch.zeros_like(p)))
        return state

    def import_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Restore `export_state`'s tensors at optimiser step `step`.

        Raises:
            CheckpointError: if names or shapes differ from the module's trainable parameters.
        """
        check_engine_state(self.module, state, {name: tuple(p.shape) for name, p in trainable(self.module)})
        with torch.no_grad():
            for name, p in trainable(self.module):
                p.copy_(state[f"param/{name}"])
                moments = {key: state[f"{key}/{name}"].to(p.device, p.dtype, copy=True) for key in MOMENTS}
                self._optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
        self._optimizer.zero_grad(set_to_none=True)
        self.steps = step
        self._refused = False


def clip_gradients(params: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a global 2-norm of at most `max_norm` (0 = leave) and return the norm before."""
    return torch.nn.utils.clip_grad_norm_(params, max_norm if max_norm > 0 else float("inf"))
