"""Tiny ACMDM generators, raw and latent, whose zero-initialised gates are randomised, and a batch for them."""

from __future__ import annotations

import torch
from torch import nn

from motionrft.core.protocols import GeneratorSpec
from motionrft.core.types import Condition, MotionBatch, Representation
from motionrft.generators.acmdm import ACMDMConfig, ACMDMGenerator, ACMDMLatentConfig
from motionrft.generators.base import Build
from motionrft.representations.normalize import Normalizer

JOINT = Representation.JOINT
RAW = ACMDMConfig(layers=2, heads=1, patch=11, text_dim=12)
LATENT = ACMDMLatentConfig(layers=2, heads=1, patch=11, text_dim=12, ae_width=8, ae_depth=2)
MODELS = {"raw": RAW, "latent": LATENT}
SPEC = GeneratorSpec("acmdm", JOINT, 20.0, 24, "stub", "velocity", 1000, 3.0)
LENGTHS = (16, 11, 7, 2, 1)


def statistics() -> Normalizer:
    draw = torch.Generator().manual_seed(5)
    return Normalizer.from_pooled(torch.randn(3, generator=draw), torch.rand(3, generator=draw) + 0.5, JOINT)


def randomise(module: nn.Module, std: float = 0.2) -> None:
    """Give every tensor of a module values away from zero: gates and last layers start there."""
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=draw))


def make(config: ACMDMConfig = RAW, seed: int = 0, random_gates: bool = True, **settings) -> ACMDMGenerator:
    torch.manual_seed(seed)
    generator = ACMDMGenerator(Build(SPEC, statistics(), 12, 12), config, **settings)
    if random_gates:
        randomise(generator.network)
    if generator.is_latent:
        generator.space.mean.copy_(torch.tensor([0.1, -0.2, 0.0, 0.3]))
        generator.space.std.copy_(torch.tensor([0.5, 1.5, 1.0, 0.7]))
    return generator


def make_batch(rows: int = 5, frames: int = 16, seed: int = 1) -> MotionBatch:
    draw = torch.Generator().manual_seed(seed)
    pooled = torch.randn(rows, 12, generator=draw)
    text = Condition(pooled[:, None], torch.ones(rows, 1, dtype=torch.bool), pooled)
    motion = torch.randn(rows, frames, 66, generator=draw)
    ids = tuple(f"clip{i}" for i in range(rows))
    lengths = torch.tensor(LENGTHS[:rows]).clamp(max=frames)
    keys = torch.arange(rows) * 17 + 3
    return MotionBatch(ids, {JOINT: motion}, lengths, 20.0, ids, text, torch.full((rows,), -1), keys)
