"""Joint trees: who hangs on whom, raw bone axes, standard bone lengths, mirror pairs, contact and facing joints.

Letters: J joints. Canonical frame of every array: right-handed, Y up, the body faces +Z, the character's left is +X.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from motionrft.core.errors import RepresentationError, explain

Vector = tuple[float, float, float]

_X: Vector = (1.0, 0.0, 0.0)
_Y: Vector = (0.0, 1.0, 0.0)
_Z: Vector = (0.0, 0.0, 1.0)
_NEG_X: Vector = (-1.0, 0.0, 0.0)
_NEG_Y: Vector = (0.0, -1.0, 0.0)


@dataclass(frozen=True)
class Skeleton:
    """A joint tree with everything the feature conversion needs to know about it.

    `chains` are the paths along which swing rotations accumulate; each restarts from the root rotation, also where its
    first joint is not the root (both arm chains). `predecessors` follows from them and differs from `parents` there.
    """

    name: str
    joint_names: tuple[str, ...]  # J names
    parents: tuple[int, ...]  # J, -1 for the root; a parent precedes its children
    chains: tuple[tuple[int, ...], ...]  # joint indices from chain head to leaf
    raw_axes: tuple[Vector, ...]  # J signed unit axes; entry 0 is zero
    mirror_pairs: tuple[tuple[int, int], ...]  # (right, left)
    contact_joints: tuple[int, int, int, int]  # order of the contact channels
    facing_joints: tuple[int, int, int, int]  # right hip, left hip, right shoulder, left shoulder
    leg_joints: tuple[int, int]  # the two bones whose summed length gives the retarget scale
    contact_threshold: float  # squared step length (unit^2 per frame^2) below which a joint is in contact
    bone_lengths: tuple[float, ...] | None = None  # J - 1 lengths of the standard skeleton, joints 1..J-1
    rest_offsets: tuple[Vector, ...] | None = None  # J generic rest-pose offsets, for FK without a body model
    fps: float = 20.0
    unit: str = "m"

    def __post_init__(self) -> None:
        """Check that the tables agree in size and that parents come before children."""
        count = len(self.joint_names)
        sizes = {"parents": len(self.parents), "raw_axes": len(self.raw_axes)}
        if self.bone_lengths is not None:
            sizes["bone_lengths"] = len(self.bone_lengths) + 1
        if self.rest_offsets is not None:
            sizes["rest_offsets"] = len(self.rest_offsets)
        wrong = {k: v for k, v in sizes.items() if v != count}
        if wrong:
            raise ValueError(f"skeleton {self.name!r} names {count} joints but its tables have other sizes: {wrong}")
        if self.parents[0] != -1 or any(not 0 <= p < j for j, p in enumerate(self.parents) if j > 0):
            raise ValueError(f"skeleton {self.name!r}: joint 0 is the root and every parent precedes its children")
        if any(sorted(map(abs, axis)) != [0.0, 0.0, 1.0] for axis in self.raw_axes[1:]):
            raise ValueError(f"skeleton {self.name!r}: raw axes of joints 1.. must be signed coordinate axes")

    @property
    def num_joints(self) -> int:
        """J."""
        return len(self.parents)

    @property
    def kinematic_dim(self) -> int:
        """Features per frame of the kinematic representation: 12 J - 1."""
        return 12 * self.num_joints - 1

    @cached_property
    def predecessors(self) -> tuple[int, ...]:
        """For each joint the joint whose swing rotation precedes it in its chain; -1 for the root."""
        result = [-1] * self.num_joints
        for chain in self.chains:
            previous = 0
            for joint in chain[1:]:
                result[joint] = previous
                previous = joint
        return tuple(result)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Joints grouped by depth below the root: FK needs one batched step per level."""
        depth = [0] * self.num_joints
        for joint in range(1, self.num_joints):
            depth[joint] = depth[self.parents[joint]] + 1
        return tuple(tuple(j for j, d in enumerate(depth) if d == level) for level in range(max(depth) + 1))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each joint the joints that hang on it."""
        return tuple(tuple(c for c, p in enumerate(self.parents) if p == j) for j in range(self.num_joints))

    @cached_property
    def mirror_permutation(self) -> tuple[int, ...]:
        """Joint order after exchanging left and right."""
        order = list(range(self.num_joints))
        for right, left in self.mirror_pairs:
            order[right], order[left] = left, right
        return tuple(order)

    def bone_length_tensor(self) -> Tensor:
        """Return the standard bone lengths, (J - 1,) float64."""
        if self.bone_lengths is None:
            raise RepresentationError(
                explain(
                    f"standard bone lengths of skeleton {self.name!r}",
                    "a skeleton without them",
                    "representations/skeleton.py",
                    "Measure them on one released joint file with bone_lengths() and pass "
                    "skeleton.with_bone_lengths(lengths).",
                )
            )
        return torch.tensor(self.bone_lengths, dtype=torch.float64)

    def raw_axes_tensor(self) -> Tensor:
        """Return the raw bone axes, (J, 3) float64, zero for the root."""
        return torch.tensor(self.raw_axes, dtype=torch.float64)

    def raw_offsets(self) -> Tensor:
        """Return raw axis times standard length, (J, 3) float64."""
        lengths = torch.cat([torch.zeros(1, dtype=torch.float64), self.bone_length_tensor()])
        return self.raw_axes_tensor() * lengths[:, None]

    def rest_offset_tensor(self) -> Tensor:
        """Return the generic rest-pose offsets, (J, 3) float64."""
        if self.rest_offsets is None:
            raise RepresentationError(
                explain(
                    f"rest-pose offsets of skeleton {self.name!r}",
                    "a skeleton without them",
                    "representations/skeleton.py",
                    "Pass the offsets of the body the rotations belong to.",
                )
            )
        return torch.tensor(self.rest_offsets, dtype=torch.float64)

    def standard_offsets(self) -> Tensor:
        """Return rest-pose offsets with the standard bone lengths, (J, 3) float64: the default body of rotations.

        Joints made with it have the bone lengths that retargeted joints (J) and kinematic features (K) have.
        """
        offsets = self.rest_offset_tensor()
        unit = offsets[1:] / offsets[1:].norm(dim=-1, keepdim=True)
        return torch.cat([offsets[:1], unit * self.bone_length_tensor()[:, None]])

    def with_bone_lengths(self, lengths: Sequence[float] | Tensor) -> Skeleton:
        """Return a copy whose standard skeleton has these J - 1 bone lengths."""
        return replace(self, bone_lengths=tuple(float(v) for v in lengths))


def bone_lengths(joints: Tensor, skeleton: Skeleton) -> Tensor:
    """Return the bone lengths (..., J - 1) of joints (..., J, 3), bone j - 1 ends in joint j."""
    return (joints[..., 1:, :] - joints[..., list(skeleton.parents[1:]), :]).norm(dim=-1)


T2M = Skeleton(
    name="t2m",
    joint_names=(
        "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle", "right_ankle",
        "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head", "left_shoulder",
        "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
    ),
    parents=(-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19),
    chains=((0, 2, 5, 8, 11), (0, 1, 4, 7, 10), (0, 3, 6, 9, 12, 15), (9, 14, 17, 19, 21), (9, 13, 16, 18, 20)),
    raw_axes=(
        (0.0, 0.0, 0.0), _X, _NEG_X, _Y, _NEG_Y, _NEG_Y, _Y, _NEG_Y, _NEG_Y, _Y, _Z, _Z, _Y, _X, _NEG_X, _Z,
        _NEG_Y, _NEG_Y, _NEG_Y, _NEG_Y, _NEG_Y, _NEG_Y,
    ),
    mirror_pairs=((2, 1), (5, 4), (8, 7), (11, 10), (14, 13), (17, 16), (19, 18), (21, 20)),
    contact_joints=(7, 10, 8, 11),
    facing_joints=(2, 1, 17, 16),
    leg_joints=(5, 8),
    contact_threshold=0.002,
    bone_lengths=(
        0.10307397, 0.10988337, 0.13156824, 0.39362320, 0.39018823, 0.14319022, 0.43243308, 0.42564335, 0.05736474,
        0.14338182, 0.14941907, 0.21936005, 0.13748677, 0.14338283, 0.10303922, 0.13161405, 0.12298438, 0.25684000,
        0.26309174, 0.26601172, 0.26987640,
    ),
    rest_offsets=(
        (0.0, 0.0, 0.0), (0.06, -0.09, 0.0), (-0.06, -0.09, 0.0), (0.0, 0.11, -0.02), (0.04, -0.38, 0.0),
        (-0.04, -0.38, 0.0), (0.0, 0.14, 0.02), (-0.01, -0.42, -0.04), (0.01, -0.42, -0.04), (0.0, 0.05, 0.02),
        (0.03, -0.06, 0.13), (-0.03, -0.06, 0.13), (0.0, 0.21, -0.03), (0.08, 0.12, -0.02), (-0.08, 0.12, -0.02),
        (0.0, 0.09, 0.05), (0.12, 0.03, -0.01), (-0.12, 0.03, -0.01), (0.25, -0.01, -0.03), (-0.25, -0.01, -0.03),
        (0.26, 0.01, 0.0), (-0.26, 0.01, 0.0),
    ),
)  # fmt: skip
"""22 SMPL joints in metres at 20 fps: HumanML3D and everything this project trains on."""

KIT = Skeleton(
    name="kit",
    joint_names=(
        "root", "BP", "BT", "BLN", "BUN", "LS", "LE", "LW", "RS", "RE", "RW", "LH", "LK", "LA", "LMrot", "LF", "RH",
        "RK", "RA", "RMrot", "RF",
    ),
    parents=(-1, 0, 1, 2, 3, 3, 5, 6, 3, 8, 9, 0, 11, 12, 13, 14, 0, 16, 17, 18, 19),
    chains=((0, 11, 12, 13, 14, 15), (0, 16, 17, 18, 19, 20), (0, 1, 2, 3, 4), (3, 5, 6, 7), (3, 8, 9, 10)),
    raw_axes=(
        (0.0, 0.0, 0.0), _Y, _Y, _Y, _Y, _X, _NEG_Y, _NEG_Y, _NEG_X, _NEG_Y, _NEG_Y, _X, _NEG_Y, _NEG_Y, _Z, _Z,
        _NEG_X, _NEG_Y, _NEG_Y, _Z, _Z,
    ),
    mirror_pairs=((5, 8), (6, 9), (7, 10), (11, 16), (12, 17), (13, 18), (14, 19), (15, 20)),
    contact_joints=(19, 20, 14, 15),
    facing_joints=(11, 16, 5, 8),
    leg_joints=(17, 18),
    contact_threshold=0.05,
    fps=12.5,
    unit="mmm",
)  # fmt: skip
"""21 MMM joints of KIT-ML at 12.5 fps in its own length unit (about 640 per metre). Its standard bone lengths are
not published as numbers: measure them on a released joint file. Its L/R names do not follow the SMPL side."""
