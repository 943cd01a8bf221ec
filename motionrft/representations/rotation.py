"""The rotation representation (R): 135 numbers per frame.

0:3 root translation (metres, absolute, Y up); 3:135 the 22 local joint rotations as interleaved 6D, joint 0 being the
global orientation. Canonical clips start in the XZ origin facing +Z. The translation is that of the pelvis joint;
files with SMPL `transl` hold pelvis minus the body's rest pelvis, see `transl_to_pelvis`.

Letters: T frames, J = 22 joints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motionrft.core.errors import RepresentationError, explain
from motionrft.core.types import valid_mask
from motionrft.representations.kinematics import forward_kinematics, mirror_rotations, rotation_to_forward
from motionrft.representations.rotations import SixD, matrix_to_six_d, six_d_to_matrix
from motionrft.representations.skeleton import T2M

TRANSLATION = slice(0, 3)
ROOT_ROTATION = slice(3, 9)
JOINT_ROTATIONS = slice(3, 135)
DIM = 135


def matrices_to_rotation(rotations: Tensor, root: Tensor) -> Tensor:
    """Return the vector (..., 135) of local rotations (..., 22, 3, 3) and root positions (..., 3)."""
    return torch.cat([root, matrix_to_six_d(rotations, SixD.INTERLEAVED).flatten(-2)], dim=-1)


def rotation_to_matrices(motion: Tensor) -> tuple[Tensor, Tensor]:
    """Return local rotations (..., 22, 3, 3), orthonormalised, and root positions (..., 3); differentiable."""
    _check(motion)
    six = motion[..., JOINT_ROTATIONS].unflatten(-1, (-1, 6))
    return six_d_to_matrix(six, SixD.INTERLEAVED), motion[..., TRANSLATION]


def rotation_to_joints(motion: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Return joints (..., 22, 3) by forward kinematics; differentiable.

    Args:
        motion: (..., 135) in physical units.
        offsets: (22, 3) rest offsets of the body; by default the generic body with standard bone lengths, whose bones
            are as long as those of J and K. Exact for a given body; record which one was used.
    """
    rotations, root = rotation_to_matrices(motion)
    return forward_kinematics(rotations, root, T2M.standard_offsets() if offsets is None else offsets)[0]


def canonicalise_rotation(
    motion: Tensor, lengths_B: Tensor | None = None, offsets: Tensor | None = None, floor: bool = False
) -> Tensor:
    """Return clips (..., T, 135) moved to the XZ origin and turned so that frame 0 faces +Z.

    Facing is that of the joints (hips and shoulders), so the result agrees with canonical joints of the same clip.

    Args:
        motion: (..., T, 135), padding after the valid frames.
        lengths_B: (B,) valid frames of a (B, T, 135) batch; padding then becomes zero. None: every frame counts.
        offsets: rest offsets of the body, for facing and floor.
        floor: also shift heights so that the lowest joint of the clip touches 0.
    """
    rotations, root = rotation_to_matrices(motion)
    joints0 = rotation_to_joints(motion[..., 0, :], offsets)
    turn = rotation_to_forward(joints0)[..., None, :, :]
    start = root[..., :1, :] * root.new_tensor([1.0, 0.0, 1.0])
    root = (turn @ (root - start)[..., None])[..., 0]
    rotations = torch.cat([(turn @ rotations[..., 0, :, :])[..., None, :, :], rotations[..., 1:, :, :]], dim=-3)
    result = matrices_to_rotation(rotations, root)
    mask = None if lengths_B is None else valid_mask(lengths_B, motion.shape[-2])
    if floor:
        heights = rotation_to_joints(result, offsets)[..., 1].amin(-1)
        if mask is not None:
            heights = heights.masked_fill(~mask, torch.inf)
        drop = heights.amin(-1)[..., None, None]
        result = torch.cat([result[..., :1], result[..., 1:2] - drop, result[..., 2:]], dim=-1)
    return result if mask is None else result * mask[..., None]


def mirror_rotation(motion: Tensor) -> Tensor:
    """Return the left-right mirrored motion (..., 135); exact and its own inverse."""
    rotations, root = rotation_to_matrices(motion)
    return matrices_to_rotation(mirror_rotations(rotations), root * root.new_tensor([-1.0, 1.0, 1.0]))


def transl_to_pelvis(motion: Tensor, rest_pelvis: Tensor) -> Tensor:
    """Return the motion with pelvis positions of one with SMPL `transl`; `rest_pelvis` (3,) is J0 of the body."""
    return torch.cat([motion[..., :3] + rest_pelvis.to(motion), motion[..., 3:]], dim=-1)


def pelvis_to_transl(motion: Tensor, rest_pelvis: Tensor) -> Tensor:
    """Return the motion with SMPL `transl` in place of pelvis positions. Inverse of `transl_to_pelvis`."""
    return torch.cat([motion[..., :3] - rest_pelvis.to(motion), motion[..., 3:]], dim=-1)


def _check(motion: Tensor) -> None:
    if motion.shape[-1] != DIM:
        hint = " (HY-Motion? use its first 135 numbers)" if motion.shape[-1] == 201 else ""
        raise RepresentationError(
            explain(
                f"{DIM} numbers per frame: translation and 22 interleaved 6D rotations",
                f"{motion.shape[-1]}{hint}",
                "rotation representation",
                "Convert with representations.convert or choose the representation the array has.",
            )
        )
