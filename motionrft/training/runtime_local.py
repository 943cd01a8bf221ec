"""One process: the runtime and executor of tests, laptops and in-process trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from motionrft.training.optim import OptimConfig
from motionrft.training.single import SingleEngine

Item = TypeVar("Item")
Out = TypeVar("Out")


class LocalRuntime:
    """`core.protocols.Runtime` of a single process: every collective is the identity.

    Args:
        device: where modules and batches live.
        precision: "fp32" or "autocast" (bf16 compute on fp32 weights).
        on_report: receives each report; a trial uses it to reach its scheduler, which may stop it by raising.
    """

    rank = 0
    world = 1

    def __init__(
        self,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        on_report: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._precision = precision
        self._on_report = on_report

    def build_engine(self, module: nn.Module, optim: OptimConfig) -> SingleEngine:
        """Return a plain torch engine around the module, moved to the device."""
        return SingleEngine(module.to(self.device), optim, self._precision)

    def mean(self, value: Tensor) -> Tensor:
        """Return the value without gradient."""
        return value.detach()

    def gather(self, value_B: Tensor) -> Tensor:
        """Return the value."""
        return value_B

    def all_true(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def barrier(self) -> None:
        """Do nothing: nobody to wait for."""

    def report(self, metrics: Mapping[str, float], checkpoint_dir: Path | None = None) -> None:
        """Pass the metrics on."""
        if self._on_report is not None:
            self._on_report(metrics)


class LocalExecutor:
    """`core.protocols.Executor` in this process, one shard after the other."""

    def map_shards(
        self, fn: Callable[[Item], Out], shards: Sequence[Item], after: Sequence[int | None] | None = None
    ) -> list[Out]:
        """Return [fn(shard) for shard in shards]; one after the other keeps every order."""
        return [fn(shard) for shard in shards]
