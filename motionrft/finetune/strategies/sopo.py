"""SoPo: semi-online preference. Clips of the data set are preferred to the worst of the network's own samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from motionrft.core.errors import ConfigError, explain
from motionrft.finetune.preference import Group, Pairs, PreferenceStrategy, counted, sample_group
from motionrft.finetune.rollout import Rollout


@dataclass(frozen=True)
class SoPo(PreferenceStrategy):
    """-log sigmoid(-beta [(2 - p) (e_w - e_w_ref) - m (e_l - e_l_ref)]), w the batch's clip, l the worst of K samples.

    m is 1 where even the worst sample's reward is below `threshold`, else 0: what is good enough is not pushed away.
    p in [0, 1] is the least (1 + cosine) / 2 between a sample's and the clip's motion embedding under the reward
    model: clips the network does not yet come near weigh more.

    Source: SoPo (Tan et al.), with the values of its released byte code.
    Differs: the four errors share time and noise, where the released code draws noise four times; the threshold is
    one of the whole weighted reward.
    """

    name = "sopo"
    needs_motions = True

    samples: int = 2
    """K, samples per prompt."""
    threshold: float = 0.45
    """Weighted reward from which on a worst sample is not pushed away. Depends on the reward's weights and scale: watch
    sopo/pushed, the share of prompts below it."""
    guided: bool = False
    """Whether samples are drawn with guidance. Without it they come from what the errors describe."""

    def rules(self) -> list[tuple[bool, str]]:
        """Return (holds, message) of what settings must fulfil."""
        return [*super().rules(), (self.samples >= 1, f"samples must be >= 1, got {self.samples}")]

    def pairs(self, rollout: Rollout) -> Pairs:
        """Return the batch's clips, each with the worst of its prompt's samples."""
        clip = _clips(rollout)
        group = sample_group(rollout, self.samples, self.guided)
        worst_B = group.reward_BK.min(1)
        pushed_B = (worst_B.values < self.threshold).to(clip.dtype)
        with rollout.metrics.timed("reward"):
            similarity_B = _least_similarity(rollout, group)
        for metric, value_B in (("worst", worst_B.values), ("pushed", pushed_B), ("similarity", similarity_B)):
            rollout.metrics.add(f"sopo/{metric}", value_B.mean())
        weight_B = counted(torch.ones_like(pushed_B), group.reward_BK.sum(1))
        return Pairs(clip, group.pick(worst_B.indices), 2.0 - similarity_B, pushed_B, weight_B)


@torch.no_grad()
def _clips(rollout: Rollout) -> Tensor:
    """Return the clean states (B, ...) of the batch's clips, as large as the rollout's."""
    batch, generator, kind = rollout.batch, rollout.generator, rollout.generator.spec.representation
    if kind not in batch.motions:
        got = f"{[r.value for r in batch.motions]}"
        expected = f"clips in representation {kind.value!r}"
        raise ConfigError(explain(expected, got, "strategy SoPo", "Load motions with the captions."))
    state = generator.encode(batch.motions[kind][:, : int(batch.lengths_B.max())], batch.lengths_B)
    missing = rollout.shape[0] - state.shape[1]
    return pad(state, (*[0, 0] * (state.dim() - 2), 0, missing))


@torch.no_grad()
def _least_similarity(rollout: Rollout, group: Group) -> Tensor:
    """Return min over a prompt's samples of (1 + cosine to the clip) / 2, (B,)."""
    batch, kind, several = rollout.batch, rollout.generator.spec.representation, group.rollout.batch
    motion = rollout.generator.decode(group.states.flatten(0, 1), several.lengths_B)
    samples_BKE = rollout.reward.embed(motion, several.lengths_B, kind).unflatten(0, group.reward_BK.shape)
    clip_BE = rollout.reward.embed(batch.motions[kind], batch.lengths_B, kind)
    return 0.5 + 0.5 * cosine_similarity(samples_BKE, clip_BE[:, None], dim=2).amin(1)
