from __future__ import annotations

import math

import pytest
import torch

from motionrft.core.errors import RepresentationError
from motionrft.core.rng import generator
from motionrft.representations.rotations import (
    SixD,
    continuous_quaternions,
    geodesic_angle,
    matrix_to_quaternion,
    matrix_to_six_d,
    nearest_rotation,
    quaternion_to_matrix,
    rotvec_to_matrix,
    shortest_rotation,
    six_d_to_matrix,
    slerp,
    yaw_matrix,
)


def random_rotations(*shape: int) -> torch.Tensor:
    return rotvec_to_matrix(torch.randn(*shape, 3, dtype=torch.float64, generator=generator("rotations", *shape)))


def test_six_numbers_of_a_quarter_turn_about_z_stand_in_the_documented_order():
    quarter = rotvec_to_matrix(torch.tensor([0.0, 0.0, math.pi / 2], dtype=torch.float64))  # x -> y, y -> -x
    want = {SixD.ROW: [0, -1, 0, 1, 0, 0], SixD.COLUMN: [0, 1, 0, -1, 0, 0], SixD.INTERLEAVED: [0, -1, 1, 0, 0, 0]}
    for convention, numbers in want.items():
        torch.testing.assert_close(
            matrix_to_six_d(quarter, convention), torch.tensor(numbers, dtype=torch.float64), atol=1e-12, rtol=0
        )


def test_decoding_with_the_wrong_convention_gives_a_valid_but_different_rotation():
    rotation = random_rotations(8)
    wrong = six_d_to_matrix(matrix_to_six_d(rotation, SixD.COLUMN), SixD.INTERLEAVED)
    torch.testing.assert_close(wrong @ wrong.mT, torch.eye(3, dtype=torch.float64).expand(8, 3, 3))
    assert (geodesic_angle(wrong, rotation) > 0.05).all()


@pytest.mark.parametrize("convention", list(SixD))
def test_six_number_decoding_has_correct_gradients(convention):
    six = torch.randn(3, 6, dtype=torch.float64, generator=generator("six")).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: six_d_to_matrix(x, convention), (six,))


def test_collinear_and_zero_six_numbers_decode_without_nan():
    six = torch.tensor([[1.0, 0, 0, 2.0, 0, 0], [0.0] * 6])
    assert six_d_to_matrix(six, SixD.COLUMN).isfinite().all()


def test_shortest_rotation_maps_source_to_target_also_when_opposite():
    source = torch.randn(64, 3, dtype=torch.float64, generator=generator("a"))
    target = torch.randn(64, 3, dtype=torch.float64, generator=generator("b"))
    target[:8] = -2.0 * source[:8]
    source[0], target[0] = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, -1.0, 0.0])
    rotation = shortest_rotation(source, target)
    torch.testing.assert_close(
        (rotation @ source[..., None])[..., 0] / source.norm(dim=-1, keepdim=True),
        target / target.norm(dim=-1, keepdim=True),
    )
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(64, dtype=torch.float64))


def test_shortest_rotation_has_no_larger_angle_than_the_directions():
    a, b = random_rotations(16)[..., 0], random_rotations(16, 1)[:, 0, :, 1]
    eye = torch.eye(3, dtype=torch.float64).expand(16, 3, 3)
    torch.testing.assert_close(geodesic_angle(shortest_rotation(a, b), eye), torch.acos((a * b).sum(-1)))


def test_slerp_halfway_is_half_the_angle_from_both_ends():
    a, b = random_rotations(10), random_rotations(10, 1)[:, 0]
    middle = slerp(a, b, torch.full((10,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(geodesic_angle(a, middle), geodesic_angle(a, b) / 2)
    torch.testing.assert_close(geodesic_angle(middle, b), geodesic_angle(a, b) / 2)


def test_quaternions_near_half_turn_round_trip():
    angle = math.pi - 1e-7
    rotation = rotvec_to_matrix(torch.tensor([[angle, 0, 0], [0, angle, 0], [0, 0, angle]], dtype=torch.float64))
    torch.testing.assert_close(quaternion_to_matrix(matrix_to_quaternion(rotation)), rotation)


def test_continuous_quaternions_never_flip_between_frames():
    angles = torch.linspace(0, 4 * math.pi, 60, dtype=torch.float64)
    canonical = matrix_to_quaternion(yaw_matrix(angles))
    assert ((canonical[1:] * canonical[:-1]).sum(-1) < 0).any()
    continuous = continuous_quaternions(canonical)
    assert ((continuous[1:] * continuous[:-1]).sum(-1) > 0).all()
    torch.testing.assert_close(quaternion_to_matrix(continuous), yaw_matrix(angles))


def test_yaw_turns_forward_towards_the_left():
    forward = torch.tensor([0.0, 0.0, 1.0])
    torch.testing.assert_close(yaw_matrix(torch.tensor(math.pi / 2)) @ forward, torch.tensor([1.0, 0.0, 0.0]))


def test_zero_quaternion_and_reflection_are_refused():
    with pytest.raises(RepresentationError, match="unit norm"):
        quaternion_to_matrix(torch.zeros(1, 4))
    with pytest.raises(RepresentationError, match="orthonormal"):
        nearest_rotation(torch.diag(torch.tensor([1.0, 1.0, -1.0])))


def test_nearest_rotation_repairs_small_errors():
    rotation = random_rotations(5)
    noise = 1e-3 * torch.randn(5, 3, 3, dtype=torch.float64, generator=generator("noise"))
    repaired = nearest_rotation(rotation + noise)
    torch.testing.assert_close(repaired @ repaired.mT, torch.eye(3, dtype=torch.float64).expand(5, 3, 3))
    assert (geodesic_angle(repaired, rotation) < 5e-3).all()
