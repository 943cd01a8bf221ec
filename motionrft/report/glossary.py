"""What each metric is called, which way is better, and what it means to somebody who never saw it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricText:
    """How a metric is shown and explained."""

    key: str
    label: str
    better: int  # +1 higher, -1 lower, 0 closer to real
    digits: int
    unit: str
    meaning: str

    @property
    def arrow(self) -> str:
        """Which way is better, as a word."""
        return {1: "higher is better", -1: "lower is better", 0: "closer to real is better"}[self.better]

    def show(self, value: float, signed: bool = False) -> str:
        """Return the value as text, a dash where it was not measured."""
        text = f"{value:{'+' if signed else ''}.{self.digits}f}" if math.isfinite(value) else "–"
        return text.replace("-", "−")


GROUPS: tuple[tuple[str, tuple[MetricText, ...]], ...] = (
    (
        "Does the motion do what the caption says?",
        (
            MetricText(
                "r_precision_top1", "R@1", 1, 3, "",
                "How often a caption picks its own motion first among 32 motions of 32 different classes. "
                "Chance is 0.031, perfect is 1.",
            ),
            MetricText("r_precision_top2", "R@2", 1, 3, "", "The same, its own motion among the first two."),
            MetricText("r_precision_top3", "R@3", 1, 3, "", "The same, its own motion among the first three."),
            MetricText(
                "mm_dist", "MM-Dist", -1, 3, "",
                "Mean distance between a caption and its motion in the evaluator's space, 0 to 2.",
            ),
        ),
    ),
    (
        "Taken together, do the motions resemble real ones?",
        (
            MetricText(
                "fid", "FID x 100", -1, 1, "",
                "Distance between the clouds of generated and real motions in the evaluator's space. Compare it with "
                "the floor: what two halves of the real motions score against each other.",
            ),
            MetricText(
                "diversity", "Diversity", 0, 3, "",
                "Mean distance between two motions. Far below real: the model repeats itself.",
            ),
        ),
    ),
    (
        "Is the motion physically clean?",
        (
            MetricText(
                "jerk", "Jerk", -1, 0, "m/s³",
                "How abruptly joints change their acceleration: visible shaking. The first thing to rise when a model "
                "learns to please the reward instead of moving well.",
            ),
            MetricText("foot_slide", "Foot slide", -1, 3, "m/s", "Speed of toes along the floor while touching it."),
            MetricText(
                "foot_skate_ratio", "Foot skating", -1, 3, "",
                "Share of frames in which a touching foot moves faster than 0.5 m/s.",
            ),
            MetricText(
                "bone_drift", "Bone drift", -1, 4, "",
                "How much bone lengths change during a clip, relative to their mean. A rigid body has 0.",
            ),
        ),
    ),
    (
        "What the reward model thinks (this was optimised, so a rise alone proves nothing)",
        (
            MetricText("reward_total", "Reward, total", 1, 3, "", "Weighted sum that fine-tuning maximised."),
            MetricText("reward_semantic", "Semantic", 1, 3, "", "Cosine of caption and motion in the reward's space."),
            MetricText("reward_preference", "Preference", 1, 3, "", "Learned from preferred and rejected motions."),
            MetricText("reward_authenticity", "Authenticity", 1, 3, "", "Does it look captured rather than generated?"),
            MetricText("reward_similarity", "Similarity", 1, 3, "", "Closeness to the motion before tuning."),
        ),
    ),
)  # fmt: skip

METRICS = {metric.key: metric for _, group in GROUPS for metric in group}

TABLE_KEYS = (
    "r_precision_top1", "r_precision_top3", "fid", "mm_dist", "diversity", "jerk", "foot_slide", "foot_skate_ratio",
    "bone_drift", "reward_total",
)  # fmt: skip
"""Columns of the table of all rows."""

CARD_KEYS = ("r_precision_top1", "fid", "jerk", "foot_slide")
"""Metrics shown large at the top."""

HOW_TO_READ = (
    "Every number comes with a 95 % interval (±). Over several seeds it covers the randomness of generation; with one "
    "seed it covers the choice of test prompts and is marked with a dagger (†). Where intervals overlap, treat the "
    "numbers as equal.",
    "The real row is recorded human motion scored the same way: as good as this evaluator can tell.",
    "The evaluator is a separate network that only measures. Nothing was trained against it. Its numbers depend on its "
    "own seed: never compare numbers of two evaluators, of other step counts, or of other projects.",
    "An evaluator hardly sees small shaking. Read jerk, foot slide and bone drift beside every gain.",
    "R@k uses pools of 32 different classes, so that another take of the same action never counts as a wrong answer.",
)

LIMITS = (
    "Evaluator, reward and generator saw the same training clips; they are independent in architecture, seed and the "
    "way they read text, not in data.",
    "A tuned model can score higher than real motion on a learned metric. That is no proof of better motion: watch it.",
    "A base model that was stopped early leaves room for any method. Compare with the rows of longer training.",
)
