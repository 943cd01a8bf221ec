"""Self-attention with explicit projections, and the sites where low-rank adapters attach.

Letters: B batch, T positions, D width, H heads. Masks are bool, True = valid key.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionrft.nn.dropout import attention


class Site(nn.Linear):
    """An identity map shaped like a D x D linear layer, so that a PEFT LoRA layer can wrap it.

    Wrapped, it computes x + s B A x: a residual on the attention's input or output, which is what the released reward
    adapters hold. It copies its input because PEFT's mixed-adapter batches add into the base output in place; without
    the copy they would change the tensor that the other sites and the residual branch read.
    """

    def __init__(self, dim: int) -> None:
        nn.Module.__init__(self)  # not Linear's: there is no weight to make
        self.in_features = self.out_features = dim
        self.register_buffer("weight", torch.empty(0), persistent=False)  # PEFT asks it for a device and a dtype
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return a copy of x."""
        return x.clone()


class SelfAttention(nn.Module):
    """Multi-head self-attention, q, k, v and output as separate Linear layers.

    Args:
        dim: width D.
        num_heads: heads H; divides D.
        dropout: on attention weights.
        sites: put an adapter `Site` before q, k, v and after the output projection.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0, sites: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide dim {dim}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.q_site, self.k_site, self.v_site, self.o_site = (Site(dim) if sites else nn.Identity() for _ in range(4))

    def forward(self, x_BTD: Tensor, mask_BT: Tensor, num_queries: int | None = None) -> Tensor:
        """Return attention output for the first `num_queries` positions (all by default), (B, Q, D)."""
        queries = x_BTD if num_queries is None else x_BTD[:, :num_queries]
        q = self._split(self.q_proj(self.q_site(queries)))
        k = self._split(self.k_proj(self.k_site(x_BTD)))
        v = self._split(self.v_proj(self.v_site(x_BTD)))
        dropout = self.dropout if self.training else 0.0
        mixed = attention(q, k, v, mask_BT, dropout)
        return self.o_site(self.out_proj(mixed.transpose(1, 2).flatten(2)))

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class SingleTokenAttention(nn.Module):
    """Cross-attention to a memory of one token: the softmax over one key is 1, so only value and output matter.

    Query and key weights have no influence and no gradient. They are kept as buffers because reference checkpoints
    hold them, and as buffers they cannot trip engines that refuse parameters without gradient.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for name in ("q", "k"):
            self.register_buffer(f"{name}_weight", torch.zeros(dim, dim))
            self.register_buffer(f"{name}_bias", torch.zeros(dim))

    def forward(self, memory_BD: Tensor) -> Tensor:
        """Return the same output for every query, (B, 1, D)."""
        return self.out_proj(self.v_proj(memory_BD))[:, None]
