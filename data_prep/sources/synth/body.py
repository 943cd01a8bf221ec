"""A jointed body that is told where feet stand and where arms point, and answers with rotations and joints.

Legs are solved from ankle targets (two bones, knees forward), so a planted foot stays where it is; everything is array
arithmetic over frames. Letters: T frames, J = 22 joints. Y up, the body faces +Z at yaw 0, its left is +X.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionrft.representations.skeleton import T2M

Array = np.ndarray
ANKLE_HEIGHT = 0.06
"""Of a flat foot, metres at body scale 1: the toe joint then lies on the floor."""
REACH = 0.995
"""Share of the leg's length that an ankle target may use; a straight leg has no knee direction."""


@dataclass(frozen=True)
class Pose:
    """What an action asks of the body, per frame. Arms and head are relative to the chest, feet to the world."""

    root: Array  # (T, 3) pelvis, metres; its height is lowered where a leg would not reach
    yaw: Array  # (T,) heading, radians
    lean: Array  # (T,) forward bend of the pelvis
    bend: Array  # (T,) forward bend of the spine
    roll: Array  # (T,) sideways bend of the spine, positive to the left
    ankles: Array  # (T, 2, 3) left and right ankle
    foot_yaw: Array  # (T, 2)
    foot_pitch: Array  # (T, 2) positive = toes down
    upper_arms: Array  # (T, 2, 3) directions in the chest frame
    forearms: Array  # (T, 2, 3) directions in the chest frame


def rotation(axis: int, angle: Array) -> Array:
    """Return rotation matrices (..., 3, 3) about x (0), y (1) or z (2)."""
    cos, sin = np.cos(angle), np.sin(angle)
    result = np.zeros((*np.shape(angle), 3, 3))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    result[..., axis, axis] = 1.0
    result[..., i, i] = result[..., j, j] = cos
    result[..., i, j], result[..., j, i] = -sin, sin
    return result


def swing(source: Array, target: Array) -> Array:
    """Return the shortest rotations (T, 3, 3) from the direction `source` (3,) to `target` (T, 3)."""
    a = source / np.linalg.norm(source)
    b = target / np.linalg.norm(target, axis=-1, keepdims=True)
    k = np.cross(np.broadcast_to(a, b.shape), b)
    cosine = (a * b).sum(-1)
    cross = np.zeros((*k.shape, 3))
    cross[..., 0, 1], cross[..., 0, 2] = -k[..., 2], k[..., 1]
    cross[..., 1, 0], cross[..., 1, 2] = k[..., 2], -k[..., 0]
    cross[..., 2, 0], cross[..., 2, 1] = -k[..., 1], k[..., 0]
    # 1 + cosine is kept away from 0: no action points a bone exactly against its rest direction.
    return np.eye(3) + cross + cross @ cross / np.maximum(1.0 + cosine, 1e-6)[..., None, None]


def smooth(values: Array, width: float) -> Array:
    """Return values (T, ...) convolved with a Gaussian of `width` frames, ends repeated."""
    radius = int(3 * width) + 1
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
    weights /= weights.sum()
    padded = np.concatenate([np.repeat(values[:1], radius, 0), values, np.repeat(values[-1:], radius, 0)])
    return np.apply_along_axis(lambda column: np.convolve(column, weights, "valid"), 0, padded)


def pose_body(pose: Pose, scale: float) -> tuple[Array, Array]:
    """Return joints (T, 22, 3) in metres and local rotations (T, 22, 3, 3) of a body of this size."""
    frames = len(pose.root)
    offsets = scale * np.array(T2M.rest_offsets)
    pelvis = rotation(1, pose.yaw) @ rotation(0, pose.lean)
    root = pose.root.copy()
    root[:, 1] -= _lowering(root, pelvis, pose.ankles, offsets)
    world = np.broadcast_to(np.eye(3), (frames, 22, 3, 3)).copy()
    world[:, 0] = pelvis
    third = rotation(0, pose.bend / 3) @ rotation(2, -pose.roll / 3)
    for joint, parent in ((3, 0), (6, 3), (9, 6)):
        world[:, joint] = world[:, parent] @ third
    chest = world[:, 9]
    level = rotation(0, -0.5 * (pose.lean + pose.bend))  # the head looks half way back to the horizon
    world[:, 12] = world[:, 15] = chest @ level
    world[:, 13] = world[:, 14] = chest
    for side, (shoulder, elbow, wrist) in enumerate(((16, 18, 20), (17, 19, 21))):
        world[:, shoulder] = chest @ swing(offsets[elbow], pose.upper_arms[:, side])
        world[:, elbow] = world[:, wrist] = chest @ swing(offsets[wrist], pose.forearms[:, side])
    for side, (hip, knee, ankle, foot) in enumerate(((1, 4, 7, 10), (2, 5, 8, 11))):
        start = root + pelvis @ offsets[hip]
        thigh, shin = _leg(start, pose.ankles[:, side], pelvis, offsets[knee], offsets[ankle])
        inverse = np.swapaxes(pelvis, -1, -2)
        world[:, hip] = pelvis @ swing(offsets[knee], (inverse @ thigh[..., None])[..., 0])
        world[:, knee] = pelvis @ swing(offsets[ankle], (inverse @ shin[..., None])[..., 0])
        world[:, ankle] = rotation(1, pose.foot_yaw[:, side]) @ rotation(0, pose.foot_pitch[:, side])
        world[:, foot] = world[:, ankle]
    joints = np.zeros((frames, 22, 3))
    local = np.zeros((frames, 22, 3, 3))
    joints[:, 0], local[:, 0] = root, pelvis
    for joint in range(1, 22):
        parent = T2M.parents[joint]
        joints[:, joint] = joints[:, parent] + world[:, parent] @ offsets[joint]
        local[:, joint] = np.swapaxes(world[:, parent], -1, -2) @ world[:, joint]
    return joints, local


def _lowering(root: Array, pelvis: Array, ankles: Array, offsets: Array) -> Array:
    """Return how far the pelvis must sink, (T,), for both ankles to be in reach; smooth in time."""
    needed = np.zeros(len(root))
    for side, (hip, knee, ankle) in enumerate(((1, 4, 7), (2, 5, 8))):
        start = root + pelvis @ offsets[hip]
        length = REACH * (np.linalg.norm(offsets[knee]) + np.linalg.norm(offsets[ankle]))
        away = ankles[:, side] - start
        flat = np.minimum((away[:, [0, 2]] ** 2).sum(-1), 0.98 * length**2)
        needed = np.maximum(needed, -away[:, 1] - np.sqrt(length**2 - flat))
    window = 4
    padded = np.concatenate([np.repeat(needed[:1], window), needed, np.repeat(needed[-1:], window)])
    highest = np.max([padded[i : i + len(needed)] for i in range(2 * window + 1)], axis=0)
    return smooth(highest, window / 3)


def _leg(start: Array, target: Array, pelvis: Array, thigh_rest: Array, shin_rest: Array) -> tuple[Array, Array]:
    """Return world directions (T, 3) of thigh and shin that bring the ankle to `target`, knee forward."""
    upper, lower = np.linalg.norm(thigh_rest), np.linalg.norm(shin_rest)
    away = target - start
    distance = np.linalg.norm(away, axis=-1)
    axis = away / distance[:, None]
    distance = np.clip(distance, abs(upper - lower) * 1.05 + 1e-3, 0.9999 * (upper + lower))
    along = (upper**2 - lower**2 + distance**2) / (2 * distance)
    out = np.sqrt(np.maximum(upper**2 - along**2, 0.0))
    forward = pelvis[:, :, 2]
    pole = forward - (forward * axis).sum(-1, keepdims=True) * axis
    pole /= np.maximum(np.linalg.norm(pole, axis=-1, keepdims=True), 1e-9)
    thigh = along[:, None] * axis + out[:, None] * pole
    return thigh, distance[:, None] * axis - thigh
