"""Transformer blocks whose parameters are named and packed like those of torch's own layers, as released models are.

Letters: B batch, N positions, M memory positions, E width. Masks are bool, True = valid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention


class PackedAttention(nn.Module):
    """Multi-head attention with packed projections.

    torch's own module switches to other kernels without gradient; then sampling and training steps would differ in
    rounding, and a rollout would depend on which of its steps are trained.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query_BNE: Tensor, memory_BME: Tensor | None = None, mask_BM: Tensor | None = None) -> Tensor:
        """Return (B, N, E); without a memory, positions attend to one another."""
        width = query_BNE.shape[2]
        if memory_BME is None:
            q, k, v = linear(query_BNE, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            (of_query, of_memory) = self.in_proj_weight.split([width, 2 * width])
            (query_bias, memory_bias) = self.in_proj_bias.split([width, 2 * width])
            q = linear(query_BNE, of_query, query_bias)
            k, v = linear(memory_BME, of_memory, memory_bias).chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        mask = None if mask_BM is None else mask_BM[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class PackedBlock(nn.Module):
    """Self-attention, cross-attention if there is a memory, MLP (exact GELU); normalised before or after each.

    Args:
        width: E.
        heads: attention heads; divide E.
        ff: hidden width of the MLP.
        dropout: on every branch, inside the MLP and on attention weights.
        cross: whether there is a memory.
        norm_first: LayerNorm on the input of every branch; otherwise on the sum after it.
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
        mask_BN: Tensor | None = None,
        memory_BME: Tensor | None = None,
        memory_mask_BM: Tensor | None = None,
    ) -> Tensor:
        """Return (B, N, E)."""
        x = x_BNE
        for name in self.norms:
            norm = self.get_submodule(name)
            y = norm(x) if self.norm_first else x
            if name == "norm1":
                y = self.self_attn(y, None, mask_BN)
            elif name == self.norms[-1]:
                y = self.linear2(self.dropout(gelu(self.linear1(y))))
            else:
                y = self.multihead_attn(y, memory_BME, memory_mask_BM)
            x = x + self.dropout(y)
            x = x if self.norm_first else norm(x)
        return x
