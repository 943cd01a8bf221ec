"""Exponential moving average of the trainable parameters, kept outside the engine and saved with the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from motionrft.core.errors import ConfigError
from motionrft.training.optim import trainable
from motionrft.training.state_dict import cpu_copy, require_same_tensors


class Ema:
    """avg <- d * avg + (1 - d) * param, with d = min(decay, (1 + n) / (10 + n)) over the first updates.

    The short warm-up keeps the random initialisation from dominating early averages. With `every` > 1 the average
    moves after every so many batches, by as much as that many moves: small models spend 7 % of a batch on averaging.
    """

    def __init__(self, params: Mapping[str, Tensor], decay: float = 0.999, every: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema decay must be in [0, 1), got {decay}")
        if every < 1:
            raise ConfigError(f"ema every must be at least 1 batch, got {every}")
        self.decay = decay**every
        self.every = every
        self.updates = 0
        self._average = {name: p.detach().float().clone() for name, p in params.items()}

    def due(self, done: int) -> bool:
        """Return whether the average moves after `done` batches."""
        return done % self.every == 0

    @torch.no_grad()
    def update(self, params: Mapping[str, Tensor]) -> None:
        """Move the average towards the current parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self._average.items():
            average.lerp_(params[name].detach().to(average.device, torch.float32), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Swap the average into a module whose parameters are whole (any stage but ZeRO-3); restore on exit."""
        kept = {name: p.detach().clone() for name, p in trainable(module)}
        try:
            with torch.no_grad():
                for name, p in trainable(module):
                    p.copy_(self._average[name])
            yield
        finally:
            with torch.no_grad():
                for name, p in trainable(module):
                    p.copy_(kept[name])

    def export_state(self) -> dict[str, Tensor]:
        """Return the averages on CPU and the number of updates."""
        return {**{f"avg/{n}": cpu_copy(v) for n, v in self._average.items()}, "updates": torch.tensor([self.updates])}

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore `export_state`.

        Raises:
            CheckpointError: if names or shapes differ.
        """
        expected = {f"avg/{name}": tuple(v.shape) for name, v in self._average.items()} | {"updates": (1,)}
        require_same_tensors(expected, state, "the saved parameter average")
        for name, average in self._average.items():
            average.copy_(state[f"avg/{name}"])
        self.updates = int(state["updates"][0])
