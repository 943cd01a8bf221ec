"""The synthetic source: deterministic, balanced, anatomically sound, and worded without ambiguity."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from data_prep.sources.synth.actions import Variation
from data_prep.sources.synth.classes import FRAMES, HELD_OUT_FRAMES, SUBJECTS, actions
from data_prep.sources.synth.source import SyntheticConfig, SyntheticSource, make_motion
from motionrft.core.errors import ConfigError
from motionrft.evaluation.quality import clip_quality
from motionrft.representations.kinematics import forward_kinematics
from motionrft.representations.skeleton import T2M, bone_lengths

SOURCE = SyntheticSource(SyntheticConfig(num_clips=2000))


def variation(**changes: float) -> Variation:
    values = {"frames": 60, "fps": 20.0, "scale": 1.0, "tempo": 1.0, "amplitude": 1.0, "phase": 0.3, **changes}
    return Variation(wobble=np.zeros(6), **values)  # type: ignore[arg-type]


def test_there_are_many_families_and_every_split_holds_at_least_forty_classes() -> None:
    assert len(actions()) >= 60 and len({a.name.split("|")[0] for a in actions()}) >= 12
    found = defaultdict(lambda: defaultdict(int))
    for clip_id in SOURCE.ids()[::1]:
        index = int(clip_id)
        place = (index // len(actions()) + 3 * (index % len(actions()))) % 10
        split = "train" if place < 7 else "val" if place == 7 else "test"
        found[split][actions()[index % len(actions())].name] += 1
    assert all(len(found[s]) >= 60 for s in ("train", "val", "test"))
    sizes = {s: sum(c.values()) for s, c in found.items()}
    assert abs(sizes["train"] / 2000 - 0.7) < 0.02 and abs(sizes["test"] / 2000 - 0.2) < 0.02


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    a, b = SOURCE.read("000017"), SyntheticSource(SyntheticConfig(num_clips=50)).read("000017")
    assert a.joints_TJ3.tobytes() == b.joints_TJ3.tobytes() and a.captions == b.captions
    other = SyntheticSource(SyntheticConfig(seed=1)).read("000017")
    assert other.joints_TJ3.shape != a.joints_TJ3.shape or other.joints_TJ3.tobytes() != a.joints_TJ3.tobytes()


@pytest.mark.parametrize("index", range(0, len(actions()), 3))
def test_bones_keep_their_length_and_rotations_give_the_joints(index: int) -> None:
    clip = SOURCE.read(f"{index:06d}")
    joints = torch.from_numpy(clip.joints_TJ3).double()
    lengths = bone_lengths(joints, T2M)
    assert float((lengths - lengths[:1]).abs().max()) < 1e-5
    scale = float(lengths[0, 3] / T2M.rest_offset_tensor()[4].norm())
    rotations = torch.from_numpy(clip.rotations_TJ33).double()
    again, _ = forward_kinematics(rotations, joints[:, 0], scale * T2M.rest_offset_tensor())
    assert float((again - joints).abs().max()) < 1e-4
    assert float(joints[..., 1].min()) > -0.02


def test_standing_feet_do_not_slide() -> None:
    for name in ("walk|forward|normal", "turn|left|half", "march|place|slow", "wave|left|fast", "squat|2"):
        action = next(a for a in actions() if a.name == name)
        joints, _ = make_motion(action, variation())
        found = clip_quality(joints[None].astype(np.float32), np.array([len(joints)]), 20.0)
        assert found["foot_skate_ratio"][0] < 0.25, name
        toes = joints[:, [10, 11]]
        still = np.linalg.norm(np.diff(toes, axis=0), axis=-1) < 1e-3
        assert still.mean() > 0.4, name  # planted means motionless, not merely slow


def test_knees_bend_forward_and_arms_swing_against_legs() -> None:
    walk = next(a for a in actions() if a.name == "walk|forward|normal")
    joints, _ = make_motion(walk, variation())
    for hip, knee, ankle in ((1, 4, 7), (2, 5, 8)):
        share = 0.5 * (joints[:, hip] + joints[:, ankle])
        assert ((joints[:, knee] - share)[:, 2] > -0.02).all()
    leg = joints[:, 7, 2] - joints[:, 8, 2]
    arm = joints[:, 20, 2] - joints[:, 21, 2]
    assert np.corrcoef(leg, arm)[0, 1] < -0.5


def test_left_and_right_classes_are_mirror_images_where_time_is_symmetric() -> None:
    by_name = {a.name: a for a in actions()}
    for name in ("raise|left|front", "kick|left|side", "lunge|left", "throw|left"):
        left, _ = make_motion(by_name[name], variation())
        right, _ = make_motion(by_name[name.replace("left", "right")], variation())
        mirrored = right[:, list(T2M.mirror_permutation)] * np.array([-1.0, 1.0, 1.0])
        assert np.abs(left - mirrored).max() < 0.12, name  # idle movement is not mirrored


def test_no_caption_names_two_classes_and_held_out_frames_never_train() -> None:
    owner: dict[str, str] = {}
    for action in actions():
        for verb in action.verbs:
            for frame in (*FRAMES, *HELD_OUT_FRAMES):
                for subject in SUBJECTS:
                    assert owner.setdefault(frame.format(s=subject, v=verb), action.name) == action.name
    for clip_id in SOURCE.ids()[:300]:
        clip = SOURCE.read(clip_id)
        held_out = [c for c in clip.captions if c.startswith("here ") or c.endswith(" now")]
        assert len(set(clip.captions)) == 4
        assert len(held_out) == (0 if clip.split == "train" else 4)


def test_counts_and_speeds_differ_in_the_motion() -> None:
    by_name = {a.name: a for a in actions()}
    heights = {n: make_motion(by_name[f"squat|{n}"], variation())[0][:, 0, 1] for n in (1, 2, 3)}
    for count, height in heights.items():
        middle = (height.max() + height.min()) / 2
        assert int(((height[:-1] > middle) & (height[1:] <= middle)).sum()) == count
    far = {p: make_motion(by_name[f"walk|forward|{p}"], variation())[0][-1, 0, 2] for p in ("slow", "normal", "fast")}
    assert far["slow"] < 0.75 * far["normal"] < 0.75 * far["fast"]


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_clips"):
        SyntheticConfig(num_clips=0)
    with pytest.raises(ConfigError, match="min_frames"):
        SyntheticConfig(min_frames=90)
