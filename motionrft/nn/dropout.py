"""Dropout that is cheap on a CPU, alone and inside attention.

Torch draws a CPU mask with one scalar random number per element, on one thread whatever their number (its vectorised
path is for Intel alone): 19 % of a one-threaded training step of the reward. Here four elements share one 64-bit draw
of the same global generator. In evaluation, and on every other device, all of this is torch's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

_LEVELS = 1 << 16


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Return x with elements zeroed independently with probability p and the others scaled to keep the mean.

    On a CPU p is rounded to a multiple of 2^-16, and the scale is that of the rounded rate.
    """
    threshold = round(p * _LEVELS)
    if not training or x.device.type != "cpu" or not 0 < threshold < _LEVELS:
        return nn.functional.dropout(x, p, training)
    # random_ without an upper end fills all 64 bits; read as int16, they are uniform over [-2^15, 2^15)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - _LEVELS // 2
    return x * keep.to(x.dtype).mul_(_LEVELS / (_LEVELS - threshold))


class Dropout(nn.Dropout):
    """`dropout` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x, dropped in training mode."""
        return dropout(x, self.p, self.training)


def attention(q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask_BK: Tensor, p: float) -> Tensor:
    """Return softmax(q k^T / sqrt(E)) v over valid keys with dropout p on the weights, (B, H, Q, E).

    Args:
        q_BHQE: queries.
        k_BHKE: keys.
        v_BHKE: values.
        mask_BK: bool, True = valid key; at least one per row.
        p: dropout, 0 outside training.
    """
    mask = mask_BK[:, None, None, :]
    if p == 0 or q_BHQE.device.type != "cpu":
        return scaled_dot_product_attention(q_BHQE, k_BHKE, v_BHKE, attn_mask=mask, dropout_p=p)
    # no fused CPU kernel drops weights: torch would take these steps too, with its own masks
    scores = (q_BHQE * q_BHQE.shape[-1] ** -0.5) @ k_BHKE.transpose(-1, -2)
    bias = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -math.inf)
    return dropout((scores + bias).softmax(-1), p) @ v_BHKE
