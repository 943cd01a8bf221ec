"""Gradients taken at one set of parameters, applied to another: the "chain" variant of EasyTune."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from motionrft.core.errors import ConfigError, explain
from motionrft.core.protocols import Engine


class Snapshot:
    """A copy of the engine's module as it is now. Calling it runs the copy; `hand_over` gives its gradient back.

    Collective: every rank constructs it. Costs one copy of the module.

    Raises:
        ConfigError: if the engine shards parameters, so that a gradient cannot be handed over by name.
    """

    def __init__(self, engine: Engine) -> None:
        if any(p.numel() == 0 for p in engine.module.parameters()):
            raise ConfigError(
                explain(
                    "whole parameters on every rank",
                    "sharded ones (ZeRO stage 3)",
                    "strategy EasyTune, variant chain",
                    "Use ZeRO stage 0 to 2, or variant step or accumulate.",
                )
            )
        self._engine = engine
        self.module: nn.Module = copy.deepcopy(engine.module)
        self._own = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        current = engine.trainable_tensors()
        with torch.no_grad():
            for name, p in self._own.items():
                p.copy_(current[name])
                p.grad = None

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Forward through the copy."""
        return self.module(*args, **kwargs)

    def hand_over(self, loss: Tensor) -> None:
        """Accumulate d loss / d copy on the engine, as the gradient of a function linear in its parameters."""
        gradients = torch.autograd.grad(loss, list(self._own.values()), allow_unused=True)
        live = dict(self._engine.module.named_parameters())
        terms = [(live[name] * g.to(live[name].dtype)).sum() for name, g in zip(self._own, gradients) if g is not None]
        self._engine.backward(torch.stack(terms).sum())
