"""Rotation arrays of other projects, to and from the rotation representation (R).

* FlowMDM / BABEL, 135 numbers: [root height, planar steps, 22 x 6D row], Z up. The same width as R, another meaning.
* HY-Motion, 201 numbers: R followed by the 22 joint positions relative to the root, in world orientation.
* MotionCritic: (25, 6, T) generator tensors and (T, 25, 3) rotation vectors of 24 SMPL joints and the root.

Letters: T frames.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from motionrft.core.errors import RepresentationError, explain
from motionrft.representations.rotation import (
    canonicalise_rotation,
    matrices_to_rotation,
    rotation_to_joints,
    rotation_to_matrices,
)
from motionrft.representations.rotations import (
    SixD,
    matrix_to_rotvec,
    matrix_to_six_d,
    rotvec_to_matrix,
    six_d_to_matrix,
)

_Z_TO_Y_UP = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0))  # (x, y, z) -> (x, z, -y)


def rotation_from_flowmdm(features: Tensor) -> Tensor:
    """Return canonical R clips (..., T, 135) of un-normalised FlowMDM features (..., T, 135), at their own frame rate.

    The initial heading and place are not in the features; the result starts in the XZ origin facing +Z.
    """
    matrices = six_d_to_matrix(features[..., 3:].unflatten(-1, (-1, 6)), SixD.ROW)
    ground = features[..., 1:3].cumsum(-2)
    root = torch.cat([ground, features[..., :1]], dim=-1)
    return canonicalise_rotation(_change_world(matrices, root, torch.tensor(_Z_TO_Y_UP)))


def rotation_to_flowmdm(motion: Tensor) -> Tensor:
    """Return un-normalised FlowMDM features (..., T, 135) of R clips (..., T, 135), frame rate unchanged.

    Z up; the clip is turned about the vertical by minus (z of the first root rotation vector + pi/2).
    """
    matrices, root = rotation_to_matrices(motion)
    z_up, root = rotation_to_matrices(_change_world(matrices, root, torch.tensor(_Z_TO_Y_UP).T))
    angle = -(matrix_to_rotvec(z_up[..., 0, 0, :, :])[..., 2] + math.pi / 2)
    axis = torch.stack([torch.zeros_like(angle), torch.zeros_like(angle), angle], dim=-1)
    turn = rotvec_to_matrix(axis)[..., None, :, :]
    root = (turn @ root[..., None])[..., 0]
    matrices = torch.cat([turn[..., None, :, :] @ z_up[..., :1, :, :], z_up[..., 1:, :, :]], dim=-3)
    steps = torch.cat([torch.zeros_like(root[..., :1, :2]), root[..., 1:, :2] - root[..., :-1, :2]], dim=-2)
    return torch.cat([root[..., 2:], steps, matrix_to_six_d(matrices, SixD.ROW).flatten(-2)], dim=-1)


def rotation_from_hymotion(features: Tensor) -> Tensor:
    """Return R (..., 135) of un-normalised HY-Motion features (..., 201), at their own 30 fps."""
    if features.shape[-1] != 201:
        raise RepresentationError(
            explain(
                "201 HY-Motion features per frame",
                str(features.shape[-1]),
                "HY-Motion to rotation",
                "135 numbers may already be R.",
            )
        )
    return features[..., :135]


def rotation_to_hymotion(motion: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Return HY-Motion features (..., 201) of R (..., 135): R, then its joints relative to the root."""
    joints = rotation_to_joints(motion, offsets)
    return torch.cat([motion, (joints - joints[..., :1, :]).flatten(-2)], dim=-1)


def critic_to_rotvecs(critic: Tensor) -> Tensor:
    """Return (..., T, 25, 3): 24 rotation vectors and the root position, of generator tensors (..., 25, 6, T)."""
    if critic.shape[-3:-1] != (25, 6):
        raise RepresentationError(
            explain(
                "a MotionCritic tensor (..., 25, 6, T)",
                f"shape {tuple(critic.shape)}",
                "MotionCritic import",
                "Permute joints, numbers and frames into this order.",
            )
        )
    rows = critic.movedim(-1, -3)
    rotvecs = matrix_to_rotvec(six_d_to_matrix(rows[..., :24, :], SixD.ROW))
    return torch.cat([rotvecs, rows[..., 24:, :3]], dim=-2)


def rotation_from_critic(rotvecs: Tensor, y_down: bool = True) -> Tensor:
    """Return canonical R clips (..., T, 135) of MotionCritic clips (..., T, 25, 3), floor at 0.

    Args:
        rotvecs: 24 SMPL rotation vectors, then the root position relative to frame 0. The two hands are dropped.
        y_down: the clips of that dataset are in camera convention; they are turned by 180 degrees about X (never
            multiplied by -1, which would mirror left and right).
    """
    if rotvecs.shape[-2:] != (25, 3):
        raise RepresentationError(
            explain(
                "MotionCritic rotation vectors (..., T, 25, 3)",
                f"shape {tuple(rotvecs.shape)}",
                "MotionCritic import",
                "Use critic_to_rotvecs on (25, 6, T) generator tensors first.",
            )
        )
    matrices = rotvec_to_matrix(rotvecs[..., :22, :])
    world = torch.diag(torch.tensor([1.0, -1.0, -1.0])) if y_down else torch.eye(3)
    return canonicalise_rotation(_change_world(matrices, rotvecs[..., 24, :], world), floor=True)


def _change_world(matrices: Tensor, root: Tensor, world: Tensor) -> Tensor:
    """Return R of a motion seen in another world frame: only the global rotation and the root change."""
    world = world.to(matrices)
    first = (world @ matrices[..., 0, :, :])[..., None, :, :]
    root = (world @ root[..., None])[..., 0]
    return matrices_to_rotation(torch.cat([first, matrices[..., 1:, :, :]], dim=-3), root)
