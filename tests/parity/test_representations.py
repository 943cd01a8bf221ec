"""Recorded reference arrays of every representation, at the tolerances that float32 references allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motionrft.core.types import Representation
from motionrft.representations.kinematic import (
    KIT_LAYOUT,
    T2M_LAYOUT,
    KinematicFlag,
    KinematicLayout,
    clip_to_kinematic,
    joints_to_kinematic,
    kinematic_to_joints,
    recover_from_rot,
)
from motionrft.representations.kinematics import forward_kinematics, mirror_joints
from motionrft.representations.layouts import (
    critic_to_rotvecs,
    rotation_from_critic,
    rotation_from_flowmdm,
    rotation_to_flowmdm,
)
from motionrft.representations.normalize import Moments, finalise, grouped_std
from motionrft.representations.rotation import canonicalise_rotation, matrices_to_rotation, rotation_to_joints
from motionrft.representations.rotations import (
    SixD,
    change_six_d,
    matrix_to_quaternion,
    matrix_to_rotvec,
    matrix_to_six_d,
    quaternion_to_matrix,
    rotvec_to_matrix,
    six_d_to_matrix,
)
from motionrft.representations.skeleton import KIT, T2M
from tests.paths import shared_path

pytestmark = pytest.mark.parity

CLIPS = ["walk40", "turn64", "mixed120", "long199", "still48", "spin_pi80", "short2", "short4", "walk40_mirror"]
T2M_TOLERANCES = {
    "yaw_rate": 1e-6,
    "root_velocity": 5e-6,
    "root_height": 5e-6,
    "joint_positions": 5e-6,
    "joint_rotations": 1e-4,
    "joint_velocities": 5e-6,
    "contacts": 0.0,
}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(shared_path(f"golden/representations_{name}.npz"), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def t2m() -> dict[str, np.ndarray]:
    return load("t2m")


@pytest.fixture(scope="module")
def rot() -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in load("rot").items()}


def close(got: torch.Tensor, want: np.ndarray | torch.Tensor, atol: float) -> None:
    want = torch.as_tensor(want)
    assert got.shape == want.shape
    error = float((got.double() - want.double()).abs().max())
    assert error <= atol, f"largest difference {error:.3g} > {atol:g}"


def close_features(got: torch.Tensor, want: np.ndarray, layout: KinematicLayout, limits: dict[str, float]) -> None:
    assert got.shape == want.shape and got.dtype == torch.float32
    errors = {n: float((got[:, s] - torch.from_numpy(want)[:, s]).abs().max()) for n, s in layout.groups.items()}
    assert all(errors[n] <= limits[n] for n in limits), errors


def test_skeleton_tables_equal_the_reference(t2m):
    assert T2M.parents == tuple(t2m["parents"])
    close(T2M.bone_length_tensor(), t2m["target_bone_lengths"], 1e-7)
    close(T2M.raw_offsets(), t2m["target_offsets"], 1e-7)
    close(T2M.rest_offset_tensor(), t2m["rest_offsets"], 1e-12)
    assert KIT.parents == tuple(load("kit")["parents"])


@pytest.mark.parametrize("clip", CLIPS)
def test_compatible_features_equal_the_reference(t2m, clip):
    features, ground, _ = clip_to_kinematic(torch.from_numpy(t2m[f"{clip}__joints"]))
    close_features(features, t2m[f"{clip}__data"], T2M_LAYOUT, T2M_TOLERANCES)
    if f"{clip}__ground" in t2m:
        close(ground, t2m[f"{clip}__ground"], 5e-6)


def test_one_padded_batch_of_all_clips_equals_the_reference(t2m):
    joints = [torch.from_numpy(t2m[f"{clip}__joints"]) for clip in CLIPS]
    lengths = torch.tensor([len(j) for j in joints])
    batch = torch.full((len(joints), 230, 22, 3), torch.nan, dtype=torch.float64)
    for row, clip in enumerate(joints):
        batch[row, : len(clip)] = clip
    result = joints_to_kinematic(batch, lengths)
    for row, clip in enumerate(CLIPS):
        rows = int(result.lengths_B[row])
        close_features(result.features[row, :rows], t2m[f"{clip}__data"], T2M_LAYOUT, T2M_TOLERANCES)
        assert not result.features[row, rows:].any()


@pytest.mark.parametrize("clip", ["walk40", "turn64", "still48", "spin_pi80"])
def test_retargeted_shape_equals_the_reference(t2m, clip):
    # The reference's array before floor and heading: compare what a rigid motion cannot change.
    _, ground, _ = clip_to_kinematic(torch.from_numpy(t2m[f"{clip}__joints"]), dtype=torch.float64)
    uniform = torch.from_numpy(t2m[f"{clip}__uniform"])
    ours, reference = ground.reshape(-1, 3)[::7], uniform.reshape(-1, 3)[::7]
    close(torch.cdist(ours, ours), torch.cdist(reference, reference), 5e-6)


@pytest.mark.parametrize("clip", CLIPS[:-1])
def test_recovery_from_positions_equals_the_reference(t2m, clip):
    close(kinematic_to_joints(torch.from_numpy(t2m[f"{clip}__data"])), t2m[f"{clip}__ric"], 2e-6)


@pytest.mark.parametrize("clip", ["walk40", "turn64", "still48", "spin_pi80"])
def test_recovery_from_rotations_equals_the_reference(t2m, clip):
    close(recover_from_rot(torch.from_numpy(t2m[f"{clip}__data"])), t2m[f"{clip}__from_rot"], 2e-6)


def test_the_yaw_sign_error_of_the_spin_clip_is_reproduced_and_flagged(t2m):
    joints = torch.from_numpy(t2m["spin_pi80__joints"])
    features, ground, flags = clip_to_kinematic(joints)
    assert flags == KinematicFlag.YAW_SIGN_ERROR
    error = (kinematic_to_joints(features) - ground[:-1]).norm(dim=-1).max()
    reference = np.linalg.norm(t2m["spin_pi80__ric"] - t2m["spin_pi80__ground"][:-1], axis=-1).max()
    assert error > 0.05 and abs(float(error) - float(reference)) < 1e-4


def test_mirrored_joints_equal_the_reference(t2m):
    # The reference mirrors before conversion: its joints are ours up to nothing but rounding.
    close(mirror_joints(torch.from_numpy(t2m["walk40__joints"])), t2m["walk40_mirror__joints"], 1e-6)


def test_kit_features_equal_the_reference():
    kit = load("kit")
    skeleton = KIT.with_bone_lengths(kit["target_bone_lengths"])
    close(skeleton.raw_offsets(), kit["target_offsets"], 1e-4)
    features, ground, _ = clip_to_kinematic(torch.from_numpy(kit["joints"]), skeleton)
    limits = {name: 2e-3 for name in KIT_LAYOUT.groups} | {"joint_rotations": 1e-4, "contacts": 0.0, "yaw_rate": 1e-6}
    close_features(features, kit["data"], KIT_LAYOUT, limits)
    close(ground, kit["ground"], 2e-3)
    close(kinematic_to_joints(torch.from_numpy(kit["data"])), kit["ric"], 2e-3)
    exact, lengths = (
        clip_to_kinematic(torch.from_numpy(kit["joints"]), skeleton, dtype=torch.float64)[1],
        kit["uniform"],
    )
    ours, reference = exact.reshape(-1, 3)[::5], torch.from_numpy(lengths).reshape(-1, 3)[::5]
    close(torch.cdist(ours, ours), torch.cdist(reference, reference), 2e-3)


def test_forward_kinematics_equals_the_reference(rot):
    joints, _ = forward_kinematics(rot["R"], rot["root"], rot["rest_offsets"])
    close(joints, rot["joints_restFK"], 1e-12)


def test_quaternions_and_rotation_vectors_equal_the_reference(rot):
    close(matrix_to_quaternion(rot["R"]), rot["quat_wxyz"], 1e-9)
    close(matrix_to_rotvec(rot["R"]), rot["axis_angle"], 1e-6)
    close(quaternion_to_matrix(rot["quat_wxyz"]), rot["R"], 1e-12)
    close(rotvec_to_matrix(rot["axis_angle"]), rot["R"], 1e-6)


@pytest.mark.parametrize(("convention", "key"), [("row", "six_row"), ("column", "six_col"), ("interleaved", "six_hy")])
def test_each_six_number_convention_equals_the_reference(rot, convention, key):
    close(matrix_to_six_d(rot["R"], SixD(convention)), rot[key], 1e-15)
    close(six_d_to_matrix(rot[key], SixD(convention)), rot["R"], 1e-12)
    for other, other_key in (("row", "six_row"), ("column", "six_col"), ("interleaved", "six_hy")):
        close(change_six_d(rot[key], SixD(convention), SixD(other)), rot[other_key], 1e-12)


@pytest.mark.parametrize(
    ("convention", "key"), [("row", "noisy_as_row"), ("column", "noisy_as_col"), ("interleaved", "noisy_as_hy")]
)
def test_noisy_six_numbers_decode_as_the_reference(rot, convention, key):
    # Some of the noisy pairs are 0.4 degrees from collinear, which costs float32 two digits.
    close(six_d_to_matrix(rot["noisy6"], SixD(convention)), rot[key], 1e-5)


def test_rotation_vector_and_its_joints_equal_the_reference(rot):
    close(matrices_to_rotation(rot["R"], rot["root"]), rot["x135_hy"], 1e-15)
    close(rotation_to_joints(rot["x135_hy"], rot["rest_offsets"]), rot["joints_restFK"], 1e-12)
    tpose = rot["tpose_script"]
    offsets = tpose.clone()
    offsets[1:] = tpose[1:] - tpose[list(T2M.parents[1:])]
    offsets[0] = 0.0
    close(rotation_to_joints(rot["x135_hy"], offsets), rot["fk135_script"], 2e-6)


def test_flowmdm_features_equal_the_reference_and_come_back_canonical(rot):
    close(rotation_to_flowmdm(rot["x135_hy"]), rot["flowmdm135"], 1e-9)
    close(rotation_from_flowmdm(rot["flowmdm135"]), canonicalise_rotation(rot["x135_hy"]), 1e-9)


def test_motioncritic_tensor_equals_the_reference_and_imports(rot):
    rotvecs = critic_to_rotvecs(rot["critic_in"])
    # The reference loses digits at small angles in float32; against the exact rotation vectors we do not.
    close(rotvecs, rot["critic_out"], 2e-4)
    close(rotvecs[0, :, :22], rot["axis_angle"], 1e-6)
    imported = rotation_from_critic(rotvecs.double(), y_down=False)[0]
    want = canonicalise_rotation(rot["x135_hy"], floor=True)
    close(imported, want, 1e-4)


def test_statistics_equal_the_reference(t2m):
    stats = load("stats")
    parts = [Moments.of(torch.from_numpy(t2m[f"{clip}__data"])) for clip in stats["clips"]]
    merged = Moments.merge_all(parts)
    assert merged.count == int(stats["n_frames"])
    close(merged.mean, stats["mean_f64"], 1e-12)
    close(merged.std(), stats["std_f64"], 1e-12)
    close(merged.mean, stats["mean_upstream"], 1e-5)
    close(grouped_std(merged.std()), stats["std_grouped_upstream"], 1e-5)
    normalizer = finalise(merged, Representation.KINEMATIC, grouped=True)
    close(normalizer.std, stats["std_grouped_upstream"], 1e-5)
