"""Motions as BVH files, which animation programs read: one hierarchy, one line of angles per frame.

Letters: T frames, J = 22 joints.
"""

from __future__ import annotations

from pathlib import Path

import roma
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, DataError, explain
from motionrft.core.types import Representation
from motionrft.representations.convert import to_joints
from motionrft.representations.kinematics import joints_to_rotations
from motionrft.representations.rotation import rotation_to_matrices
from motionrft.representations.skeleton import T2M, bone_lengths

_CM = 100.0  # the unit most programs assume
_ORDER = "ZXY"


def write_bvh(path: Path, motion_TD: Tensor, representation: Representation, fps: float) -> float:
    """Write one clip and return the largest distance in metres between its joints and those of the file.

    Rotations are written as they are, with the standard body. Positions (joints, kinematic) have none: they are fitted
    to a body with the clip's own mean bone lengths; twist about bones is not in positions and stays zero.

    Args:
        path: file to write; folders are made.
        motion_TD: physical motion of one clip, all frames valid.
        representation: what the numbers are.
        fps: frames per second.

    Raises:
        DataError: no frame, or numbers that are not finite.
        ConfigError: the file cannot be written.
    """
    if len(motion_TD) == 0 or not bool(motion_TD.isfinite().all()):
        raise DataError(explain("finite frames", f"shape {tuple(motion_TD.shape)}", str(path), "Leave this clip out."))
    motion = motion_TD.detach().double().cpu()
    if representation is Representation.ROTATION:
        rotations, root = rotation_to_matrices(motion)
        offsets, residual = T2M.standard_offsets().double(), 0.0
    else:
        joints = to_joints(motion, representation)
        lengths = bone_lengths(joints, T2M).mean(0)
        offsets = T2M.with_bone_lengths(lengths).standard_offsets().double()
        fit = joints_to_rotations(joints, offsets)
        rotations, root, residual = fit.rotations, fit.root, float(fit.residual.max())
    angles = roma.rotmat_to_euler(_ORDER, rotations, degrees=True)  # (T, 22, 3)
    order = _depth_first()
    values = torch.cat([root * _CM, angles[:, order].flatten(1)], dim=1)
    lines = ["HIERARCHY", *_hierarchy(0, offsets * _CM, 0), "MOTION", f"Frames: {len(values)}"]
    lines += [f"Frame Time: {1.0 / fps:.8f}", *(" ".join(f"{v:.6f}" for v in row) for row in values.tolist())]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    return residual


def _depth_first(joint: int = 0) -> list[int]:
    """Return joints in the order in which a BVH hierarchy, and so its motion lines, name them."""
    return [joint, *(below for child in T2M.children[joint] for below in _depth_first(child))]


def _hierarchy(joint: int, offsets: Tensor, depth: int) -> list[str]:
    pad = "  " * depth
    rotations = " ".join(f"{axis}rotation" for axis in _ORDER)
    channels = f"6 Xposition Yposition Zposition {rotations}" if joint == 0 else f"3 {rotations}"
    place = (0.0, 0.0, 0.0) if joint == 0 else offsets[joint].tolist()
    lines = [
        f"{pad}{'ROOT' if joint == 0 else 'JOINT'} {T2M.joint_names[joint]}",
        pad + "{",
        f"{pad}  OFFSET {' '.join(f'{v:.6f}' for v in place)}",
        f"{pad}  CHANNELS {channels}",
    ]
    children = T2M.children[joint]
    for child in children:
        lines += _hierarchy(child, offsets, depth + 1)
    if not children:
        lines += [f"{pad}  End Site", pad + "  {", f"{pad}    OFFSET 0.0 0.0 0.0", pad + "  }"]
    return [*lines, pad + "}"]
