"""Noise awareness: the diffusion process the towers are trained on, and the label of a noisy motion.

Letters: B batch, T frames, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from motionrft.core.rng import keyed_normal, keyed_uniform
from motionrft.core.types import valid_mask
from motionrft.reward.config import check

NUM_STEPS = 1000
_BETA_FIRST, _BETA_LAST = 0.00085, 0.012


@lru_cache(maxsize=1)
def alpha_bar() -> Tensor:
    """Return the cumulative signal share of the scaled-linear DDPM schedule, (1000,) float64."""
    betas = torch.linspace(math.sqrt(_BETA_FIRST), math.sqrt(_BETA_LAST), NUM_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


@dataclass(frozen=True)
class NoisePolicy:
    """How training batches are made noisy. Clean rows get t = 0; every other row draws its own t below `max_t`."""

    p_clean: float = 0.5
    """Share of clean rows."""
    max_t: int = 500
    """Exclusive upper end of the drawn times; keep it equal to the model's."""
    p_low: float = 0.0
    """Extra probability of a time below `low_t`; 0 draws uniformly."""
    low_t: int = 50
    """End of the range that `p_low` favours."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        check(
            (0.0 <= self.p_clean <= 1.0, "p_clean must be in [0, 1]"),
            (1 <= self.low_t <= self.max_t <= NUM_STEPS, f"need 1 <= low_t <= max_t <= {NUM_STEPS}"),
            (0.0 <= self.p_low <= 1.0, "p_low must be in [0, 1]"),
            where="reward.noise",
        )


def draw_times(keys_B: Tensor, policy: NoisePolicy, *parts: int | str) -> Tensor:
    """Return one time per row, (B,) int64: 0 for clean rows. Depends on key and `parts`, not on the batch."""
    clean_B = keyed_uniform(keys_B, "reward-clean", *parts) < policy.p_clean
    low_B = keyed_uniform(keys_B, "reward-low", *parts) < policy.p_low
    limit_B = torch.where(low_B, policy.low_t, policy.max_t)
    t_B = (keyed_uniform(keys_B, "reward-t", *parts) * limit_B).long().minimum(limit_B - 1)
    return torch.where(clean_B, 0, t_B)


def mix(motion_BTF: Tensor, noise_BTF: Tensor, share_B: Tensor) -> Tensor:
    """Return sqrt(s) x + sqrt(1 - s) eps for the signal share s of each row."""
    share = share_B[:, None, None]
    return share.sqrt().to(motion_BTF.dtype) * motion_BTF + (1.0 - share).sqrt().to(motion_BTF.dtype) * noise_BTF


def add_noise(motion_BTF: Tensor, noise_BTF: Tensor, t_B: Tensor) -> Tensor:
    """Return the motion at diffusion time t, row by row."""
    return mix(motion_BTF, noise_BTF, alpha_bar().to(motion_BTF.device)[t_B])


def noised(motion_BTF: Tensor, lengths_B: Tensor, t_B: Tensor, keys_B: Tensor, *parts: int | str) -> Tensor:
    """Return normalised motion with noise on the valid frames of the rows with t > 0; clean rows stay untouched.

    Noise is drawn per key, so neither the batch a clip stands in nor the frames it is padded to matter.
    """
    rows = torch.nonzero(t_B > 0)[:, 0]
    if not len(rows):
        return motion_BTF
    noise = keyed_normal(keys_B[rows], tuple(motion_BTF.shape[1:]), "reward-noise", *parts).to(motion_BTF.dtype)
    mask = valid_mask(lengths_B[rows], motion_BTF.shape[1])[..., None]
    noisy = torch.where(mask, add_noise(motion_BTF[rows], noise, t_B[rows]), 0.0)
    return motion_BTF.index_copy(0, rows, noisy)


def time_of_noise_level(noise_level: float, max_t: int) -> int:
    """Return the time whose signal share is nearest to 1 - noise_level^2, at most `max_t` - 1; 0 for clean motion.

    Args:
        noise_level: standard deviation of the noise in a unit-variance mixture, 0 clean .. 1 pure noise.
        max_t: exclusive upper end of the times the tower was trained for.
    """
    if not 0.0 <= noise_level <= 1.0:
        raise ValueError(f"noise_level must be in [0, 1], got {noise_level}")
    if noise_level == 0.0:
        return 0
    return min(int((alpha_bar() - (1.0 - noise_level**2)).abs().argmin()), max_t - 1)


def match_affine_noise(signal: float, noise: float, max_t: int) -> tuple[int, float]:
    """Return (time, scale) for a state signal * x + noise * eps of another process: feed scale * state at that time.

    Serves generators whose state does not keep unit variance, e.g. flow matching.
    """
    norm = math.hypot(signal, noise)
    return time_of_noise_level(min(noise / norm, 1.0), max_t), 1.0 / norm
