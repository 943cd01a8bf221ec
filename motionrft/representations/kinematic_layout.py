"""Where each feature of the kinematic representation lives.

D = 12 J - 1: 4 root numbers, 3 (J - 1) positions, 6 (J - 1) swing rotations, 3 J velocities, 4 contacts.
263 for 22 joints, 251 for 21.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from motionrft.core.errors import RepresentationError, explain
from motionrft.representations.skeleton import KIT, T2M, Skeleton

Variant = Literal["compatible", "fixed"]
"""Which conversion made the features: the reference's, or the corrected one. See `kinematic`."""


@dataclass(frozen=True)
class KinematicLayout:
    """Named slices of the feature axis for a skeleton of `num_joints`."""

    num_joints: int

    @property
    def yaw_rate(self) -> slice:
        """Half of the yaw step t -> t+1 (rad per frame), positive when the body turns right."""
        return slice(0, 1)

    @property
    def root_velocity(self) -> slice:
        """X and Z of the root step (m per frame) in the heading frame of t+1."""
        return slice(1, 3)

    @property
    def root_height(self) -> slice:
        """Root Y above the floor of the clip (m)."""
        return slice(3, 4)

    @property
    def joint_positions(self) -> slice:
        """Joints 1..J-1 relative to the root's XZ in the heading frame of t ("ric"), row-major (J - 1, 3)."""
        return slice(4, 4 + 3 * (self.num_joints - 1))

    @property
    def joint_rotations(self) -> slice:
        """Swing rotations of joints 1..J-1, first two columns ("rot"), row-major (J - 1, 6)."""
        start = self.joint_positions.stop
        return slice(start, start + 6 * (self.num_joints - 1))

    @property
    def joint_velocities(self) -> slice:
        """Steps of joints 0..J-1 (m per frame) in the heading frame of t, row-major (J, 3)."""
        start = self.joint_rotations.stop
        return slice(start, start + 3 * self.num_joints)

    @property
    def contacts(self) -> slice:
        """Four 0/1 contacts in the order of `Skeleton.contact_joints`."""
        start = self.joint_velocities.stop
        return slice(start, start + 4)

    @property
    def dim(self) -> int:
        """D."""
        return self.contacts.stop

    @cached_property
    def groups(self) -> dict[str, slice]:
        """All slices by name, in order; also the groups whose standard deviations HumanML3D averages."""
        return {
            "yaw_rate": self.yaw_rate,
            "root_velocity": self.root_velocity,
            "root_height": self.root_height,
            "joint_positions": self.joint_positions,
            "joint_rotations": self.joint_rotations,
            "joint_velocities": self.joint_velocities,
            "contacts": self.contacts,
        }


T2M_LAYOUT = KinematicLayout(T2M.num_joints)
KIT_LAYOUT = KinematicLayout(KIT.num_joints)


def layout_of(features_dim: int) -> KinematicLayout:
    """Return the layout of a feature width, refusing widths that belong to something else.

    Raises:
        RepresentationError: the width is neither 263 nor 251.
    """
    for layout in (T2M_LAYOUT, KIT_LAYOUT):
        if layout.dim == features_dim:
            return layout
    hints = {66: "joint positions (J)", 135: "rotations (R)", 201: "HY-Motion features"}
    hint = f", which looks like {hints[features_dim]}" if features_dim in hints else ""
    raise RepresentationError(
        explain(
            f"{T2M_LAYOUT.dim} (22 joints) or {KIT_LAYOUT.dim} (KIT, 21 joints) kinematic features per frame",
            f"{features_dim}{hint}",
            "last axis of the feature array",
            "Convert with representations.convert or choose the representation the array has.",
        )
    )


def skeleton_of(features_dim: int) -> Skeleton:
    """Return the skeleton that a kinematic feature width belongs to."""
    return T2M if layout_of(features_dim) is T2M_LAYOUT else KIT
