"""Small reward models and batches for tests; everything is seeded."""

from __future__ import annotations

import torch
from torch import Tensor

from motionrft.core.rng import generator
from motionrft.core.types import Condition, MotionBatch, Representation
from motionrft.nn.text import StubEncoder
from motionrft.reward.adapters import AdaptedTower
from motionrft.reward.backbone import RewardBackbone, build_backbone
from motionrft.reward.config import AdapterConfig, MotionRewardConfig

TINY = MotionRewardConfig(
    unified_dim=16,
    latent_dim=8,
    num_layers=3,
    decoder_layers=1,
    num_heads=2,
    text_heads=2,
    ff_dim=32,
    proj_hidden=16,
    proj_layers=2,
    text_token_dim=16,
    max_positions=80,
    dropout=0.0,
)


class Scale:
    """A normaliser with one mean and one standard deviation for all features."""

    def __init__(self, mean: float = 0.1, std: float = 0.5) -> None:
        self.mean, self.std = mean, std

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


NORMALIZERS = {r: Scale() for r in Representation}


def make_backbone(config: MotionRewardConfig = TINY, seed: int = 0) -> RewardBackbone:
    return build_backbone(config, seed).eval()


def make_adapted(backbone: RewardBackbone, seed: int = 0, rank: int = 2) -> AdaptedTower:
    """Return adapters whose updates are not zero, so that an adapter that is ignored shows."""
    adapted = AdaptedTower(backbone.motion, AdapterConfig(rank=rank, alpha=5.0, dropout=0.0), seed)
    rng = generator("test-adapters", seed)
    with torch.no_grad():
        for path, parameter in adapted.tower.named_parameters():
            if ".lora_B." in path:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    return adapted


def make_batch(num: int = 6, num_frames: int = 12, seed: int = 0, full: bool = False) -> MotionBatch:
    """Return clips of different lengths, captions that differ by a number, and two clips per class."""
    rng = generator("test-batch", seed)
    lengths = torch.full((num,), num_frames)
    if not full:
        lengths = 3 + torch.randint(num_frames - 2, (num,), generator=rng)
        lengths[0] = num_frames
    mask = torch.arange(num_frames)[None] < lengths[:, None]
    motions = {r: torch.randn(num, num_frames, r.dim, generator=rng) * mask[..., None] for r in Representation}
    captions = tuple(f"person number {i} does thing {i * i}" for i in range(num))
    return MotionBatch(
        item_ids=tuple(f"clip{i}" for i in range(num)),
        motions=motions,
        lengths_B=lengths,
        fps=20.0,
        captions=captions,
        text=StubEncoder(16).encode(list(captions)),
        class_ids_B=torch.arange(num) // 2,
        keys_B=torch.arange(num) * 7919 + 13,
    )


def repeat_condition(text: Condition, times: int) -> Condition:
    return text.index(torch.arange(len(text)).repeat(times))
