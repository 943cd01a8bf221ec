"""How fast joints become kinematic features: the batched conversion against a per-clip loop of quaternion passes.

The loop is the algorithm as HumanML3D describes it, vectorised over frames only: fit quaternions joint by joint, replay
them on the standard skeleton, turn, fit again, convert to features. Both work in float64 on one thread, and every run
first checks that they agree on the clips it times.

Letters: T frames, J joints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from motionrft.core.errors import NumericalError, explain
from motionrft.core.rng import numpy_rng
from motionrft.representations.kinematic import T2M_LAYOUT, KinematicFlag, clips_to_kinematic
from motionrft.representations.kinematics import forward_kinematics
from motionrft.representations.rotations import rotvec_to_matrix, yaw_matrix
from motionrft.representations.skeleton import T2M, Skeleton

TOLERANCES = {
    "yaw_rate": 1e-4,
    "root_velocity": 5e-5,
    "root_height": 5e-5,
    "joint_positions": 1e-4,
    "joint_rotations": 1e-3,
    "joint_velocities": 5e-5,
}
"""Largest allowed difference per feature group; contacts must be equal except within 1e-6 of the threshold."""


def run(
    clips: Sequence[Tensor | np.ndarray] | None = None, seconds_budget: float = 20.0, seed: int = 0
) -> dict[str, float]:
    """Time both conversions on the same clips and return the figures.

    Times are processor time of one thread, the median over passes that alternate between the two, so that other work on
    the machine disturbs neither more than the other.

    Args:
        clips: joint arrays (T, 22, 3), T >= 2; default: 100 synthetic clips of 40 to 199 frames.
        seconds_budget: roughly how long to measure (at least one pass of each).
        seed: of the synthetic clips.

    Returns:
        clips_per_s, loop_clips_per_s, ms_per_clip, loop_ms_per_clip, speedup, frames_per_s, num_clips, mean_frames,
        compared_clips (those checked against the loop) and max_difference (largest over their features).

    Raises:
        NumericalError: the two conversions disagree.
    """
    arrays = [np.asarray(c, dtype=np.float64) for c in clips] if clips is not None else synthetic_clips(100, seed)
    tensors = [torch.from_numpy(c) for c in arrays]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            compared, difference = _check_agreement(arrays, tensors)
            fast: list[float] = []
            slow: list[float] = []
            started = time.perf_counter()
            while not fast or time.perf_counter() - started < seconds_budget:
                slow.append(_seconds(lambda: [convert_clip_by_loop(c) for c in arrays]))
                fast += [_seconds(lambda: clips_to_kinematic(tensors)) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    frames = sum(len(c) for c in arrays)
    fast_s, slow_s = float(np.median(fast)), float(np.median(slow))
    return {
        "clips_per_s": len(arrays) / fast_s,
        "loop_clips_per_s": len(arrays) / slow_s,
        "ms_per_clip": 1e3 * fast_s / len(arrays),
        "loop_ms_per_clip": 1e3 * slow_s / len(arrays),
        "speedup": slow_s / fast_s,
        "frames_per_s": frames / fast_s,
        "num_clips": float(len(arrays)),
        "mean_frames": frames / len(arrays),
        "compared_clips": float(compared),
        "max_difference": difference,
    }


def synthetic_clips(count: int, seed: int = 0, min_frames: int = 40, max_frames: int = 199) -> list[np.ndarray]:
    """Return `count` smooth clips (T, 22, 3) float64: a body walking a random curve with swinging joints."""
    clips = []
    for index in range(count):
        rng = numpy_rng("synthetic clip", seed, index)
        frames = int(rng.integers(min_frames, max_frames + 1))
        seconds = np.arange(frames)[:, None, None] / T2M.fps
        swing = np.zeros((frames, T2M.num_joints, 3))
        for _ in range(3):
            amplitude, phase = rng.normal(0.0, 0.15, (2, T2M.num_joints, 3))
            swing += amplitude * np.sin(2 * np.pi * (rng.uniform(0.2, 1.5) * seconds + 10 * phase))
        yaw = rng.uniform(-3, 3) + rng.normal(0, 0.5) * seconds[:, 0, 0] + 0.3 * np.sin(2 * seconds[:, 0, 0])
        rotations = rotvec_to_matrix(torch.from_numpy(swing))
        turn = yaw_matrix(torch.from_numpy(yaw))
        rotations[:, 0] = turn @ rotations[:, 0]
        speed = rng.uniform(0.0, 1.5) / T2M.fps
        step = np.stack([speed * np.sin(yaw), 0.03 * np.cos(8 * seconds[:, 0, 0]) / T2M.fps, speed * np.cos(yaw)], -1)
        root = rng.normal(0, 1, 3) + step.cumsum(0) + [0.0, 0.9, 0.0]
        offsets = T2M.standard_offsets() * float(rng.uniform(0.85, 1.15))
        clips.append(forward_kinematics(rotations, torch.from_numpy(root), offsets)[0].numpy())
    return clips


def convert_clip_by_loop(joints_TJ3: np.ndarray, skeleton: Skeleton = T2M) -> np.ndarray:
    """Return the "compatible" features (T - 1, 263) float32 of one clip by the slow road, for cross-checks."""
    source = joints_TJ3.astype(np.float64)
    offsets = skeleton.raw_offsets().numpy()
    right_hip, left_hip, right_shoulder, left_shoulder = skeleton.facing_joints

    # Retarget: fit, then replay on the standard skeleton, scaled by leg length.
    first, second = skeleton.leg_joints
    leg = sum(np.linalg.norm(source[0, j] - source[0, skeleton.parents[j]]) for j in (first, second))
    scale = (np.linalg.norm(offsets[first]) + np.linalg.norm(offsets[second])) / leg
    fitted = _fit_quaternions(source, skeleton, smooth=False)
    joints = _replay(fitted, source[:, 0] * scale, offsets, skeleton)

    # Floor, origin, initial heading.
    joints[..., 1] -= joints[..., 1].min()
    joints -= joints[0, 0] * [1.0, 0.0, 1.0]
    across = joints[0, right_hip] - joints[0, left_hip] + joints[0, right_shoulder] - joints[0, left_shoulder]
    across = across / np.linalg.norm(across)
    forward = np.cross([0.0, 1.0, 0.0], across)
    forward = forward / np.linalg.norm(forward)
    initial = _between(forward[None], np.array([[0.0, 0.0, 1.0]]))
    joints = _rotate(np.broadcast_to(initial[:, None], (*joints.shape[:2], 4)), joints)

    # Features.
    step = joints[1:] - joints[:-1]
    contact_joints = list(skeleton.contact_joints)
    contacts = (step[:, contact_joints] ** 2).sum(-1) < skeleton.contact_threshold
    quaternions = _fit_quaternions(joints, skeleton, smooth=True)
    six = np.concatenate([_matrix_column(quaternions, 0), _matrix_column(quaternions, 1)], axis=-1)
    heading = quaternions[:, 0]
    root_step = _rotate(heading[1:], step[:, 0])
    yaw_step = _multiply(heading[1:], _conjugate(heading[:-1]))
    local = joints - joints[:, :1] * [1.0, 0.0, 1.0]
    local = _rotate(np.broadcast_to(heading[:, None], (*local.shape[:2], 4)), local)
    velocity = _rotate(np.broadcast_to(heading[:-1, None], (*step.shape[:2], 4)), step)
    rows = len(step)
    return np.concatenate(
        [
            np.arcsin(yaw_step[:, 2:3]),
            root_step[:, [0, 2]],
            joints[:-1, 0, 1:2],
            local[:-1, 1:].reshape(rows, -1),
            six[:-1, 1:].reshape(rows, -1),
            velocity.reshape(rows, -1),
            contacts,
        ],
        axis=-1,
    ).astype(np.float32)


def _fit_quaternions(joints: np.ndarray, skeleton: Skeleton, smooth: bool) -> np.ndarray:
    """Return local quaternions (T, J, 4): heading for the root, chain by chain swings for the other joints."""
    right_hip, left_hip, right_shoulder, left_shoulder = skeleton.facing_joints
    across = joints[:, left_hip] - joints[:, right_hip] + joints[:, right_shoulder] - joints[:, left_shoulder]
    across = across / np.linalg.norm(across, axis=-1, keepdims=True)
    forward = np.cross(np.array([[0.0, 1.0, 0.0]]), across)
    if smooth:
        offsets = np.arange(-80, 81)
        weights = np.exp(-(offsets**2) / 800.0)
        weights /= weights.sum()
        padded = np.pad(forward, ((80, 80), (0, 0)), mode="edge")
        forward = np.stack([np.convolve(padded[:, i], weights, mode="valid") for i in range(3)], axis=-1)
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    quaternions = np.zeros((*joints.shape[:2], 4))
    quaternions[:, 0] = _between(forward, np.array([[0.0, 0.0, 1.0]]))
    if smooth:
        quaternions[0, 0] = [1.0, 0.0, 0.0, 0.0]
    axes = skeleton.raw_axes_tensor().numpy()
    for chain in skeleton.chains:
        accumulated = quaternions[:, 0]
        for previous, joint in pairwise(chain):
            bone = joints[:, joint] - joints[:, previous]
            bone = bone / np.linalg.norm(bone, axis=-1, keepdims=True)
            swing = _between(np.broadcast_to(axes[joint], bone.shape), bone)
            quaternions[:, joint] = _multiply(_conjugate(accumulated), swing)
            accumulated = _multiply(accumulated, quaternions[:, joint])
    return quaternions


def _replay(quaternions: np.ndarray, root: np.ndarray, offsets: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """Return joints (T, J, 3) of local quaternions on a skeleton of raw offsets."""
    joints = np.zeros((*quaternions.shape[:2], 3))
    joints[:, 0] = root
    for chain in skeleton.chains:
        accumulated = quaternions[:, 0]
        for previous, joint in pairwise(chain):
            accumulated = _multiply(accumulated, quaternions[:, joint])
            bone = np.broadcast_to(offsets[joint], (len(root), 3))
            joints[:, joint] = joints[:, previous] + _rotate(accumulated, bone)
    return joints


def _between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    w = np.sqrt((a**2).sum(-1, keepdims=True) * (b**2).sum(-1, keepdims=True)) + (a * b).sum(-1, keepdims=True)
    quaternion = np.concatenate([w, np.cross(a, b)], axis=-1)
    return quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)


def _conjugate(q: np.ndarray) -> np.ndarray:
    return q * [1.0, -1.0, -1.0, -1.0]


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    aw, ax, ay, az = np.moveaxis(a, -1, 0)
    bw, bx, by, bz = np.moveaxis(b, -1, 0)
    return np.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        axis=-1,
    )


def _rotate(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    twice = 2 * np.cross(q[..., 1:], v)
    return v + q[..., :1] * twice + np.cross(q[..., 1:], twice)


def _matrix_column(q: np.ndarray, column: int) -> np.ndarray:
    w, x, y, z = np.moveaxis(q, -1, 0)
    if column == 0:
        return np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], axis=-1)
    return np.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], axis=-1)


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _check_agreement(arrays: Sequence[np.ndarray], tensors: Sequence[Tensor]) -> tuple[int, float]:
    """Return how many clips were compared and the largest difference, or raise beyond the tolerances.

    Clips that the batched conversion flags (opposite directions, missing bones) have no defined result in the loop.
    """
    undefined = ~(KinematicFlag.YAW_SIGN_ERROR | KinematicFlag.DEGENERATE_HEADING)
    compared, worst = 0, 0.0
    for index, (array, (features, ground, flags)) in enumerate(zip(arrays, clips_to_kinematic(tensors))):
        if flags & undefined:
            continue
        compared += 1
        difference = np.abs(features.numpy() - convert_clip_by_loop(array))
        for name, limit in TOLERANCES.items():
            error = float(difference[:, T2M_LAYOUT.groups[name]].max())
            worst = max(worst, error)
            if not error <= limit:
                raise NumericalError(
                    explain(
                        f"{name} equal within {limit:g} by both conversions",
                        f"a difference of {error:.3g}",
                        f"benchmark clip {index}",
                        "Report this clip: one of the two conversions is wrong.",
                    )
                )
        feet = ground[:, list(T2M.contact_joints)].double().diff(dim=0)
        margin = (feet.square().sum(-1) - T2M.contact_threshold).abs().numpy()
        if (difference[:, T2M_LAYOUT.contacts][margin > 1e-6] != 0).any():
            raise NumericalError(
                explain(
                    "equal contacts by both conversions",
                    "different ones away from the threshold",
                    f"benchmark clip {index}",
                    "Report this clip: one of the two conversions is wrong.",
                )
            )
    if not compared:
        raise NumericalError(
            explain("at least one clip both conversions define", "none", "convert benchmark", "Give ordinary clips.")
        )
    return compared, worst
