"""Forward kinematics by tree depth, facing, the inverse-kinematics fit, and mirroring.

Letters: J joints; leading axes are free. Everything is differentiable where the maths is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import roma
import torch
from torch import Tensor

from motionrft.representations.rotations import shortest_rotation
from motionrft.representations.skeleton import T2M, Skeleton


def forward_kinematics(
    rotations: Tensor, root: Tensor, offsets: Tensor, skeleton: Skeleton = T2M
) -> tuple[Tensor, Tensor]:
    """Return joints (..., J, 3) and global rotations (..., J, 3, 3).

    G_0 = R_0, x_0 = root; G_j = G_parent R_j, x_j = x_parent + G_parent o_j. One batched product per tree level.

    Args:
        rotations: (..., J, 3, 3) local rotations, joint 0 global.
        root: (..., 3) position of joint 0.
        offsets: (J, 3) or (..., J, 3) rest offsets from the parent.
        skeleton: the tree.
    """
    offsets = offsets.to(rotations)
    above_rotation, above_position = rotations[..., :1, :, :], root[..., None, :].to(rotations)
    above = skeleton.levels[0]
    order = list(above)
    global_levels, position_levels = [above_rotation], [above_position]
    for level in skeleton.levels[1:]:
        joints = list(level)
        rows = [above.index(skeleton.parents[j]) for j in joints]
        parent_rotation, parent_position = above_rotation[..., rows, :, :], above_position[..., rows, :]
        above_position = parent_position + (parent_rotation @ offsets[..., joints, :, None])[..., 0]
        above_rotation = parent_rotation @ rotations[..., joints, :, :]
        position_levels.append(above_position)
        global_levels.append(above_rotation)
        above = level
        order += joints
    back = [order.index(j) for j in range(skeleton.num_joints)]
    return torch.cat(position_levels, dim=-2)[..., back, :], torch.cat(global_levels, dim=-3)[..., back, :, :]


def facing_direction(joints: Tensor, skeleton: Skeleton = T2M) -> Tensor:
    """Return the horizontal unit facing (..., 3) of joints (..., J, 3): up x (hips + shoulders, right minus left).

    A body lying on its side has no facing: the result is then zero.
    """
    right_hip, left_hip, right_shoulder, left_shoulder = skeleton.facing_joints
    across = (joints[..., right_hip, :] - joints[..., left_hip, :]) + (
        joints[..., right_shoulder, :] - joints[..., left_shoulder, :]
    )
    facing = torch.stack([across[..., 2], torch.zeros_like(across[..., 0]), -across[..., 0]], dim=-1)
    norm = facing.norm(dim=-1, keepdim=True)
    return torch.where(norm < 1e-6, torch.zeros_like(facing), facing / norm.clamp_min(1e-6))


def facing_yaw(joints: Tensor, skeleton: Skeleton = T2M) -> Tensor:
    """Return the facing angle about +Y in radians, (...): 0 = +Z, positive towards +X (the character's left)."""
    facing = facing_direction(joints, skeleton)
    return torch.atan2(facing[..., 0], facing[..., 2])


def rotation_to_forward(joints: Tensor, skeleton: Skeleton = T2M) -> Tensor:
    """Return rotations about Y (..., 3, 3) that turn the facing of joints (..., J, 3) to +Z; identity if undefined."""
    facing = facing_direction(joints, skeleton)
    x, z = facing[..., 0], facing[..., 2]
    z = torch.where((x == 0) & (z == 0), torch.ones_like(z), z)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return torch.stack([z, zero, -x, zero, one, zero, x, zero, z], dim=-1).unflatten(-1, (3, 3))


@dataclass(frozen=True)
class RotationFit:
    """Rotations fitted to joint positions. Not the rotations the motion was made with: twist is not in positions."""

    source: ClassVar[str] = "ik"
    rotations: Tensor  # (..., J, 3, 3) local
    root: Tensor  # (..., 3)
    residual: Tensor  # (...) largest distance between given and reproduced joints, in the skeleton's unit


def joints_to_rotations(joints: Tensor, offsets: Tensor, skeleton: Skeleton = T2M) -> RotationFit:
    """Fit local rotations to joints (..., J, 3) for a body with rest `offsets` (J, 3). LOSSY.

    A joint with several children takes the least-squares rotation of their offsets (Kabsch), one with a single child
    the shortest rotation relative to its parent, a leaf the identity. Positions are reproduced exactly when the joints
    come from a body with these offsets; twist about single-child bones and the orientation of leaves cannot be
    recovered (errors of 3 to 22 degrees on natural motion). Keep such clips apart from true rotations by `source`.
    """
    offsets = offsets.to(joints)
    local: list[Tensor | None] = [None] * skeleton.num_joints
    world: list[Tensor | None] = [None] * skeleton.num_joints
    eye = torch.eye(3, dtype=joints.dtype, device=joints.device).expand(*joints.shape[:-2], 3, 3)
    for joint, children in enumerate(skeleton.children):
        parent = eye if joint == 0 else world[skeleton.parents[joint]]
        assert parent is not None
        bones = joints[..., list(children), :] - joints[..., joint, None, :]
        own = bones @ parent  # parent^T bone for every child, as rows
        if len(children) == 0:
            rotation = eye
        elif len(children) == 1:
            rotation = shortest_rotation(offsets[list(children)].expand_as(own), own)[..., 0, :, :]
        else:
            correlation = own.transpose(-1, -2) @ offsets[list(children)]
            rotation = roma.special_procrustes(correlation)
        local[joint] = rotation
        world[joint] = parent @ rotation
    rotations = torch.stack([r for r in local if r is not None], dim=-3)
    root = joints[..., 0, :]
    rebuilt, _ = forward_kinematics(rotations, root, offsets, skeleton)
    return RotationFit(rotations, root, (rebuilt - joints).norm(dim=-1).amax(-1))


def mirror_joints(joints: Tensor, skeleton: Skeleton = T2M) -> Tensor:
    """Return joints (..., J, 3) mirrored at the YZ plane: x negated, left and right exchanged. Its own inverse.

    Mirror before retargeting: the standard skeleton is not symmetric, so mirrored features differ from features of
    mirrored joints by up to a centimetre.
    """
    return joints[..., list(skeleton.mirror_permutation), :] * joints.new_tensor([-1.0, 1.0, 1.0])


def mirror_rotations(rotations: Tensor, skeleton: Skeleton = T2M) -> Tensor:
    """Return local rotations (..., J, 3, 3) of the mirrored motion, M R_swap M with M = diag(-1, 1, 1). Exact."""
    signs = rotations.new_tensor([-1.0, 1.0, 1.0])
    return rotations[..., list(skeleton.mirror_permutation), :, :] * (signs[:, None] * signs)
