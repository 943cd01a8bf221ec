"""Rotation formats: matrices, tagged 6D conventions, quaternions (w, x, y, z), rotation vectors.

Matrices act on column vectors. Three 6D conventions are in use and decode each other's numbers without any error, so
every function that touches six numbers takes a `SixD`.
"""

from __future__ import annotations

from enum import StrEnum

import roma
import torch
from torch import Tensor
from torch.nn import functional as F

from motionrft.core.errors import RepresentationError, explain

_ANTIPODAL = 1e-7


class SixD(StrEnum):
    """Which six entries of a matrix stand in which order. `R01` is row 0, column 1."""

    ROW = "row"  # R00 R01 R02 R10 R11 R12: MDM, MotionCritic, FlowMDM
    COLUMN = "column"  # R00 R10 R20 R01 R11 R21: kinematic features
    INTERLEAVED = "interleaved"  # R00 R01 R10 R11 R20 R21: the rotation representation (R), HY-Motion


def matrix_to_six_d(matrix: Tensor, convention: SixD) -> Tensor:
    """Return six numbers (..., 6) of rotation matrices (..., 3, 3)."""
    if convention is SixD.ROW:
        return matrix[..., :2, :].flatten(-2)
    if convention is SixD.COLUMN:
        return matrix[..., :2].transpose(-1, -2).flatten(-2)
    return matrix[..., :2].flatten(-2)


def six_d_to_matrix(six: Tensor, convention: SixD) -> Tensor:
    """Return rotation matrices (..., 3, 3) of six numbers (..., 6), not necessarily orthonormal; differentiable.

    Gram-Schmidt: b1 = unit(a1), b2 = unit(a2 - (b1 . a2) b1), b3 = b1 x b2. Norms are guarded at 1e-12.
    """
    if convention is SixD.INTERLEAVED:
        first, second = six[..., 0::2], six[..., 1::2]
    else:
        first, second = six[..., :3], six[..., 3:]
    b1 = F.normalize(first, dim=-1, eps=1e-12)
    b2 = F.normalize(second - (b1 * second).sum(-1, keepdim=True) * b1, dim=-1, eps=1e-12)
    b3 = torch.linalg.cross(b1, b2, dim=-1)
    return torch.stack([b1, b2, b3], dim=-2 if convention is SixD.ROW else -1)


def change_six_d(six: Tensor, source: SixD, target: SixD) -> Tensor:
    """Return the same rotations in another convention. Column <-> interleaved only reorders; row needs the matrix."""
    if source is target:
        return six
    if source is SixD.COLUMN and target is SixD.INTERLEAVED:
        return six[..., [0, 3, 1, 4, 2, 5]]
    if source is SixD.INTERLEAVED and target is SixD.COLUMN:
        return six[..., [0, 2, 4, 1, 3, 5]]
    return matrix_to_six_d(six_d_to_matrix(six, source), target)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Return unit quaternions (w, x, y, z), (..., 4), with w >= 0. Accurate at every angle (four-branch method)."""
    quaternion = roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(matrix))
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Return matrices of quaternions (w, x, y, z) of any norm above 1e-6.

    Raises:
        RepresentationError: a quaternion is nearly zero and stands for no rotation.
    """
    norm = quaternion.norm(dim=-1, keepdim=True)
    if bool((norm < 1e-6).any()):
        raise RepresentationError(
            explain(
                "quaternions of unit norm",
                f"a norm of {float(norm.min()):.1e}",
                "quaternion to matrix",
                "Check the order of the four numbers, and drop the clip if the source holds zeros.",
            )
        )
    return roma.unitquat_to_rotmat(roma.quat_wxyz_to_xyzw(quaternion / norm))


def rotvec_to_matrix(rotvec: Tensor) -> Tensor:
    """Return matrices (..., 3, 3) of rotation vectors (..., 3): axis times angle in radians."""
    return roma.rotvec_to_rotmat(rotvec)


def matrix_to_rotvec(matrix: Tensor) -> Tensor:
    """Return rotation vectors (..., 3), angle in [0, pi], of matrices (..., 3, 3)."""
    return roma.rotmat_to_rotvec(matrix)


def slerp(start: Tensor, end: Tensor, fraction: Tensor) -> Tensor:
    """Return rotations on the shortest arc between matrices (..., 3, 3) at `fraction` in [0, 1].

    Args:
        start: (..., 3, 3) rotations at fraction 0.
        end: the same shape, at fraction 1.
        fraction: (...) one value per pair.
    """
    q0, q1 = roma.rotmat_to_unitquat(start), roma.rotmat_to_unitquat(end)
    q1 = torch.where((q0 * q1).sum(-1, keepdim=True) < 0, -q1, q1)
    rotvec = roma.unitquat_to_rotvec(roma.quat_product(roma.quat_conjugation(q0), q1))
    return roma.unitquat_to_rotmat(roma.quat_product(q0, roma.rotvec_to_unitquat(rotvec * fraction[..., None])))


def continuous_quaternions(quaternions: Tensor) -> Tensor:
    """Return quaternions (T, ..., 4) whose signs never flip from frame to frame, as filters along time need."""
    flips = (quaternions[1:] * quaternions[:-1]).sum(-1, keepdim=True) < 0
    sign = torch.where(flips, -1.0, 1.0).to(quaternions.dtype).cumprod(0)
    return torch.cat([quaternions[:1], quaternions[1:] * sign])


def geodesic_angle(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle in radians between rotations (..., 3, 3), shape (...)."""
    return roma.rotmat_geodesic_distance(a, b)


def yaw_matrix(angle: Tensor) -> Tensor:
    """Return rotations about +Y by `angle` radians (...): +Z turns towards +X, the character's left."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    return torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], dim=-1).unflatten(-1, (3, 3))


def shortest_rotation(source: Tensor, target: Tensor) -> Tensor:
    """Return the rotation (..., 3, 3) of least angle taking direction `source` to `target` (..., 3), of any length.

    G = d I + [k]x + k k^T / (1 + d) with k = a x b, d = a . b for unit a, b. Exactly opposite directions take a half
    turn about a fixed perpendicular axis.
    """
    a, b = F.normalize(source, dim=-1), F.normalize(target, dim=-1)
    a, b = torch.broadcast_tensors(a, b)
    k = torch.linalg.cross(a, b, dim=-1)
    d = (a * b).sum(-1)[..., None, None]
    opposite = 1 + d < _ANTIPODAL
    x, y, z = k.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    outer = k[..., :, None] * k[..., None, :]
    eye = torch.eye(3, dtype=a.dtype, device=a.device)
    general = d * eye + skew + outer / torch.where(opposite, 1.0, 1 + d)
    # The coordinate axis least aligned with a, made perpendicular to it.
    helper = F.one_hot(a.detach().abs().argmin(-1), 3).to(a.dtype)
    axis = F.normalize(helper - (helper * a).sum(-1, keepdim=True) * a, dim=-1)
    half_turn = 2 * axis[..., :, None] * axis[..., None, :] - eye
    return torch.where(opposite, half_turn, general)


def nearest_rotation(matrix: Tensor, max_residual: float = 1e-2) -> Tensor:
    """Return the closest rotation to each nearly orthonormal matrix (..., 3, 3).

    Raises:
        RepresentationError: a matrix is further than `max_residual` (largest entry) from every rotation, e.g. a
            reflection, or a 6D array decoded from something else.
    """
    rotation = roma.special_procrustes(matrix)
    residual = float((rotation - matrix).abs().max()) if matrix.numel() else 0.0
    if not residual <= max_residual:
        raise RepresentationError(
            explain(
                f"rotation matrices within {max_residual:g} of orthonormal",
                f"a residual of {residual:.3g}",
                "nearest rotation",
                "Check the 6D convention, axis flips (a reflection is no rotation) and units of the source.",
            )
        )
    return rotation
