from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from motionrft.core.errors import RepresentationError
from motionrft.evaluation.benchmarks.convert import convert_clip_by_loop, synthetic_clips
from motionrft.representations import kinematic_forward
from motionrft.representations.kinematic import (
    T2M_LAYOUT,
    KinematicFlag,
    clip_to_kinematic,
    clips_to_kinematic,
    joints_to_kinematic,
    kinematic_to_joints,
    layout_of,
    recover_from_ric,
    recover_from_rot,
)
from motionrft.representations.kinematics import facing_yaw, forward_kinematics
from motionrft.representations.rotations import yaw_matrix
from motionrft.representations.skeleton import KIT, T2M, bone_lengths

F64 = torch.float64
PARTS = T2M_LAYOUT.groups


def clips(count: int, seed: int = 1, low: int = 40, high: int = 120) -> list[torch.Tensor]:
    return [torch.from_numpy(c) for c in synthetic_clips(count, seed, low, high)]


def standing(frames: int) -> torch.Tensor:
    """Hips, collars and shoulders point exactly sideways: the body faces exactly +Z though its sides differ in size."""
    eye = torch.eye(3, dtype=F64).expand(frames, 22, 3, 3)
    root = torch.tensor([0.0, 1.0, 0.0], dtype=F64).expand(frames, 3)
    offsets = T2M.standard_offsets()
    offsets[[1, 2, 13, 14, 16, 17], 1:] = 0.0
    return forward_kinematics(eye, root, offsets)[0]


def turned(joints: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return joints @ yaw_matrix(angles.to(F64)).mT


def test_slices_tile_the_feature_axis():
    for layout, dim in ((T2M_LAYOUT, 263), (layout_of(251), 251)):
        edges = [0] + [s.stop for s in layout.groups.values()]
        assert [s.start for s in layout.groups.values()] == edges[:-1] and edges[-1] == dim
    assert PARTS["joint_rotations"] == slice(67, 193) and PARTS["contacts"] == slice(259, 263)


def test_batched_features_equal_the_quaternion_loop():
    for clip in clips(6):
        features, _, _ = clip_to_kinematic(clip)
        difference = np.abs(features.numpy() - convert_clip_by_loop(clip.numpy()))
        assert difference.max() < 1e-5


@pytest.mark.parametrize("variant", ["compatible", "fixed"])
def test_features_give_back_the_ground_joints(variant):
    results = [clip_to_kinematic(clip, variant=variant) for clip in clips(4)]
    faithful = [r for r in results if not r[2] & KinematicFlag.YAW_SIGN_ERROR]
    assert len(faithful) >= (4 if variant == "fixed" else 2)
    for features, ground, _ in faithful:
        assert float((recover_from_ric(features) - ground[:-1]).abs().max()) < 2e-6
        assert float((recover_from_rot(features, variant=variant) - ground[:-1]).abs().max()) < 5e-6


@pytest.mark.parametrize("variant", ["compatible", "fixed"])
def test_ground_joints_are_canonical(variant):
    for clip in clips(3, seed=2):
        _, ground, _ = clip_to_kinematic(clip, variant=variant, dtype=F64)
        torch.testing.assert_close(bone_lengths(ground, T2M), T2M.bone_length_tensor().expand(len(clip), 21))
        assert abs(float(ground[..., 1].min())) < 1e-12
        assert float(ground[0, 0, [0, 2]].abs().max()) < 1e-12
        if variant == "compatible":
            assert abs(float(facing_yaw(ground[0]))) < 1e-9


def test_walking_straight_has_closed_form_features():
    step = torch.tensor([0.0, 0.0, 0.05], dtype=F64)
    joints = standing(50) + torch.arange(50, dtype=F64)[:, None, None] * step
    features, _, flags = clip_to_kinematic(joints, dtype=F64)
    assert flags == 0
    assert float(features[:, PARTS["yaw_rate"]].abs().max()) < 1e-12
    torch.testing.assert_close(features[:, 1:3], torch.tensor([0.0, 0.05], dtype=F64).expand(49, 2))
    velocities = features[:, PARTS["joint_velocities"]].view(49, 22, 3)
    torch.testing.assert_close(velocities, step.expand(49, 22, 3))
    assert not features[:, PARTS["contacts"]].any()  # 0.05^2 > 0.002
    still, _, _ = clip_to_kinematic(standing(10))
    assert still[:, PARTS["contacts"]].all()


def test_turning_left_at_constant_rate_is_half_the_step_with_negative_sign():
    rate = 0.02
    joints = turned(standing(200), rate * torch.arange(200))
    features, _, _ = clip_to_kinematic(joints, variant="fixed", dtype=F64)
    middle = features[90:110, 0]  # far from the ends, where smoothing sees only the constant rate
    torch.testing.assert_close(middle, torch.full_like(middle, -rate / 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["compatible", "fixed"])
def test_place_heading_and_size_of_the_source_do_not_matter(variant):
    clip = clips(1, seed=3)[0]
    moved = 1.3 * turned(clip, torch.tensor(2.0)) + torch.tensor([3.0, -0.4, 7.0], dtype=F64)
    a, b = (clip_to_kinematic(c, variant=variant, dtype=F64)[0] for c in (clip, moved))
    torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_fixed_rotation_features_do_not_depend_on_later_heading_but_compatible_ones_do():
    pose = standing(200)
    spin = turned(pose, 0.02 * torch.arange(200))
    part = PARTS["joint_rotations"]
    for variant, invariant in (("fixed", True), ("compatible", False)):
        still = clip_to_kinematic(pose, variant=variant, dtype=F64)[0][100, part]
        spun = clip_to_kinematic(spin, variant=variant, dtype=F64)[0][100, part]
        assert (float((still - spun).abs().max()) < 1e-6) is invariant


def test_spin_through_half_turn_is_recovered_by_fixed_and_flagged_by_compatible():
    joints = turned(standing(120), 0.1 * torch.arange(120))
    features, ground, flags = clip_to_kinematic(joints, variant="fixed")
    assert flags == 0
    assert float((recover_from_ric(features) - ground[:-1]).abs().max()) < 1e-5
    assert float((recover_from_rot(features, variant="fixed") - ground[:-1]).abs().max()) < 1e-5
    features, ground, flags = clip_to_kinematic(joints)
    assert flags == KinematicFlag.YAW_SIGN_ERROR
    assert float((recover_from_ric(features) - ground[:-1]).abs().max()) > 0.05


@pytest.mark.parametrize("frames", [2, 3, 4])
@pytest.mark.parametrize("variant", ["compatible", "fixed"])
def test_very_short_clips_convert(frames, variant):
    clip = clips(1, seed=4)[0][:frames]
    features, ground, flags = clip_to_kinematic(clip, variant=variant)
    assert features.shape == (frames - 1, 263) and flags == 0
    assert float((recover_from_ric(features) - ground[:-1]).abs().max()) < 2e-6
    if variant == "compatible":
        assert np.abs(features.numpy() - convert_clip_by_loop(clip.numpy())).max() < 1e-5


def test_one_frame_has_no_row_and_a_flag():
    features, ground, flags = clip_to_kinematic(clips(1)[0][:1])
    assert features.shape == (0, 263) and ground.shape == (1, 22, 3) and flags == KinematicFlag.TOO_SHORT


def test_bones_against_their_raw_axis_are_finite_flagged_and_recovered():
    joints = standing(10)
    for child in (4, 15, 13):  # axes -Y, +Z, +X
        parent = T2M.parents[child]
        axis = torch.tensor(T2M.raw_axes[child], dtype=F64)
        joints[:, child] = joints[:, parent] - 0.2 * axis
    for variant in ("compatible", "fixed"):
        features, ground, flags = clip_to_kinematic(joints, variant=variant)
        assert features.isfinite().all() and flags & KinematicFlag.ANTIPODAL_BONE
        assert float((recover_from_rot(features, variant=variant) - ground[:-1]).abs().max()) < 1e-5


def test_first_frame_facing_exactly_backwards_converts():
    forwards = standing(10)
    backwards = forwards * torch.tensor([-1.0, 1.0, -1.0], dtype=F64)
    a, _, _ = clip_to_kinematic(forwards, dtype=F64)
    b, ground, flags = clip_to_kinematic(backwards, dtype=F64)
    assert flags & KinematicFlag.ANTIPODAL_HEADING
    torch.testing.assert_close(a, b)
    assert abs(float(facing_yaw(ground[0]))) < 1e-9


def test_a_vanished_bone_takes_the_last_direction_and_is_flagged():
    clip = clips(1, seed=5)[0][:30]
    broken = clip.clone()
    broken[10, 20] = broken[10, 18]
    features, ground, flags = clip_to_kinematic(broken, dtype=F64)
    assert flags == KinematicFlag.ZERO_BONE and features.isfinite().all()
    bone = ground[:, 20] - ground[:, 18]
    torch.testing.assert_close(bone[10], bone[9])
    broken[0, 20] = broken[0, 18]
    assert clip_to_kinematic(broken)[2] & KinematicFlag.ZERO_BONE_FIRST_FRAME


def test_a_body_lying_on_its_side_is_flagged_and_finite():
    lying = standing(20) @ torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64).T
    features, _, flags = clip_to_kinematic(lying)
    assert flags & KinematicFlag.DEGENERATE_HEADING and features.isfinite().all()


def test_a_broken_clip_is_nan_and_does_not_touch_its_neighbours():
    good = clips(3, seed=6)
    broken = [good[0], good[1].clone(), good[2]]
    broken[1][5, 3, 0] = torch.nan
    before, after = clips_to_kinematic(good), clips_to_kinematic(broken)
    assert after[1][2] == KinematicFlag.NONFINITE and after[1][0].isnan().all()
    for row in (0, 2):
        assert torch.equal(before[row][0], after[row][0])


def test_batch_equals_single_whatever_the_padding_holds_and_however_work_is_chunked(monkeypatch):
    joints = clips(7, seed=7)
    single = [clip_to_kinematic(c)[0] for c in joints]
    lengths = torch.tensor([len(c) for c in joints])
    batch = torch.full((7, 190, 22, 3), torch.nan, dtype=F64)
    for row, clip in enumerate(joints):
        batch[row, : len(clip)] = clip
    for frames_per_chunk in (1, 200, 100_000):
        monkeypatch.setattr(kinematic_forward, "_FRAMES_PER_CHUNK", frames_per_chunk)
        result = joints_to_kinematic(batch, lengths)
        for row, want in enumerate(single):
            torch.testing.assert_close(result.features[row, : len(want)], want, atol=1e-7, rtol=0)
            assert not result.features[row, len(want) :].any() and not result.ground_joints[row, len(want) + 1 :].any()
        assert torch.equal(result.lengths_B, lengths - 1)


def test_conversion_has_correct_gradients_in_both_directions():
    joints = clips(1, seed=8)[0][:4].requires_grad_()
    smooth = torch.cat([torch.arange(259), torch.tensor([], dtype=torch.long)])
    for variant in ("compatible", "fixed"):
        convert = lambda x, v=variant: clip_to_kinematic(x, variant=v, dtype=F64)[0][:, smooth]  # noqa: E731
        assert torch.autograd.gradcheck(convert, (joints,), fast_mode=True)
        features = clip_to_kinematic(joints.detach(), variant=variant, dtype=F64)[0].requires_grad_()
        assert torch.autograd.gradcheck(recover_from_ric, (features,), fast_mode=True)
        back = lambda x, v=variant: recover_from_rot(x, variant=v)  # noqa: E731
        assert torch.autograd.gradcheck(back, (features,), fast_mode=True)


def test_gradients_survive_a_first_call_in_inference_mode():
    kinematic_forward._tables.cache_clear()
    clip = clips(1, seed=9)[0][:5]
    with torch.inference_mode():
        clip_to_kinematic(clip)
    joints = clip.clone().requires_grad_()
    clip_to_kinematic(joints)[0].sum().backward()
    assert joints.grad is not None and joints.grad.abs().max() > 0


def test_inverse_takes_any_leading_axes_and_low_precision():
    features = clip_to_kinematic(clips(1)[0])[0][:20]
    batched = kinematic_to_joints(features.expand(2, 3, 20, 263))
    torch.testing.assert_close(batched[1, 2], kinematic_to_joints(features))
    assert kinematic_to_joints(features.bfloat16()).dtype == torch.float32


def test_wrong_shapes_lengths_and_variants_are_refused():
    joints = torch.zeros(1, 5, 24, 3)
    with pytest.raises(RepresentationError, match="first 22"):
        joints_to_kinematic(joints, torch.tensor([5]))
    with pytest.raises(ValueError, match="lengths"):
        joints_to_kinematic(joints[:, :, :22], torch.tensor([6]))
    with pytest.raises(ValueError, match="variant"):
        joints_to_kinematic(joints[:, :, :22], torch.tensor([5]), variant="new")
    with pytest.raises(RepresentationError, match="rotations"):
        kinematic_to_joints(torch.zeros(4, 135))


def test_kit_clip_round_trips():
    lengths = torch.linspace(100, 400, 20)
    skeleton = KIT.with_bone_lengths(lengths)
    steps = torch.sin(torch.arange(30, dtype=F64)[:, None, None] * 0.1 + torch.arange(63).view(21, 3))
    joints = 80 * steps
    for j in range(1, 21):
        joints[:, j] += joints[:, KIT.parents[j]] + 300 * torch.tensor(KIT.raw_axes[j], dtype=F64)
    features, ground, _ = clip_to_kinematic(joints, skeleton, variant="fixed", dtype=F64)
    assert features.shape == (29, 251)
    torch.testing.assert_close(recover_from_ric(features), ground[:-1], atol=1e-6, rtol=0)
    rotated = recover_from_rot(features, skeleton, "fixed")
    torch.testing.assert_close(rotated, ground[:-1], atol=1e-6, rtol=0)
    assert math.isclose(float(bone_lengths(ground, skeleton)[0, 3]), float(lengths[3]), rel_tol=1e-6)
