"""Flow-GRPO: group-relative policy gradients on the SDE of a flow, near the reference."""

from __future__ import annotations

from dataclasses import dataclass

from motionrft.finetune.policy_gradient import PolicyGradient


@dataclass(frozen=True)
class FlowGRPO(PolicyGradient):
    """Rewards are compared within a prompt's group and divided by the deviation over the global batch.

    On diffusion models the SDE is DDIM with eta = `noise`. Published runs sample 10 steps, groups of 24 for 48 prompts,
    and train low-rank adapters at a rate of 3e-4.

    Source: Flow-GRPO (Liu et al.) and its public code.
    """

    noise: float = 0.7
    """Fresh noise of the sampler, in (0, 1]: a of a flow's SDE, eta of DDIM. Consistency models have their own."""
    scale: str = "batch"
    """What the difference to the baseline is divided by: the deviation over the prompt's samples ("prompt"), over the
    global batch ("batch"), or "none"."""
    updates: int = 2
    """Optimiser steps per inner epoch, between which the trained steps are split; at most one per step."""
    kl_weight: float = 0.004
    """Weight of the KL divergence of each trained step from the frozen network's. Published code leaves the step size
    out of it: its 0.04 at 10 steps is 0.004 here."""
