"""Positions and times as vectors. Letters: B batch, T positions, D width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from motionrft.core.errors import ConfigError, explain


def time_sinusoid(t_B: Tensor, size: int, max_period: float = 10000.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return [cos(t f_0..f_{h-1}), sin(t f_0..f_{h-1})] with f_i = max_period^(-i/h), h = size / 2.

    Args:
        t_B: times, any numeric dtype.
        size: even output size.
        max_period: slowest period over 2 pi.
        dtype: what it is computed in; float32 for models that were trained on its rounding (1e-4 at t = 1000).

    Returns:
        (B, size) `dtype`; cast it to the consumer's.
    """
    if size % 2:
        raise ValueError(f"size must be even, got {size}")
    half = size // 2
    index = torch.arange(half, dtype=dtype, device=t_B.device)
    angle = t_B.to(dtype)[:, None] * torch.exp(-math.log(max_period) * index / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoid of the time, then Linear, SiLU, Linear: (B,) -> (B, D)."""

    def __init__(self, dim: int, sinusoid_size: int = 512) -> None:
        super().__init__()
        self.sinusoid_size = sinusoid_size
        self.linear_1, self.linear_2 = nn.Linear(sinusoid_size, dim), nn.Linear(dim, dim)

    def forward(self, t_B: Tensor) -> Tensor:
        """Return (B, D)."""
        waves = time_sinusoid(t_B, self.sinusoid_size).to(self.linear_1.weight.dtype)
        return self.linear_2(silu(self.linear_1(waves)))


class LearnedPositions(nn.Module):
    """One learned vector per position, uniform in [0, 1) at start."""

    def __init__(self, max_positions: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(max_positions, dim))

    def forward(self, num_positions: int) -> Tensor:
        """Return vectors of positions 0..num_positions-1, (T, D).

        Raises:
            ConfigError: if the sequence is longer than the table.
        """
        limit = self.table.shape[0]
        if num_positions > limit:
            raise ConfigError(
                explain(
                    f"at most {limit} positions",
                    f"{num_positions} (tokens for class, time and frames)",
                    "learned positions",
                    "Shorten the motion, or train with a larger max_positions.",
                )
            )
        return self.table[:num_positions]
