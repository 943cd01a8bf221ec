"""DDPO: clipped policy gradients on ancestral sampling."""

from __future__ import annotations

from dataclasses import dataclass

from motionrft.finetune.policy_gradient import PolicyGradient


@dataclass(frozen=True)
class DDPO(PolicyGradient):
    """Rewards are standardised prompt by prompt and every step of eta 1 sampling learns, in one update.

    With `group=1 baseline=batch scale=batch` they are standardised over the global batch; with more inner epochs it is
    PPO on denoising steps. Published runs use rates of 1e-4 to 3e-4 on low-rank adapters.

    Source: DDPO (Black et al.), importance-sampling estimator.
    Differs: a prompt's statistics are those of its samples in this batch; published code keeps its last 16 rewards
    over batches.
    """
