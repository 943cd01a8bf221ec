"""Blocks of the HY-Motion network: two token streams that share their attention, then one stream of both.

Parameter names are those of the released checkpoints. Letters: B batch, N positions, L text tokens, E width, H heads,
K width of one head. Masks are bool, True = the query (row) sees the key (column).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

from motionrft.nn.embeddings import time_sinusoid

_EPS = 1e-6


class Modulation(nn.Module):
    """Vectors (shift, scale, gate, ...) made of the condition; zero at start, so that gated blocks do nothing."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition_B1E: Tensor) -> tuple[Tensor, ...]:
        """Return `parts` tensors (B, 1, E)."""
        return self.linear(silu(condition_B1E)).chunk(self.parts, dim=-1)


class MLP(nn.Module):
    """fc1, activation, fc2: tanh-GELU in the blocks of both streams, SiLU in the refiner."""

    def __init__(self, width: int, hidden: int, use_silu: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.use_silu = use_silu

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape of x."""
        hidden = self.fc1(x)
        return self.fc2(silu(hidden) if self.use_silu else gelu(hidden, approximate="tanh"))


class Projection(nn.Module):
    """Linear, SiLU, Linear of a feature vector."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linears = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., E)."""
        return self.linears(x)


class TimeEncoder(nn.Module):
    """Linear, SiLU, Linear of the sinusoid of `factor` times the flow time: (B,) -> (B, E)."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.factor, self.width = factor, width
        self.blocks = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """Return (B, E)."""
        waves = time_sinusoid(t_B.double() * self.factor, self.width)
        return self.blocks(waves.to(next(self.parameters()).dtype))


def rotary_table(position_N: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin (N, dim / 2) of position times 10000^(-2 i / dim); single precision or better."""
    index = torch.arange(0, dim, 2, dtype=torch.float64, device=position_N.device)
    angle = position_N.double()[:, None] * 10000.0 ** (-index / dim)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return angle.cos().to(kept), angle.sin().to(kept)


def rotate(x_BHNK: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Return x with neighbouring features (2 i, 2 i + 1) turned as a pair by the angle of their position."""
    cos, sin = table
    even, odd = x_BHNK.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x_BHNK.dtype)


def split_heads(qkv_BNE: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v (B, H, N, K) of a fused projection packed as (3, H, K)."""
    q, k, v = qkv_BNE.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return softmax attention with heads side by side, (B, N, E)."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def modulate(x_BNE: Tensor, shift_B1E: Tensor, scale_B1E: Tensor) -> Tensor:
    """Return LayerNorm(x) (1 + scale) + shift; the norm has no weights of its own."""
    return layer_norm(x_BNE, x_BNE.shape[-1:], eps=_EPS) * (1 + scale_B1E) + shift_B1E


class DoubleBlock(nn.Module):
    """Motion and text with weights of their own, attending as one sequence [motion ; text]."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        for stream in ("motion", "text"):
            self.add_module(f"{stream}_mod", Modulation(width, 6))
            self.add_module(f"{stream}_qkv", nn.Linear(width, 3 * width))
            for part in ("q", "k"):
                self.add_module(f"{stream}_{part}_norm", nn.RMSNorm(width // heads, eps=_EPS))
            self.add_module(f"{stream}_out_proj", nn.Linear(width, width))
            self.add_module(f"{stream}_mlp", MLP(width, hidden))

    def forward(
        self,
        motion_BNE: Tensor,
        text_BLE: Tensor,
        condition_B1E: Tensor,
        mask: Tensor,
        table: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return both streams, shaped as they came.

        Args:
            motion_BNE: motion tokens.
            text_BLE: text tokens.
            condition_B1E: time and sentence.
            mask: (B, 1, N + L, N + L) bool.
            table: `rotary_table` of the N + L positions.
        """
        streams = {"motion": motion_BNE, "text": text_BLE}
        parts = {name: self._part(name, "mod")(condition_B1E) for name in streams}
        heads = [self._heads(name, modulate(x, *parts[name][:2])) for name, x in streams.items()]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
        mixed = attend(rotate(q, table), rotate(k, table), v, mask)
        mixed_by = dict(zip(streams, mixed.split([motion_BNE.shape[1], text_BLE.shape[1]], dim=1), strict=True))
        for name, x in streams.items():
            _, _, gate, shift, scale, gate_mlp = parts[name]
            x = x + gate * self._part(name, "out_proj")(mixed_by[name])
            streams[name] = x + gate_mlp * self._part(name, "mlp")(modulate(x, shift, scale))
        return streams["motion"], streams["text"]

    def _part(self, stream: str, name: str) -> nn.Module:
        return self.get_submodule(f"{stream}_{name}")

    def _heads(self, stream: str, x_BNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self._part(stream, "qkv")(x_BNE), self.heads)
        return self._part(stream, "q_norm")(q), self._part(stream, "k_norm")(k), v


class SingleBlock(nn.Module):
    """Attention and MLP side by side on [motion ; text], from one projection and into another."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.widths = heads, (3 * width, hidden)
        self.modulation = Modulation(width, 3)
        self.linear1, self.linear2 = nn.Linear(width, 3 * width + hidden), nn.Linear(width + hidden, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=_EPS) for _ in range(2))

    def forward(self, x_BNE: Tensor, condition_B1E: Tensor, mask: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, N, E). Arguments as `DoubleBlock`, streams joined."""
        shift, scale, gate = self.modulation(condition_B1E)
        qkv, hidden = self.linear1(modulate(x_BNE, shift, scale)).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        mixed = attend(rotate(self.q_norm(q), table), rotate(self.k_norm(k), table), v, mask)
        return x_BNE + gate * self.linear2(torch.cat([mixed, gelu(hidden, approximate="tanh")], dim=-1))


class RefinerBlock(nn.Module):
    """Self-attention of text tokens and MLP, each behind a gate of the condition. No positions."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.self_attn_qkv = nn.Linear(width, 3 * width)
        self.self_attn_q_norm, self.self_attn_k_norm = (nn.LayerNorm(width // heads, eps=_EPS) for _ in range(2))
        self.self_attn_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = MLP(width, hidden, use_silu=True)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x_BLE: Tensor, condition_B1E: Tensor, mask: Tensor) -> Tensor:
        """Return (B, L, E); mask (B, 1, L, L)."""
        gate, gate_mlp = self.adaLN_modulation(condition_B1E)
        q, k, v = split_heads(self.self_attn_qkv(self.norm1(x_BLE)), self.heads)
        mixed = attend(self.self_attn_q_norm(q), self.self_attn_k_norm(k), v, mask)
        x = x_BLE + gate * self.self_attn_proj(mixed)
        return x + gate_mlp * self.mlp(self.norm2(x))


class TextRefiner(nn.Module):
    """Text tokens refined by one another, given the time and their mean.

    Its time is the flow time itself; the rest of the network sees it times 1000.
    """

    def __init__(self, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(width, width)
        self.context_encoder = Projection(width, width)
        self.timestep_encoder = TimeEncoder(width, factor=1.0)
        self.individual_token_refiner = nn.Module()
        self.individual_token_refiner.blocks = nn.ModuleList(RefinerBlock(width, heads, hidden) for _ in range(layers))

    def forward(self, tokens_BLE: Tensor, t_B: Tensor, mask_BL: Tensor) -> Tensor:
        """Return (B, L, E); arbitrary where masked."""
        kept = torch.where(mask_BL[..., None], tokens_BLE, 0.0)
        mean_BE = kept.sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)
        condition = (self.timestep_encoder(t_B) + self.context_encoder(mean_BE))[:, None]
        x, mask = self.input_embedder(tokens_BLE), with_self(mask_BL[:, None, None, :])
        for block in self.individual_token_refiner.get_submodule("blocks").children():
            x = block(x, condition, mask)
        return x


class FinalLayer(nn.Module):
    """Modulated norm and projection to features."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.adaLN_modulation = Modulation(width, 2)
        self.linear = nn.Linear(width, features)

    def forward(self, x_BNE: Tensor, condition_B1E: Tensor) -> Tensor:
        """Return (B, N, D)."""
        shift, scale = self.adaLN_modulation(condition_B1E)
        return self.linear(modulate(x_BNE, shift, scale))


def with_self(mask: Tensor) -> Tensor:
    """Return the mask (B, 1, N or 1, N) as (B, 1, N, N) in which every position sees itself.

    Valid positions do so anyway. Padded ones then have a key as well: a row without any would be NaN on some kernels,
    and NaN in padding spreads through zero weights.
    """
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
