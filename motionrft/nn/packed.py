"""Transformer blocks whose query, key and value projections are one tensor, under torch's parameter names.

Checkpoints of networks built on `torch.nn.TransformerEncoder` and `TransformerDecoder` load into them. Letters: B
batch, N positions, L memory positions, E width. Masks are bool, True = valid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention


class PackedAttention(nn.Module):
    """Multi-head attention with packed projections.

    torch's own module switches to other kernels without gradient; then sampling and training steps would differ in
    rounding, and a rollout would depend on which of its steps are trained.

    Args:
        width: E.
        heads: divide E.
        dropout: on attention weights.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query_BNE: Tensor, memory_BLE: Tensor | None, mask_BL: Tensor | None) -> Tensor:
        """Return (B, N, E); without a memory, positions attend to one another."""
        width = query_BNE.shape[2]
        if memory_BLE is None:
            q, k, v = linear(query_BNE, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            (of_query, of_memory) = self.in_proj_weight.split([width, 2 * width])
            (query_bias, memory_bias) = self.in_proj_bias.split([width, 2 * width])
            q = linear(query_BNE, of_query, query_bias)
            k, v = linear(memory_BLE, of_memory, memory_bias).chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class PackedBlock(nn.Module):
    """Self-attention, cross-attention if there is a memory, MLP with GELU; normalised before or after each.

    Args:
        width: E.
        heads: of each attention.
        ff: hidden width of the MLP.
        dropout: on every branch, on attention weights and inside the MLP.
        cross: attend to a memory as well.
        norm_first: pre-norm instead of post-norm.
    """

    def __init__(
        self, width: int, heads: int, ff: int, dropout: float, cross: bool = False, norm_first: bool = False
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = PackedAttention(width, heads, dropout)
        if cross:
            self.multihead_attn = PackedAttention(width, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(width, ff), nn.Linear(ff, width)
        self.norms = ("norm1", "norm2", "norm3") if cross else ("norm1", "norm2")
        for name in self.norms:
            self.add_module(name, nn.LayerNorm(width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BNE: Tensor,
        mask_BN: Tensor | None,
        memory_BLE: Tensor | None = None,
        memory_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Return (B, N, E); a mask None means all positions are valid."""
        x = x_BNE
        for name in self.norms:
            norm = self.get_submodule(name)
            y = norm(x) if self.norm_first else x
            if name == "norm1":
                y = self.self_attn(y, None, mask_BN)
            elif name == self.norms[-1]:
                y = self.linear2(self.dropout(gelu(self.linear1(y))))
            else:
                y = self.multihead_attn(y, memory_BLE, memory_mask_BL)
            x = x + self.dropout(y)
            x = x if self.norm_first else norm(x)
        return x


class PackedStack(nn.Module):
    """Blocks one after another; pre-norm ones are followed by a norm. Arguments as `PackedBlock`."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        ff: int,
        dropout: float,
        cross: bool = False,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PackedBlock(width, heads, ff, dropout, cross, norm_first) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()

    def forward(
        self,
        x_BNE: Tensor,
        mask_BN: Tensor | None,
        memory_BLE: Tensor | None = None,
        memory_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Return (B, N, E)."""
        for layer in self.layers:
            x_BNE = layer(x_BNE, mask_BN, memory_BLE, memory_mask_BL)
        return self.norm(x_BNE)
