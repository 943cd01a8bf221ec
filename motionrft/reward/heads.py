"""The scoring head of an adapter: an MLP from the latent mean to a score or to class logits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu

from motionrft.nn.dropout import Dropout


class ScoreHead(nn.Module):
    """Four linear layers d -> 2d -> d -> d/2 -> outputs with GELU and dropout between them."""

    def __init__(self, dim: int, outputs: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.fc3, self.fc4 = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, outputs)
        self.dropout = Dropout(dropout)

    def forward(self, latent_Bd: Tensor) -> Tensor:
        """Return (B, outputs)."""
        x = latent_Bd
        for layer in (self.fc1, self.fc2, self.fc3):
            x = self.dropout(gelu(layer(x)))
        return self.fc4(x)
