"""Groups of frames as tokens: what is in them, which count, and the way back."""

from __future__ import annotations

import pytest
import torch

from motionrft.core.types import valid_mask
from motionrft.nn.frames import stack_frames, token_mask, unstack_frames


def test_tokens_hold_consecutive_frames_and_zeros_beyond_a_clip() -> None:
    motion = torch.arange(20.0).reshape(2, 5, 2) + 1
    tokens, mask = stack_frames(motion, torch.tensor([5, 3]), 2)
    assert tokens.tolist() == [
        [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]],
        [[11, 12, 13, 14], [15, 16, 0, 0], [0, 0, 0, 0]],
    ]
    assert mask.tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize("frames_per_token", [1, 2, 3, 9])
def test_frames_come_back(frames_per_token: int) -> None:
    motion, lengths = torch.randn(3, 7, 4), torch.tensor([7, 4, 1])
    tokens, mask = stack_frames(motion, lengths, frames_per_token)
    valid = valid_mask(lengths, 7)
    assert torch.equal(unstack_frames(tokens, 7, frames_per_token)[valid], motion[valid])
    assert torch.equal(mask, token_mask(lengths, 7, frames_per_token)) and mask.shape == tokens.shape[:2]
    assert mask.sum(1).tolist() == [-(-n // frames_per_token) for n in (7, 4, 1)]
