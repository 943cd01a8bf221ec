"""Closed forms: moving a rigid body in known ways has known quality."""

from __future__ import annotations

import numpy as np
import pytest

from motionrft.core.errors import ConfigError
from motionrft.evaluation import quality
from motionrft.representations.skeleton import T2M

FPS = 20.0
T = 40


def rigid(path_T3: np.ndarray) -> np.ndarray:
    """Return the rest pose, feet on the floor, carried along a path: (1, T, 22, 3)."""
    pose = np.zeros((22, 3))
    for j in range(1, 22):
        pose[j] = pose[T2M.parents[j]] + T2M.standard_offsets().numpy()[j]
    pose[:, 1] -= pose[:, 1].min()
    return pose[None, None] + path_T3[None, :, None]


def along(axis: int, values: np.ndarray) -> np.ndarray:
    path = np.zeros((len(values), 3))
    path[:, axis] = values
    return path


TIME = np.arange(T) / FPS
FULL = np.array([T])


def test_a_rigid_slide_has_its_speed_as_foot_slide_and_skates_but_for_the_edges():
    joints = rigid(along(0, 0.8 * TIME))
    slide, contact = quality.foot_slide(joints, FULL, FPS)
    assert slide[0] == pytest.approx(0.8)
    assert contact[0] == 1.0
    assert quality.foot_skate_ratio(joints, FULL, FPS)[0] == pytest.approx((T - 3) / (T - 1))


def test_lifted_feet_neither_slide_nor_skate_but_do_not_touch():
    joints = rigid(along(0, 0.8 * TIME)) + np.array([0.0, 0.2, 0.0])
    slide, contact = quality.foot_slide(joints, FULL, FPS)
    assert np.isnan(slide[0])
    assert contact[0] == 0.0
    assert quality.foot_skate_ratio(joints, FULL, FPS)[0] == 0.0


def test_contact_needs_the_toe_low_in_both_frames_of_a_step():
    joints = rigid(along(0, 0.8 * TIME))
    joints[:, ::2] += np.array([0.0, 0.3, 0.0])  # every other frame in the air
    assert quality.foot_slide(joints, FULL, FPS)[1][0] == 0.0


def test_standing_still_is_perfect():
    found = quality.clip_quality(rigid(np.zeros((T, 3))), FULL, FPS)
    for key in ("foot_skate_ratio", "foot_slide", "jerk", "acceleration", "bone_drift", "penetration"):
        assert found[key][0] == pytest.approx(0.0, abs=1e-9), key
    assert found["valid"][0] == 1.0


def test_free_fall_has_acceleration_g_and_no_jerk():
    joints = rigid(along(1, 20.0 - 0.5 * 9.81 * TIME**2))
    assert quality.mean_derivative(joints, FULL, FPS, 2)[0] == pytest.approx(9.81)
    assert quality.mean_derivative(joints, FULL, FPS, 3)[0] == pytest.approx(0.0, abs=1e-6)


def test_a_cubic_path_has_constant_jerk_in_metres_per_second_cubed_at_any_frame_rate():
    for fps in (20.0, 30.0):
        joints = rigid(along(2, (np.arange(T) / fps) ** 3))
        assert quality.mean_derivative(joints, FULL, fps, 3)[0] == pytest.approx(6.0)


def test_rigid_motion_has_no_bone_drift_and_breathing_bones_have_their_coefficient_of_variation():
    still = rigid(np.zeros((T, 3)))
    scale = np.where(np.arange(T) % 2, 1.1, 0.9)[None, :, None, None]
    assert quality.bone_drift(rigid(along(0, np.sin(TIME))), FULL)[0] == pytest.approx(0.0, abs=1e-9)
    assert quality.bone_drift(still * scale, FULL)[0] == pytest.approx(0.1)


def test_sinking_five_centimetres_is_fifty_millimetres_of_penetration():
    down = rigid(np.zeros((T, 3))) - np.array([0.0, 0.05, 0.0])
    depth, height = quality.floor_distance(down, FULL, tolerance_m=0.0)
    assert (depth[0], height[0]) == pytest.approx((0.05, 0.0))


def test_frames_beyond_the_length_are_never_read():
    joints = rigid(along(0, 0.8 * TIME + 0.05 * TIME**3))
    short = quality.clip_quality(joints[:, :25], np.array([25]), FPS)
    padded = joints.copy()
    padded[:, 25:] = np.nan
    with np.errstate(invalid="ignore"):
        found = quality.clip_quality(padded, np.array([25]), FPS)
    for key, value in short.items():
        assert found[key][0] == pytest.approx(value[0]), key


def test_nan_teleport_and_distance_make_a_clip_invalid():
    joints = np.repeat(rigid(np.zeros((T, 3))), 4, axis=0)
    joints[1, 5, 3, 0] = np.nan
    joints[2, 10:] += np.array([2.0, 0.0, 0.0])
    joints[3] += np.array([25.0, 0.0, 0.0])
    with np.errstate(invalid="ignore"):
        found = quality.validity(joints, np.full(4, T), FPS)
    assert found.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_three_frame_clip_has_no_jerk():
    assert np.isnan(quality.mean_derivative(rigid(np.zeros((T, 3))), np.array([3]), FPS, 3)[0])


def test_wrong_shapes_and_thresholds_are_refused():
    with pytest.raises(ValueError, match="22, 3"):
        quality.bone_drift(np.zeros((1, 5, 21, 3)), [5])
    with pytest.raises(ValueError, match="lengths"):
        quality.bone_drift(np.zeros((1, 5, 22, 3)), [6])
    with pytest.raises(ConfigError, match="skate_height_m"):
        quality.QualityConfig(skate_height_m=-1.0)
