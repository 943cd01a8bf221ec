"""Counter-based seeding: noise depends on (seed, stream, sample key, step), never on layout or call order.

Worker count, batch split, resume and unrelated draws therefore change nothing. Normal values come from a
counter hash (SplitMix64) through Box-Muller, in float64 and rounded to float32: one 64-bit word per pair of values.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def stable_key(text: str) -> int:
    """Return a non-negative 63-bit integer that is the same for `text` on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from a tuple of integers and names."""
    return stable_key("\x1f".join(str(p) for p in parts))


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU torch generator seeded by `parts`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def numpy_rng(*parts: int | str) -> np.random.Generator:
    """Return a numpy generator seeded by `parts`."""
    return np.random.default_rng(derive_seed(*parts))


def _splitmix(state: np.ndarray) -> np.ndarray:
    """Hash in place: this is most of the cost of noise."""
    state += np.uint64(0x9E3779B97F4A7C15)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


def _bits(keys_B: Tensor, count: int, stream: int) -> np.ndarray:
    """Return (B, count) independent uint64 words per key."""
    with np.errstate(over="ignore"):
        base = _splitmix(keys_B.detach().cpu().numpy().astype(np.uint64) ^ np.uint64(stream & _MASK))
        counter = np.arange(count, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
        return _splitmix(_splitmix(base[:, None] + counter[None, :]))


def keyed_uniform(keys_B: Tensor, *parts: int | str) -> Tensor:
    """Return one uniform [0, 1) float32 value per sample key, shape (B,)."""
    bits = _bits(keys_B, 1, derive_seed(*parts))[:, 0]
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).float().to(keys_B.device)


def keyed_normal(keys_B: Tensor, shape: tuple[int, ...], *parts: int | str) -> Tensor:
    """Return standard normal float32 noise of shape (B, *shape), keyed by sample and by `parts`.

    Padding the last axes differently changes the values; pad the first axis after B (frames) only: rows are
    filled frame-major, so a longer T extends a sample's noise instead of reshuffling it.
    """
    count = int(np.prod(shape)) if shape else 1
    half = (count + 1) // 2
    halves = _bits(keys_B, half, derive_seed(*parts)).view(np.uint32).reshape(len(keys_B), half, 2)
    uniform = torch.from_numpy(halves.astype(np.float64)).add_(0.5).mul_(2.0**-32)
    radius, angle = uniform[..., 0].log().mul_(-2.0).sqrt_(), uniform[..., 1].mul(2.0 * math.pi)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    return pairs[:, :count].float().reshape(len(keys_B), *shape).to(keys_B.device)
