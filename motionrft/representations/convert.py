"""The conversion graph between the three representations; each edge says whether it is exact and differentiable.

All representations of one clip in a dataset are row-aligned: K has one row per frame but the last, and J and R drop
that frame. `convert` takes any of them; turning J or R into K costs one more row, because velocities are differences.

Letters: B clips, T frames, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motionrft.core.errors import RepresentationError, explain
from motionrft.core.types import Representation, valid_mask
from motionrft.representations.kinematic import Variant, joints_to_kinematic, kinematic_to_joints
from motionrft.representations.kinematics import joints_to_rotations
from motionrft.representations.rotation import matrices_to_rotation, rotation_to_joints
from motionrft.representations.skeleton import T2M

_K, _J, _R = Representation.KINEMATIC, Representation.JOINT, Representation.ROTATION


@dataclass(frozen=True)
class Edge:
    """One direct conversion."""

    source: Representation
    target: Representation
    exact: bool  # nothing of the source is lost (up to rounding)
    differentiable: bool
    drops_last_frame: bool
    note: str


EDGES: dict[tuple[Representation, Representation], Edge] = {
    (e.source, e.target): e
    for e in (
        Edge(_K, _J, True, True, False, "positions of features; exact for canonical clips of standard bone lengths"),
        Edge(_J, _K, False, True, True, "loses bone lengths, place and heading; contacts carry no gradient"),
        Edge(_R, _J, True, True, False, "forward kinematics; exact for the given rest offsets"),
        Edge(_J, _R, False, True, False, "inverse-kinematics fit: twist and leaf rotations are not in positions"),
    )
}
"""Direct edges. K <-> R go through J (`path`)."""


@dataclass(frozen=True)
class Conversion:
    """A converted batch with its new lengths."""

    motion_BTD: Tensor
    lengths_B: Tensor
    path: tuple[Edge, ...]

    @property
    def exact(self) -> bool:
        """True iff every edge of the path is."""
        return all(e.exact for e in self.path)


def path(source: Representation, target: Representation) -> tuple[Edge, ...]:
    """Return the edges from source to target: none, one, or two through J."""
    source, target = Representation(source), Representation(target)
    if source is target:
        return ()
    if (source, target) in EDGES:
        return (EDGES[source, target],)
    return (EDGES[source, _J], EDGES[_J, target])


def to_joints(motion_BTD: Tensor, representation: Representation, offsets: Tensor | None = None) -> Tensor:
    """Return joints (..., T, 22, 3) in metres of a physical motion (..., T, D); differentiable for K, J and R.

    Rows stay rows: frame t of the result is row t of the motion. Padding rows give some pose; mask them.

    Args:
        motion_BTD: (..., T, D), not normalised.
        representation: what the numbers are.
        offsets: (22, 3) body for R; default: generic body with standard bone lengths.

    Raises:
        RepresentationError: D does not belong to the representation.
    """
    representation = Representation(representation)
    _check_width(motion_BTD, representation)
    if representation is _K:
        return kinematic_to_joints(motion_BTD)
    if representation is _J:
        return motion_BTD.unflatten(-1, (-1, 3))
    return rotation_to_joints(motion_BTD, offsets)


def convert(
    motion_BTD: Tensor,
    source: Representation,
    target: Representation,
    lengths_B: Tensor | None = None,
    offsets: Tensor | None = None,
    variant: Variant = "compatible",
) -> Conversion:
    """Return a padded batch in another representation, zeros beyond each new length.

    Args:
        motion_BTD: (B, T, D) in physical units.
        source: what the numbers are.
        target: what they shall be.
        lengths_B: (B,) valid rows; default: all T.
        offsets: (22, 3) rest offsets of the body of R; default: generic body with standard bone lengths.
        variant: of kinematic features made here.

    Raises:
        RepresentationError: D does not belong to `source`.
    """
    source, target = Representation(source), Representation(target)
    if motion_BTD.ndim != 3:
        raise ValueError(f"convert takes a batch (B, T, D), got shape {tuple(motion_BTD.shape)}")
    _check_width(motion_BTD, source)
    num_clips, num_frames = motion_BTD.shape[:2]
    if lengths_B is None:
        lengths_B = torch.full((num_clips,), num_frames, dtype=torch.int64, device=motion_BTD.device)
    edges = path(source, target)
    if not edges:
        return Conversion(motion_BTD, lengths_B, edges)
    joints = to_joints(motion_BTD, source, offsets)
    if target is _K:
        result = joints_to_kinematic(joints, lengths_B, variant=variant, dtype=joints.dtype)
        return Conversion(result.features, result.lengths_B, edges)
    if target is _J:
        motion = joints.flatten(-2)
    else:
        body = T2M.standard_offsets() if offsets is None else offsets
        fit = joints_to_rotations(joints, body)
        motion = matrices_to_rotation(fit.rotations, fit.root)
    mask = valid_mask(lengths_B, num_frames)[..., None]
    return Conversion(torch.where(mask, motion, 0.0), lengths_B, edges)


def _check_width(motion: Tensor, representation: Representation) -> None:
    if motion.shape[-1] != representation.dim:
        others = [r.value for r in Representation if r.dim == motion.shape[-1]]
        hint = f", the width of {others[0]!r}" if others else ""
        raise RepresentationError(
            explain(
                f"{representation.dim} numbers per frame for {representation.value!r}",
                f"{motion.shape[-1]}{hint} (shape {tuple(motion.shape)})",
                "representation conversion",
                "Name the representation the array has; joints are flattened to (..., 66).",
            )
        )
