from __future__ import annotations

import math

import pytest
import torch

from motionrft.core.errors import RepresentationError
from motionrft.core.rng import generator
from motionrft.representations.kinematics import (
    facing_yaw,
    forward_kinematics,
    joints_to_rotations,
    mirror_joints,
    mirror_rotations,
    rotation_to_forward,
)
from motionrft.representations.rotations import geodesic_angle, rotvec_to_matrix, yaw_matrix
from motionrft.representations.skeleton import KIT, T2M, Skeleton, bone_lengths

EYES = torch.eye(3, dtype=torch.float64).expand(22, 3, 3)


def random_pose(*shape: int, scale: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator("pose", *shape)
    rotvec = scale * torch.randn(*shape, 22, 3, dtype=torch.float64, generator=rng)
    return rotvec_to_matrix(rotvec), torch.randn(*shape, 3, dtype=torch.float64, generator=rng)


def test_skeleton_levels_predecessors_and_mirror():
    assert [len(level) for level in T2M.levels] == [1, 3, 3, 3, 5, 3, 2, 2]
    assert (T2M.predecessors[13], T2M.predecessors[14]) == (0, 0) and T2M.parents[13] == 9
    assert [T2M.predecessors[j] for j in range(1, 13)] == list(T2M.parents[1:13])
    assert KIT.predecessors[5] == 0 and KIT.parents[5] == 3
    order = T2M.mirror_permutation
    assert [order[order[j]] for j in range(22)] == list(range(22))
    assert T2M.kinematic_dim == 263 and KIT.kinematic_dim == 251


def test_kit_without_bone_lengths_says_how_to_get_them():
    with pytest.raises(RepresentationError, match="with_bone_lengths"):
        KIT.raw_offsets()


def test_skeleton_refuses_a_child_before_its_parent():
    with pytest.raises(ValueError, match="precedes"):
        Skeleton(
            "bad", ("a", "b", "c"), (-1, 2, 0), ((0, 2, 1),), ((0, 0, 0), (0, 1, 0), (0, 1, 0)), (), (1, 1, 1, 1),
            (1, 2, 1, 2), (1, 2), 0.1,
        )  # fmt: skip


def test_forward_kinematics_of_the_rest_pose_sums_offsets():
    offsets = T2M.rest_offset_tensor()
    joints, _ = forward_kinematics(EYES, torch.zeros(3, dtype=torch.float64), offsets)
    hand = offsets[[3, 6, 9, 13, 16, 18, 20]].sum(0)
    torch.testing.assert_close(joints[20], hand)


def test_forward_kinematics_keeps_bone_lengths_and_matches_a_joint_loop():
    rotations, root = random_pose(2, 5)
    offsets = T2M.standard_offsets()
    joints, world = forward_kinematics(rotations, root, offsets)
    torch.testing.assert_close(bone_lengths(joints, T2M), T2M.bone_length_tensor().expand(2, 5, 21))
    slow, turns = [root], [rotations[..., 0, :, :]]
    for j in range(1, 22):
        parent = T2M.parents[j]
        slow.append(slow[parent] + turns[parent] @ offsets[j])
        turns.append(turns[parent] @ rotations[..., j, :, :])
    torch.testing.assert_close(joints, torch.stack(slow, dim=-2))
    torch.testing.assert_close(world, torch.stack(turns, dim=-3))


def test_forward_kinematics_has_correct_gradients():
    rotations, root = random_pose(1)
    inputs = (rotations.requires_grad_(), root.requires_grad_(), T2M.standard_offsets().requires_grad_())
    assert torch.autograd.gradcheck(lambda r, x, o: forward_kinematics(r, x, o)[0].sum(-1), inputs)


@pytest.mark.parametrize("angle", [-2.5, -0.3, 0.0, 1.2, math.pi - 1e-6])
def test_facing_yaw_is_the_angle_the_body_was_turned_by(angle):
    rotations = EYES.clone()
    rotations[0] = yaw_matrix(torch.tensor(angle, dtype=torch.float64))
    joints, _ = forward_kinematics(rotations, torch.zeros(3, dtype=torch.float64), T2M.rest_offset_tensor())
    assert abs(float(facing_yaw(joints)) - angle) < 1e-9
    turned = (rotation_to_forward(joints) @ joints[..., None])[..., 0]
    assert abs(float(facing_yaw(turned))) < 1e-9


def test_inverse_kinematics_reproduces_positions_and_all_but_twist():
    rotations, root = random_pose(6, scale=0.4)
    offsets = T2M.standard_offsets()
    joints, _ = forward_kinematics(rotations, root, offsets)
    fit = joints_to_rotations(joints, offsets)
    assert fit.source == "ik" and float(fit.residual.max()) < 1e-9
    torch.testing.assert_close(fit.rotations[:, 0], rotations[:, 0])
    leaf_error = geodesic_angle(fit.rotations[:, 15], rotations[:, 15])
    assert float(leaf_error.min()) > 1e-2  # a leaf's rotation is not in the positions


def test_inverse_kinematics_reports_the_misfit_of_another_body():
    rotations, root = random_pose(2)
    joints, _ = forward_kinematics(rotations, root, 1.2 * T2M.standard_offsets())
    assert float(joints_to_rotations(joints, T2M.standard_offsets()).residual.min()) > 0.05


def test_inverse_kinematics_survives_a_bone_against_its_offset():
    joints, _ = forward_kinematics(EYES, torch.zeros(3, dtype=torch.float64), T2M.standard_offsets())
    joints[7] = joints[4] - (joints[7] - joints[4])
    joints[10] = joints[7] + (joints[10] - joints[7])
    fit = joints_to_rotations(joints, T2M.standard_offsets())
    assert fit.rotations.isfinite().all()


def test_mirroring_rotations_mirrors_the_joints_of_a_symmetric_body():
    rotations, root = random_pose(4)
    offsets = T2M.rest_offset_tensor()
    joints, _ = forward_kinematics(rotations, root, offsets)
    flipped = root * torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    mirrored, _ = forward_kinematics(mirror_rotations(rotations), flipped, offsets)
    torch.testing.assert_close(mirrored, mirror_joints(joints))
    torch.testing.assert_close(mirror_joints(mirror_joints(joints)), joints)
