"""Smooth curves of time: ease, keyframes, ballistic splines, slow wobble. Times in seconds, angles in radians.

Letters: T frames, K keyframes, D values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def ease(x: ArrayLike) -> Array:
    """Return the minimum-jerk step 10 x^3 - 15 x^4 + 6 x^5, 0 below 0 and 1 above 1."""
    x = np.clip(np.asarray(x, dtype=np.float64), 0.0, 1.0)
    return x * x * x * (10.0 + x * (6.0 * x - 15.0))


def bump(x: ArrayLike) -> Array:
    """Return 16 x^2 (1 - x)^2 on [0, 1], 0 outside: rises to 1 at one half and leaves and lands at rest."""
    x = np.clip(np.asarray(x, dtype=np.float64), 0.0, 1.0)
    return 16.0 * (x * (1.0 - x)) ** 2


def keys(t: Array, times: ArrayLike, values: ArrayLike) -> Array:
    """Return minimum-jerk moves between keyframes, (T,) for K values or (T, D) for (K, D); constant outside."""
    times, values = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    left = np.clip(np.searchsorted(times, t, side="right") - 1, 0, len(times) - 2)
    step = ease((t - times[left]) / (times[left + 1] - times[left]))
    step = step.reshape(step.shape + (1,) * (values.ndim - 1))
    return values[left] + (values[left + 1] - values[left]) * step


def hermite(t: Array, times: ArrayLike, values: ArrayLike, slopes: ArrayLike) -> Array:
    """Return the cubic spline (T,) through K values with K given slopes: two slopes +-v draw a ballistic flight."""
    times, values, slopes = (np.asarray(x, dtype=np.float64) for x in (times, values, slopes))
    left = np.clip(np.searchsorted(times, t, side="right") - 1, 0, len(times) - 2)
    span = times[left + 1] - times[left]
    s = np.clip((t - times[left]) / span, 0.0, 1.0)
    rise = values[left + 1] - values[left]
    bend = (1 - s) * slopes[left] * span + (2 * s - 1) * rise - s * slopes[left + 1] * span
    return values[left] + s * rise + s * (1 - s) * bend


def wobble(rng: np.random.Generator, t: Array, amplitude: float, size: int) -> Array:
    """Return slow natural unrest (T, size): three sines of 0.1 to 0.6 Hz each, about `amplitude` in all."""
    frequency = rng.uniform(0.1, 0.6, (3, size))
    phase = rng.uniform(0.0, 2.0 * np.pi, (3, size))
    weight = rng.uniform(0.2, 1.0, (3, size)) * amplitude / 1.8
    return (weight * np.sin(2.0 * np.pi * frequency * t[:, None, None] + phase)).sum(1)


def smooth_in_time(values: Array, sigma: float, axis: int) -> Array:
    """Return `values` blurred along `axis` by a Gaussian of `sigma` frames; the ends are repeated."""
    radius = max(1, int(np.ceil(3.0 * sigma)))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    moved = np.moveaxis(values, axis, 0)
    padded = np.concatenate([moved[:1].repeat(radius, 0), moved, moved[-1:].repeat(radius, 0)])
    blurred = sum(w * padded[i : i + len(moved)] for i, w in enumerate(weights))
    return np.moveaxis(np.asarray(blurred), 0, axis)


def rotation(axis: int, angle: ArrayLike) -> Array:
    """Return right-handed rotations (..., 3, 3) about coordinate axis 0, 1 or 2 by `angle` (...)."""
    angle = np.asarray(angle, dtype=np.float64)
    matrix = np.zeros((*angle.shape, 3, 3))
    first, second = (axis + 1) % 3, (axis + 2) % 3
    cos, sin = np.cos(angle), np.sin(angle)
    matrix[..., axis, axis] = 1.0
    matrix[..., first, first] = cos
    matrix[..., second, second] = cos
    matrix[..., first, second] = -sin
    matrix[..., second, first] = sin
    return matrix
