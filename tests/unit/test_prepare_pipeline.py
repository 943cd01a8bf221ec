"""The pipeline: same input, same bytes; canonical clips; rotations that agree with positions; mirrors; captions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.canonicalize import resample, turn_between
from data_prep.captions import BATCH, caption_batches, mirror_class, mirror_text
from data_prep.pipeline import prepare
from data_prep.represent import motions_of_joints
from motionrft.core.errors import ClusterError, ConfigError, DataError
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.data.schema import ROW_GROUP, QcFlag
from motionrft.data.tables import ClipTable, TextTable
from motionrft.representations.convert import to_joints
from motionrft.representations.kinematics import facing_yaw, mirror_joints
from motionrft.representations.rotations import yaw_matrix
from tests.prepare_fixtures import MovingSource, config, make_dataset, moving_clip, tree_bytes

K, J, R = Representation


def table(root, split="train") -> ClipTable:
    return ClipTable.open(Dataset.open(root, verify=True), split)


def test_same_input_same_bytes(tmp_path):
    make_dataset(tmp_path / "a", 20)
    make_dataset(tmp_path / "b", 20)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_shards_and_row_groups_hold_the_same_rows(tmp_path):
    make_dataset(tmp_path / "one", 30)
    report = make_dataset(tmp_path / "many", 30, clips_per_shard=4)
    files = Dataset.open(tmp_path / "many").clip_files("train")
    assert len(files) == 5 and report.clips["train"] == 18 < ROW_GROUP
    one, many = table(tmp_path / "one"), table(tmp_path / "many")
    assert one.item_ids == many.item_ids
    assert all(np.array_equal(one.frames(i, K), many.frames(i, K)) for i in range(len(one)))


def test_clips_are_canonical(tmp_path):
    make_dataset(tmp_path / "out", 10)
    clips = table(tmp_path / "out")
    for row in range(len(clips)):
        joints = to_joints(clips.motion(row, J), J)
        assert joints[0, 0, [0, 2]].abs().max() < 1e-6
        assert abs(float(facing_yaw(joints[0]))) < 1e-5
        assert 0 <= float(joints[..., 1].min()) < 0.02  # the floor is that of all frames, the last one has no row


def test_place_heading_and_body_size_of_the_source_do_not_matter(tmp_path):
    clip = moving_clip("c000", 40, with_rotations=False)
    turn = yaw_matrix(torch.tensor(2.0)).numpy()
    moved = replace(clip, joints_TJ3=(clip.joints_TJ3 @ turn.T + [5.0, 0.3, -2.0]).astype(np.float32))
    bigger = moving_clip("c000", 40, scale=1.3, with_rotations=False)
    make_dataset(tmp_path / "out", 3, {"c000": vars(clip), "c001": {**vars(moved), "clip_id": "c001"}, "c002": {}})
    clips = table(tmp_path / "out")
    np.testing.assert_allclose(clips.frames(0, J), clips.frames(1, J), atol=1e-5)
    np.testing.assert_allclose(clips.frames(0, K)[:, :193], clips.frames(1, K)[:, :193], atol=1e-4)
    a, b = (motions_of_joints([torch.from_numpy(c.joints_TJ3)])[0] for c in (clip, bigger))
    lengths = [(to_joints(m.joint_TD, J)[:, 4] - to_joints(m.joint_TD, J)[:, 1]).norm(dim=-1) for m in (a, b)]
    torch.testing.assert_close(*lengths, atol=1e-5, rtol=0)


def test_given_rotations_are_kept_and_missing_ones_are_fitted(tmp_path):
    make_dataset(tmp_path / "out", 10, {"c001": {"rotations_TJ33": None, "rot_source": ""}})
    clips = table(tmp_path / "out")
    sources = dict(zip(clips.item_ids, clips.rot_sources))
    assert sources.pop("c001") == "ik" and set(sources.values()) == {"body_model"}
    row = clips.item_ids.index("c001")  # the standard body's joints are reproduced by fitted rotations too
    joints = {r: to_joints(clips.motion(row, r), r) for r in (J, R)}
    torch.testing.assert_close(joints[R], joints[J], atol=1e-5, rtol=0)


def test_rotations_that_contradict_positions_are_replaced(tmp_path):
    bent = moving_clip("c001", 31).rotations_TJ33.copy()
    bent[:, 1] = np.diag([1.0, -1.0, -1.0])  # a leg in the air
    make_dataset(tmp_path / "out", 5, {"c001": {"rotations_TJ33": bent}})
    clips = table(tmp_path / "out")
    row = clips.item_ids.index("c001")
    assert clips.rot_sources[row] == "ik" and clips.qc_flags[row] & QcFlag.ROTATION_DISAGREES


def test_rotations_can_be_required(tmp_path):
    report = make_dataset(
        tmp_path / "out", 10, {"c001": {"rotations_TJ33": None, "rot_source": ""}}, rotations="require"
    )
    assert report.rejected == {"NO_ROTATIONS": 1}


def test_long_clips_are_cut_or_rejected(tmp_path):
    report = make_dataset(tmp_path / "cut", 10, max_frames=30)
    clips = table(tmp_path / "cut")
    assert int(clips.lengths.max()) == 30 and report.flagged["CUT"] > 3 and not report.rejected
    assert make_dataset(tmp_path / "rej", 10, max_frames=32, long_clips="reject").rejected["TOO_LONG"] > 3


def test_mirrored_copies_are_of_training_clips_and_mirror_words(tmp_path):
    plain, report = make_dataset(tmp_path / "plain", 10), make_dataset(tmp_path / "out", 10, mirror=True)
    assert report.clips == {**plain.clips, "train": 2 * plain.clips["train"]} and report.read == 10
    clips = table(tmp_path / "out")
    for row in range(0, len(clips), 2):
        assert clips.item_ids[row + 1] == f"M{clips.item_ids[row]}" and clips.clip_ids[row + 1] == clips.clip_ids[row]
        assert clips.captions[row + 1] == tuple(map(mirror_text, clips.captions[row])) != clips.captions[row]
        assert clips.class_names[row + 1] == mirror_class(clips.class_names[row])
        a, b = (to_joints(clips.motion(i, R), R) for i in (row, row + 1))
        assert float((mirror_joints(a) - b).abs().max()) < 0.1  # not equal: the standard body is not symmetric
        torch.testing.assert_close(to_joints(clips.motion(row + 1, J), J), b, atol=2e-6, rtol=0)


def test_held_out_clips_are_mirrored_on_request_and_stay_in_their_split(tmp_path):
    plain = make_dataset(tmp_path / "plain", 20)
    report = make_dataset(tmp_path / "out", 20, mirror=True, mirror_held_out=True)
    assert report.clips == {split: 2 * count for split, count in plain.clips.items()}
    for split in ("val", "test"):
        clips = table(tmp_path / "out", split)
        assert set(clips.clip_ids) == set(table(tmp_path / "plain", split).clip_ids)
        assert {i.removeprefix("M") for i in clips.item_ids} == set(clips.clip_ids)


def test_words_are_mirrored():
    assert mirror_text("Left hand, then right; clockwise") == "Right hand, then left; counterclockwise"
    assert mirror_text("turns anticlockwise upright") == "turns clockwise upright"
    assert mirror_class("wave|left_hand|fast") == "wave|right_hand|fast"
    for caption in ("a left turn", "rightwards", "counterclockwise circle"):
        assert mirror_text(mirror_text(caption)) == caption != mirror_text(caption)


@pytest.mark.parametrize("fps", [30.0, 60.0, 12.5, 120.0])
def test_any_rate_is_resampled_to_the_same_motion(tmp_path, fps):
    clip = moving_clip("c000", int(3 * fps), fps=fps)
    make_dataset(tmp_path / "out", 1, {"c000": vars(clip)})
    clips = table(tmp_path / "out")
    assert clips.qc_flags[0] & QcFlag.RESAMPLED and clips.rot_sources == ("body_model",)
    reference = motions_of_joints([torch.from_numpy(moving_clip("c000", 60).joints_TJ3)])[0].joint_TD
    n = min(len(reference), int(clips.lengths[0]))
    assert n >= 57
    np.testing.assert_allclose(clips.frames(0, J)[:n], reference[:n], atol=0.02)


def test_resampling_keeps_samples_that_coincide():
    clip = moving_clip("c", 31, fps=30.0)
    joints, rotations = (torch.from_numpy(x).double() for x in (clip.joints_TJ3, clip.rotations_TJ33))
    new_joints, new_rotations = resample(joints, rotations, 1 / 0.0333333, 20.0)
    assert len(new_joints) == 21
    torch.testing.assert_close(new_joints[::2], joints[::3], atol=1e-5, rtol=0)
    torch.testing.assert_close(new_rotations[::2], rotations[::3], atol=1e-5, rtol=0)


def test_turn_between_finds_the_angle():
    joints = torch.from_numpy(moving_clip("c").joints_TJ3).double()
    for angle in (-3.0, 0.0, 1.2, 3.14159):
        turn = yaw_matrix(torch.tensor(angle, dtype=torch.float64))
        torch.testing.assert_close(turn_between(joints, joints @ turn.T + 1.0), turn)


def test_caption_batches_depend_on_the_set_alone():
    captions = [f"caption {i}" for i in range(300)]
    batches = caption_batches(captions)
    assert batches == caption_batches(captions[::-1] + captions[:7])
    assert batches[0][0] == "" and max(map(len, batches)) == BATCH
    assert sum(map(len, batches)) == 301


def test_text_cache_is_used_and_changes_nothing(tmp_path):
    make_dataset(tmp_path / "plain", 10)
    make_dataset(tmp_path / "a", 6, text_cache=str(tmp_path / "cache"))
    make_dataset(tmp_path / "b", 10, text_cache=str(tmp_path / "cache"))
    assert tree_bytes(tmp_path / "b") == tree_bytes(tmp_path / "plain")
    cached = next((tmp_path / "cache").iterdir())
    assert len(TextTable.open(Dataset.open(tmp_path / "b"))) > 1
    cached.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="text cache"):
        make_dataset(tmp_path / "c", 6, text_cache=str(tmp_path / "cache"))


def test_limit_reads_the_first_ids(tmp_path):
    assert make_dataset(tmp_path / "out", 20, limit=5).read == 5


def test_progress_is_told(tmp_path):
    seen = []
    prepare(config(tmp_path / "out"), progress=lambda *a: seen.append(a), source=MovingSource(70))
    assert [s for s in seen if s[0] == "clips"] == [("clips", 64, 70), ("clips", 70, 70)]
    assert [s[0] for s in seen][-1] == "captions"


def test_workers_without_ray_are_refused(tmp_path):
    with pytest.raises(ClusterError, match="workers to 0"):
        make_dataset(tmp_path / "out", 5, workers=2)
    assert not (tmp_path / "out").exists()


def test_missing_text_encoder_costs_no_work(tmp_path):
    with pytest.raises(ConfigError, match="text encoder"):
        make_dataset(tmp_path / "out", 5, text_encoder="no-such-encoder")
    assert not (tmp_path / "out").exists()


def test_manifest_holds_no_place_and_no_worker_count(tmp_path):
    make_dataset(tmp_path / "out", 5)
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert str(tmp_path) not in text and "workers" not in text
