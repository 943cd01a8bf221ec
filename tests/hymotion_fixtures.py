"""A tiny HY-Motion generator whose gates are open, and clips for it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from motionrft.core.protocols import GeneratorSpec
from motionrft.core.types import Condition, MotionBatch, Representation
from motionrft.generators.base import Build
from motionrft.generators.hymotion import HYMotionConfig, HYMotionGenerator
from motionrft.representations.normalize import Normalizer

KIND = Representation.ROTATION
TOKENS, POOLED = 12, 10
CLEAN = HYMotionConfig(
    width=16,
    heads=2,
    mlp_ratio=2,
    pooled_gain=1.0,
    frame_weight=2.0,
    train_frames=24,
    band_frames=3,
    zero_final=False,
)
SMALL = replace(CLEAN, output="velocity", frame_weight=0.0)
RELEASED = replace(SMALL, joint_positions=True, native_fps=30.0, min_frames=6, rest_pelvis=(0.1, -0.2, 0.3))
"""Small, but in everything else like the released models."""


def statistics() -> Normalizer:
    """Return statistics like those of standing bodies; feature 20 never varies."""
    draw = torch.Generator().manual_seed(5)
    mean, std = 0.1 * torch.randn(135, generator=draw), torch.rand(135, generator=draw) + 0.5
    mean[1], std[20] = 0.9, 1e-4
    mean[3:].view(22, 6)[:, [0, 3]] += 0.8
    return Normalizer(mean, std, KIND)


def randomise(module: nn.Module, scale: float = 0.3) -> None:
    """Open the gates, which start closed: without it most weights have no influence and no gradient."""
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "mod" in name or "final_layer" in name or name.startswith("null"):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))


def make(
    config: HYMotionConfig = SMALL, seed: int = 0, max_frames: int = 16, opened: bool = True, fps: float = 20.0
) -> HYMotionGenerator:
    """Return a generator with random weights."""
    torch.manual_seed(seed)
    spec = GeneratorSpec("hymotion", KIND, fps, max_frames, "stub", "velocity", 1000, 2.5)
    generator = HYMotionGenerator(Build(spec, statistics(), TOKENS, POOLED), config)
    if opened:
        randomise(generator.network)
    generator.network.eval()
    return generator


def make_text(rows: int, seed: int = 1) -> Condition:
    """Return captions of 1 to 4 words, zero where masked."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(4)[None] < torch.tensor([4, 3, 1, 2, 4][:rows])[:, None]
    tokens = torch.randn(rows, 4, TOKENS, generator=draw) * mask[..., None]
    return Condition(tokens, mask, torch.randn(rows, POOLED, generator=draw))


def make_batch(rows: int = 5, frames: int = 16) -> MotionBatch:
    """Return clips of very different lengths."""
    draw = torch.Generator().manual_seed(2)
    lengths = torch.tensor([16, 11, 7, 2, 1][:rows]).clamp(max=frames)
    normal = statistics()
    motion = normal.denormalise(torch.randn(rows, frames, 135, generator=draw))
    ids = tuple(f"clip{i}" for i in range(rows))
    classes, keys = torch.full((rows,), -1), torch.arange(rows) * 17 + 3
    return MotionBatch(ids, {KIND: motion}, lengths, 20.0, ids, make_text(rows), classes, keys)
