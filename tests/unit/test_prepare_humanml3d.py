"""The HumanML3D directory format: released features are kept, parts become items, odd lines become quality rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_prep.pipeline import prepare
from data_prep.represent import motions_of_joints
from data_prep.sources import build_source
from data_prep.sources.base import Rejected
from data_prep.sources.humanml3d import HumanML3DSource, parse_caption_line
from motionrft.core.errors import DataError
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.data.tables import ClipTable
from motionrft.representations.convert import to_joints
from motionrft.representations.kinematics import facing_yaw
from tests.paths import shared_path
from tests.prepare_fixtures import config, moving_clip

K, J, R = Representation
_WHOLE = "a person sways.#a/DET person/NOUN sway/VERB#0.0#0.0\n"


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "hml"
    for name in ("new_joint_vecs", "new_joints", "texts"):
        (folder / name).mkdir(parents=True)
    ids = [f"{i:06d}" for i in range(6)]
    for clip_id in ids:
        motions = motions_of_joints([torch.from_numpy(moving_clip(clip_id, 101).joints_TJ3)])[0]
        np.save(folder / "new_joint_vecs" / f"{clip_id}.npy", motions.kinematic_TD.numpy())
        np.save(folder / "new_joints" / f"{clip_id}.npy", motions.joint_TD.numpy().reshape(-1, 22, 3))
        (folder / "texts" / f"{clip_id}.txt").write_text(_WHOLE)
    for split, part in (("train", ids[:4]), ("val", ids[4:5]), ("test", ids[5:])):
        (folder / f"{split}.txt").write_text("\n".join(part) + "\n")
    return folder


def problems(root: Path) -> dict[str, str]:
    return {p.clip_id: p.reason_code for p in HumanML3DSource(str(root)).known_problems()}


def run(root: Path, **options):
    report = prepare(config(root.parent / "out", source="humanml3d", path=str(root), **options))
    return report, Dataset.open(report.root)


def test_released_features_and_joints_are_kept_bit_for_bit(root):
    report, dataset = run(root)
    assert report.clips == {"train": 4, "val": 1, "test": 1}
    clips = ClipTable.open(dataset, "train")
    for row, clip_id in enumerate(clips.item_ids):
        np.testing.assert_array_equal(clips.frames(row, K), np.load(root / "new_joint_vecs" / f"{clip_id}.npy"))
        joints = np.load(root / "new_joints" / f"{clip_id}.npy")
        np.testing.assert_array_equal(clips.frames(row, J), joints.reshape(len(joints), -1))
    assert set(clips.rot_sources) == {"ik"}


def test_part_of_a_clip_becomes_an_item(root):
    text = _WHOLE + "then#waves#then/ADV#1.0#3.0\nto the end#x/X#2.5#99\n"
    (root / "texts" / "000001.txt").write_text(text)
    _, dataset = run(root)
    clips = ClipTable.open(dataset, "train")
    part, whole = clips.item_ids.index("000001#1"), clips.item_ids.index("000001")
    assert clips.captions[part] == ("then#waves",) and clips.captions[whole] == ("a person sways.",)
    assert clips.clip_ids[part] == clips.clip_ids[whole] == "000001"
    np.testing.assert_array_equal(clips.frames(part, K), clips.frames(whole, K)[20:60])
    joints = to_joints(clips.motion(part, J), J)
    assert joints[0, 0, [0, 2]].abs().max() < 1e-6 and abs(float(facing_yaw(joints[0]))) < 1e-5
    torch.testing.assert_close(to_joints(clips.motion(part, R), R), joints, atol=1e-5, rtol=0)
    assert int(clips.lengths[clips.item_ids.index("000001#2")]) == 50


@pytest.mark.parametrize(
    "line",
    ["no separators", "only#two", "#x/X#0.0#0.0", "  #x/X#0.0#0.0", "a#x/X#0.0#soon", "a#x/X#3.0#2.0", "a#x#-1#2"],
)
def test_malformed_caption_line_is_a_quality_row(root, line):
    with pytest.raises(ValueError):
        parse_caption_line(line)
    (root / "texts" / "000002.txt").write_text(line + "\n\n" + _WHOLE)
    assert problems(root) == {"000002#0": "BAD_CAPTION_LINE"}
    _, dataset = run(root)
    rows = pq.read_table(dataset.root / "quality.parquet").to_pylist()
    assert [(r["clip_id"], r["severity"]) for r in rows] == [("000002#0", "source")]
    clips = ClipTable.open(dataset, "train")
    assert clips.captions[clips.item_ids.index("000002")] == ("a person sways.",)


def test_caption_lines_parse():
    assert parse_caption_line("a # b#x/X#nan#nan").whole
    assert parse_caption_line("a # b#x/X#nan#nan").caption == "a # b"
    assert parse_caption_line("a#x/X#0.5#2").end_s == 2.0


def test_missing_and_empty_texts_are_kept_without_captions(root):
    (root / "texts" / "000000.txt").unlink()
    (root / "texts" / "000001.txt").write_text("")
    (root / "texts" / "000002.txt").write_bytes(b"caf\xe9 walk#x/X#0.0#0.0")
    assert problems(root) == {"000000": "MISSING_TEXT", "000002#0": "NOT_UTF8"}
    report, dataset = run(root)
    assert report.flagged == {"NO_CAPTION": 2}
    clips = ClipTable.open(dataset, "train")
    assert clips.captions[0] == clips.captions[1] == () and len(clips.rows(with_captions=True)) == 2


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_missing_split_list_is_an_error(root, split):
    (root / f"{split}.txt").unlink()
    with pytest.raises(DataError, match=rf"{split}\.txt.*never made up"):
        HumanML3DSource(str(root))


def test_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        build_source(config(tmp_path / "o", source="humanml3d", path=str(tmp_path / "none")))


def test_missing_files_count_as_unusable(root):
    for clip_id in ("000000", "000001"):
        (root / "new_joint_vecs" / f"{clip_id}.npy").unlink()
    assert problems(root) == {"000000": "MISSING_FILE", "000001": "MISSING_FILE"}
    report, _ = run(root)
    assert report.read == 4
    with pytest.raises(DataError, match=r"33\.3% of 6"):
        run(root, max_reject_frac=0.3, overwrite=True)


def test_id_in_two_lists_stays_out_of_training(root):
    (root / "train.txt").write_text("000000\n000001\n000005\n")
    assert problems(root) == {"000005": "DUPLICATE_ID"}
    assert HumanML3DSource(str(root)).read("000005").split == "test"


def test_absent_joints_are_recovered_from_features(root):
    kept = np.load(root / "new_joints" / "000000.npy")
    (root / "new_joints" / "000000.npy").unlink()
    clip = HumanML3DSource(str(root)).read("000000")
    np.testing.assert_allclose(clip.joints_TJ3, kept, atol=2e-6)


@pytest.mark.parametrize(
    ("array", "code", "word"),
    [
        (np.zeros((50, 251), np.float32), "WRONG_SHAPE", "KIT"),
        (np.zeros((50, 66), np.float32), "WRONG_SHAPE", "joint positions"),
        (np.zeros(263, np.float32), "WRONG_SHAPE", "expected"),
        (np.zeros((50, 263), np.float32), "WRONG_SHAPE", "rows"),
        (np.array([{}], dtype=object), "UNREADABLE", "allow_pickle"),
    ],
)
def test_wrong_arrays_are_rejected(root, array, code, word):
    np.save(root / "new_joint_vecs" / "000000.npy", array)
    result = HumanML3DSource(str(root)).read("000000")
    assert isinstance(result, Rejected) and result.reason_code == code and word in result.detail


def test_git_lfs_pointer_is_named(root):
    (root / "new_joint_vecs" / "000000.npy").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    result = HumanML3DSource(str(root)).read("000000")
    assert isinstance(result, Rejected) and "git lfs pull" in result.detail


def test_nan_features_are_rejected_and_lost_time_axes_too(root):
    features = np.load(root / "new_joint_vecs" / "000000.npy")
    features[3, 5] = np.nan
    np.save(root / "new_joint_vecs" / "000000.npy", features)
    np.save(root / "new_joints" / "000001.npy", np.zeros((22, 3), np.float32))
    report, _ = run(root)
    assert report.rejected == {"NONFINITE": 1, "WRONG_SHAPE": 1}


def test_real_directory_is_read_as_released(tmp_path):
    source = shared_path("data/humanml3d_format")
    report = prepare(config(tmp_path / "out", source="humanml3d", path=str(source), max_reject_frac=0.0, limit=20))
    assert report.read == 20 and not report.rejected
    for split in ("train", "val", "test"):
        if not report.clips[split]:
            continue
        clips = ClipTable.open(Dataset.open(tmp_path / "out"), split)
        for row, clip_id in enumerate(clips.item_ids):
            released = np.load(source / "new_joint_vecs" / f"{clip_id}.npy")
            n = int(clips.lengths[row])
            np.testing.assert_array_equal(clips.frames(row, K), released[:n])
            assert n == min(len(released), 196) and clips.captions[row]
            torch.testing.assert_close(
                to_joints(clips.motion(row, K), K), to_joints(clips.motion(row, J), J), atol=2e-6, rtol=0
            )
