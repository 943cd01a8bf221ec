"""`core.protocols.Collective` over torch.distributed: averages, flags, and a gather with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """Concatenate equal shares along dim 0; the backward sums what every rank's loss wants of our rows.

    With gradients averaged over ranks afterwards, the result is the gradient of the average of the ranks' losses,
    whether each rank computes the whole coupled loss or only its own anchors.
    """

    @staticmethod
    def forward(ctx: Any, value_B: Tensor) -> Tensor:
        ctx.rows = value_B.shape[0]
        parts = [torch.empty_like(value_B) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value_B.contiguous())
        return torch.cat(parts, dim=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


class TorchCollective:
    """The default process group. Every method is a collective: all ranks call it, in the same order.

    Args:
        device: where small tensors for flags live (the GPU under nccl, else CPU).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def mean(self, value: Tensor) -> Tensor:
        """Return the average over ranks, without gradient."""
        total = value.detach().clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        return total / self.world

    def gather(self, value_B: Tensor) -> Tensor:
        """Return (world * B, ...): all ranks' rows in rank order, with gradient to the local ones.

        Every rank gives the same number of rows, and every rank's loss must depend on the result: its backward is a
        collective too.

        Raises:
            ValueError: if the ranks' row counts differ (on every rank, so that none waits).
        """
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([value_B.shape[0]], device=self.device))
        rows = [int(count[0]) for count in counts]
        if len(set(rows)) > 1:
            raise ValueError(f"gather needs the same number of rows on every rank, got {rows}; drop the last batch")
        return _GatherRows.apply(value_B)  # type: ignore[no-any-return]

    def all_true(self, flag: bool) -> bool:
        """Return True iff every rank says True."""
        lowest = torch.tensor([1 if flag else 0], dtype=torch.int32, device=self.device)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        return bool(lowest[0])

    def barrier(self) -> None:
        """Wait for every rank."""
        self.all_true(True)
