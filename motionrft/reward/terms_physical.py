"""Reward terms on joint positions in metres, for any representation. Importing this module registers them.

Each is at most 0, and 0 for a standing body of the standard skeleton with its feet on the floor (bone terms: up to
rounding). Time derivatives use the 20 frames per second of the 22-joint data. They judge what
`evaluation.quality` measures; where their form differs, the class says so.

Letters: B batch, T frames, J joints.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from motionrft.core.types import valid_mask
from motionrft.representations.skeleton import T2M, bone_lengths
from motionrft.reward.terms import MotionView, masked_mean, register_term

FLOOR_TOLERANCE_M = 0.02
"""Depth below and height above the floor that is free: joints are not skin."""
JERK_SCALE_M_S3 = 60.0
"""Mean joint jerk of motion capture at 20 fps (60 m/s^3 on Bandai Namco clips): captured motion scores about -1."""
GRAVITY_M_S2 = 9.81

_TOES = (10, 11)  # left_foot, right_foot of the 22 joints
_CONTACT_HEIGHT_M = 0.07
_CONTACT_SOFTNESS_M = 0.01


@register_term
class FootSliding:
    """Minus the planar toe speed while in contact, metres per second.

    A toe is in contact softly below 7 cm. The contact weight carries no gradient: sliding must not be cured by
    lifting the foot.
    """

    name: ClassVar[str] = "foot_sliding"

    def __call__(self, motion: MotionView) -> Tensor:
        """Return (B,), at most 0."""
        toes_BTJ3 = motion.joints_BTJ3[:, :, list(_TOES)]
        speed = _norm(toes_BTJ3[..., [0, 2]].diff(dim=1)) * T2M.fps
        height = toes_BTJ3[..., 1].detach()
        lower = torch.maximum(height[:, 1:], height[:, :-1])
        contact = torch.sigmoid((_CONTACT_HEIGHT_M - lower) / _CONTACT_SOFTNESS_M)
        return -masked_mean((speed * contact).mean(-1), valid_mask(motion.lengths_B - 1, speed.shape[1]))


@register_term
class FloorPenetration:
    """Minus the depth of the lowest joint below the floor beyond a tolerance, mean over frames, metres."""

    name: ClassVar[str] = "floor_penetration"

    def __call__(self, motion: MotionView) -> Tensor:
        """Return (B,), at most 0."""
        depth_BT = (-_lowest(motion) - FLOOR_TOLERANCE_M).clamp(min=0.0)
        return -masked_mean(depth_BT, motion.mask_BT)


@register_term
class Floating:
    """Minus the height of the lowest joint above the floor while nothing explains it, metres.

    A body in the air falls: its mean joint accelerates down with g. Height beyond the tolerance therefore counts with
    the share of the weight that is not falling, 1 + a / g cut to 0 .. 1 for the vertical acceleration a: all of it
    while the body hovers, nothing during a jump. The share carries no gradient: floating is cured by coming down, not
    by falling harder. The mean is over frames that have both neighbours, 0 for clips of less than three.

    Stairs and furniture count as floating: there is no floor but 0. `evaluation.quality` also counts jumps.
    """

    name: ClassVar[str] = "floating"

    def __call__(self, motion: MotionView) -> Tensor:
        """Return (B,), at most 0."""
        body_BT = motion.joints_BTJ3[..., 1].mean(-1).detach()
        fall = body_BT.diff(n=2, dim=1) * T2M.fps**2
        carried = (1.0 + fall / GRAVITY_M_S2).clamp(0.0, 1.0)
        height = (_lowest(motion)[:, 1:-1] - FLOOR_TOLERANCE_M).clamp(min=0.0)
        return -masked_mean(height * carried, valid_mask(motion.lengths_B - 2, carried.shape[1]))


@register_term
class JointJerk:
    """Minus the mean norm of the third time derivative over joints and frames, in units of `JERK_SCALE_M_S3`.

    0 for clips of less than four frames.
    """

    name: ClassVar[str] = "joint_jerk"

    def __call__(self, motion: MotionView) -> Tensor:
        """Return (B,), at most 0; about -1 for captured motion."""
        jerk_BTJ = _norm(motion.joints_BTJ3.diff(n=3, dim=1)) * (T2M.fps**3 / JERK_SCALE_M_S3)
        return -masked_mean(jerk_BTJ.mean(-1), valid_mask(motion.lengths_B - 3, jerk_BTJ.shape[1]))


@register_term
class BoneDrift:
    """Minus the change of bone lengths over the clip: standard deviation over mean of each bone, mean over bones.

    Bodies of any size score 0 if they keep it. Rotations (R) have constant bones by construction.
    """

    name: ClassVar[str] = "bone_drift"

    def __call__(self, motion: MotionView) -> Tensor:
        """Return (B,), at most 0, relative."""
        bones = bone_lengths(motion.joints_BTJ3, T2M)
        weight = motion.mask_BT[..., None].to(bones) / motion.lengths_B[:, None, None]
        mean = (bones * weight).sum(1)
        deviation = _norm(((bones - mean[:, None]) * weight.sqrt()).transpose(1, 2))
        return -(deviation / mean.clamp(min=1e-8)).mean(-1)


@register_term
class BoneLength:
    """Minus the relative difference of bone lengths from the standard skeleton, mean over bones and frames.

    For features (K) and joints (J) retargeted to it, as prepared datasets are; other bodies have no reason to agree.
    """

    name: ClassVar[str] = "bone_length"

    def __call__(self, motion: MotionView) -> Tensor:
        """Return (B,), at most 0, relative."""
        bones = bone_lengths(motion.joints_BTJ3, T2M)
        standard = T2M.bone_length_tensor().to(bones)
        return -masked_mean((bones / standard - 1.0).abs().mean(-1), motion.mask_BT)


def _lowest(motion: MotionView) -> Tensor:
    """Return the height of the lowest joint, (B, T)."""
    return motion.joints_BTJ3[..., 1].amin(-1)


def _norm(x: Tensor) -> Tensor:
    """Return the norm over the last axis, exactly 0 with gradient 0 for zeros (its derivative there is undefined)."""
    squared = x.square().sum(-1)
    moving = squared > 0
    return torch.where(moving, torch.where(moving, squared, 1.0).sqrt(), 0.0)
