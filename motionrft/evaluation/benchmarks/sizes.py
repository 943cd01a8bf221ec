"""How long clips and captions are, for benchmarks whose result depends on it.

HumanML3D states 7.1 s per motion, 12 words per description on average and 10 in the median; clips of it are 40 to 196
frames at 20 frames per second.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FRAMES = (40, 196)
_MEAN_FRAMES = 142
_WORDS = (3, 60)
_MEDIAN_WORDS, _MEAN_WORDS = 10, 12


def clip_lengths(count: int, rng: torch.Generator) -> Tensor:
    """Return frames per clip, (count,) int64: 40 to 196, 142 on average, one clip of 196 (the padded length)."""
    low, high = _FRAMES
    power = (high - low) / (_MEAN_FRAMES - low) - 1.0  # the mean of u^p for uniform u is 1 / (p + 1)
    lengths = low + torch.rand(count, generator=rng).pow(power) * (high - low)
    lengths[0] = high
    return lengths.round().long()


def caption_tokens(count: int, rng: torch.Generator) -> Tensor:
    """Return tokens per caption, (count,) int64: a word each and an end token. Real tokenisers split some words."""
    spread = math.sqrt(2.0 * math.log(_MEAN_WORDS / _MEDIAN_WORDS))  # of a log-normal with this median and mean
    words = _MEDIAN_WORDS * torch.exp(spread * torch.randn(count, generator=rng))
    return words.round().clamp(*_WORDS).long() + 1
