"""Classifier-free guidance: two conditions in one forward, combined afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

GRADIENTS = ("both", "caption", "caption_unscaled")
"""Branches that a gradient of u + s (c - u) goes through. "both": weights s and 1 - s, whose sum on shared parameters
is 1. "caption": u is constant, so that shared parameters get s. "caption_unscaled": the same divided by s."""


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Return u + s (c - u); s broadcasts. Affine, so guiding eps or x0 at the same state gives the same sample."""
    return unconditional + scale * (conditional - unconditional)


def double_rows(x: Tensor) -> Tensor:
    """Return the batch twice, (2B, ...): first for the caption, then for the empty condition."""
    return torch.cat([x, x])


def guide_doubled(out: Tensor, scale: float | Tensor) -> Tensor:
    """Return the guided output (B, ...) of a doubled batch (2B, ...)."""
    conditional, unconditional = out.chunk(2)
    return guide(conditional, unconditional, scale)


def guide_captioned(conditional: Tensor, unconditional: Tensor, scale: float, unscaled: bool) -> Tensor:
    """Return the guided output whose gradient goes through c only, with weight s, or 1 if `unscaled`."""
    if not unscaled:
        return guide(conditional, unconditional.detach(), scale)
    return guide(conditional.detach(), unconditional.detach(), scale) + (conditional - conditional.detach())
