"""Latent -> motion, used only to train the towers. Letters: B batch, T frames, N tokens, d latent, F features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionrft.core.types import valid_mask
from motionrft.nn.embeddings import LearnedPositions
from motionrft.nn.frames import token_mask, unstack_frames
from motionrft.nn.transformer import SkipDecoder
from motionrft.reward.config import MotionRewardConfig


class MotionDecoder(nn.Module):
    """Position queries attend to one latent token; one linear layer per representation reads the result."""

    def __init__(self, config: MotionRewardConfig) -> None:
        super().__init__()
        dim = config.latent_dim
        self.frames_per_token = config.frames_per_token
        self.positions = LearnedPositions(config.max_positions, dim)
        self.decoder = SkipDecoder(dim, config.decoder_layers, config.num_heads, config.ff_dim, config.dropout)
        self.final = nn.ModuleDict(
            {
                name: nn.Linear(dim, config.feature_dim(name) * config.frames_per_token)
                for name in config.representations
            }
        )

    def forward(self, z_Bd: Tensor, lengths_B: Tensor, num_frames: int, representation: str) -> Tensor:
        """Return normalised motion (B, T, F), exactly zero beyond each length."""
        motion = self.read(self.hidden(z_Bd, lengths_B, num_frames), num_frames, representation)
        return torch.where(valid_mask(lengths_B, num_frames)[..., None], motion, 0.0)

    def hidden(self, z_Bd: Tensor, lengths_B: Tensor, num_frames: int) -> Tensor:
        """Return decoder states (B, N, d), which do not depend on the representation."""
        mask_BN = token_mask(lengths_B, num_frames, self.frames_per_token)
        queries = self.positions(mask_BN.shape[1]).expand(len(z_Bd), -1, -1)
        return self.decoder(queries, mask_BN, z_Bd)

    def read(self, hidden_BNd: Tensor, num_frames: int, representation: str) -> Tensor:
        """Return motion (B, T, F) of decoder states; beyond each length it holds whatever comes out."""
        return unstack_frames(self.final[representation](hidden_BNd), num_frames, self.frames_per_token)
