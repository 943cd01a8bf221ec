"""The three networks of stage 1 as one module, and how they are built without touching the global random state."""

from __future__ import annotations

import torch
from torch import nn

from motionrft.core.rng import derive_seed
from motionrft.reward.config import MotionRewardConfig
from motionrft.reward.decoders import MotionDecoder
from motionrft.reward.encoders import MotionTower, TextTower


class RewardBackbone(nn.Module):
    """Motion tower, text tower and decoder. `state_dict()` is the stage-1 artefact."""

    def __init__(self, config: MotionRewardConfig) -> None:
        super().__init__()
        self.config = config
        self.motion = MotionTower(config)
        self.text = TextTower(config)
        self.decoder = MotionDecoder(config)


def build_backbone(config: MotionRewardConfig, seed: int) -> RewardBackbone:
    """Return a freshly initialised backbone that depends on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("reward-backbone", seed))
        return RewardBackbone(config)
