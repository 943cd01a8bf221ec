"""Samplers as tables of affine maps, `core.protocols.SolverTable`. Letters: S denoising steps, ab = alpha_bar, float64.

Every sampler here is x_prev = a x + b out + c noise with x0_hat = p x + q out. One table therefore serves the loop, the
closed-form tests, and the strategies that need the sampler's linear part.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from motionrft.core.protocols import SolverTable
from motionrft.diffusion.prediction import x0_coefficients


def ddim_table(
    alpha_bar: Tensor, timesteps: Tensor, prediction: str, eta: float = 0.0, final_alpha_bar: float = 1.0
) -> SolverTable:
    """Return DDIM: x_prev = sqrt(ab') x0_hat + sqrt(1 - ab' - sigma^2) eps_hat + sigma noise.

    sigma = eta sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab'); eta 0 is deterministic, eta 1 is ancestral sampling.

    Args:
        alpha_bar: (N,) of the training schedule.
        timesteps: (S,) visited training steps, noisiest first; also what the network is told.
        prediction: "x0", "eps" or "v".
        eta: share of fresh noise, in [0, 1].
        final_alpha_bar: ab' of the last step; 1 ends on clean data, some latent models end on alpha_bar[0].

    Source: DDIM (Song et al.), Eq. 12.
    """
    ab, ab_next = _levels(alpha_bar, timesteps, final_alpha_bar)
    sigma = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).clamp(min=0).sqrt()
    p, q = x0_coefficients(ab, prediction)
    eps_share = (1 - ab_next - sigma**2).clamp(min=0).sqrt() / (1 - ab).sqrt()
    a = ab_next.sqrt() * p + eps_share * (1 - ab.sqrt() * p)
    b = q * (ab_next.sqrt() - eps_share * ab.sqrt())
    return SolverTable(timesteps, a, b, sigma, p, q, _noise_levels(ab, ab_next))


def ddpm_table(alpha_bar: Tensor, timesteps: Tensor, prediction: str, final_alpha_bar: float = 1.0) -> SolverTable:
    """Return ancestral sampling from the posterior q(x_prev | x_t, x0_hat) with its own ("fixed small") variance.

    On a subset of the training steps the posterior is that of the respaced process, 1 - beta = ab / ab'. The last step
    adds no noise. Arguments as `ddim_table`.

    Source: DDPM (Ho et al.), Eq. 7; respacing as in Improved DDPM.
    """
    ab, ab_next = _levels(alpha_bar, timesteps, final_alpha_bar)
    alpha = ab / ab_next
    beta = 1 - alpha
    p, q = x0_coefficients(ab, prediction)
    of_x0 = ab_next.sqrt() * beta / (1 - ab)
    of_x = alpha.sqrt() * (1 - ab_next) / (1 - ab)
    c = (beta * (1 - ab_next) / (1 - ab)).clamp(min=0).sqrt()
    c[-1] = 0.0
    return SolverTable(timesteps, of_x + of_x0 * p, of_x0 * q, c, p, q, _noise_levels(ab, ab_next))


def lcm_table(
    alpha_bar: Tensor,
    timesteps: Tensor,
    prediction: str = "eps",
    sigma_data: float = 0.5,
    time_scale: float = 10.0,
) -> SolverTable:
    """Return consistency sampling: D = c_out x0_hat + c_skip x, re-noised to the next level except at the end.

    The reward's x0_hat stays the plain one-step estimate. Arguments as `ddim_table`.

    Source: latent consistency models; boundary terms with s = 10 t, sigma_data = 0.5.
    """
    ab, ab_next = _levels(alpha_bar, timesteps, 1.0)
    p, q = x0_coefficients(ab, prediction)
    c_skip, c_out = consistency_coefficients(timesteps, sigma_data, time_scale)
    keep = ab_next.sqrt()  # 1 at the end
    a, b, c = keep * (c_out * p + c_skip), keep * c_out * q, (1 - ab_next).sqrt()
    return SolverTable(timesteps, a, b, c, p, q, _noise_levels(ab, ab_next))


def consistency_coefficients(
    timesteps: Tensor, sigma_data: float = 0.5, time_scale: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Return (c_skip, c_out), float64, of D = c_skip x + c_out x0_hat; at time 0 it is x itself. See `lcm_table`."""
    scaled = time_scale * timesteps.double()
    return sigma_data**2 / (scaled**2 + sigma_data**2), scaled / (scaled**2 + sigma_data**2).sqrt()


def flow_euler_table(num_steps: int) -> SolverTable:
    """Return Euler steps of a flow whose velocity points from noise (time 0) to data (time 1).

    Its state t x0 + (1 - t) eps is sqrt(ab) x0 + sqrt(1 - ab) eps of the same signal-to-noise ratio times the norm
    n = sqrt(t^2 + (1 - t)^2): noise_level is (1 - t) / n and scale is 1 / n.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    edges = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    time, one = edges[:-1], torch.ones(num_steps, dtype=torch.float64)
    norm = torch.hypot(edges, 1 - edges)
    return SolverTable(time, one, one / num_steps, 0 * one, one, 1 - time, (1 - edges) / norm, 1 / norm)


def flow_sde_table(num_steps: int, noise: float) -> SolverTable:
    """Return Euler-Maruyama steps of the SDE whose marginals are those of the flow; velocity as in `flow_euler_table`.

    x_prev = x + h [v + s^2 (t v - x) / (2 (1 - t))] + s sqrt(h) noise with s = a sqrt((1 - t) / t). In the first step,
    where s is infinite, its denominator is the second step's t; that leaves the variance up to a^4 / 4 too large.

    Args:
        num_steps: S.
        noise: a; 0 gives the Euler steps themselves.

    Source: Flow-GRPO (Liu et al.), where t counts from data to noise.
    Differs: the last step is the plain Euler step. Nothing learns from it, and its noise, of the size of one step,
    would stay in the sample.
    """
    euler = flow_euler_table(num_steps)
    h, time = 1.0 / num_steps, euler.model_time
    share = noise**2 / time.clamp(min=h)  # s^2 / (1 - t)
    share[-1] = 0.0
    return replace(euler, a=1 - h * share / 2, b=h * (1 + share * time / 2), c=(share * (1 - time) * h).sqrt())


def skip_gains(table: SolverTable, prediction: str) -> tuple[Tensor, Tensor]:
    """Return the derivatives (of x_prev, of x0_hat) by x when the network's noise estimate is held fixed, (S,) each.

    Strategies that stop the gradient inside the network but not through the sampler (DRTune) are defined for noise
    prediction. A network that outputs x0 has no direct path from x to x0_hat, so for it the path is that of the
    implied noise estimate. For the other types it is the table's own.
    """
    if prediction != "x0":
        return table.a, table.p
    gain = (1 - table.noise_level[:-1] ** 2).rsqrt()
    return table.a + table.b * gain, table.p + table.q * gain


def _levels(alpha_bar: Tensor, timesteps: Tensor, final_alpha_bar: float) -> tuple[Tensor, Tensor]:
    if timesteps.dim() != 1 or len(timesteps) < 1:
        raise ValueError(f"timesteps must be (S,) with S >= 1, got shape {tuple(timesteps.shape)}")
    ab = alpha_bar.double()[timesteps]
    return ab, torch.cat([ab[1:], ab.new_tensor([final_alpha_bar])])


def _noise_levels(ab: Tensor, ab_next: Tensor) -> Tensor:
    return (1 - torch.cat([ab, ab_next[-1:]])).clamp(min=0).sqrt()
