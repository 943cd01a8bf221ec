"""Reward terms in metres: closed forms, gradients, and the metrics they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from motionrft.config.load import resolve
from motionrft.core.errors import RepresentationError
from motionrft.core.types import Representation
from motionrft.evaluation import quality
from motionrft.representations.convert import convert, to_joints
from motionrft.representations.rotation import canonicalise_rotation, matrices_to_rotation
from motionrft.representations.rotations import rotvec_to_matrix
from motionrft.representations.skeleton import T2M
from motionrft.reward import terms as terms_module
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.terms import TERMS, MotionView
from motionrft.reward.terms_physical import FLOOR_TOLERANCE_M, GRAVITY_M_S2, JERK_SCALE_M_S3
from tests.reward_fixtures import NORMALIZERS, TINY, Scale, make_backbone

PHYSICAL = ("foot_sliding", "floor_penetration", "floating", "joint_jerk", "bone_drift", "bone_length")
J, R, K = Representation.JOINT, Representation.ROTATION, Representation.KINEMATIC
T = 40
SECONDS = torch.arange(T, dtype=torch.float64) / T2M.fps


def standing(frames: int = T) -> Tensor:
    """Return the rest pose with its feet on the floor, (1, frames, 22, 3) float64."""
    pose = to_joints(matrices_to_rotation(torch.eye(3, dtype=torch.float64).expand(22, 3, 3), torch.zeros(3)), R)
    pose = pose - pose[:, 1].min() * torch.tensor([0.0, 1.0, 0.0])
    return pose.expand(1, frames, 22, 3).clone()


def moved(axis: int, path_T: Tensor) -> Tensor:
    joints = standing(len(path_T))
    joints[..., axis] += path_T[:, None]
    return joints


def value(name: str, joints_BTJ3: Tensor, lengths: list[int] | None = None) -> Tensor:
    lengths_B = torch.tensor(lengths or [joints_BTJ3.shape[1]] * len(joints_BTJ3))
    return TERMS[name]()(MotionView(joints_BTJ3.flatten(2), lengths_B, J, Scale()))


def wave(seed: int = 0, frames: int = 25) -> Tensor:
    """Return a smooth canonical clip as rotations, (1, frames, 135) float64."""
    rng = torch.Generator().manual_seed(seed)
    seconds = torch.arange(frames, dtype=torch.float64)[:, None, None] / T2M.fps
    amplitude, phase = torch.randn(2, 22, 3, generator=rng, dtype=torch.float64)
    turns = rotvec_to_matrix(0.2 * amplitude * torch.sin(2 * seconds + 3 * phase))
    root = torch.stack([0.5 * seconds, 0.9 + 0.05 * torch.sin(6 * seconds), 0.8 * seconds], -1)[:, 0, 0]
    return canonicalise_rotation(matrices_to_rotation(turns, root)[None], floor=True)


# ------------------------------------------------------------------------------------------------------ closed forms


def test_a_standing_body_of_the_standard_skeleton_is_perfect() -> None:
    for name in PHYSICAL:
        exact = 0.0 if name not in ("bone_drift", "bone_length") else 1e-12
        assert abs(value(name, standing()).item()) <= exact, name


def test_sliding_feet_cost_their_speed_and_lifted_feet_nothing() -> None:
    assert value("foot_sliding", moved(0, 0.8 * SECONDS)).item() == pytest.approx(-0.8, rel=1e-2)
    flying = moved(0, 0.8 * SECONDS) + torch.tensor([0.0, 0.5, 0.0])
    assert value("foot_sliding", flying).item() == pytest.approx(0.0, abs=1e-6)


def test_sinking_costs_the_depth_beyond_the_tolerance() -> None:
    path = torch.where(torch.arange(T) < T // 4, -0.12, 0.05).double()
    assert value("floor_penetration", moved(1, path)).item() == pytest.approx(-(0.12 - FLOOR_TOLERANCE_M) / 4)
    shallow = torch.full((T,), -FLOOR_TOLERANCE_M + 1e-9).double()
    assert value("floor_penetration", moved(1, shallow)).item() == 0.0


def test_hovering_costs_its_height_a_jump_costs_nothing_and_half_a_fall_half() -> None:
    hover = torch.full((T,), 0.32).double()
    assert value("floating", moved(1, hover)).item() == pytest.approx(-(0.32 - FLOOR_TOLERANCE_M))
    for share in (1.0, 0.5):
        fall = 3.0 + 3.0 * SECONDS - 0.5 * share * GRAVITY_M_S2 * SECONDS**2
        want = -(1.0 - share) * float((fall[1:-1] - FLOOR_TOLERANCE_M).clamp(min=0).mean())
        assert value("floating", moved(1, fall)).item() == pytest.approx(want, abs=1e-6)
    rising = 1.0 + 4.0 * SECONDS**2  # pushed upwards by nothing: no more than its height
    assert value("floating", moved(1, rising)).item() == pytest.approx(-float(rising[1:-1].mean()) + FLOOR_TOLERANCE_M)


def test_jerk_of_a_cubic_path_is_its_third_derivative() -> None:
    assert value("joint_jerk", moved(2, 20.0 * SECONDS**3)).item() == pytest.approx(-120.0 / JERK_SCALE_M_S3)
    assert value("joint_jerk", moved(2, 5.0 * SECONDS**2)).item() == pytest.approx(0.0, abs=1e-9)


def test_bones_that_breathe_cost_their_variation_and_a_larger_body_only_its_difference() -> None:
    factor = 1.0 + 0.1 * (-1.0) ** torch.arange(T).double()
    breathing = standing() * factor[:, None, None]
    assert value("bone_drift", breathing).item() == pytest.approx(-0.1)
    assert value("bone_length", breathing).item() == pytest.approx(-0.1)
    assert value("bone_drift", 1.2 * standing()).item() == pytest.approx(0.0, abs=1e-12)
    assert value("bone_length", 1.2 * standing()).item() == pytest.approx(-0.2)


# ---------------------------------------------------------------------------------------------------------- metrics


def test_terms_equal_the_metrics_they_stand_for() -> None:
    rng = torch.Generator().manual_seed(3)
    joints = standing() + 0.05 * torch.randn(4, T, 22, 3, generator=rng, dtype=torch.float64)
    joints[..., 1] += torch.tensor([-0.2, -0.05, 0.0, 0.2])[:, None, None]
    lengths = [T, 30, 17, 9]
    found = quality.clip_quality(joints.numpy(), np.array(lengths), T2M.fps)
    pairs = {"floor_penetration": "penetration", "bone_drift": "bone_drift"}
    for term, metric in pairs.items():
        np.testing.assert_allclose(value(term, joints, lengths), -found[metric], rtol=1e-9, err_msg=term)
    np.testing.assert_allclose(value("joint_jerk", joints, lengths) * JERK_SCALE_M_S3, -found["jerk"], rtol=1e-9)
    assert FLOOR_TOLERANCE_M == quality.QualityConfig().floor_tolerance_m


@pytest.mark.parametrize(
    ("term", "metric", "worse"),
    [
        ("foot_sliding", "foot_slide", lambda a: moved(2, a * SECONDS)),
        ("floating", "float", lambda a: moved(1, torch.full((T,), a).double())),
        ("floor_penetration", "penetration", lambda a: moved(1, torch.full((T,), -a).double())),
        ("joint_jerk", "jerk", lambda a: moved(0, a * torch.sin(20 * SECONDS))),
        ("bone_drift", "bone_drift", lambda a: standing() * (1 + a * torch.sin(SECONDS))[:, None, None]),
    ],
)
def test_terms_fall_as_their_metric_rises(term: str, metric: str, worse) -> None:
    clips = torch.cat([worse(a) for a in (0.05, 0.1, 0.3, 0.6)])
    found = quality.clip_quality(clips.numpy(), np.full(4, T), T2M.fps)[metric]
    assert (np.diff(found) > 0).all()
    assert (value(term, clips).diff() < 0).all()


# -------------------------------------------------------------------------------------------------- representations


@pytest.mark.parametrize(
    ("height", "broken"),
    [
        (-0.15, {"foot_sliding", "joint_jerk", "floor_penetration"}),
        (0.0, {"foot_sliding", "joint_jerk", "floating"}),  # the wave lifts its feet without jumping
        (0.25, {"joint_jerk", "floating"}),
    ],
)
def test_all_representations_of_one_clip_score_alike(height: float, broken: set[str]) -> None:
    rotation = wave()
    joints = to_joints(rotation, R).flatten(2)
    kinematic = convert(joints, J, K).motion_BTD
    rotation, joints = rotation[:, :-1].clone(), joints[:, :-1].clone()  # features have one row less
    rotation[..., 1] += height
    joints[..., 1::3] += height
    kinematic[..., 3] += height
    kinematic[..., 5:67:3] += height
    lengths = torch.tensor([kinematic.shape[1]])
    for name in PHYSICAL:
        found = [
            TERMS[name]()(MotionView(x.float(), lengths, kind, Scale())).item()
            for x, kind in ((rotation, R), (joints, J), (kinematic, K))
        ]
        assert max(found) - min(found) < 2e-3 * abs(min(found)) + 1e-5, (name, found)
        assert (max(found) < -1e-3) == (name in broken), (name, found)


def test_one_call_converts_to_joints_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Representation] = []
    monkeypatch.setattr(terms_module, "to_joints", lambda x, kind: (calls.append(kind), to_joints(x, kind))[1])
    reward = MotionReward(make_backbone(), NORMALIZERS)
    motion, lengths, text = wave().float(), torch.tensor([25]), torch.ones(1, TINY.latent_dim)
    reward.score(motion, lengths, R, text_BE=text, terms=["semantic", "smoothness"])
    assert calls == []
    reward.score(motion, lengths, R, text_BE=text, terms=["semantic", *PHYSICAL])
    assert calls == [R]


def test_features_of_another_skeleton_are_refused() -> None:
    with pytest.raises(RepresentationError, match="263"):
        TERMS["joint_jerk"]()(MotionView(torch.zeros(1, 5, 251), torch.tensor([5]), K, Scale()))


# -------------------------------------------------------------------------------------------------------- gradients


def physical_motion(kind: Representation, frames: int) -> Tensor:
    """Return a wave in a representation, 5 cm sunk so that every term but `floating` has something to say."""
    rotation = wave(seed=1, frames=frames + 1)
    rotation[..., 1] -= 0.05
    if kind is R:
        return rotation[:, :-1]
    joints = to_joints(rotation, R).flatten(2)
    if kind is J:
        return joints[:, :-1]
    features = convert(joints, J, K).motion_BTD.double()
    features[..., 3] -= 0.05
    features[..., 5:67:3] -= 0.05
    return features


@pytest.mark.parametrize("kind", list(Representation))
@pytest.mark.parametrize("name", ["floor_penetration", "joint_jerk", "bone_drift", "bone_length"])
def test_gradients_equal_finite_differences(name: str, kind: Representation) -> None:
    term, lengths = TERMS[name](), torch.tensor([5])
    motion = physical_motion(kind, 6)
    motion = motion + 0.01 * torch.randn(motion.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scored = term(MotionView(motion, lengths, kind, Scale())).item()
    assert scored < -1e-3 or (kind is R and name.startswith("bone"))
    assert torch.autograd.gradcheck(
        lambda x: term(MotionView(x, lengths, kind, Scale())), motion.requires_grad_(), atol=1e-5, rtol=1e-4
    )


def difference(name: str, joints_BTJ3: Tensor, direction: Tensor, step: float = 1e-6) -> float:
    ends = [value(name, joints_BTJ3 + sign * step * direction).item() for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


def test_weights_that_only_gate_carry_no_gradient_and_the_rest_does() -> None:
    rng = torch.Generator().manual_seed(2)
    sliding = moved(0, 0.5 * SECONDS) + torch.tensor([0.0, 0.06, 0.0])  # near the end of contact
    floating = moved(1, 0.31 + 1.0 * SECONDS - 2.0 * SECONDS**2)  # between hovering and falling
    planar, vertical = torch.zeros(1, T, 22, 3).double(), torch.zeros(1, T, 22, 3).double()
    planar[..., [0, 2]] = torch.randn(1, T, 22, 2, generator=rng, dtype=torch.float64)
    vertical[..., 1] = 1.0  # all joints up by the same: the acceleration stays
    for name, joints, direction in (("foot_sliding", sliding, planar), ("floating", floating, vertical)):
        x = joints.clone().requires_grad_()
        value(name, x).sum().backward()
        assert float((x.grad * direction).sum()) == pytest.approx(difference(name, joints, direction), rel=1e-5)
        assert x.grad.abs().max() > 0
        if name == "foot_sliding":
            assert (x.grad[..., 1] == 0).all()  # sliding is not cured by lifting the foot
        else:
            assert (x.grad[..., 1] <= 0).all()  # nor floating by falling harder


@pytest.mark.parametrize("kind", list(Representation))
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_short_and_resting_clips_have_finite_values_and_gradients(kind: Representation, frames: int) -> None:
    resting = wave(frames=1).expand(1, frames + 1, 135).float()
    motion = {R: resting, J: to_joints(resting, R).flatten(2)}.get(kind)
    if motion is None:
        motion = convert(to_joints(resting, R).flatten(2), J, K).motion_BTD
    for padded in (frames, frames + 1):
        x = torch.nn.functional.pad(motion[:, :frames], (0, 0, 0, padded - frames)).clone().requires_grad_()
        view = MotionView(x, torch.tensor([frames]), kind, Scale())
        values = torch.stack([TERMS[name]()(view) for name in PHYSICAL])
        values.sum().backward()
        assert values.isfinite().all() and (values <= 0).all()
        assert x.grad.isfinite().all() and (x.grad[:, frames:] == 0).all()


@pytest.mark.parametrize("kind", list(Representation))
def test_padding_of_any_content_changes_neither_value_nor_gradient(kind: Representation) -> None:
    clean = physical_motion(kind, 8).float()
    results = []
    for junk, extra in ((0.0, 0), (1e4, 3), (math.nan, 1), (math.inf, 2)):
        x = torch.nn.functional.pad(clean, (0, 0, 0, extra), value=junk).clone().requires_grad_()
        view = MotionView(x, torch.tensor([8]), kind, Scale())
        values = torch.stack([TERMS[name]()(view) for name in PHYSICAL])
        values.sum().backward()
        assert (x.grad[:, 8:] == 0).all()
        results.append((values.detach(), x.grad[:, :8]))
    for values, gradient in results[1:]:
        assert torch.allclose(values, results[0][0], atol=1e-6) and torch.allclose(gradient, results[0][1], atol=1e-6)


# ---------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", sorted(PHYSICAL))
def test_every_term_is_a_weight_of_a_run(name: str) -> None:
    assert resolve("quickstart", flags=[f"finetune.weights.{name}=0.03"]).finetune.weights[name] == 0.03
