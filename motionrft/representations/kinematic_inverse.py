"""Kinematic features (K) back to joints, differentiable; used by rewards, losses and viewers.

Letters: T frames, J joints, D = 12 J - 1. Computed in the dtype of the features, at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motionrft.representations.kinematic_layout import Variant, layout_of, skeleton_of
from motionrft.representations.skeleton import Skeleton


def recover_root(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (cos, sin) (..., T) of the accumulated world-to-heading yaw and the root (..., T, 3).

    The features hold half yaw steps, so the accumulated rotation about Y is twice their running sum. Frame 0 stands in
    the XZ origin and faces +Z; row T-1's step is not used.
    """
    features = features if features.dtype == torch.float64 else features.float()
    layout = layout_of(features.shape[-1])
    yaw = features[..., layout.yaw_rate.start]
    angle = 2.0 * _exclusive_cumsum(yaw)
    cos, sin = torch.cos(angle), torch.sin(angle)
    step_x, step_z = features[..., layout.root_velocity].unbind(-1)
    # Row t-1 holds the step t-1 -> t in the heading frame of t.
    x = _delay(step_x) * cos - _delay(step_z) * sin
    z = _delay(step_x) * sin + _delay(step_z) * cos
    height = features[..., layout.root_height.start]
    return cos, sin, torch.stack([x.cumsum(-1), height, z.cumsum(-1)], dim=-1)


def recover_from_ric(features: Tensor) -> Tensor:
    """Return joints (..., T, J, 3) from the root track and the heading-frame joint positions.

    Args:
        features: (..., T, 263) or (..., T, 251) in physical units (not normalised).

    Raises:
        RepresentationError: another feature width.
    """
    cos, sin, root = recover_root(features)
    layout = layout_of(features.shape[-1])
    local = features[..., layout.joint_positions].to(root.dtype).unflatten(-1, (-1, 3))
    x, y, z = local.unbind(-1)
    cos, sin = cos[..., None], sin[..., None]
    joints = torch.stack([cos * x - sin * z + root[..., :1], y, sin * x + cos * z + root[..., 2:]], dim=-1)
    return torch.cat([root[..., None, :], joints], dim=-2)


def recover_from_rot(features: Tensor, skeleton: Skeleton | None = None, variant: Variant = "compatible") -> Tensor:
    """Return joints (..., T, J, 3) from the root track and the swing rotations, with the standard bone lengths.

    Agrees with `recover_from_ric` on converted clips, except after a yaw sign error of "compatible" features. The bone
    directions follow the same chains as in the conversion, so `variant` must be that of the features.

    Args:
        features: (..., T, D) in physical units.
        skeleton: bone lengths and axes; by default the one the feature width names.
        variant: which conversion made the features.
    """
    skeleton = skeleton or skeleton_of(features.shape[-1])
    cos, sin, root = recover_root(features)
    layout = layout_of(features.shape[-1])
    six = features[..., layout.joint_rotations].to(root.dtype).unflatten(-1, (-1, 6))
    first = torch.nn.functional.normalize(six[..., :3], dim=-1)
    second = six[..., 3:] - (first * six[..., 3:]).sum(-1, keepdim=True) * first
    second = torch.nn.functional.normalize(second, dim=-1)
    swing = torch.stack([first, second, torch.linalg.cross(first, second, dim=-1)], dim=-1)
    fixed = variant == "fixed"
    predecessors = skeleton.parents if fixed else skeleton.predecessors
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    if fixed:
        base = [one, zero, zero, zero, one, zero, zero, zero, one]
    else:
        base = [cos, zero, sin, zero, one, zero, -sin, zero, cos]
    rotations: dict[int, Tensor] = {0: torch.stack(base, dim=-1).unflatten(-1, (3, 3))[..., None, :, :]}
    offsets = skeleton.raw_offsets().to(root)
    positions: dict[int, Tensor] = {0: torch.zeros_like(root)}
    for level in skeleton.levels[1:]:
        joints = list(level)
        before = torch.cat([rotations[predecessors[j]] for j in joints], dim=-3)
        total = before @ swing[..., [j - 1 for j in joints], :, :]
        bone = (total @ offsets[joints][..., None])[..., 0]
        for i, j in enumerate(joints):
            rotations[j] = total[..., i : i + 1, :, :]
            positions[j] = positions[skeleton.parents[j]] + bone[..., i, :]
    local = torch.stack([positions[j] for j in range(skeleton.num_joints)], dim=-2)
    if fixed:  # directions are in the heading frame: turn them back to the world
        x, y, z = local.unbind(-1)
        cos, sin = cos[..., None], sin[..., None]
        local = torch.stack([cos * x - sin * z, y, sin * x + cos * z], dim=-1)
    return local + root[..., None, :]


def _exclusive_cumsum(x: Tensor) -> Tensor:
    return _delay(x).cumsum(-1)


def _delay(x: Tensor) -> Tensor:
    """Return x shifted by one frame along the last axis, zero first."""
    return torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], dim=-1)
