"""Per-representation projections into the shared width: the only part of the tower that knows the representation.

Letters: B batch, T frames, N = ceil(T / frames_per_token) tokens, D width, F features of the representation.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from motionrft.core.types import valid_mask
from motionrft.nn.dropout import Dropout


class Projection(nn.Sequential):
    """Linear, then (GELU, dropout, Linear) up to `num_layers` linear layers; children 0, 3, 6 are the linear ones."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, num_layers: int, dropout: float) -> None:
        widths = [in_dim, *([hidden] * (num_layers - 1)), out_dim]
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for before, after in itertools.pairwise(widths[1:]):
            layers += [nn.GELU(), Dropout(dropout), nn.Linear(before, after)]
        super().__init__(*layers)


def stack_frames(motion_BTF: Tensor, lengths_B: Tensor, frames_per_token: int) -> tuple[Tensor, Tensor]:
    """Return tokens of `frames_per_token` consecutive frames, (B, N, n F), and their mask (B, N).

    With one frame per token nothing is copied. Otherwise frames beyond the length are zeroed first, because the last
    valid token may hold some of them.
    """
    num_frames = motion_BTF.shape[1]
    if frames_per_token == 1:
        return motion_BTF, valid_mask(lengths_B, num_frames)
    motion_BTF = torch.where(valid_mask(lengths_B, num_frames)[..., None], motion_BTF, 0.0)
    missing = -num_frames % frames_per_token
    if missing:
        motion_BTF = pad(motion_BTF, (0, 0, 0, missing))
    tokens = motion_BTF.unflatten(1, (-1, frames_per_token)).flatten(2)
    return tokens, valid_mask((lengths_B + frames_per_token - 1) // frames_per_token, tokens.shape[1])
