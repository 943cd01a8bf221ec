"""The causal auto-encoder of latent ACMDM: every joint's track by itself, four frames to one latent.

No layer looks ahead in time: latent k depends on frames up to 4 k + 3 and influences frames from 4 k on, so cutting the
end of a clip changes nothing before it. Parameter names are those of the released checkpoints. Letters: B batch,
T frames, L = T / 4 latents, J joints, C latent channels, W width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from motionrft.generators.acmdm_network import ACMDMConfig, released

FRAMES_PER_LATENT = 4
_STAGES = 2  # each halves the frames
_AXES = 3


@dataclass(frozen=True)
class ACMDMLatentConfig(ACMDMConfig):
    """Sizes of the flow on auto-encoder latents, and of the auto-encoder. Defaults are the small from-scratch model."""

    stages = ("autoencoder", "generator")

    latent_channels: int = 4
    """Numbers per joint and latent, C."""
    ae_width: int = 32
    """Convolution width W."""
    ae_depth: int = 3
    """Residual blocks per stage; their dilations are powers of 3."""
    ae_dropout: float = 0.0
    """Dropout inside residual blocks; the published auto-encoder was trained with 0.2."""
    variational: bool = False
    """The encoder gives means and log-variances and the mean is the latent: published variational twins, not trained
    here."""

    def problems(self) -> list[str]:
        """Return what contradicts itself."""
        sizes = ("latent_channels", "ae_width", "ae_depth")
        found = [f"{name} must be >= 1, got {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]
        if not 0 <= self.ae_dropout < 1:
            found.append(f"ae_dropout must be in [0, 1), got {self.ae_dropout}")
        return super().problems() + found


def released_latent(scale: str, patch: int = 22) -> ACMDMLatentConfig:
    """Return the published latent model: "S", "B", "L" or "XL", patches of 22, 11 or 2 joints."""
    return latent(released(scale, patch), ae_width=512, ae_dropout=0.2)


def latent(model: ACMDMConfig, **sizes: Any) -> ACMDMLatentConfig:
    """Return the model on latents with the same transformer; `sizes` are fields of the auto-encoder."""
    return ACMDMLatentConfig(**asdict(model), **sizes)


class _CausalConv(nn.Conv2d):
    """Convolution over time, padded on the left so that it keeps the number of frames and never looks ahead."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, dilation: int = 1) -> None:
        super().__init__(inputs, outputs, (size, 1), dilation=(dilation, 1))
        self.left = dilation * (size - 1)

    def forward(self, x_BCTJ: Tensor) -> Tensor:
        """Return (B, outputs, T, J)."""
        return super().forward(pad(x_BCTJ, (0, 0, self.left, 0)))


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = _CausalConv(width, width, dilation=dilation), _CausalConv(width, width, size=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor shaped like x."""
        return x + self.dropout(self.conv2(silu(self.conv1(silu(x)))))


def _residuals(config: ACMDMLatentConfig) -> list[nn.Module]:
    dilations = [3**i for i in reversed(range(config.ae_depth))]
    return [_Residual(config.ae_width, dilation, config.ae_dropout) for dilation in dilations]


class _Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _CausalConv(width, width)

    def forward(self, x_BCTJ: Tensor) -> Tensor:
        """Return twice the frames."""
        return self.conv(x_BCTJ.repeat_interleave(2, dim=2))


class _Encoder(nn.Module):
    def __init__(self, config: ACMDMLatentConfig) -> None:
        super().__init__()
        width = config.ae_width
        self.conv_in = _CausalConv(_AXES, width)
        layers: list[nn.Module] = []
        for _ in range(_STAGES):
            halve = nn.Conv2d(width, width, (4, 1), stride=(2, 1))
            layers += [nn.ZeroPad2d((0, 0, 2, 0)), halve, *_residuals(config)]
        self.model = nn.Sequential(*layers)
        self.conv_out = _CausalConv(width, config.latent_channels * (2 if config.variational else 1))

    def forward(self, x_BCTJ: Tensor) -> Tensor:
        """Return (B, outputs, T // 4, J)."""
        return self.conv_out(self.model(self.conv_in(x_BCTJ)))


class _Decoder(nn.Module):
    def __init__(self, config: ACMDMLatentConfig) -> None:
        super().__init__()
        width = config.ae_width
        self.conv_in = _CausalConv(config.latent_channels, width)
        self.model = nn.Sequential(*[m for _ in range(_STAGES) for m in (*_residuals(config), _Upsample(width))])
        self.conv_out1, self.conv_out2 = _CausalConv(width, width), _CausalConv(width, _AXES)

    def forward(self, z_BCLJ: Tensor) -> Tensor:
        """Return (B, 3, 4 L, J)."""
        return self.conv_out2(silu(self.conv_out1(self.model(self.conv_in(z_BCLJ)))))


class CausalAutoencoder(nn.Module):
    """Normalised joint positions to latents and back. Arguments: see `ACMDMLatentConfig`."""

    def __init__(self, config: ACMDMLatentConfig) -> None:
        super().__init__()
        self.channels = config.latent_channels
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)

    def encode(self, motion_BTJ3: Tensor) -> Tensor:
        """Return latents (B, T // 4, J, C); frames beyond a multiple of 4 are not read."""
        x = motion_BTJ3.permute(0, 3, 1, 2).to(self.encoder.conv_in.weight.dtype)
        return self.encoder(x)[:, : self.channels].permute(0, 2, 3, 1)

    def decode(self, z_BLJC: Tensor) -> Tensor:
        """Return motion (B, 4 L, J, 3)."""
        z = z_BLJC.permute(0, 3, 1, 2).to(self.decoder.conv_in.weight.dtype)
        return self.decoder(z).permute(0, 2, 3, 1)

    def forward(self, motion_BTJ3: Tensor) -> Tensor:
        """Return the reconstruction of the first 4 (T // 4) frames."""
        return self.decode(self.encode(motion_BTJ3))


class LatentSpace(nn.Module):
    """An auto-encoder with the statistics of its latents: what a latent generator is not trained with."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ACMDMLatentConfig) -> None:
        super().__init__()
        self.autoencoder = CausalAutoencoder(config)
        self.register_buffer("mean", torch.zeros(config.latent_channels))
        self.register_buffer("std", torch.ones(config.latent_channels))

    def encode(self, motion_BTJ3: Tensor) -> Tensor:
        """Return standardised latents (B, T // 4, J, C)."""
        return (self.autoencoder.encode(motion_BTJ3) - self.mean) / self.std

    def decode(self, state_BLJC: Tensor) -> Tensor:
        """Return normalised motion (B, 4 L, J, 3) of standardised latents; differentiable."""
        return self.autoencoder.decode(state_BLJC * self.std + self.mean)
