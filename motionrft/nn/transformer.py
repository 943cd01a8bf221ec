"""Post-norm transformer encoder and decoder whose outer blocks are joined by skip connections.

Block i of the first half hands its output to the mirrored block of the second half, which reads
Linear([x, skipped]). Letters: B batch, T positions, D width. Masks are bool, True = valid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from motionrft.nn.attention import SelfAttention, SingleTokenAttention
from motionrft.nn.dropout import Dropout


class EncoderBlock(nn.Module):
    """x = norm1(x + attention(x)); x = norm2(x + W2 gelu(W1 x)), with dropout on both branches and inside the MLP."""

    def __init__(self, dim: int, num_heads: int, ff_dim: int, dropout: float, sites: bool = False) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout, sites)
        self.linear1, self.linear2 = nn.Linear(dim, ff_dim), nn.Linear(ff_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor, num_queries: int | None = None) -> Tensor:
        """Return the block's output at the first `num_queries` positions (all by default), (B, Q, D)."""
        kept = x_BTD if num_queries is None else x_BTD[:, :num_queries]
        x = self.norm1(kept + self.dropout(self.self_attn(x_BTD, mask_BT, num_queries)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(gelu(self.linear1(x))))))


class DecoderBlock(nn.Module):
    """Post-norm block with self-attention, cross-attention to one memory token, and an MLP."""

    def __init__(self, dim: int, num_heads: int, ff_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.cross_attn = SingleTokenAttention(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ff_dim), nn.Linear(ff_dim, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor, memory_BD: Tensor) -> Tensor:
        """Return (B, T, D)."""
        x = self.norm1(x_BTD + self.dropout(self.self_attn(x_BTD, mask_BT)))
        x = self.norm2(x + self.dropout(self.cross_attn(memory_BD)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(gelu(self.linear1(x))))))


class SkipStack(nn.Module):
    """Skip transformer: (n - 1) / 2 blocks in, one in the middle, as many out, a final norm.

    Args:
        dim: width D.
        num_layers: n, odd.
        build: makes one block.
    """

    def __init__(self, dim: int, num_layers: int, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        if num_layers < 1 or num_layers % 2 == 0:
            raise ValueError(f"a skip transformer needs an odd number of layers, got {num_layers}")
        half = (num_layers - 1) // 2
        self.input_blocks = nn.ModuleList(build() for _ in range(half))
        self.middle_block = build()
        self.output_blocks = nn.ModuleList(build() for _ in range(half))
        self.linear_blocks = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        for tensor in [*self.parameters(), *self.buffers()]:
            if tensor.dim() > 1:
                nn.init.xavier_uniform_(tensor)

    def forward(self, x_BTD: Tensor, *context: Tensor | None) -> Tensor:
        """Return (B, T, D); every block is called with x and the context."""
        skipped, x = [], x_BTD
        for block in self.input_blocks:
            x = block(x, *context)
            skipped.append(x)
        x = self.middle_block(x, *context)
        for join, block in zip(self.linear_blocks, self.output_blocks, strict=True):
            x = block(join(torch.cat([x, skipped.pop()], dim=-1)), *context)
        return self.norm(x)


class SkipEncoder(SkipStack):
    """Skip transformer encoder.

    Args:
        dim: width D.
        num_layers: odd number of blocks.
        num_heads: heads per block.
        ff_dim: hidden width of the MLPs.
        dropout: everywhere, attention weights included.
        sites: build adapter sites into every attention.
    """

    def __init__(
        self, dim: int, num_layers: int, num_heads: int, ff_dim: int, dropout: float, sites: bool = False
    ) -> None:
        super().__init__(dim, num_layers, lambda: EncoderBlock(dim, num_heads, ff_dim, dropout, sites))

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, mask_BT: Tensor, num_queries: int | None = None
    ) -> Tensor:
        """Return (B, Q, D) for the first `num_queries` positions (all by default).

        A reader of the first position alone saves most of the last block: its queries and MLP run on that position.
        """
        skipped, x = [], x_BTD
        last = self.output_blocks[-1] if len(self.output_blocks) else self.middle_block
        for block in self.input_blocks:
            x = block(x, mask_BT)
            skipped.append(x)
        x = self.middle_block(x, mask_BT, num_queries if last is self.middle_block else None)
        for join, block in zip(self.linear_blocks, self.output_blocks, strict=True):
            x = join(torch.cat([x, skipped.pop()], dim=-1))
            x = block(x, mask_BT, num_queries if block is last else None)
        return self.norm(x)


class SkipDecoder(SkipStack):
    """Skip transformer decoder reading one memory token, forward(x, mask, memory). Arguments as `SkipEncoder`."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, ff_dim: int, dropout: float) -> None:
        super().__init__(dim, num_layers, lambda: DecoderBlock(dim, num_heads, ff_dim, dropout))
