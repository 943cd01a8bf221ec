"""Consecutive frames as one position of a transformer, and back.

Letters: B batch, T frames, n frames per token, N = ceil(T / n) tokens, F features of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from motionrft.core.types import valid_mask


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
    return tokens, token_mask(lengths_B, num_frames, frames_per_token)


def token_mask(lengths_B: Tensor, num_frames: int, frames_per_token: int) -> Tensor:
    """Return which tokens of T frames hold a valid frame, (B, N) bool."""
    return valid_mask((lengths_B + frames_per_token - 1) // frames_per_token, -(-num_frames // frames_per_token))


def unstack_frames(tokens_BNF: Tensor, num_frames: int, frames_per_token: int) -> Tensor:
    """Return the frames (B, T, F) of tokens (B, N, n F); arbitrary beyond each length."""
    return tokens_BNF.unflatten(2, (frames_per_token, -1)).flatten(1, 2)[:, :num_frames]
