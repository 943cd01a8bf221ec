"""Diffusion-DPO: the best of a group of samples is preferred to its worst."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from motionrft.finetune.preference import Pairs, PreferenceStrategy, counted, sample_group
from motionrft.finetune.rollout import Rollout


@dataclass(frozen=True)
class DiffusionDPO(PreferenceStrategy):
    """-log sigmoid(-beta / 2 [(e_w - e_w_ref) - (e_l - e_l_ref)]) on the network's own samples, ranked by the reward.

    The reward is read at final samples only and never differentiated. Prompts whose samples earn the same drop out.

    Source: Diffusion-DPO (Wallace et al.) with pairs made online as in the public Flow-GRPO code.
    """

    name = "dpo"

    beta: float = 100.0
    """How fast a preference saturates; the pull to the reference grows with it."""
    samples: int = 4
    """K, samples per prompt."""
    guided: bool = True
    """Whether samples are drawn with guidance, as the tuned model will be used. The errors are always without."""

    def rules(self) -> list[tuple[bool, str]]:
        """Return (holds, message) of what settings must fulfil."""
        return [*super().rules(), (self.samples >= 2, f"samples must be >= 2, got {self.samples}")]

    def pairs(self, rollout: Rollout) -> Pairs:
        """Return best and worst of each group."""
        group = sample_group(rollout, self.samples, self.guided)
        best_B, worst_B = group.reward_BK.max(1), group.reward_BK.min(1)
        gap_B = best_B.values - worst_B.values
        weight_B = counted(gap_B > 0, group.reward_BK.sum(1))
        rollout.metrics.add("dpo/ties", (gap_B == 0).float().mean())
        rollout.metrics.add("dpo/reward_gap", gap_B.mean())
        half_B = torch.full_like(gap_B, 0.5)
        return Pairs(group.pick(best_B.indices), group.pick(worst_B.indices), half_B, half_B, weight_B)
