"""A body of its own size for every clip, and the pose solver: tracks -> local rotations -> joints.

Feet are given in the world and legs follow by two-bone inverse kinematics, so a planted toe stays exactly where it is.
Joints come from forward kinematics of the rotations, so both agree to rounding.
Letters: T frames, J = 22 joints, 2 sides (0 = left, 1 = right). Angles of both sides are given for a left limb.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.sources.synthetic_curves import Array, ease, rotation, smooth_in_time
from motionrft.representations.skeleton import T2M

FLEX, ABDUCT, ACROSS, TWIST, ELBOW = range(5)
"""Columns of an arm track, radians: forward raise, sideways raise, inward turn about the vertical, inward spin of the
upper arm, elbow bend. All zero: arm straight down."""

_NAMES = T2M.joint_names
_LEGS = tuple(tuple(_NAMES.index(f"{s}_{n}") for n in ("hip", "knee", "ankle", "foot")) for s in ("left", "right"))
_ARMS = tuple(tuple(_NAMES.index(f"{s}_{n}") for n in ("collar", "shoulder", "elbow")) for s in ("left", "right"))
_SPINE, _NECK = (3, 6, 9), (12, 15)
_LEG_OF_BONE, _ARM_OF_BONE, _SIDE_BONES = (4, 5, 7, 8), (18, 19, 20, 21), (1, 2, 13, 14, 16, 17)
_REACH, _REACH_END = 0.985, 0.9995  # share of the straight leg: used by planted feet, and never exceeded
_SOFT_M = 0.01  # metres over which the height limits of the two legs blend
_FOLD = 0.34  # share of the straight leg below which the knee does not fold further


@dataclass(frozen=True)
class Body:
    """Rest offsets of one left-right symmetric person."""

    offsets_J3: Array

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Body:
        """Return the standard rest pose with random height, leg, arm and trunk length, and width."""
        height, leg, arm, trunk, width = 1.0 + np.clip(rng.normal(size=5), -2, 2) * (0.05, 0.03, 0.03, 0.03, 0.04)
        offsets = np.array(T2M.rest_offsets) * height
        offsets[list(_LEG_OF_BONE)] *= leg
        offsets[list(_ARM_OF_BONE)] *= arm
        offsets[[3, 6, 9, 12, 15]] *= trunk
        offsets[list(_SIDE_BONES), 0] *= width
        return cls(offsets)

    @cached_property
    def leg(self) -> float:
        """Length of the straight leg from hip to ankle, metres."""
        constant, swing, _ = self.knee
        return float(np.sqrt(constant + swing))

    @cached_property
    def knee(self) -> tuple[float, float, float]:
        """(C, M, k0) of squared hip-ankle distance = C + M cos(knee - k0)."""
        thigh, shank = self.offsets_J3[_LEGS[0][1]], self.offsets_J3[_LEGS[0][2]]
        even = 2.0 * (thigh[1] * shank[1] + thigh[2] * shank[2])
        odd = 2.0 * (thigh[2] * shank[1] - thigh[1] * shank[2])
        constant = float(thigh @ thigh + shank @ shank + 2.0 * thigh[0] * shank[0])
        return constant, float(np.hypot(even, odd)), float(np.arctan2(odd, even))

    @cached_property
    def stand(self) -> float:
        """Pelvis height of relaxed standing, metres."""
        return float(_REACH * self.leg - self.offsets_J3[_LEGS[0][0], 1] - self.offsets_J3[_LEGS[0][3], 1])

    @cached_property
    def hip_width(self) -> float:
        """Distance of a toe from the middle when the leg hangs straight down, metres."""
        return float(self.offsets_J3[list(_LEGS[0]), 0].sum())

    @cached_property
    def toe_ahead(self) -> float:
        """Distance of the toe in front of the pelvis in relaxed standing, metres."""
        return float(self.offsets_J3[_LEGS[0][3], 2] - 0.03 * self.leg)


@dataclass
class Pose:
    """What an action says about every frame. Metres, radians; mutable while it is being written."""

    root_T3: Array  # pelvis; y is a wish, lowered where a planted foot would not be reached
    yaw_T: Array  # pelvis heading, positive to the left
    pelvis_T2: Array  # forward pitch, lean to the left
    spine_T3: Array  # forward pitch, lean to the left, turn to the left, spread over three joints
    head_T3: Array  # the same, spread over neck and head
    arms_2T5: Array  # columns FLEX ABDUCT ACROSS TWIST ELBOW
    toes_2T3: Array  # world position of the planted or swinging toe
    feet_2T2: Array  # world yaw, heel-up pitch
    free_2T: Array  # 0 = the foot is where `toes` says, 1 = the leg is posed by `reach`
    reach_2T3: Array  # ankle relative to the hip in the pelvis heading, in leg lengths (x outwards)
    point_2T: Array  # ankle rotation of a free leg, positive = toes down


def solve(pose: Pose, body: Body) -> tuple[Array, Array]:
    """Return joints (T, 22, 3) in metres and local rotations (T, 22, 3, 3), root rotation global."""
    num_frames = len(pose.yaw_T)
    local = np.tile(np.eye(3), (22, num_frames, 1, 1))
    pelvis = rotation(1, pose.yaw_T) @ rotation(0, pose.pelvis_T2[:, 0]) @ rotation(2, -pose.pelvis_T2[:, 1])
    local[0] = pelvis
    for joints, track in ((_SPINE, pose.spine_T3), (_NECK, pose.head_T3)):
        pitch, lean, turn = (track / len(joints)).T
        local[list(joints)] = rotation(1, turn) @ rotation(0, pitch) @ rotation(2, -lean)
    for side in range(2):
        _arm(local, pose.arms_2T5[side], side)
    root = _legs(local, pelvis, pose, body)
    return forward(local, root, body), np.moveaxis(local, 0, 1)


def forward(local_JT33: Array, root_T3: Array, body: Body) -> Array:
    """Return joints (T, 22, 3) of local rotations (22, T, 3, 3)."""
    world, joints = [local_JT33[0]], [root_T3]
    for joint in range(1, 22):
        parent = T2M.parents[joint]
        joints.append(joints[parent] + world[parent] @ body.offsets_J3[joint])
        world.append(world[parent] @ local_JT33[joint])
    return np.stack(joints, axis=1)


def _arm(local: Array, track_T5: Array, side: int) -> None:
    """Write collar, shoulder and elbow. The right arm is the mirror image of a left arm: turns about Y and Z flip."""
    sign = 1.0 - 2.0 * side
    collar, shoulder, elbow = _ARMS[side]
    lift = ease((np.hypot(track_T5[:, FLEX], track_T5[:, ABDUCT]) - 1.0) / 2.2)
    local[collar] = rotation(2, sign * 0.3 * lift)
    local[shoulder] = (
        rotation(1, -sign * track_T5[:, ACROSS])
        @ rotation(0, -track_T5[:, FLEX])
        @ rotation(2, sign * (track_T5[:, ABDUCT] - 0.3 * lift - np.pi / 2))
        @ rotation(0, track_T5[:, TWIST])
    )
    local[elbow] = rotation(1, -sign * track_T5[:, ELBOW])


def _legs(local: Array, pelvis: Array, pose: Pose, body: Body) -> Array:
    """Write hips, knees and ankles, and return the pelvis (T, 3), lowered until planted feet are within reach."""
    offsets = body.offsets_J3
    hips = np.stack([pelvis @ offsets[leg[0]] for leg in _LEGS])  # relative to the pelvis
    feet = rotation(1, pose.feet_2T2[..., 0]) @ rotation(0, pose.feet_2T2[..., 1])
    toe = np.stack([offsets[leg[3]] for leg in _LEGS])
    planted = pose.toes_2T3 - (feet @ toe[:, None, :, None])[..., 0]

    flat = planted - hips - pose.root_T3
    sideways = flat[..., 0] ** 2 + flat[..., 2] ** 2
    reach = np.sqrt(np.maximum((_REACH * body.leg) ** 2 - sideways, (0.3 * body.leg) ** 2))
    limits = planted[..., 1] - hips[..., 1] + reach + 10.0 * pose.free_2T
    heights = np.concatenate([pose.root_T3[None, :, 1], limits])
    lowest = heights.min(0)
    height = lowest - _SOFT_M * np.log(np.exp((lowest - heights) / _SOFT_M).sum(0))
    root = pose.root_T3.copy()
    root[:, 1] = smooth_in_time(height, 0.7, 0)

    for side, (hip, knee, ankle, _) in enumerate(_LEGS):
        mirror = np.array([1.0 - 2.0 * side, 1.0, 1.0])
        free = pose.free_2T[side][:, None]
        posed = (rotation(1, pose.yaw_T) @ (pose.reach_2T3[side] * mirror * body.leg)[..., None])[..., 0]
        span = (1.0 - free) * (planted[side] - hips[side] - root) + free * posed
        hinge = pelvis[..., 0] + rotation(1, pose.feet_2T2[side, :, 0])[..., 0]
        thigh, bend = _two_bones(span, hinge, offsets[knee], offsets[ankle], body)
        shank = thigh @ bend
        local[hip] = pelvis.transpose(0, 2, 1) @ thigh
        local[knee] = bend
        held, loose = shank.transpose(0, 2, 1) @ feet[side], rotation(0, pose.point_2T[side])
        local[ankle] = _orthonormal((1.0 - free[..., None]) * held + free[..., None] * loose)
    return root


def _two_bones(span: Array, hinge: Array, thigh: Array, shank: Array, body: Body) -> tuple[Array, Array]:
    """Return the world rotation of the thigh and the local knee bend that put the ankle at `span` from the hip.

    The knee bends about its own X only, by the law of cosines; `hinge` (T, 3) is where that axis should point.
    """
    constant, swing, straight = body.knee
    distance = np.linalg.norm(span, axis=-1)
    share = np.maximum(distance / body.leg, _FOLD)
    room = _REACH_END - _REACH
    share = np.where(share < _REACH, share, _REACH + room * np.tanh((share - _REACH) / room))
    angle = straight + np.arccos(np.clip(((share * body.leg) ** 2 - constant) / swing, -1.0, 1.0))
    bend = rotation(0, angle)
    own = _frame(thigh + bend @ shank, np.broadcast_to(np.array([1.0, 0.0, 0.0]), span.shape))
    return _frame(span, hinge) @ own.transpose(0, 2, 1), bend


def _frame(first: Array, second: Array) -> Array:
    """Return orthonormal frames (T, 3, 3) whose columns are `first`, the rest of `second`, and their cross product."""
    a = first / np.linalg.norm(first, axis=-1, keepdims=True)
    b = second - (second * a).sum(-1, keepdims=True) * a
    b /= np.linalg.norm(b, axis=-1, keepdims=True)
    return np.stack([a, b, np.cross(a, b)], axis=-1)


def _orthonormal(matrix: Array) -> Array:
    """Return the rotation nearest in its first column, then in its second, to a blend of rotations (T, 3, 3)."""
    return _frame(matrix[..., 0], matrix[..., 1])
