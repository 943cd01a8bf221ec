"""The procedural source: fixed bytes, planted feet, exact rotations, captions that tell classes apart."""

from __future__ import annotations

import pickle
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from data_prep.sources.base import Source, SourceClip
from data_prep.sources.synthetic import SyntheticConfig, SyntheticSource, make_motion
from data_prep.sources.synthetic_body import Body, forward
from data_prep.sources.synthetic_captions import all_captions, draw_captions
from data_prep.sources.synthetic_classes import FAMILIES, ActionClass, all_classes
from data_prep.sources.synthetic_styles import STYLES
from motionrft.core.errors import ConfigError, DataError
from motionrft.core.rng import numpy_rng
from motionrft.evaluation.quality import clip_quality
from motionrft.evaluation.vocabulary import words_of
from motionrft.representations.kinematics import facing_direction, facing_yaw, forward_kinematics, mirror_joints
from motionrft.representations.skeleton import T2M, bone_lengths

CLASSES = all_classes()
CONFIG = SyntheticConfig(num_clips=2 * len(CLASSES), seed=5)
JOINT = {name: i for i, name in enumerate(T2M.joint_names)}


def named(name: str) -> ActionClass:
    return next(c for c in CLASSES if c.name == name)


def motion(name: str, index: int = 0) -> np.ndarray:
    return make_motion(named(name), CONFIG, index)[0]


@pytest.fixture(scope="module")
def clips() -> list[SourceClip]:
    source = SyntheticSource(CONFIG)
    found = [source.read(i) for i in source.ids()]
    return [c for c in found if isinstance(c, SourceClip)]


def fastest_joint_rms(joints: np.ndarray) -> float:
    speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1)
    return float(np.sqrt((speed**2).mean(0)).max())


def quality(clips: list[SourceClip]) -> dict[str, np.ndarray]:
    lengths = np.array([len(c.joints_TJ3) for c in clips])
    joints = np.zeros((len(clips), lengths.max(), 22, 3))
    for row, clip in zip(joints, clips):
        row[: len(clip.joints_TJ3)] = clip.joints_TJ3
    return clip_quality(joints, lengths, CONFIG.fps)


def test_is_a_source_that_survives_pickling_with_the_same_bytes():
    source = SyntheticSource(CONFIG)
    assert isinstance(source, Source)
    again = pickle.loads(pickle.dumps(source))
    assert source.ids() == sorted(source.ids()) == again.ids() and source.known_problems() == []
    for clip_id in source.ids()[::17]:
        one, two = source.read(clip_id), again.read(clip_id)
        assert one.joints_TJ3.tobytes() == two.joints_TJ3.tobytes()
        assert one.rotations_TJ33.tobytes() == two.rotations_TJ33.tobytes()
        assert (one.captions, one.class_name, one.split) == (two.captions, two.class_name, two.split)


def test_a_clip_does_not_depend_on_how_many_clips_there_are_but_on_the_seed():
    few, many = SyntheticSource(SyntheticConfig(num_clips=30)), SyntheticSource(SyntheticConfig(num_clips=3000))
    other = SyntheticSource(SyntheticConfig(num_clips=30, seed=1))
    for clip_id in few.ids()[::7]:
        one, two, three = few.read(clip_id), many.read(clip_id), other.read(clip_id)
        assert one.joints_TJ3.tobytes() == two.joints_TJ3.tobytes() and one.captions == two.captions
        assert one.split == two.split and one.class_name == two.class_name
        assert one.joints_TJ3.tobytes() != three.joints_TJ3.tobytes()


def test_two_thousand_clips_cover_every_class_in_every_split():
    source = SyntheticSource(SyntheticConfig())
    count = len(source.classes)
    assert count >= 60 and len(FAMILIES) >= 12 and len({c.name for c in source.classes}) == count
    found = Counter((source.split_of(i), i % count) for i in range(2000))
    sizes = {s: sum(n for (split, _), n in found.items() if split == s) for s in ("train", "val", "test")}
    assert abs(sizes["train"] - 1400) <= 40 and abs(sizes["val"] - 200) <= 40 and abs(sizes["test"] - 400) <= 40
    for split in sizes:
        of_class = [found[split, c] for c in range(count)]
        assert min(of_class) >= 1 and max(of_class) - min(of_class) <= 4


def test_clips_are_whole_and_start_over_the_origin_facing_z(clips: list[SourceClip]):
    assert len(clips) == CONFIG.num_clips
    for clip in clips:
        length = len(clip.joints_TJ3)
        assert clip.rotations_TJ33 is not None
        assert CONFIG.min_frames <= length <= CONFIG.max_frames
        assert clip.joints_TJ3.shape == (length, 22, 3) and clip.rotations_TJ33.shape == (length, 22, 3, 3)
        assert clip.joints_TJ3.dtype == clip.rotations_TJ33.dtype == np.float32
        assert np.isfinite(clip.joints_TJ3).all() and np.isfinite(clip.rotations_TJ33).all()
        assert np.abs(clip.joints_TJ3[0, 0, [0, 2]]).max() < 1e-6
        forward_z = facing_direction(torch.from_numpy(clip.joints_TJ3[0]))
        assert torch.allclose(forward_z, torch.tensor([0.0, 0.0, 1.0]), atol=1e-5)
        assert clip.rot_source == "body_model" and len(set(clip.captions)) == CONFIG.captions_per_clip


def test_joints_are_forward_kinematics_of_the_rotations_on_one_rigid_body(clips: list[SourceClip]):
    for clip in clips[::5]:
        rotations, joints = torch.from_numpy(clip.rotations_TJ33), torch.from_numpy(clip.joints_TJ3)
        identity = rotations @ rotations.transpose(-1, -2)
        assert torch.allclose(identity, torch.eye(3).expand_as(identity), atol=1e-5)
        assert torch.allclose(torch.linalg.det(rotations), torch.ones(()), atol=1e-5)
        world = forward_kinematics(rotations, joints[:, 0], torch.zeros(22, 3))[1]
        parents = list(T2M.parents[1:])
        bones = joints[:, 1:] - joints[:, parents]
        offsets = (world[:, parents].transpose(-1, -2) @ bones[..., None])[..., 0]
        assert float((offsets - offsets[:1]).abs().max()) < 1e-5  # one rest pose explains every frame
        body = torch.cat([torch.zeros(1, 3), offsets.mean(0)])
        assert torch.allclose(forward_kinematics(rotations, joints[:, 0], body)[0], joints, atol=1e-5)
        lengths = bone_lengths(joints, T2M)
        assert float((lengths - lengths[:1]).abs().max()) < 1e-5


def test_bodies_differ_between_clips_and_are_symmetric():
    bodies = [Body.draw(numpy_rng(i)).offsets_J3 for i in range(20)]
    heights = [body[[3, 6, 9, 12, 15], 1].sum() - body[[1, 4, 7, 10], 1].sum() for body in bodies]
    assert np.ptp(heights) > 0.1
    for body in bodies:
        assert np.allclose(mirror_joints(torch.from_numpy(body)).numpy(), body)
    local = np.tile(np.eye(3), (22, 1, 1, 1))
    assert np.allclose(forward(local, np.zeros((1, 3)), Body(bodies[0]))[0, 4], bodies[0][[1, 4]].sum(0))


def test_feet_are_planted_and_nothing_goes_through_the_floor(clips: list[SourceClip]):
    found = quality(clips)
    assert float(found["foot_skate_ratio"].mean()) < 0.002 and float(found["foot_skate_ratio"].max()) < 0.05
    assert float(np.nanmean(found["foot_slide"])) < 0.03 and float(np.nanmax(found["foot_slide"])) < 0.2
    assert found["valid"].min() == 1 and found["bone_drift"].max() < 1e-5
    lowest = np.array([c.joints_TJ3[..., 1].min() for c in clips])
    assert lowest.min() > -1e-3 and lowest.max() < 5e-3
    jerk = found["jerk"]
    assert 20 < float(jerk.mean()) < 100 and float(jerk.max()) < 450


def test_knees_bend_backwards_and_elbows_forwards_only(clips: list[SourceClip]):
    for clip in clips:
        rotations = clip.rotations_TJ33
        assert rotations is not None
        for knee in (JOINT["left_knee"], JOINT["right_knee"]):
            bend = np.arctan2(rotations[:, knee, 2, 1], rotations[:, knee, 1, 1])
            assert bend.min() > -0.15 and bend.max() < 2.7
        for elbow, sign in ((JOINT["left_elbow"], 1), (JOINT["right_elbow"], -1)):
            bend = sign * np.arctan2(-rotations[:, elbow, 0, 2], rotations[:, elbow, 0, 0])
            assert bend.min() > -0.12 and bend.max() < 2.6  # the rest pose is already bent by 0.12


def test_walking_arms_swing_against_the_legs():
    for name in (
        "walk|forward|normal",
        "walk|forward|fast",
        "walk|backward|fast",
        "run|forward|slow",
        "run|forward|fast",
    ):
        for index in range(4):
            joints = motion(name, index)
            relative = joints[..., 2] - joints[:, :1, 2]
            arms = relative[:, JOINT["left_wrist"]] - relative[:, JOINT["right_wrist"]]
            legs = relative[:, JOINT["left_ankle"]] - relative[:, JOINT["right_ankle"]]
            assert np.corrcoef(arms, legs)[0, 1] < -0.6


def test_a_right_class_is_the_mirror_image_of_its_left_twin():
    pairs = [c for c in CLASSES if c.mirrored]
    assert len(pairs) >= 15
    for action in pairs:
        right, _ = make_motion(action, CONFIG, 3)
        left, _ = make_motion(action.authored, CONFIG, 3)
        assert action.authored in CLASSES
        assert np.allclose(mirror_joints(torch.from_numpy(left)).numpy(), right, atol=1e-9)
        assert np.abs(left - right).max() > 0.1


def test_directions_sides_and_angles_are_what_the_class_says():
    for index in range(4):
        assert motion("walk|forward|slow", index)[-1, 0, 2] > 0.4 > -0.4 > motion("walk|backward|slow", index)[-1, 0, 2]
        assert (
            motion("sidestep|left|fast", index)[-1, 0, 0] > 0.4 > -0.4 > motion("sidestep|right|fast", index)[-1, 0, 0]
        )
        assert motion("jump|forward|1", index)[-1, 0, 2] > 0.3 and motion("jump|backward|1", index)[-1, 0, 2] < -0.2
        for angle, low, high in (("quarter", 80, 100), ("half", 165, 195), ("full", 330, 390)):
            yaw = np.unwrap(facing_yaw(torch.from_numpy(motion(f"turn|left|{angle}", index))).numpy())
            assert low < np.rad2deg(yaw[-1]) < high
        wave = motion("wave|left|slow", index)[..., 1]
        assert wave[:, JOINT["left_wrist"]].max() > wave[:, JOINT["right_wrist"]].max() + 0.4
        kick = motion("kick|left|forward", index)
        assert kick[:, JOINT["left_foot"], 1].max() > 0.3 and kick[:, JOINT["right_foot"], 1].max() < 0.02
        assert motion("sit|slow", index)[-1, 0, 1] < 0.7 < motion("stand|slow", index)[-1, 0, 1]


def test_styles_are_seen_in_the_posture_and_leave_the_feet_alone():
    wrists, shoulders = [JOINT["left_wrist"], JOINT["right_wrist"]], [JOINT["left_shoulder"], JOINT["right_shoulder"]]
    for family in ("walk", "run", "march"):
        for index in range(3):
            found = {style: motion(f"{family}|{style}", index) for style in STYLES}
            reach = {s: (j[:, wrists, 1] - j[:, shoulders, 1]).mean() for s, j in found.items()}
            assert reach["arms_up"] > 0.25 and abs(reach["arms_spread"]) < 0.15 and reach["tired"] < -0.1
            head = {s: j[:, JOINT["head"], 1].mean() for s, j in found.items()}
            assert head["tired"] < head["proud"] - 0.08
            hips = np.linalg.norm(found["hands_on_hips"][:, wrists] - found["hands_on_hips"][:, :1], axis=-1)
            assert hips.mean() < 0.45
            across = {s: (j[:, JOINT["head"], 0] - j[:, 0, 0]).std() for s, j in found.items()}
            assert across["drunk"] > 1.5 * across["proud"]
            toes = [j[:, JOINT["left_foot"], 1] for j in found.values()]
            assert max(np.abs(t - toes[0]).max() for t in toes) < 0.02


def test_counts_are_countable_in_the_middle_sixty_frames():
    for index in range(4):
        for count in (1, 2, 3):
            for name, joint, sign in ((f"jump|up|{count}", 0, 1), (f"squat|{count}", 0, -1)):
                height = sign * motion(name, index)[:, joint, 1]
                start = max(0, (len(height) - 60) // 2)
                height = height[start : start + 60]
                high = height > height.min() + 0.6 * np.ptp(height) if sign < 0 else height > height[0] + 0.08
                assert int((np.diff(high.astype(int)) == 1).sum()) == count


def test_fast_classes_are_faster_than_slow_ones():
    for action in CLASSES:
        if action.get("speed") != "slow":
            continue
        fast = named(action.name.replace("slow", "fast"))
        pace = [np.mean([fastest_joint_rms(make_motion(a, CONFIG, i)[0]) for i in range(4)]) for a in (action, fast)]
        assert pace[1] > 1.25 * pace[0], action.name


def test_no_caption_belongs_to_two_classes():
    owners: dict[str, set[str]] = defaultdict(set)
    for action in CLASSES:
        for held_out in (False, True):
            captions = all_captions(action, held_out)
            assert len(captions) >= 8
            for caption in captions:
                owners[caption].add(action.name)
                assert not set("[]{}_") & set(caption)
                for attribute in ("left", "right"):
                    assert (attribute in words_of(caption)) == (attribute in action.name.split("|"))
    assert {len(names) for names in owners.values()} == {1}


def test_held_out_wordings_are_absent_from_training_and_use_known_words_only(clips: list[SourceClip]):
    train = {c for action in CLASSES for c in all_captions(action, False)}
    held_out = {c for action in CLASSES for c in all_captions(action, True)}
    assert not train & held_out
    assert {w for c in held_out for w in words_of(c)} <= {w for c in train for w in words_of(c)}
    for clip in clips:
        assert set(clip.captions) <= (train if clip.split == "train" else held_out)


def test_captions_of_one_clip_are_different_sentences():
    for index, action in enumerate(CLASSES):
        for held_out in (False, True):
            drawn = draw_captions(action, held_out, 4, numpy_rng(index))
            assert len(set(drawn)) == 4 and set(drawn) <= set(all_captions(action, held_out))


def test_clips_of_a_class_differ_and_still_look_more_like_each_other_than_like_others():
    names = ["walk|forward|slow", "run|forward|fast", "wave|left|fast", "squat|1", "sit|slow", "kick|right|forward"]
    rows = []
    for name in names:
        for index in range(6):
            joints = motion(name, index)[:40] - motion(name, index)[:40, :1] * np.array([1.0, 0.0, 1.0])
            speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1) * 20
            rows.append(np.concatenate([joints.std(0).ravel() * 3, speed.mean(0)]))
    table = np.linalg.norm(np.array(rows)[:, None] - np.array(rows)[None], axis=-1) + np.eye(len(rows)) * 1e9
    assert table.min() > 1e-3
    nearest = table.argmin(1) // 6
    assert (nearest == np.arange(len(rows)) // 6).mean() > 0.8


def test_bad_configs_and_ids_are_refused_with_the_reason():
    for bad, word in (
        ({"num_clips": 0}, "num_clips"),
        ({"fps": 0.0}, "fps"),
        ({"min_frames": 20}, "min_frames"),
        ({"min_frames": 60, "max_frames": 50}, "max_frames"),
        ({"captions_per_clip": 0}, "captions_per_clip"),
        ({"families": ("fly",)}, "fly"),
    ):
        with pytest.raises(ConfigError, match=word):
            SyntheticConfig(**bad)
    for bad_id in ("synthetic_000009", "000001", "synthetic_x", "synthetic_-1"):
        with pytest.raises(DataError, match="ids"):
            SyntheticSource(SyntheticConfig(num_clips=9)).read(bad_id)


def test_few_families_and_other_frame_rates_work():
    source = SyntheticSource(
        SyntheticConfig(num_clips=12, families=("walk", "jump"), fps=30.0, min_frames=60, max_frames=90)
    )
    assert {c.family for c in source.classes} == {"walk", "jump"}
    clips = [source.read(i) for i in source.ids()]
    assert all(c.fps == 30.0 and 60 <= len(c.joints_TJ3) <= 90 for c in clips)
    shortest = SyntheticSource(SyntheticConfig(num_clips=len(CLASSES), max_frames=40))
    for clip_id in shortest.ids():
        assert np.isfinite(shortest.read(clip_id).joints_TJ3).all()
