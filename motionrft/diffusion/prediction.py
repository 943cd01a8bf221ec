"""What a network's output means: x0, eps or v, as affine maps to the clean estimate; and the forward processes.

They concern variance-preserving diffusion, x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps with ab = alpha_bar; only
`flow_state` belongs to linear flows, whose networks output the velocity x_0 - eps.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTIONS = ("x0", "eps", "v")
FLOW_OUTPUTS = ("velocity", "clean")
"""What the last layer of a flow network may give; the velocity follows from a clean estimate."""
_NEAREST = 1e-3  # a clean estimate is turned into a velocity no nearer to the data: one of 1000 steps


def x0_coefficients(alpha_bar: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Return (p, q) with x0_hat = p x_t + q out, each shaped like `alpha_bar`.

    v is sqrt(ab) eps - sqrt(1 - ab) x_0.

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction == "x0":
        return torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar)
    if prediction == "eps":
        return alpha_bar.rsqrt(), -((1.0 - alpha_bar) / alpha_bar).sqrt()
    if prediction == "v":
        return alpha_bar.sqrt(), -(1.0 - alpha_bar).sqrt()
    raise ValueError(f"prediction must be one of {PREDICTIONS}, got {prediction!r}")


def output_for(x0: Tensor, noise: Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """Return what a perfect network would output, shaped like x0; `alpha_bar` broadcasts against it."""
    if prediction == "x0":
        return x0
    if prediction == "eps":
        return noise
    if prediction == "v":
        return alpha_bar.sqrt() * noise - (1.0 - alpha_bar).sqrt() * x0
    raise ValueError(f"prediction must be one of {PREDICTIONS}, got {prediction!r}")


def add_noise(x0_BTD: Tensor, noise_BTD: Tensor, alpha_bar_B: Tensor) -> Tensor:
    """Return sqrt(ab) x0 + sqrt(1 - ab) noise, row by row; the roots are taken in float64."""
    ab = alpha_bar_B.double().reshape(-1, *[1] * (x0_BTD.dim() - 1))
    return ab.sqrt().to(x0_BTD.dtype) * x0_BTD + (1.0 - ab).sqrt().to(x0_BTD.dtype) * noise_BTD


def flow_state(x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """Return t x0 + (1 - t) noise, row by row: the state of a linear flow at time t, 0 noise .. 1 data."""
    t = t_B.to(x0.dtype).reshape(-1, *[1] * (x0.dim() - 1))
    return t * x0 + (1.0 - t) * noise


def flow_remaining(x: Tensor, t_B: Tensor) -> Tensor:
    """Return the flow time 1 - t from here to the data, kept away from zero, shaped to broadcast against x.

    A network that estimates the clean state has the velocity (x0_hat - x_t) / (1 - t).
    """
    return (1 - t_B).clamp(min=_NEAREST).reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
