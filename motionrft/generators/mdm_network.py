"""The network of the MDM family: a transformer over frames, conditioned on one sentence vector or on text tokens.

One class covers the released models and the small quickstart model; they differ in the fields of `MDMConfig` only.
Parameter names are those of the released checkpoints. Letters: B batch, T frames, N positions, D features, E width,
L text tokens. Masks are bool, True = valid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from motionrft.core.errors import ConfigError
from motionrft.core.types import Representation
from motionrft.generators.base import ModelConfig
from motionrft.nn.frames import stack_frames, unstack_frames
from motionrft.nn.packed import PackedStack


@dataclass(frozen=True)
class MDMConfig(ModelConfig):
    """Sizes and variant. Defaults are the small from-scratch model; `OFFICIAL` is the released 50-step encoder."""

    family = "mdm"
    representations = tuple(Representation)
    prediction = "x0"
    solvers = ("ddim", "ddpm")
    default_guidance = 2.5
    lora_targets: ClassVar = {
        "default": r"seqTrans\w+\.layers\.\d+\.(\w+_attn\.out_proj|linear[12])|(in|out)put_process\.\w+"
    }

    latent_dim: int = 192
    """Transformer width E."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads per block."""
    ff: int = 384
    """Hidden width of the blocks' MLPs."""
    text_dim: int = 384
    """Size of the text features."""
    text_gain: float = 1.0
    """Factor on the text features: unit-norm sentence vectors of D features are read as weak noise without sqrt(D)."""
    dropout: float = 0.1
    """Dropout everywhere, positions and attention weights included."""
    frames_per_token: int = 2
    """Consecutive frames that share one position of the transformer."""
    norm_first: bool = True
    """Pre-norm blocks with a final norm; the released models are post-norm without one."""
    arch: str = "encoder"
    """"encoder": the condition is a prefix position. "decoder": the condition is cross-attended."""
    text: str = "pooled"
    """Which text features condition: "pooled" sentence vector or "tokens" (decoder only)."""
    condition_bias: bool = True
    """Add the condition to every position as well (encoder only)."""
    time_token: bool = False
    """Prepend the time embedding to the decoder's queries (decoder only)."""
    mask_frames: bool = True
    """Attention ignores padded frames. Released models without it must run at their full number of frames."""
    text_dropout: float = 0.1
    """Probability of training a clip without its caption, for classifier-free guidance."""
    velocity_weight: float = 2.0
    """Weight of the frame-difference error in the pre-training loss."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        sizes = ("latent_dim", "layers", "heads", "ff", "text_dim", "frames_per_token")
        rules = [(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}") for name in sizes]
        decoder = self.arch == "decoder"
        rules += [
            (self.latent_dim % 2 == 0, f"latent_dim must be even, got {self.latent_dim}"),
            (self.heads < 1 or self.latent_dim % self.heads == 0, f"heads {self.heads} must divide {self.latent_dim}"),
            (0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}"),
            (0 <= self.text_dropout < 1, f"text_dropout must be in [0, 1), got {self.text_dropout}"),
            (self.text_gain > 0, f"text_gain must be positive, got {self.text_gain}"),
            (self.velocity_weight >= 0, f"velocity_weight must be >= 0, got {self.velocity_weight}"),
            (self.arch in ("encoder", "decoder"), f"arch must be encoder or decoder, got {self.arch!r}"),
            (self.text in ("pooled", "tokens"), f"text must be pooled or tokens, got {self.text!r}"),
            (decoder or self.text == "pooled", "text=tokens needs arch=decoder"),
            (decoder or not self.time_token, "time_token needs arch=decoder"),
            (not (decoder and self.condition_bias), "condition_bias needs arch=encoder"),
            (self.mask_frames or self.frames_per_token == 1, "frames_per_token > 1 needs mask_frames"),
        ]
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise ConfigError("mdm: " + "; ".join(problems))


OFFICIAL = MDMConfig(
    latent_dim=512,
    layers=8,
    heads=4,
    ff=1024,
    text_dim=512,
    frames_per_token=1,
    norm_first=False,
    condition_bias=False,
    mask_frames=False,
    velocity_weight=0.0,
)
OFFICIAL_DECODER = replace(OFFICIAL, arch="decoder")
"""The optional release that cross-attends to one CLIP vector."""
OFFICIAL_DECODER_TOKENS = replace(OFFICIAL_DECODER, text="tokens", text_dim=768, mask_frames=True)
"""The released 50-step decoder on DistilBERT tokens."""


def interleaved_sinusoid(position_N: Tensor, dim: int) -> Tensor:
    """Return [sin(p f_0), cos(p f_0), sin(p f_1), ...] with f_i = 10000^(-2i / dim), (N, dim) float32."""
    frequency = torch.exp(
        torch.arange(0, dim, 2, dtype=torch.float64, device=position_N.device) * (-math.log(10000.0) / dim)
    )
    angle = position_N.double()[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


class MDM(nn.Module):
    """Predicts clean normalised motion from a noisy one, the diffusion step and the caption.

    Args:
        features: D.
        config: sizes and variant.
    """

    def __init__(self, features: int, config: MDMConfig) -> None:
        super().__init__()
        self.config, self.features = config, features
        width, patch = config.latent_dim, features * config.frames_per_token
        self.input_process = nn.ModuleDict({"poseEmbedding": nn.Linear(patch, width)})
        self.output_process = nn.ModuleDict({"poseFinal": nn.Linear(width, patch)})
        time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_timestep = nn.ModuleDict({"time_embed": time_embed})
        self.embed_text = nn.Linear(config.text_dim, width)
        cross = config.arch == "decoder"
        stack = PackedStack(width, config.layers, config.heads, config.ff, config.dropout, cross, config.norm_first)
        if not cross:
            self.seqTransEncoder = stack
        else:
            self.seqTransDecoder = stack
        self.dropout = nn.Dropout(config.dropout)

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
        """Return the clean estimate (B, T, D); arbitrary beyond each length.

        Args:
            x_BTD: normalised noisy motion.
            t_B: diffusion steps, as the network was trained with (integers).
            tokens_BLC: text tokens, read when `config.text` is "tokens".
            mask_BL: bool, valid text tokens.
            pooled_BC: sentence vectors, read when `config.text` is "pooled".
            keep_B: bool, False replaces the text by zeros (the projection's bias remains).
            lengths_B: int64 valid frames.
        """
        config = self.config
        dtype = self.embed_text.weight.dtype
        waves = interleaved_sinusoid(t_B, config.latent_dim).to(dtype)
        time_BE = self.embed_timestep["time_embed"](waves)
        text = tokens_BLC if config.text == "tokens" else pooled_BC[:, None]
        condition_BLE = self.embed_text(config.text_gain * text.to(dtype) * keep_B[:, None, None]) + time_BE[:, None]

        h, mask_BN = self._embed_frames(x_BTD, lengths_B)
        if config.arch == "encoder":
            if config.condition_bias:
                h = h + condition_BLE
            h, mask_BN = self._positions(*_prepend(condition_BLE, h, mask_BN))
            h = self.seqTransEncoder(h, mask_BN)[:, 1:]
        else:
            if config.time_token:
                h, mask_BN = _prepend(time_BE[:, None], h, mask_BN)
            h, mask_BN = self._positions(h, mask_BN)
            memory_mask = mask_BL if config.text == "tokens" else None
            h = self.seqTransDecoder(h, mask_BN, condition_BLE, memory_mask)[:, int(config.time_token) :]
        out = self.output_process["poseFinal"](h)
        return unstack_frames(out, x_BTD.shape[1], config.frames_per_token)

    def _embed_frames(self, x_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return one vector per group of frames (B, N, E), and which of them hold a valid frame (None: all)."""
        groups, mask_BN = stack_frames(x_BTD, lengths_B, self.config.frames_per_token)
        h = self.input_process["poseEmbedding"](groups.to(self.embed_text.weight.dtype))
        return h, mask_BN if self.config.mask_frames else None

    def _positions(self, h_BNE: Tensor, mask_BN: Tensor | None) -> tuple[Tensor, Tensor | None]:
        places = torch.arange(h_BNE.shape[1], device=h_BNE.device)
        return self.dropout(h_BNE + interleaved_sinusoid(places, h_BNE.shape[2]).to(h_BNE.dtype)), mask_BN


def _prepend(token_B1E: Tensor, h_BNE: Tensor, mask_BN: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the sequence with one more valid position in front."""
    mask = None if mask_BN is None else torch.cat([torch.ones_like(mask_BN[:, :1]), mask_BN], dim=1)
    return torch.cat([token_B1E, h_BNE], dim=1), mask
