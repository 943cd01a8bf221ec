"""Noise schedules and the timesteps a sampler visits, in float64. Letters: N training steps, S denoising steps.

`alpha_bar[t]` is the share of signal variance left after step t: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCHEDULES = ("cosine", "linear", "scaled_linear")
SPACINGS = ("respaced", "leading", "trailing")


def betas(
    schedule: str,
    num_steps: int,
    first: float | None = None,
    last: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the noise added per training step, (N,).

    Args:
        schedule: "cosine" (from cos^2 of the share, capped at 0.999), "linear", or "scaled_linear" (square roots are
            linear).
        num_steps: N >= 1.
        first: beta of step 0; linear 1e-4 (scaled by 1000 / N), scaled_linear 0.00085. Not used by cosine.
        last: beta of step N - 1; linear 0.02 (scaled likewise), scaled_linear 0.012.
        dtype: what it is computed in; float32 for models that were trained on its rounding.

    Raises:
        ValueError: unknown schedule or num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    if schedule == "cosine":
        share = [math.cos((i / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_steps + 1)]
        steps = [min(1.0 - share[i + 1] / share[i], 0.999) for i in range(num_steps)]
        return torch.tensor(steps, dtype=dtype)
    if schedule == "linear":
        scale = 1000.0 / num_steps
        first, last = scale * 1e-4 if first is None else first, scale * 0.02 if last is None else last
        return torch.linspace(first, last, num_steps, dtype=dtype)
    if schedule == "scaled_linear":
        first, last = 0.00085 if first is None else first, 0.012 if last is None else last
        return torch.linspace(math.sqrt(first), math.sqrt(last), num_steps, dtype=dtype).square()
    raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")


def alpha_bars(
    schedule: str,
    num_steps: int,
    first: float | None = None,
    last: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the cumulative product of 1 - beta, (N,) float64 whatever it is computed in. Arguments as `betas`."""
    return torch.cumprod(1.0 - betas(schedule, num_steps, first, last, dtype), dim=0).double()


def spaced_timesteps(train_steps: int, num_steps: int, spacing: str = "respaced") -> Tensor:
    """Return the S training timesteps a sampler visits, noisiest first, (S,) int64.

    Args:
        train_steps: N.
        num_steps: S, 1 <= S <= N.
        spacing: "respaced" visits both ends, round(j (N-1) / (S-1)) (S = 1: the noisiest); "leading" visits
            j (N // S) + 1 (latent models with an offset of one step); "trailing" visits round(N - j N / S) - 1.

    Raises:
        ValueError: unknown spacing or S outside 1..N.

    Source: MDM's spaced diffusion ("respaced"); DDIM's "leading" and "trailing" grids.

    >>> spaced_timesteps(1000, 5).tolist()
    [999, 749, 500, 250, 0]
    >>> spaced_timesteps(1000, 4, "leading").tolist()
    [751, 501, 251, 1]
    """
    if not 1 <= num_steps <= train_steps:
        raise ValueError(f"need 1 <= num_steps <= {train_steps}, got {num_steps}")
    if spacing == "respaced":
        if num_steps == 1:
            return torch.tensor([train_steps - 1])
        # The stride is accumulated: exact halves then round as in the published models.
        stride, position, visited = (train_steps - 1) / (num_steps - 1), 0.0, []
        for _ in range(num_steps):
            visited.append(round(position))
            position += stride
        return torch.tensor(visited[::-1])
    if spacing == "leading":
        stride = train_steps // num_steps
        offset = 1 if (num_steps - 1) * stride + 1 < train_steps else 0  # no room when every step is visited
        return (torch.arange(num_steps) * stride + offset).flip(0)
    if spacing == "trailing":
        return torch.tensor([round(train_steps - j * train_steps / num_steps) - 1 for j in range(num_steps)])
    raise ValueError(f"spacing must be one of {SPACINGS}, got {spacing!r}")
