"""The network of the ACMDM family: a transformer over patches of joints, modulated by flow time and sentence vector.

Parameter names are those of the released checkpoints. Letters: B batch, L state frames, J joints, C channels per joint,
P joints per patch, N tokens = L J / P (frame by frame), E width, H heads. Masks are bool, True = valid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from motionrft.core.errors import ConfigError, explain
from motionrft.core.types import Representation, valid_mask
from motionrft.diffusion.prediction import FLOW_OUTPUTS, flow_remaining
from motionrft.generators.base import ModelConfig
from motionrft.nn.embeddings import time_sinusoid

HEAD_DIM = 64
"""Features per attention head: fixed in the published models, whose width is 64 per head."""
_TIME_WAVES = 256
_EPS = 1e-6


@dataclass(frozen=True)
class ACMDMConfig(ModelConfig):
    """Sizes of the flow on joint positions. Defaults are the small from-scratch model; `released` gives the published.

    Latent models are `acmdm_autoencoder.ACMDMLatentConfig`.
    """

    family = "acmdm"
    representations = (Representation.JOINT,)
    prediction = "velocity"
    solvers = ("euler",)
    default_guidance = 3.0
    lora_targets: ClassVar = {"default": r"ACMDMTransformer\.\d+\.(attn\.(qkv|proj)|mlp\.(w12|w3))"}

    layers: int = 2
    """Transformer blocks."""
    heads: int = 2
    """Attention heads of 64 features: the width is 64 heads."""
    patch: int = 22
    """Neighbouring joints that share a token; divides the number of joints."""
    text_dim: int = 384
    """Size of the sentence vector."""
    text_gain: float = 1.0
    """Factor on the sentence vector: one of unit norm and D features is read as weak noise without sqrt(D)."""
    text_dropout: float = 0.1
    """Probability of training a clip without its caption, for classifier-free guidance."""
    output: str = "velocity"
    """What the last layer gives: "velocity" (the released models), or "clean": the state, from which the velocity
    follows. A velocity carries all of the noise; small networks shake less with a clean state."""
    frame_weight: float = 0.0
    """Weight of the frame-difference error in the pre-training loss."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        problems = self.problems()
        if problems:
            raise ConfigError("acmdm: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """Return what contradicts itself."""
        sizes = ("layers", "heads", "patch", "text_dim")
        rules = [(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}") for name in sizes]
        rules += [
            (0 <= self.text_dropout < 1, f"text_dropout must be in [0, 1), got {self.text_dropout}"),
            (self.text_gain > 0, f"text_gain must be positive, got {self.text_gain}"),
            (self.output in FLOW_OUTPUTS, f"output must be one of {FLOW_OUTPUTS}, got {self.output!r}"),
            (self.frame_weight >= 0, f"frame_weight must be >= 0, got {self.frame_weight}"),
        ]
        return [message for holds, message in rules if not holds]

    @property
    def width(self) -> int:
        """Transformer width E."""
        return HEAD_DIM * self.heads


SCALES = {"S": 8, "B": 12, "L": 16, "XL": 20}
"""Published scale -> number of blocks, which is also the number of heads."""


def released(scale: str, patch: int = 22) -> ACMDMConfig:
    """Return the published model on joint positions: "S", "B", "L" or "XL", patches of 22, 11 or 2 joints."""
    return ACMDMConfig(layers=SCALES[scale], heads=SCALES[scale], patch=patch, text_dim=512)


def hidden_width(width: int) -> int:
    """Return the hidden width of the gated MLP: two thirds of 4 E, rounded down."""
    return 8 * width // 3


def rotary_base(max_tokens: int) -> int:
    """Return the slowest period over 2 pi: 8 N / pi, rounded up to the next hundred (an exact hundred as well)."""
    return (int(8 * max_tokens / math.pi) // 100 + 1) * 100


def rotary_angles(num_tokens: int, base: int, device: torch.device | str | None = None) -> Tensor:
    """Return n * base^(-e) for token n and 32 exponents e from 0 to 1, both ends included, (N, 32) float64.

    Usual rotary embeddings stop short of exponent 1; the published models do not.
    """
    exponents = torch.linspace(0.0, 1.0, HEAD_DIM // 2, dtype=torch.float64, device=device)
    return torch.arange(num_tokens, dtype=torch.float64, device=device)[:, None] * base ** (-exponents)


def rotate(x_BHND: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Return q or k with feature pairs (i, i + 32) turned by their angle, in the tables' precision or better."""
    first, second = x_BHND.chunk(2, dim=-1)
    turned = torch.cat([first * cos_ND - second * sin_ND, second * cos_ND + first * sin_ND], dim=-1)
    return turned.to(x_BHND.dtype)


class _RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) times a learned weight, in float32 or better."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x in its own dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + _EPS).rsqrt() * self.weight).to(x.dtype)


def _modulation(width: int, parts: int) -> nn.Sequential:
    """Return SiLU and Linear to `parts` vectors of the width; index 1 is the Linear's published name."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = _RMSNorm(HEAD_DIM), _RMSNorm(HEAD_DIM)

    def forward(self, x_BNE: Tensor, mask_BN: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, N, E)."""
        q, k, v = self.qkv(x_BNE).unflatten(2, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), *tables), rotate(self.k_norm(k), *tables)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask_BN[:, None, None, :])
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = hidden_width(width)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return w3(silu(a) b), shaped like x."""
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(silu(a) * b)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = _RMSNorm(width), _Attention(width)
        self.norm2, self.mlp = _RMSNorm(width), _MLP(width)
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, h_BNE: Tensor, y_B1E: Tensor, mask_BN: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, N, E)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(y_B1E).chunk(6, dim=-1)
        h = h_BNE + gate * self.attn(self.norm1(h_BNE) * (1 + scale) + shift, mask_BN, tables)
        return h + mlp_gate * self.mlp(self.norm2(h) * (1 + mlp_scale) + mlp_shift)


class _FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final, self.linear = _RMSNorm(width), nn.Linear(width, outputs)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, h_BNE: Tensor, y_B1E: Tensor) -> Tensor:
        """Return (B, N, outputs)."""
        shift, scale = self.adaLN_modulation(y_B1E).chunk(2, dim=-1)
        return self.linear(self.norm_final(h_BNE) * (1 + scale) + shift)


class ACMDM(nn.Module):
    """Predicts the velocity of a flow state of joints, from the state, the flow time and the sentence vector.

    Its output is exactly 0 before training: gates and the last layer start at zero.

    Args:
        joints: J.
        channels: C.
        max_length: longest state L; it sets the rotary base, so it belongs to the weights.
        config: sizes.

    Raises:
        ConfigError: patches that do not divide the joints.
    """

    def __init__(self, joints: int, channels: int, max_length: int, config: ACMDMConfig) -> None:
        super().__init__()
        if joints % config.patch:
            raise ConfigError(
                explain(f"a patch that divides {joints} joints", str(config.patch), "acmdm", "Change model.patch.")
            )
        width, patch = config.width, config.patch
        self.config, self.joints, self.channels = config, joints, channels
        self.patches = joints // patch
        self.base = rotary_base(max_length * self.patches)
        time_mlp = nn.Sequential(nn.Linear(_TIME_WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": time_mlp})
        self.x_embedder = nn.Conv2d(channels, width, (1, patch), stride=(1, patch))
        self.ACMDMTransformer = nn.ModuleList(_Block(width) for _ in range(config.layers))
        self.y_embedder = nn.Linear(config.text_dim, width)
        self.final_layer = _FinalLayer(width, channels * patch)
        self.clean = config.output == "clean"
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                assert module.bias is not None
                nn.init.zeros_(module.bias)
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith("t_embedder"):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight.detach().flatten(1))

    def forward(
        self,
        x_BLJC: Tensor,
        t_B: Tensor,
        tokens_BLD: Tensor,
        mask_BL: Tensor,
        pooled_BD: Tensor,
        keep_B: Tensor,
        lengths_B: Tensor,
    ) -> Tensor:
        """Return the velocity (B, L, J, C); arbitrary beyond each length.

        Args:
            x_BLJC: flow state.
            t_B: flow time, 0 noise .. 1 data, as it is (not times 1000).
            tokens_BLD: not read.
            mask_BL: not read.
            pooled_BD: sentence vectors.
            keep_B: bool, False replaces the sentence vector by zeros (the projection's bias remains).
            lengths_B: int64 valid state frames.
        """
        del tokens_BLD, mask_BL
        frames = x_BLJC.shape[1]
        h_BNE = self.embed(x_BLJC)
        y_B1E = self.condition(t_B, pooled_BD, keep_B)[:, None]
        mask_BN = valid_mask(lengths_B, frames).repeat_interleave(self.patches, dim=1)
        angles = rotary_angles(frames * self.patches, self.base, h_BNE.device)
        wide = torch.promote_types(h_BNE.dtype, torch.float32)
        tables = (angles.cos().to(wide), angles.sin().to(wide))
        for block in self.ACMDMTransformer:
            h_BNE = block(h_BNE, y_B1E, mask_BN, tables)
        # Within a token the features are patch joint by channel: already the order of the state.
        out = self.final_layer(h_BNE, y_B1E).reshape(len(h_BNE), frames, self.joints, self.channels)
        return (out - x_BLJC.to(out.dtype)) / flow_remaining(out, t_B) if self.clean else out

    def embed(self, x_BLJC: Tensor) -> Tensor:
        """Return one token per patch, frame by frame, (B, N, E)."""
        patches = self.x_embedder(x_BLJC.to(self.x_embedder.weight.dtype).permute(0, 3, 1, 2))  # (B, E, L, J / P)
        return patches.permute(0, 2, 3, 1).flatten(1, 2)

    def embed_time(self, t_B: Tensor) -> Tensor:
        """Return (B, E)."""
        return self.t_embedder["mlp"](time_sinusoid(t_B, _TIME_WAVES).to(self.x_embedder.weight.dtype))

    def condition(self, t_B: Tensor, pooled_BD: Tensor, keep_B: Tensor) -> Tensor:
        """Return what modulates every block, (B, E)."""
        text = self.config.text_gain * pooled_BD.to(self.y_embedder.weight.dtype) * keep_B[:, None]
        return self.embed_time(t_B) + self.y_embedder(text)
