"""The denoiser of the latent families (MLD, MLD++, MotionLCM): a skip transformer over latent, time and text tokens.

Parameter names are those of the released checkpoints below `denoiser.`. Letters: B batch, N latent tokens, d features
per latent token, E width, C text features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from motionrft.core.errors import ConfigError, explain
from motionrft.nn.embeddings import TimeEmbedding, time_sinusoid
from motionrft.nn.packed import PackedBlock
from motionrft.nn.transformer import SkipStack


@dataclass(frozen=True)
class LatentSizes:
    """Sizes that autoencoder and denoiser share. Defaults are the small from-scratch model."""

    latent_tokens: int = 4
    """Latent tokens N of a motion, whatever its length."""
    latent_dim: int = 32
    """Features d per latent token. Where it is not `width`, linear layers lie between."""
    width: int = 128
    """Transformer width E."""
    layers: int = 3
    """Blocks of each of the three transformers; odd."""
    heads: int = 4
    """Attention heads per block."""
    ff: int = 256
    """Hidden width of the blocks' MLPs."""
    dropout: float = 0.0
    """Dropout in all blocks, attention weights included; 0.1 in the released models."""
    text_dim: int = 384
    """Size of the sentence vectors."""
    text_gain: float = 20.0
    """Factor on the sentence vectors: about the root of their size makes unit-norm ones readable. 1 when released."""
    text_relu: bool = False
    """Rectify the sentence vector before its projection, as the models of one latent token do."""
    time_dim: int = 128
    """Size of the sinusoid of the diffusion step; 768 in the released models."""
    positions: int = 500
    """Rows of the learned position tables: groups of frames + 2 N must not exceed it."""
    frames_per_token: int = 1
    """Consecutive frames that share one position of the autoencoder's transformers; 1 in the released models."""
    smooth_positions: bool = True
    """Position tables start as sinusoids, from which short trainings learn faster; False: uniform, as published."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        problems = self.problems()
        if problems:
            raise ConfigError(f"{getattr(self, 'family', 'latent generator')}: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """Return what contradicts itself; families add their own."""
        sizes = [
            *("latent_tokens", "latent_dim", "width", "layers", "heads", "ff", "text_dim", "time_dim", "positions"),
            "frames_per_token",
        ]
        rules = [(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}") for name in sizes]
        rules += [
            (self.layers % 2 == 1, f"layers must be odd (skip connections mirror them), got {self.layers}"),
            (self.heads < 1 or self.width % self.heads == 0, f"heads {self.heads} must divide width {self.width}"),
            (self.time_dim % 2 == 0, f"time_dim must be even, got {self.time_dim}"),
            (
                self.width % 2 == 0 or not self.smooth_positions,
                f"smooth_positions need an even width, got {self.width}",
            ),
            (0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}"),
            (self.text_gain > 0, f"text_gain must be positive, got {self.text_gain}"),
        ]
        return [message for holds, message in rules if not holds]

    @property
    def projected(self) -> bool:
        """Whether latents have another size than the transformers."""
        return self.latent_dim != self.width

    def stack(self, cross: bool = False) -> SkipStack:
        """Return one of the three transformers; `cross` adds a memory that every block reads."""
        build = (self.width, self.heads, self.ff, self.dropout, cross)
        return SkipStack(self.width, self.layers, lambda: PackedBlock(*build))


class PositionTable(nn.Module):
    """Learned positions, at start sinusoids or uniform in [0, 1)."""

    def __init__(self, sizes: LatentSizes) -> None:
        super().__init__()
        rows, width = sizes.positions, sizes.width
        start = time_sinusoid(torch.arange(rows), width).float() if sizes.smooth_positions else torch.rand(rows, width)
        self.pe = nn.Parameter(start[:, None].contiguous())

    def forward(self, x_BNE: Tensor) -> Tensor:
        """Return x with its positions added.

        Raises:
            ConfigError: more positions than the table has.
        """
        rows, count = self.pe.shape[0], x_BNE.shape[1]
        if count > rows:
            raise ConfigError(
                explain(f"at most {rows} positions", f"{count}", "latent generator", "Shorten the motion.")
            )
        return x_BNE + self.pe[:count, 0]


def guidance_embedding(w_B: Tensor, size: int) -> Tensor:
    """Return [sin(1000 w f_i), cos(1000 w f_i)] with f_i = 10000^(-i / (size / 2 - 1)), (B, size) float32.

    Args:
        w_B: guidance scale minus 1.
        size: even, >= 4.

    Arguments of the waves reach 1.5e4. They are rounded as in training, in float32: exact ones differ by up to 5e-4.

    Source: latent consistency models, guidance-scale embedding.
    """
    index = torch.arange(size // 2, dtype=torch.float32, device=w_B.device)
    frequency = torch.exp(index * -(math.log(10000.0) / (size // 2 - 1)))
    angle = (w_B.float() * 1000.0)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class LatentTimeEmbedding(TimeEmbedding):
    """Time embedding on a float32 sinusoid, for consistency models shifted by a projection of the guidance strength.

    Args:
        dim: output size.
        sinusoid_size: of the time's sinusoid.
        guidance_dim: of the guidance embedding; 0 = none. Its projection starts at zero.
    """

    def __init__(self, dim: int, sinusoid_size: int, guidance_dim: int = 0) -> None:
        super().__init__(dim, sinusoid_size)
        self.guidance_dim = guidance_dim
        if guidance_dim:
            self.cond_proj = nn.Linear(guidance_dim, sinusoid_size, bias=False)
            nn.init.zeros_(self.cond_proj.weight)

    def forward(self, t_B: Tensor, guidance_BG: Tensor | None = None) -> Tensor:
        """Return (B, D) of times and, for models that have it, `guidance_embedding`.

        Raises:
            ValueError: guidance is missing, or not wanted.
        """
        if (guidance_BG is None) != (self.guidance_dim == 0):
            raise ValueError(f"guidance embedding of size {self.guidance_dim} (0 = none) must be given exactly then")
        dtype = self.linear_1.weight.dtype
        waves = time_sinusoid(t_B, self.sinusoid_size, dtype=torch.float32).to(dtype)
        if guidance_BG is not None:
            waves = waves + self.cond_proj(guidance_BG.to(dtype))
        return self.linear_2(silu(self.linear_1(waves)))


class MLDDenoiser(nn.Module):
    """Predicts the noise in a latent from the diffusion step and the caption. It does not know the motion's length.

    Args:
        sizes: of the model.
        guidance_dim: size of the guidance embedding of consistency models; 0 = none.
    """

    def __init__(self, sizes: LatentSizes, guidance_dim: int = 0) -> None:
        super().__init__()
        width = sizes.width
        self.text_gain = sizes.text_gain
        self.latent_pre: nn.Module = nn.Linear(sizes.latent_dim, width) if sizes.projected else nn.Identity()
        self.latent_post: nn.Module = nn.Linear(width, sizes.latent_dim) if sizes.projected else nn.Identity()
        self.time_embedding = LatentTimeEmbedding(width, sizes.time_dim, guidance_dim)
        self.emb_proj = nn.Sequential(nn.ReLU() if sizes.text_relu else nn.Identity(), nn.Linear(sizes.text_dim, width))
        self.query_pos = PositionTable(sizes)
        self.encoder = sizes.stack()

    def forward(self, x_BNd: Tensor, t_B: Tensor, text_BC: Tensor, guidance_BG: Tensor | None = None) -> Tensor:
        """Return the noise estimate (B, N, d).

        Args:
            x_BNd: noisy latents.
            t_B: int64 diffusion steps.
            text_BC: sentence vectors.
            guidance_BG: `guidance_embedding`, for models that have it. It is made outside: engines of low precision
                round what they pass in.
        """
        dtype = self.query_pos.pe.dtype
        latents = self.latent_pre(x_BNd.to(dtype))
        time = self.time_embedding(t_B, guidance_BG)[:, None]
        text = self.emb_proj(self.text_gain * text_BC.to(dtype))[:, None]
        h = self.encoder(self.query_pos(torch.cat([latents, time, text], dim=1)), None)
        return self.latent_post(h[:, : x_BNd.shape[1]])
