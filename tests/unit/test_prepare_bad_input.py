"""Broken input becomes a row of the quality report with its reason; nothing crashes and nothing is silently gone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.pipeline import prepare
from data_prep.sources.base import Rejected
from data_prep.validate import CheckedClip, check
from motionrft.core.errors import ConfigError, DataError
from motionrft.data.manifest import UNFINISHED, Dataset
from motionrft.data.schema import QcFlag
from tests.prepare_fixtures import MovingSource, config, make_dataset, moving_clip

GOOD = moving_clip("c000", 40)


def broken(**changes):
    return replace(GOOD, **changes)


def with_value(value: float, frames) -> np.ndarray:
    joints = GOOD.joints_TJ3.copy()
    joints[frames, 3] = value
    return joints


def zero_bone(frames) -> np.ndarray:
    joints = GOOD.joints_TJ3.copy()
    joints[frames, 4] = joints[frames, 1]
    return joints


UNUSABLE = {
    "NaN frame": ({"joints_TJ3": with_value(np.nan, 3)}, "NONFINITE"),
    "inf frame": ({"joints_TJ3": with_value(np.inf, 3)}, "NONFINITE"),
    "no frames": ({"joints_TJ3": GOOD.joints_TJ3[:0], "rotations_TJ33": None}, "TOO_SHORT"),
    "one frame": ({"joints_TJ3": GOOD.joints_TJ3[:1], "rotations_TJ33": None}, "TOO_SHORT"),
    "21 joints": ({"joints_TJ3": GOOD.joints_TJ3[:, :21]}, "WRONG_SHAPE"),
    "25 joints": ({"joints_TJ3": np.zeros((9, 25, 3), np.float32)}, "WRONG_SHAPE"),
    "lost time axis": ({"joints_TJ3": GOOD.joints_TJ3[0]}, "WRONG_SHAPE"),
    "flat features": ({"joints_TJ3": np.zeros((40, 263), np.float32)}, "WRONG_SHAPE"),
    "no fps": ({"fps": float("nan")}, "UNKNOWN_FPS"),
    "zero fps": ({"fps": 0.0}, "UNKNOWN_FPS"),
    "unknown split": ({"split": "dev"}, "BAD_SPLIT"),
    "zero-length bone": ({"joints_TJ3": zero_bone(0)}, "ZERO_BONE"),
    "centimetres": ({"joints_TJ3": GOOD.joints_TJ3 * 100}, "WRONG_UNIT"),
    "upside down": ({"joints_TJ3": GOOD.joints_TJ3 * np.float32([1, -1, -1])}, "WRONG_UP_AXIS"),
    "rotation count": ({"rotations_TJ33": GOOD.rotations_TJ33[:-1]}, "WRONG_SHAPE"),
    "reflections": ({"rotations_TJ33": -GOOD.rotations_TJ33}, "BAD_ROTATIONS"),
    "NaN rotation": ({"rotations_TJ33": GOOD.rotations_TJ33 * np.nan}, "NONFINITE"),
    "feature rows": ({"kinematic_TD": np.zeros((39, 263), np.float32)}, "WRONG_SHAPE"),
    "NaN features": ({"kinematic_TD": np.full((40, 263), np.nan, np.float32)}, "NONFINITE"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_clip_is_rejected_with_a_reason(name):
    changes, code = UNUSABLE[name]
    result = check(broken(**changes))
    assert isinstance(result, Rejected) and result.reason_code == code and result.detail
    assert result.clip_id == "c000"


FLAGGED = {
    "captions": ({"captions": ("", " ")}, QcFlag.NO_CAPTION),
    "one caption": ({"captions": ("", "walks")}, QcFlag.BAD_CAPTION_DROPPED),
    "slow camera": ({"fps": 5.0}, QcFlag.UNUSUAL_FPS),
    "child": ({"joints_TJ3": GOOD.joints_TJ3 * 0.5}, QcFlag.UNUSUAL_SIZE),
    "teleport": (
        {"joints_TJ3": GOOD.joints_TJ3 + np.float32([1, 0, 0]) * (np.arange(40) > 20)[:, None, None]},
        QcFlag.FAST,
    ),
    "lying": ({"joints_TJ3": GOOD.joints_TJ3[..., [0, 2, 1]] * np.float32([1, 1, -1])}, QcFlag.NEVER_UPRIGHT),
}


@pytest.mark.parametrize("name", FLAGGED)
def test_odd_clip_is_kept_and_flagged(name):
    changes, flag = FLAGGED[name]
    result = check(broken(**changes))
    assert isinstance(result, CheckedClip) and result.flags & flag


def test_good_clip_has_no_flag():
    result = check(GOOD)
    assert isinstance(result, CheckedClip) and result.flags == 0


@pytest.mark.parametrize("joints", [24, 52])
def test_hands_are_dropped(joints):
    padded = np.concatenate([GOOD.joints_TJ3, np.ones((40, joints - 22, 3), np.float32)], axis=1)
    result = check(broken(joints_TJ3=padded))
    assert isinstance(result, CheckedClip)
    np.testing.assert_array_equal(result.clip.joints_TJ3, GOOD.joints_TJ3)


def test_flat_joints_are_reshaped():
    result = check(broken(joints_TJ3=GOOD.joints_TJ3.reshape(40, 66)))
    assert isinstance(result, CheckedClip) and result.clip.joints_TJ3.shape == (40, 22, 3)


def test_short_gaps_are_interpolated_on_request_only():
    gap = broken(joints_TJ3=with_value(np.nan, [10, 11]))
    assert isinstance(check(gap, repair_frames=1), Rejected)
    result = check(gap, repair_frames=2)
    assert isinstance(result, CheckedClip) and result.flags & QcFlag.REPAIRED
    np.testing.assert_allclose(result.clip.joints_TJ3, GOOD.joints_TJ3, atol=0.05)
    assert isinstance(check(broken(joints_TJ3=with_value(np.nan, 0)), repair_frames=3), Rejected)


def test_every_id_is_a_clip_or_a_reject_row(tmp_path):
    changes = {
        "c001": {"joints_TJ3": with_value(np.nan, 3), "rotations_TJ33": None},
        "c002": {"fps": 0.0},
        "c005": {"raise": "disk on fire"},
        "c006": Rejected("c006", "val", "moving", "TRUNCATED", "cut"),
        "c007": {"joints_TJ3": GOOD.joints_TJ3[:10], "rotations_TJ33": None},
        "c010": {"joints_TJ3": zero_bone(7), "rotations_TJ33": None},
        "c011": {"captions": ()},
    }
    report = make_dataset(tmp_path / "out", 15, changes)
    rows = pq.read_table(tmp_path / "out" / "quality.parquet").to_pylist()
    rejected = {r["clip_id"]: r["code"] for r in rows if r["severity"] == "rejected"}
    assert rejected == {
        "c001": "NONFINITE",
        "c002": "UNKNOWN_FPS",
        "c005": "UNREADABLE",
        "c006": "TRUNCATED",
        "c007": "TOO_SHORT",
    }
    assert report.read == 15 and sum(report.clips.values()) == 10
    flagged = {(r["clip_id"], r["code"]) for r in rows if r["severity"] == "flagged"}
    assert flagged == {("c010", "ZERO_BONE"), ("c011", "NO_CAPTION")}
    text = (tmp_path / "out" / "quality.txt").read_text()
    assert "15 clips read: 10 in the dataset, 5 rejected." in text
    assert "UNREADABLE (the reader failed), e.g. c005: RuntimeError: disk on fire" in text
    quality = Dataset.open(tmp_path / "out").manifest.quality
    assert (quality["read"], quality["clips"], quality["rejected"]) == (15, 10, 5)


def test_too_many_unusable_clips_fail_and_leave_the_report(tmp_path):
    changes = {f"c00{i}": {"fps": 0.0} for i in range(3)}
    with pytest.raises(DataError, match=r"at most 10.0% unusable clips; got 30.0% of 10 \(3 UNKNOWN_FPS\)"):
        make_dataset(tmp_path / "out", 10, changes, max_reject_frac=0.1)
    assert "UNKNOWN_FPS" in (tmp_path / "out" / "quality.txt").read_text()
    with pytest.raises(DataError, match="interrupted"):
        Dataset.open(tmp_path / "out")


def test_clips_the_config_leaves_out_do_not_fail_the_preparation(tmp_path):
    report = make_dataset(tmp_path / "out", 20, min_frames=35, max_reject_frac=0.0)
    assert report.rejected["TOO_SHORT"] > 1


def test_empty_training_split_is_an_error(tmp_path):
    changes = {f"c{i:03d}": {"split": "val"} for i in range(5)}
    with pytest.raises(DataError, match="training split"):
        make_dataset(tmp_path / "out", 5, changes)


def test_source_without_clips_is_an_error(tmp_path):
    with pytest.raises(DataError, match="expected clips; got none"):
        prepare(config(tmp_path / "out"), source=MovingSource(0))


def test_target_with_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(DataError, match="other files"):
        make_dataset(tmp_path, 5)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_finished_dataset_is_replaced_on_request_only(tmp_path):
    make_dataset(tmp_path / "out", 5)
    with pytest.raises(DataError, match="overwrite"):
        make_dataset(tmp_path / "out", 10)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert make_dataset(tmp_path / "out", 10, overwrite=True).read == 10
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_interrupted_preparation_starts_over(tmp_path):
    class Stops(MovingSource):
        def read(self, clip_id):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config(tmp_path / "out"), source=Stops(5))
    assert (tmp_path / "out" / UNFINISHED).exists()
    assert make_dataset(tmp_path / "out", 5).read == 5
    assert Dataset.open(tmp_path / "out").manifest.quality["read"] == 5


def test_config_reports_every_problem_at_once():
    with pytest.raises(ConfigError) as error:
        config("x", fps=0.0, min_frames=50, max_frames=40, rotations="guess", workers=-1, val_frac=0.9, test_frac=0.2)
    for word in ("fps", "min_frames", "rotations", "workers", "val_frac"):
        assert word in str(error.value)
    with pytest.raises(ConfigError, match="needs path"):
        config("x", source="bvh")
    with pytest.raises(ConfigError, match="mirror"):
        config("x", source="humanml3d", path="y", mirror=True)
