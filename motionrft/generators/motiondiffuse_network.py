"""The network of the MotionDiffuse family: linear attention over frames, a small text tower, stylised residuals.

Parameter names are those of the released checkpoints. Letters: B batch, T frames, D features, L text tokens, C
features of the text encoder, W width, S width of the time vector (4 W), U width of the text tower, H heads. Masks are
bool, True = valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from motionrft.core.errors import ConfigError
from motionrft.core.types import Representation, valid_mask
from motionrft.generators.base import ModelConfig
from motionrft.nn.embeddings import time_sinusoid
from motionrft.nn.packed import PackedStack

TEXT_TOWER = ("text_pre_proj", "textTransEncoder", "text_ln", "text_proj")
"""Sub-modules between text encoder and denoising blocks."""
TARGETS = ("velocity", "noise")


@dataclass(frozen=True)
class MotionDiffuseConfig(ModelConfig):
    """Sizes and variant. Defaults are the small from-scratch model; `OFFICIAL` is the released one."""

    family = "motiondiffuse"
    representations = tuple(Representation)
    prediction = "eps"
    solvers = ("ddpm", "ddim")
    default_guidance = 1.0
    lora_targets: ClassVar[Mapping[str, str]] = {
        "default": r"temporal_decoder_blocks\.\d+\.((sa|ca)_block\.(query|key|value)|ffn\.linear[12]|"
        r"\w+\.proj_out\.(emb_layers\.1|out_layers\.2))|joint_embed|out",
        "attention": r"temporal_decoder_blocks\.\d+\.(sa|ca)_block\.(query|key|value)",
    }
    kept_in_finetuning = TEXT_TOWER

    latent_dim: int = 128
    """Width W."""
    layers: int = 3
    """Denoising blocks."""
    heads: int = 4
    """Heads of the linear attention."""
    ff: int = 256
    """Hidden width of the blocks' MLPs."""
    text_dim: int = 384
    """Features per text token, C."""
    text_width: int = 64
    """Width U of the text tower."""
    text_layers: int = 1
    """Transformer blocks of the text tower."""
    text_heads: int = 4
    """Attention heads of the text tower."""
    text_ff: int = 128
    """Hidden width of the text tower's MLPs."""
    target: str = "velocity"
    """What the network's output is trained to be: the "noise" (published), or the "velocity" v from which the noise
    follows. An error in the noise is multiplied by up to 157 in the motion, an error in v is not; and noise needs a
    width of at least the motion's features. Trained for a minute or two, only the velocity gives motion."""
    dropout: float = 0.0
    """Dropout everywhere; the published model has none."""
    positions: int = 196
    """Learned frame positions: the longest motion the network can make."""
    text_dropout: float = 0.0
    """Probability of training a clip without its caption. The published model was trained with every caption, so it
    cannot be guided; a model trained with some dropout can (generator.guidance)."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        sizes = ("latent_dim", "layers", "heads", "ff", "text_dim", "text_width", "text_heads", "text_ff", "positions")
        rules = [(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}") for name in sizes]
        rules += [
            (self.text_layers >= 0, f"text_layers must be >= 0, got {self.text_layers}"),
            (self.latent_dim % 2 == 0, f"latent_dim must be even, got {self.latent_dim}"),
            (self.heads < 1 or self.latent_dim % self.heads == 0, f"heads {self.heads} must divide {self.latent_dim}"),
            (
                self.text_heads < 1 or self.text_width % self.text_heads == 0,
                f"text_heads {self.text_heads} must divide text_width {self.text_width}",
            ),
            (self.target in TARGETS, f"target must be one of {TARGETS}, got {self.target!r}"),
            (0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}"),
            (0 <= self.text_dropout < 1, f"text_dropout must be in [0, 1), got {self.text_dropout}"),
        ]
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise ConfigError("motiondiffuse: " + "; ".join(problems))


OFFICIAL = MotionDiffuseConfig(
    latent_dim=512,
    layers=8,
    heads=8,
    ff=1024,
    text_dim=512,
    text_width=256,
    text_layers=4,
    text_heads=4,
    text_ff=2048,
    target="noise",
)
"""The released models, HumanML3D (263 features, 20 fps) and KIT (251 features, 12.5 fps) alike."""


class MotionDiffuse(nn.Module):
    """Predicts the noise (or velocity) in a noisy normalised motion from the diffusion step and the caption's tokens.

    Args:
        features: D.
        config: sizes and variant.
    """

    def __init__(self, features: int, config: MotionDiffuseConfig) -> None:
        super().__init__()
        self.config, self.features = config, features
        width, time_dim = config.latent_dim, 4 * config.latent_dim
        self.sequence_embedding = nn.Parameter(0.02 * torch.randn(config.positions, width))
        self.text_pre_proj = nn.Linear(config.text_dim, config.text_width)
        self.textTransEncoder = PackedStack(
            config.text_width, config.text_layers, config.text_heads, config.text_ff, config.dropout
        )
        self.text_ln = nn.LayerNorm(config.text_width)
        self.text_proj = nn.Sequential(nn.Linear(config.text_width, time_dim))
        self.joint_embed = nn.Linear(features, width)
        self.time_embed = nn.Sequential(nn.Linear(width, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.temporal_decoder_blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.out = _zeroed(nn.Linear(width, features))

    def forward(
        self,
        x_BTD: Tensor,
        t_B: Tensor,
        tokens_BLC: Tensor,
        mask_BL: Tensor,
        pooled_BC: Tensor,
        keep_B: Tensor,
        lengths_B: Tensor,
    ) -> Tensor:
        """Return what `config.target` says (B, T, D); arbitrary beyond each length.

        Args:
            x_BTD: normalised noisy motion, T <= `config.positions`.
            t_B: diffusion steps, as the network was trained with (integers).
            tokens_BLC: text tokens.
            mask_BL: bool, valid text tokens, at least one per row.
            pooled_BC: not read.
            keep_B: bool, False replaces the text tokens by zeros.
            lengths_B: int64 valid frames.
        """
        del pooled_BC
        tokens_BLC = tokens_BLC.to(self.sequence_embedding.dtype) * keep_B[:, None, None]
        summary_BS, text_BLU = self.encode_text(tokens_BLC, mask_BL)
        return self.denoise(x_BTD, t_B, summary_BS, text_BLU, mask_BL, lengths_B)

    def encode_text(self, tokens_BLC: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sentence summary (B, S), read off the last valid token, and the text tokens (B, L, U).

        The tower has no positions: encoders whose last token is not the summary may deliver their tokens rolled.
        """
        h_BLU = self.textTransEncoder(self.text_pre_proj(tokens_BLC), mask_BL)
        text_BLU = self.text_ln(h_BLU)
        places = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        last_B = torch.where(mask_BL, places, 0).amax(1)
        rows = torch.arange(len(mask_BL), device=mask_BL.device)
        return self.text_proj(text_BLU[rows, last_B]), text_BLU

    def denoise(
        self, x_BTD: Tensor, t_B: Tensor, summary_BS: Tensor, text_BLU: Tensor, mask_BL: Tensor, lengths_B: Tensor
    ) -> Tensor:
        """Return what `forward` does, from what `encode_text` returns."""
        emb_BS = self.embed_time(t_B) + summary_BS
        num_frames = x_BTD.shape[1]
        mask_BT = valid_mask(lengths_B, num_frames)
        h_BTW = self.joint_embed(x_BTD.to(self.sequence_embedding.dtype)) + self.sequence_embedding[:num_frames]
        for block in self.temporal_decoder_blocks:
            h_BTW = block(h_BTW, mask_BT, text_BLU, mask_BL, emb_BS)
        return self.out(h_BTW)

    def embed_time(self, t_B: Tensor) -> Tensor:
        """Return the time vector (B, S)."""
        return self.time_embed(time_sinusoid(t_B, self.config.latent_dim).to(self.sequence_embedding.dtype))


class _Stylise(nn.Module):
    """Return W2 silu(norm(h) (1 + scale) + shift) with (scale, shift) = W1 silu(emb); W2 is zero at start."""

    def __init__(self, width: int, time_dim: int, dropout: float) -> None:
        super().__init__()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * width))
        self.norm = nn.LayerNorm(width)
        self.out_layers = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), _zeroed(nn.Linear(width, width)))

    def forward(self, h_BTW: Tensor, emb_BS: Tensor) -> Tensor:
        scale, shift = self.emb_layers(emb_BS)[:, None].chunk(2, dim=-1)
        return self.out_layers(self.norm(h_BTW) * (1 + scale) + shift)


class _LinearAttention(nn.Module):
    """x + stylised attention whose cost is linear in its positions: frames to one another, or frames to text.

    Queries are distributions over the features of a head, keys over positions: y = softmax_d(q) (softmax_n(k)^T v).

    Source: Shen et al., "Efficient Attention: Attention with Linear Complexities".
    """

    def __init__(self, config: MotionDiffuseConfig, memory_width: int | None) -> None:
        super().__init__()
        width, source = config.latent_dim, memory_width or config.latent_dim
        self.heads = config.heads
        self.norm = nn.LayerNorm(width)
        if memory_width is not None:
            self.text_norm = nn.LayerNorm(memory_width)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.proj_out = _Stylise(width, 4 * width, config.dropout)

    def forward(self, x_BTW: Tensor, memory_BNU: Tensor | None, mask_BN: Tensor, emb_BS: Tensor) -> Tensor:
        """Return (B, T, W). Without a memory frames attend to one another; `mask_BN` says what can be attended to."""
        normed = self.norm(x_BTW)
        source = normed if memory_BNU is None else self.text_norm(memory_BNU)
        query_BTHd, key_BNHd, value_BNHd = (
            part.unflatten(2, (self.heads, -1)) for part in (self.query(normed), self.key(source), self.value(source))
        )
        # A padded position has weight exactly 0: what lies there does not matter, and half precision stays finite.
        weight_BNHd = key_BNHd.masked_fill(~mask_BN[:, :, None, None], -torch.inf).softmax(dim=1)
        value_BNHd = value_BNHd.masked_fill(~mask_BN[:, :, None, None], 0.0)
        context_BHde = torch.einsum("bnhd,bnhe->bhde", weight_BNHd, value_BNHd)
        y_BTHe = torch.einsum("bthd,bhde->bthe", query_BTHd.softmax(dim=-1), context_BHde)
        return x_BTW + self.proj_out(y_BTHe.flatten(2), emb_BS)


class _Mlp(nn.Module):
    """x + stylised W2 gelu(W1 x), without a norm in front."""

    def __init__(self, config: MotionDiffuseConfig) -> None:
        super().__init__()
        width = config.latent_dim
        self.linear1, self.linear2 = nn.Linear(width, config.ff), nn.Linear(config.ff, width)
        self.dropout = nn.Dropout(config.dropout)
        self.proj_out = _Stylise(width, 4 * width, config.dropout)

    def forward(self, x_BTW: Tensor, emb_BS: Tensor) -> Tensor:
        return x_BTW + self.proj_out(self.linear2(self.dropout(gelu(self.linear1(x_BTW)))), emb_BS)


class _Block(nn.Module):
    """Frames to frames, frames to text, MLP."""

    def __init__(self, config: MotionDiffuseConfig) -> None:
        super().__init__()
        self.sa_block = _LinearAttention(config, None)
        self.ca_block = _LinearAttention(config, config.text_width)
        self.ffn = _Mlp(config)

    def forward(self, x_BTW: Tensor, mask_BT: Tensor, text_BLU: Tensor, mask_BL: Tensor, emb_BS: Tensor) -> Tensor:
        x = self.sa_block(x_BTW, None, mask_BT, emb_BS)
        x = self.ca_block(x, text_BLU, mask_BL, emb_BS)
        return self.ffn(x, emb_BS)


def _zeroed(layer: nn.Linear) -> nn.Linear:
    """Return the layer with zero weights: at start, every residual branch and the output are zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
