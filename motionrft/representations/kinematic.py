"""Joints to kinematic features (K), batched: the HumanML3D conversion without its per-joint quaternion passes.

Letters: B clips, T frames, J joints, D = 12 J - 1.

Two variants of the features:

* "compatible" is what released weights were trained on, with the reference's habits: hips enter the per-frame heading
  with the wrong sign; arm chains restart from the root rotation; the heading of frame 0 is forced to zero although the
  smoothed one is not (a jump in yaw rate row 0); one yaw step has the wrong sign when the heading crosses 180 degrees;
  rotation features depend on the world heading.
* "fixed" uses the true heading, counts it from its smoothed value at frame 0 (which then faces +Z exactly), keeps the
  sign of the yaw step, lets arm chains follow the tree, and takes bone directions in the heading frame.

Both handle exactly opposite directions, two- and three-frame clips and zero-length bones, where the reference gives
NaN, garbage or lost axes; such clips carry a flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from motionrft.core.errors import RepresentationError, explain
from motionrft.core.types import valid_mask
from motionrft.representations.kinematic_forward import KinematicFlag, convert_flat
from motionrft.representations.kinematic_inverse import recover_from_ric, recover_from_rot
from motionrft.representations.kinematic_layout import KIT_LAYOUT, T2M_LAYOUT, KinematicLayout, Variant, layout_of
from motionrft.representations.skeleton import T2M, Skeleton

__all__ = [
    "KIT_LAYOUT",
    "T2M_LAYOUT",
    "KinematicFlag",
    "KinematicLayout",
    "KinematicResult",
    "Variant",
    "clip_to_kinematic",
    "clips_to_kinematic",
    "joints_to_kinematic",
    "kinematic_to_joints",
    "layout_of",
    "recover_from_ric",
    "recover_from_rot",
]


@dataclass(frozen=True)
class KinematicResult:
    """A converted batch. Row t of the features belongs to frame t of `ground_joints`, whose last frame has no row."""

    features: Tensor  # (B, T - 1, D) float32 by default, zeros beyond each length
    ground_joints: Tensor  # (B, T, J, 3) standard bone lengths, floor 0, from the XZ origin, facing +Z
    lengths_B: Tensor  # (B,) int64 feature rows: clip length - 1
    flags_B: Tensor  # (B,) int64 KinematicFlag bits

    def flags(self, clip: int) -> KinematicFlag:
        """Return the flags of one clip."""
        return KinematicFlag(int(self.flags_B[clip]))


def joints_to_kinematic(
    joints_BTJ3: Tensor,
    lengths_B: Tensor,
    skeleton: Skeleton = T2M,
    variant: Variant = "compatible",
    dtype: torch.dtype = torch.float32,
) -> KinematicResult:
    """Return the kinematic features of a padded batch; float64 inside, differentiable except for the contacts.

    Args:
        joints_BTJ3: (B, T, J, 3) positions in the skeleton's unit, Y up, any place, heading and body size.
        lengths_B: (B,) frames per clip, 1 <= length <= T. Frames beyond are never read.
        skeleton: joint tree with standard bone lengths.
        variant: "compatible" or "fixed", see the module text.
        dtype: of the returned features and joints.

    Raises:
        RepresentationError: wrong number of joints or coordinates.
        ValueError: lengths outside 1..T or an unknown variant.
    """
    _check(joints_BTJ3, 4, skeleton, variant)
    num_clips, num_frames = joints_BTJ3.shape[:2]
    lengths_B = lengths_B.to(joints_BTJ3.device, torch.int64)
    if lengths_B.shape != (num_clips,) or (
        num_clips and not 1 <= int(lengths_B.min()) <= lengths_B.max() <= num_frames
    ):
        raise ValueError(f"lengths must be {num_clips} values in 1..{num_frames}, got {lengths_B.tolist()}")
    mask_BT = valid_mask(lengths_B, num_frames)
    rows_BT = valid_mask(lengths_B - 1, num_frames - 1)
    features_MD, ground_NJ3, flags_B = convert_flat(joints_BTJ3[mask_BT], lengths_B, skeleton, variant, dtype)
    features = features_MD.new_zeros(num_clips, num_frames - 1, skeleton.kinematic_dim)
    ground = ground_NJ3.new_zeros(num_clips, num_frames, skeleton.num_joints, 3)
    return KinematicResult(
        features=features.masked_scatter(rows_BT[..., None], features_MD),
        ground_joints=ground.masked_scatter(mask_BT[..., None, None], ground_NJ3),
        lengths_B=lengths_B - 1,
        flags_B=flags_B,
    )


def clips_to_kinematic(
    clips: Sequence[Tensor],
    skeleton: Skeleton = T2M,
    variant: Variant = "compatible",
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor, KinematicFlag]]:
    """Return (features (T-1, D), ground joints (T, J, 3), flags) per clip (T, J, 3), without padding anything.

    Results equal those of `joints_to_kinematic`; this is the quick way through a folder of clips.
    """
    for clip in clips:
        _check(clip, 3, skeleton, variant)
        if not len(clip):
            raise ValueError("a clip has no frames")
    if not clips:
        return []
    lengths_B = torch.tensor([len(c) for c in clips])
    flat = torch.cat([c.to(torch.float64) for c in clips])
    features_MD, ground_NJ3, flags_B = convert_flat(flat, lengths_B, skeleton, variant, dtype)
    rows = features_MD.split((lengths_B - 1).tolist())
    frames = ground_NJ3.split(lengths_B.tolist())
    return [(k, j, KinematicFlag(int(f))) for k, j, f in zip(rows, frames, flags_B)]


def clip_to_kinematic(
    joints_TJ3: Tensor,
    skeleton: Skeleton = T2M,
    variant: Variant = "compatible",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, KinematicFlag]:
    """Return (features (T-1, D), ground joints (T, J, 3), flags) of one clip."""
    return clips_to_kinematic([joints_TJ3], skeleton, variant, dtype)[0]


def kinematic_to_joints(features: Tensor) -> Tensor:
    """Return joints (..., T, J, 3) of features (..., T, D), from their positions; differentiable."""
    return recover_from_ric(features)


def _check(joints: Tensor, ndim: int, skeleton: Skeleton, variant: str) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {get_args(Variant)}, got {variant!r}")
    if joints.ndim != ndim or joints.shape[-2:] != (skeleton.num_joints, 3):
        shape = "(B, T, {}, 3)" if ndim == 4 else "(T, {}, 3)"
        raise RepresentationError(
            explain(
                f"joints {shape.format(skeleton.num_joints)} of skeleton {skeleton.name!r}",
                f"shape {tuple(joints.shape)}",
                "joints to kinematic features",
                "Reshape (T, 66) to (T, 22, 3), and keep the first 22 of 24 or 52 SMPL joints.",
            )
        )
