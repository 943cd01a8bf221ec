"""What scoring costs per gradient step: one learned term against all four, and against five passes that share nothing.

A gradient step is forward and backward to the motion. The published size scores kinematic features with random
weights; time does not depend on the weights. Every run first checks that all ways give the same scores and gradients.

Letters: B batch, T frames, D features, L text tokens, E reward embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from motionrft.core.errors import NumericalError, explain
from motionrft.core.rng import generator
from motionrft.core.types import Condition, Representation, RewardTerms, valid_mask
from motionrft.evaluation.benchmarks.sizes import caption_tokens, clip_lengths
from motionrft.evaluation.benchmarks.timing import fastest_seconds, torch_threads
from motionrft.representations.normalize import Normalizer
from motionrft.reward.adapters import ADAPTERS, AdaptedTower
from motionrft.reward.backbone import build_backbone
from motionrft.reward.config import AdapterConfig, MotionRewardConfig, reward_preset
from motionrft.reward.losses import cosine
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.terms import LEARNED_TERMS

KIND = Representation.KINEMATIC
TOLERANCE = 1e-5
"""Largest allowed difference of scores, and of gradients relative to the largest one."""


def run(rounds: int = 7, batch: int = 32, config: MotionRewardConfig | None = None, seed: int = 0) -> dict[str, float]:
    """Time gradient steps and return the figures: processor time of one thread, fastest of all rounds.

    Args:
        rounds: counted steps of every kind.
        batch: clips per step.
        config: sizes; default: the published ones (`tiny`).
        seed: of weights, motions and captions.

    Returns:
        For `semantic` and `all_terms` (target embedded before, adapters merged), `all_terms_unmerged`, and `five_pass`
        (caption and motion, preference, authenticity, generated and reference motion: nothing shared or kept, adapters
        unmerged): NAME_scores_per_s. Further all_over_semantic, all_over_five_pass and merged_over_unmerged (ratios
        of time), max_difference (of scores), batch and frames.

    Raises:
        NumericalError: the ways disagree.
    """
    case = _Case(config or reward_preset("tiny"), batch, seed)
    with torch_threads(1):
        difference = case.check_agreement()
        steps = {name: _gradient_step(case, way) for name, way in case.ways().items()}
        seconds = fastest_seconds(steps, rounds)
    return {
        **{f"{name}_scores_per_s": batch / s for name, s in seconds.items()},
        "all_over_semantic": seconds["all_terms"] / seconds["semantic"],
        "all_over_five_pass": seconds["all_terms"] / seconds["five_pass"],
        "merged_over_unmerged": seconds["all_terms"] / seconds["all_terms_unmerged"],
        "max_difference": difference,
        "batch": float(batch),
        "frames": float(case.motion_BTD.shape[1]),
    }


class _Case:
    """One batch, and the same reward with and without its adapters folded in."""

    def __init__(self, config: MotionRewardConfig, batch: int, seed: int) -> None:
        rng = generator("reward-score benchmark", seed)
        backbone = build_backbone(config, seed)
        adapted = AdaptedTower(backbone.motion, AdapterConfig(), seed)
        with torch.no_grad():
            for path, parameter in adapted.tower.named_parameters():
                if ".lora_B." in path:  # zero at start: an adapter that is ignored would not show
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=rng))
        statistics = {r: Normalizer(torch.zeros(r.dim), torch.ones(r.dim), r) for r in Representation}
        self.unmerged = MotionReward(backbone, statistics, adapted)
        self.merged = MotionReward(backbone, statistics, adapted).freeze_for_scoring()
        self.lengths_B = clip_lengths(batch, rng)
        mask_BT = valid_mask(self.lengths_B, int(self.lengths_B.max()))
        clips = torch.randn(2, *mask_BT.shape, KIND.dim, generator=rng) * mask_BT[..., None]
        self.motion_BTD, self.reference_BTD = clips[0].requires_grad_(), clips[1]
        tokens_B = caption_tokens(batch, rng)
        mask_BL = valid_mask(tokens_B, int(tokens_B.max()))
        tokens = torch.randn(*mask_BL.shape, config.text_token_dim, generator=rng) * mask_BL[..., None]
        self.text = Condition(tokens, mask_BL, tokens.mean(1))

    def ways(self) -> dict[str, Callable[[], RewardTerms]]:
        """Return the ways of scoring that are compared."""
        text_BE = self.merged.encode_text(self.text)
        with torch.no_grad():
            target_BE = self.merged.embed(self.reference_BTD, self.lengths_B, KIND)

        def scores(reward: MotionReward, *terms: str) -> RewardTerms:
            return reward.score(
                self.motion_BTD, self.lengths_B, KIND, text_BE=text_BE, target_BE=target_BE, terms=terms
            )

        return {
            "semantic": lambda: scores(self.merged, "semantic"),
            "all_terms": lambda: scores(self.merged, *LEARNED_TERMS),
            "all_terms_unmerged": lambda: scores(self.unmerged, *LEARNED_TERMS),
            "five_pass": self._five_passes,
        }

    def _five_passes(self) -> RewardTerms:
        """Score as separate models would: every term normalises and encodes for itself, the reference is embedded."""
        reward, lengths_B = self.unmerged, self.lengths_B
        assert reward.adapters is not None
        t_B = torch.zeros(len(lengths_B), dtype=torch.int64)

        def features(motion_BTD: Tensor) -> Tensor:
            x = reward.normalizers[KIND].normalise(motion_BTD)
            return torch.where(valid_mask(lengths_B, x.shape[1])[..., None], x, 0.0)

        text_BE = reward.encode_text(self.text)
        semantic = cosine(reward.motion(features(self.motion_BTD), lengths_B, KIND, t_B)[0], text_BE)
        heads = {n: reward.adapters(n, features(self.motion_BTD), lengths_B, KIND, t_B) for n in ADAPTERS}
        with torch.no_grad():
            target_BE = reward.motion(features(self.reference_BTD), lengths_B, KIND, t_B)[0]
        similarity = cosine(reward.motion(features(self.motion_BTD), lengths_B, KIND, t_B)[0], target_BE)
        return RewardTerms(
            {
                "semantic": semantic,
                "preference": heads["preference"][:, 0],
                "authenticity": heads["authenticity"].softmax(-1)[:, 0],
                "similarity": similarity,
            }
        )

    def check_agreement(self) -> float:
        """Return the largest difference of scores between the ways that give all terms.

        Raises:
            NumericalError: scores or gradients differ by more than the tolerance.
        """
        ways = {name: way for name, way in self.ways().items() if name != "semantic"}
        found = {}
        for name, way in ways.items():
            terms = way()
            (gradient,) = torch.autograd.grad(_total(terms), self.motion_BTD)
            found[name] = (torch.stack([terms.values[n].detach() for n in LEARNED_TERMS]), gradient)
        scores, gradient = found.pop("five_pass")
        worst = max(float((s - scores).abs().max()) for s, _ in found.values())
        slope = max(float((g - gradient).abs().max() / gradient.abs().max()) for _, g in found.values())
        if not max(worst, slope) <= TOLERANCE:
            raise NumericalError(
                explain(
                    f"scores and gradients equal within {TOLERANCE:g} however they are computed",
                    f"differences of {worst:.3g} and {slope:.3g}",
                    "reward-score benchmark",
                    "Report it: shared or merged scoring is wrong.",
                )
            )
        return worst


def _total(terms: RewardTerms) -> Tensor:
    return terms.total(dict.fromkeys(terms.values, 1.0)).sum()


def _gradient_step(case: _Case, way: Callable[[], RewardTerms]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(_total(way()), case.motion_BTD)
