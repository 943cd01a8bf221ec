"""Styles: how a whole performance is carried. They change trunk, head and arms of a pose, never the feet."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_prep.sources.synthetic_body import ABDUCT, FLEX, Pose
from data_prep.sources.synthetic_take import Take, arm


def _tired(pose: Pose, take: Take) -> None:
    """Slump: trunk and head hang forward, arms dangle and swing half as far."""
    swing = pose.arms_2T5 - pose.arms_2T5.mean(1, keepdims=True)
    pose.arms_2T5 -= 0.5 * swing
    pose.spine_T3[:, 0] += np.deg2rad(take.uniform(28, 40))
    pose.head_T3[:, 0] += np.deg2rad(take.uniform(20, 32))
    pose.arms_2T5[:, :, FLEX] += np.deg2rad(take.uniform(20, 32))


def _proud(pose: Pose, take: Take) -> None:
    """Chest out, chin up, arms a little away from the body and behind it."""
    pose.spine_T3[:, 0] -= np.deg2rad(take.uniform(14, 21))
    pose.head_T3[:, 0] -= np.deg2rad(take.uniform(9, 16))
    pose.arms_2T5[:, :, ABDUCT] += np.deg2rad(take.uniform(12, 20))
    pose.arms_2T5[:, :, FLEX] -= np.deg2rad(take.uniform(8, 14))


def _drunk(pose: Pose, take: Take) -> None:
    """Reel: the trunk leans far to one side and the other, the head follows late, the arms fly out."""
    beat = 2.0 * np.pi * (take.uniform(0.5, 0.65) * take.t + take.uniform(0, 1))
    far = np.deg2rad(take.uniform(24, 32))
    pose.spine_T3[:, 1] += far * np.sin(beat)
    pose.spine_T3[:, 0] += 0.5 * far * (1.0 + np.cos(beat))
    pose.pelvis_T2[:, 1] += 0.25 * far * np.sin(beat)
    pose.head_T3[:, 1] += 0.8 * far * np.sin(beat - 0.9)
    for side, sign in enumerate((1.0, -1.0)):
        pose.arms_2T5[side, :, ABDUCT] += np.deg2rad(28.0) * (1.0 - sign * np.sin(beat))


def _holding(left_arm: Callable[[Take], np.ndarray]) -> Callable[[Pose, Take], None]:
    """Return the style that keeps both arms in one posture, with the unrest they had."""

    def style(pose: Pose, take: Take) -> None:
        calm = np.clip(pose.arms_2T5 - pose.arms_2T5.mean(1, keepdims=True), -0.1, 0.1)
        pose.arms_2T5 = left_arm(take) + calm

    return style


STYLES: dict[str, Callable[[Pose, Take], None]] = {
    "tired": _tired,
    "proud": _proud,
    "drunk": _drunk,
    "arms_spread": _holding(lambda take: arm(abduct=take.uniform(78, 92), elbow=take.uniform(0, 12))),
    "hands_on_hips": _holding(lambda take: arm(flex=-8, abduct=take.uniform(34, 42), twist=62, elbow=95)),
    "arms_up": _holding(lambda take: arm(abduct=take.uniform(165, 178), twist=-80, elbow=take.uniform(6, 20))),
}
