"""What one performance starts from: its class, body, clock and chance; a standing pose; walking arms and hips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.sources.synthetic_body import ABDUCT, ACROSS, ELBOW, FLEX, TWIST, Body, Pose
from data_prep.sources.synthetic_classes import ActionClass
from data_prep.sources.synthetic_curves import Array, keys, wobble
from data_prep.sources.synthetic_gait import Gait, Path, footfalls

FLESH_S = 0.06
"""Trunk and arm tracks are blurred by a Gaussian of this many seconds, so that keyframed moves overlap."""


@dataclass(frozen=True)
class Take:
    """One performance of a class, always authored with the left side; "right" classes are mirrored afterwards."""

    action: ActionClass
    body: Body
    rng: np.random.Generator
    t: Array  # (T,) seconds, starts at 0

    @property
    def duration(self) -> float:
        """Seconds from the first to the last frame."""
        return float(self.t[-1])

    def uniform(self, low: float, high: float) -> float:
        """Return one random number."""
        return float(self.rng.uniform(low, high))

    def vary(self, value: float, share: float = 0.12) -> float:
        """Return `value` changed by up to `share` of itself."""
        return value * self.uniform(1.0 - share, 1.0 + share)

    def window(self, seconds: float) -> tuple[float, float]:
        """Return (start, length) of the action: `seconds` if they fit, near the middle of the clip."""
        length = min(seconds, self.duration - 0.2)
        return (self.duration - length) * self.uniform(0.35, 0.65), length

    def speed(self, slow: tuple[float, float], fast: tuple[float, float]) -> float:
        """Return a random value from the range of this class's speed."""
        return self.uniform(*(slow if self.action.get("speed") == "slow" else fast))


def arm(flex: float = 0.0, abduct: float = 0.0, across: float = 0.0, twist: float = 0.0, elbow: float = 0.0) -> Array:
    """Return one arm posture (5,), degrees in, radians out."""
    row = np.zeros(5)
    row[[FLEX, ABDUCT, ACROSS, TWIST, ELBOW]] = flex, abduct, across, twist, elbow
    return np.deg2rad(row)


def hanging(take: Take) -> Array:
    """Return a relaxed arm posture (5,)."""
    return arm(take.uniform(-3, 6), take.uniform(8, 15), 0.0, take.uniform(0, 25), take.uniform(8, 24))


def standing(take: Take) -> Pose:
    """Return a person who stands still over the origin, faces +Z, and is alive: small slow unrest everywhere."""
    t, body, rng = take.t, take.body, take.rng
    size = len(t)
    half, out = body.hip_width * take.uniform(0.85, 1.25), take.uniform(0.0, 0.2)
    ahead = take.uniform(-0.015, 0.015)
    toes = np.zeros((2, size, 3))
    feet = np.zeros((2, size, 2))
    for side, sign in enumerate((1.0, -1.0)):
        toes[side, :, 0] = sign * half
        toes[side, :, 2] = body.toe_ahead + sign * ahead
        feet[side, :, 0] = sign * out
    root = np.concatenate([wobble(rng, t, 0.008, 1), np.zeros((size, 1)), wobble(rng, t, 0.006, 1)], axis=1)
    root[:, 1] = body.stand
    rest = hanging(take)
    return Pose(
        root_T3=root,
        yaw_T=wobble(rng, t, 0.015, 1)[:, 0],
        pelvis_T2=wobble(rng, t, 0.012, 2) + np.array([take.uniform(0.0, 0.06), 0.0]),
        spine_T3=wobble(rng, t, 0.025, 3) + np.array([take.uniform(-0.03, 0.09), 0.0, 0.0]),
        head_T3=wobble(rng, t, 0.06, 3),
        arms_2T5=np.stack([rest + wobble(rng, t, 0.04, 5), rest + wobble(rng, t, 0.04, 5)]),
        toes_2T3=toes,
        feet_2T2=feet,
        free_2T=np.zeros((2, size)),
        reach_2T3=np.tile(np.array([0.0, -0.95, 0.0]), (2, size, 1)),
        point_2T=np.zeros((2, size)),
    )


def gesture(pose: Pose, take: Take, side: int, times: list[float], postures: list[Array]) -> None:
    """Move one arm through postures (5,) at `times`; where a posture is the first or last, unrest stays."""
    moved = keys(take.t, times, np.stack(postures))
    calm = pose.arms_2T5[side]
    pose.arms_2T5[side] = moved + (calm - calm.mean(0)) * 0.5


def rest_of(pose: Pose, side: int) -> Array:
    """Return the mean posture (5,) of an arm: where gestures start and end."""
    return pose.arms_2T5[side].mean(0)


@dataclass(frozen=True)
class Carriage:
    """How the upper body goes along with steps. Degrees, and metres for the two pelvis shifts."""

    sway: float = 0.022
    bob: float = 0.015
    height: float = 0.0
    lean: float = 3.0
    arm_swing: float = 22.0
    elbow: float = 20.0
    elbow_swing: float = 10.0
    hip_turn: float = 5.0
    arm_phase: float = 0.04  # cycle share at which the left arm is furthest back
    run: bool = False  # pelvis lowest in the middle of a stance, not highest
    swing_from_path: bool = True  # swing the arms as much as the body travels


def stepping(take: Take, gait: Gait, path: Path, carriage: Carriage) -> Pose:
    """Return a whole-body walk, run, march or side step along `path`: arms swing against the legs."""
    pose, t = standing(take), take.t
    place, yaw = path.at(t)
    before, _ = path.at(t - 0.3)
    after, _ = path.at(t + 0.3)
    speed = np.linalg.norm(after - before, axis=-1) / 0.6
    active = np.ones_like(t)
    if carriage.swing_from_path:
        active = np.clip(speed / max(float(speed.max()), 1e-6), 0.0, 1.0)
    phase = 2.0 * np.pi * (gait.cycles(t) - (0.5 if gait.backward else 0.0))  # 0: the left leg is in front
    middle = 2.0 * np.pi * (gait.cycles(t) - gait.duty / 2)
    across = np.stack([np.cos(yaw), -np.sin(yaw)], axis=-1)
    pose.root_T3[:, [0, 2]] += place + across * (carriage.sway * active * np.cos(middle))[:, None]
    bob = carriage.bob * active * np.cos(2.0 * middle)
    pose.root_T3[:, 1] += carriage.height + (-bob if carriage.run else bob - carriage.bob)
    swing = np.deg2rad(carriage.hip_turn) * active * np.cos(phase)
    pose.yaw_T += yaw - swing
    pose.pelvis_T2[:, 0] += np.deg2rad(carriage.lean) * 0.4
    pose.pelvis_T2[:, 1] -= np.deg2rad(2.5) * active * np.cos(middle)
    pose.spine_T3 += np.stack(
        [np.full_like(t, np.deg2rad(carriage.lean) * 0.6), np.deg2rad(2.5) * active * np.cos(middle), 2.0 * swing], -1
    )
    for side, sign in enumerate((1.0, -1.0)):
        beat = -sign * active * np.cos(phase - 2.0 * np.pi * carriage.arm_phase)
        pose.arms_2T5[side][:, FLEX] += np.deg2rad(carriage.arm_swing) * beat
        pose.arms_2T5[side][:, ELBOW] += np.deg2rad(carriage.elbow - 10.0 + carriage.elbow_swing * beat)
    pose.toes_2T3, pose.feet_2T2 = footfalls(t, gait, path)
    return pose
