"""Is a clip usable? Values, shapes, units. Broken clips become `Rejected`, odd ones get flags.

Letters: T frames, J = 22 joints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from data_prep.sources.base import SPLITS, Rejected, SourceClip
from motionrft.core.errors import RepresentationError
from motionrft.data.schema import QcFlag
from motionrft.representations.rotations import nearest_rotation
from motionrft.representations.skeleton import T2M

_J = T2M.num_joints
_HEAD = T2M.joint_names.index("head")
_FEET = tuple(T2M.contact_joints)
_ZERO_BONE_M = 1e-6
_ORTHONORMAL = 2e-5  # largest entry of R^T R - I that float32 storage explains
_LEG_M = (0.5, 1.2)  # usual thigh + shin
_LEG_UNIT_M = (0.1, 5.0)  # outside: not metres
_FPS_USUAL = (10.0, 240.0)
_MAX_JOINT_SPEED = 20.0  # m/s
_MAX_ROOT_SPEED = 10.0  # m/s: 0.5 m per frame at 20 fps
_FLOATING_M = 0.3  # feet this far above the lowest joint of the clip in every frame


@dataclass(frozen=True)
class CheckedClip:
    """A clip of the right shape with finite values, and what is odd about it."""

    clip: SourceClip
    flags: QcFlag


def check(clip: SourceClip, repair_frames: int = 0) -> CheckedClip | Rejected:
    """Return the clip in the one accepted shape with flags, or why it is unusable.

    Args:
        clip: as a source gave it.
        repair_frames: interpolate runs of up to this many frames with NaN or inf; 0 = reject such clips.
    """

    def reject(code: str, detail: str) -> Rejected:
        return Rejected(clip.clip_id, clip.split if clip.split in SPLITS else "", clip.source, code, detail)

    if clip.split not in SPLITS:
        return reject("BAD_SPLIT", f"split is {clip.split!r}, expected one of {', '.join(SPLITS)}")
    if not (np.isfinite(clip.fps) and clip.fps > 0):
        return reject("UNKNOWN_FPS", f"frame rate is {clip.fps}; it is never guessed")
    joints = _as_joints(np.asarray(clip.joints_TJ3))
    if isinstance(joints, str):
        return reject("WRONG_SHAPE", joints)
    if len(joints) < 2:
        return reject("TOO_SHORT", f"{len(joints)} frames: a velocity needs two")
    flags = QcFlag(0)
    finite_T = np.isfinite(joints).all(axis=(1, 2))
    rotations = clip.rotations_TJ33
    if rotations is not None:
        if rotations.shape != (len(joints), _J, 3, 3):
            return reject("WRONG_SHAPE", f"rotations have shape {rotations.shape}, expected {(len(joints), _J, 3, 3)}")
        finite_T &= np.isfinite(rotations).all(axis=(1, 2, 3))
    if not finite_T.all():
        bad = int((~finite_T).sum())
        if not _repairable(finite_T, repair_frames):
            return reject(
                "NONFINITE", f"{bad} of {len(joints)} frames hold NaN or inf, first {int(np.argmin(finite_T))}"
            )
        joints = _interpolated(joints, finite_T)
        rotations = None if rotations is None else _held(rotations, finite_T)
        flags |= QcFlag.REPAIRED
    if rotations is not None:
        try:
            rotations = _orthonormal(rotations.astype(np.float64))
        except RepresentationError as error:
            return reject("BAD_ROTATIONS", str(error))
    bones_m = np.linalg.norm(joints[0, 1:] - joints[0, list(T2M.parents[1:])], axis=-1)
    if bones_m.min() < _ZERO_BONE_M:
        name = T2M.joint_names[1 + int(bones_m.argmin())]
        return reject("ZERO_BONE", f"the bone to {name} has no length in frame 0, so the scale is undefined")
    leg_m = float(bones_m[T2M.leg_joints[0] - 1] + bones_m[T2M.leg_joints[1] - 1])
    if not _LEG_UNIT_M[0] <= leg_m <= _LEG_UNIT_M[1]:
        return reject("WRONG_UNIT", f"the right leg is {leg_m:.4g} long, which is not metres: set the source's unit")
    upright_T = joints[:, _HEAD, 1] - joints[:, _FEET, 1].mean(1)
    if upright_T.max() < -0.5 * leg_m:
        return reject("WRONG_UP_AXIS", "the head is below the feet in every frame: set the source's up axis")
    flags |= _odd(joints, float(clip.fps), leg_m, upright_T)
    captions = tuple(c.strip() for c in clip.captions if c.strip())
    if not captions:
        flags |= QcFlag.NO_CAPTION
    elif len(captions) < len(clip.captions):
        flags |= QcFlag.BAD_CAPTION_DROPPED
    rot_source = clip.rot_source if rotations is not None else ""
    checked = replace(
        clip,
        joints_TJ3=joints.astype(np.float32),
        rotations_TJ33=rotations,
        captions=captions,
        rot_source=rot_source,
        kinematic_TD=_as_features(clip.kinematic_TD, len(joints)),
    )
    if clip.kinematic_TD is not None and checked.kinematic_TD is None:
        return reject("WRONG_SHAPE", f"released features have shape {clip.kinematic_TD.shape} for {len(joints)} frames")
    if checked.kinematic_TD is not None and not np.isfinite(checked.kinematic_TD).all():
        return reject("NONFINITE", "released features hold NaN or inf")
    return CheckedClip(checked, flags)


def _as_joints(array: np.ndarray) -> np.ndarray | str:
    """Return (T, 22, 3), or what is wrong with the shape."""
    if array.ndim == 2 and array.shape[1] == 3 * _J:
        return array.reshape(-1, _J, 3)
    if array.ndim == 3 and array.shape[1:] == (_J, 3):
        return array
    if array.ndim == 3 and array.shape[2] == 3 and array.shape[1] in (24, 52):  # SMPL, SMPL-H: hands follow the body
        return array[:, :_J]
    if array.shape == (_J, 3):
        return f"shape {array.shape}: the time axis is lost"
    hint = " (21 joints: KIT, not supported here)" if array.ndim == 3 and array.shape[1] == 21 else ""
    return f"shape {array.shape}{hint}, expected (T, {_J}, 3), (T, {3 * _J}), (T, 24, 3) or (T, 52, 3)"


def _as_features(array: np.ndarray | None, num_frames: int) -> np.ndarray | None:
    if array is None or array.shape != (num_frames, T2M.kinematic_dim):
        return None
    return array.astype(np.float32)


def _orthonormal(rotations: np.ndarray) -> np.ndarray:
    """Return proper rotations; those orthonormal to float32 rounding stay as they are."""
    gram = rotations.swapaxes(-1, -2) @ rotations - np.eye(3)
    if np.abs(gram).max() < _ORTHONORMAL and np.linalg.det(rotations).min() > 0:
        return rotations
    return nearest_rotation(torch.from_numpy(rotations)).numpy()


def _repairable(finite_T: np.ndarray, limit: int) -> bool:
    """Are all broken runs at most `limit` frames long and inside the clip?"""
    if limit == 0 or not (finite_T[0] and finite_T[-1]):
        return False
    kept = np.flatnonzero(finite_T)
    return int(np.diff(kept).max(initial=1)) - 1 <= limit


def _interpolated(joints: np.ndarray, finite_T: np.ndarray) -> np.ndarray:
    time, flat = np.arange(len(joints)), joints.reshape(len(joints), -1)
    columns = [np.interp(time, time[finite_T], column[finite_T]) for column in flat.T]
    return np.stack(columns, axis=1).reshape(joints.shape)


def _held(rotations: np.ndarray, finite_T: np.ndarray) -> np.ndarray:
    """Return rotations where a broken frame repeats the last good one."""
    source = np.maximum.accumulate(np.where(finite_T, np.arange(len(finite_T)), 0))
    return rotations[source]


def _odd(joints: np.ndarray, fps: float, leg_m: float, upright_T: np.ndarray) -> QcFlag:
    flags = QcFlag(0)
    if not _FPS_USUAL[0] <= fps <= _FPS_USUAL[1]:
        flags |= QcFlag.UNUSUAL_FPS
    if not _LEG_M[0] <= leg_m <= _LEG_M[1]:
        flags |= QcFlag.UNUSUAL_SIZE
    speed = np.linalg.norm(np.diff(joints.astype(np.float64), axis=0), axis=-1) * fps
    if speed.max() > _MAX_JOINT_SPEED or speed[:, 0].max() > _MAX_ROOT_SPEED:
        flags |= QcFlag.FAST
    if joints[:, _FEET, 1].min() - joints[..., 1].min() > _FLOATING_M:
        flags |= QcFlag.FLOATING
    if upright_T.max() < 0.5 * leg_m:
        flags |= QcFlag.NEVER_UPRIGHT
    return flags
