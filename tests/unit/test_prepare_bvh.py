"""BVH: strict parsing, mapping to SMPL joints and rotations, archives, captions from file names."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.pipeline import prepare
from data_prep.sources import build_source
from data_prep.sources.base import Rejected
from data_prep.sources.bvh import BvhMapping, BvhSource, load_mapping
from data_prep.sources.bvh_format import parse_bvh
from motionrft.core.errors import DataError
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.data.schema import QcFlag
from motionrft.data.tables import ClipTable
from motionrft.representations.convert import to_joints
from motionrft.representations.skeleton import T2M
from tests.paths import shared_path
from tests.prepare_fixtures import config, moving_clip

_ARM = """HIERARCHY
ROOT Hips
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Arm
  {
    OFFSET 0 2 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site
    {
      OFFSET 0 1 0
    }
  }
}
MOTION
Frames: 2
Frame Time: 0.05
1 2 3 90 0 0 0 0 0
0 0 0 0 90 0 0 0 90
"""


def body_bvh(frames: int = 60, fps: float = 30.0, seed: str = "body", frame_count: int | None = None) -> str:
    """Return a moving standard body as BVH in centimetres, joints named as in SMPL."""
    clip = moving_clip(seed, frames, fps=fps)
    offsets = 100 * T2M.standard_offsets().numpy()
    lines = ["HIERARCHY"]

    def write(joint: int, depth: int) -> None:
        pad = "  " * depth
        lines.append(f"{pad}{'ROOT' if joint == 0 else 'JOINT'} {T2M.joint_names[joint]}")
        lines.append(f"{pad}{{")
        lines.append(f"{pad}  OFFSET {' '.join(f'{v:.6f}' for v in offsets[joint])}")
        place = "Xposition Yposition Zposition " if joint == 0 else ""
        lines.append(f"{pad}  CHANNELS {6 if joint == 0 else 3} {place}Zrotation Xrotation Yrotation")
        for child in T2M.children[joint]:
            order.append(child)
            write(child, depth + 1)
        if not T2M.children[joint]:
            lines.extend([f"{pad}  End Site", f"{pad}  {{", f"{pad}    OFFSET 0 0 0", f"{pad}  }}"])
        lines.append(f"{pad}}}")

    order = [0]
    write(0, 0)
    r = clip.rotations_TJ33.astype(np.float64)
    # R = Rz Rx Ry
    x = np.arcsin(np.clip(r[..., 2, 1], -1, 1))
    z, y = np.arctan2(-r[..., 0, 1], r[..., 1, 1]), np.arctan2(-r[..., 2, 0], r[..., 2, 2])
    angles = np.degrees(np.stack([z, x, y], axis=-1))
    lines += ["MOTION", f"Frames: {frames if frame_count is None else frame_count}", f"Frame Time: {1 / fps:.7f}"]
    for t in range(frames):
        values = [*(100 * clip.joints_TJ3[t, 0]), *angles[t, order].reshape(-1)]
        lines.append(" ".join(f"{v:.6f}" for v in values))
    return "\n".join(lines) + "\n"


def identity_mapping(**changes) -> BvhMapping:
    return BvhMapping(
        **{
            "name": "plain",
            "unit_m": 0.01,
            "joints": {n: n for n in T2M.joint_names},
            "rotations": {n: [n, "+x", "+y", "+z"] for n in T2M.joint_names},
            "file_name": r"(?P<content>[a-z]+)_(?P<style>[a-z]+)_\d+",
            "contents": {"walk": ["walk|forward", "walks"]},
            "styles": {"normal": ["normal", ""], "sad": ["sad", "sadly"]},
            "captions": ("a person {content} {style}.",),
            **changes,
        }
    )


def test_forward_kinematics_follows_channel_order():
    clip = parse_bvh(_ARM.encode())
    assert clip.names == ("Hips", "Arm") and clip.parents == (-1, 0) and clip.fps == 20.0
    np.testing.assert_allclose(clip.positions_TN3[0], [[1, 2, 3], [-1, 2, 3]], atol=1e-12)  # +Y turned by 90 about Z
    np.testing.assert_allclose(clip.positions_TN3[1], [[0, 0, 0], [0, 0, 2]], atol=1e-12)
    np.testing.assert_allclose(clip.rotations_TN33[1, 1] @ [1, 0, 0], [0, 1, 0], atol=1e-12)


BROKEN = {
    "empty": ("", "not a BVH"),
    "header only": (_ARM.split("MOTION")[0], "not a BVH"),
    "open brace": (_ARM.replace("}\nMOTION", "\nMOTION"), "not closed"),
    "lost frame": (_ARM.rsplit("\n", 2)[0], "truncated"),
    "cut in a line": (_ARM[:-6], "truncated"),
    "cut in a number": (_ARM[:-3].rstrip() + " -", "no number"),
    "frame count": (_ARM.replace("Frames: 2", "Frames: 7"), "truncated"),
    "no frame count": (_ARM.replace("Frames: 2", "Frames: many"), "MOTION header"),
    "unknown channel": (_ARM.replace("Xrotation Yrotation\n  JOINT", "Wrotation Yrotation\n  JOINT"), "channels"),
    "bad offset": (_ARM.replace("OFFSET 0 2 0", "OFFSET 0 two 0"), "hierarchy"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_says_what_is_wrong(name):
    text, message = BROKEN[name]
    with pytest.raises(DataError, match=message):
        parse_bvh(text.encode())


def test_zero_frame_time_is_an_unknown_rate(tmp_path):
    (tmp_path / "a.bvh").write_text(body_bvh().replace("Frame Time: 0.0333333", "Frame Time: 0"))
    clip = BvhSource(str(tmp_path), identity_mapping()).read("a")
    assert np.isnan(clip.fps)


def test_body_comes_back_with_its_rotations(tmp_path):
    (tmp_path / "walk_sad_1.bvh").write_text(body_bvh())
    clip, original = BvhSource(str(tmp_path), identity_mapping()).read("walk_sad_1"), moving_clip("body", 60, fps=30.0)
    assert clip.fps == pytest.approx(30.0, rel=1e-5) and clip.rot_source == "bvh"
    assert clip.captions == ("a person walks sadly.",) and clip.class_name == "walk|forward|sad"
    np.testing.assert_allclose(clip.joints_TJ3, original.joints_TJ3, atol=1e-5)
    np.testing.assert_allclose(clip.rotations_TJ33, original.rotations_TJ33, atol=1e-5)


def test_z_up_files_are_turned(tmp_path):
    (tmp_path / "a.bvh").write_text(body_bvh())
    plain = BvhSource(str(tmp_path), identity_mapping()).read("a").joints_TJ3
    turned = BvhSource(str(tmp_path), identity_mapping(up="z", rotations={})).read("a")
    np.testing.assert_allclose(turned.joints_TJ3[..., 1], plain[..., 2], atol=1e-6)
    assert turned.rotations_TJ33 is None and turned.rot_source == ""


def test_folder_and_archives_prepare_alike(tmp_path):
    folder = tmp_path / "folder" / "set"
    folder.mkdir(parents=True)
    for i in range(6):
        (folder / f"walk_normal_{i}.bvh").write_text(body_bvh(60, seed=f"b{i}"))
    (folder / "walk_normal_6.bvh").write_text(body_bvh(60)[:-500])
    (folder / "readme.txt").write_text("not a clip")
    with tarfile.open(tmp_path / "set.tar.xz", "w:xz") as archive:
        archive.add(folder, "set")
    options = {"source": "bvh", "mapping": str(tmp_path / "map.yaml"), "val_frac": 0.0, "test_frac": 0.0}
    mapping = identity_mapping()
    tables = []
    for name, path in (("a", tmp_path / "folder"), ("b", tmp_path / "set.tar.xz")):
        source = BvhSource(str(path), mapping, 0.0, 0.0)
        report = prepare(config(tmp_path / name, path=str(path), **options), source=source)
        assert report.clips["train"] == 6 and report.rejected == {"TRUNCATED": 1}
        tables.append(ClipTable.open(Dataset.open(tmp_path / name), "train"))
    assert tables[0].item_ids == tables[1].item_ids
    assert tables[0].item_ids[0] == "set/walk_normal_0" and set(tables[0].rot_sources) == {"bvh"}
    np.testing.assert_array_equal(tables[0].frames(3, Representation.ROTATION), tables[1].frames(3, "rotation"))


def test_split_is_a_hash_of_the_file_or_named_by_the_mapping(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.bvh").write_text(_ARM + " " * i)
    source = BvhSource(str(tmp_path), identity_mapping(), 0.25, 0.25)
    splits = [source.read(i).split for i in source.ids()]
    assert min(splits.count(s) for s in ("train", "val", "test")) >= 3 and splits.count("train") > 12
    assert splits == [BvhSource(str(tmp_path), identity_mapping(), 0.25, 0.25).read(i).split for i in source.ids()]
    named = BvhSource(str(tmp_path), identity_mapping(splits={"test": "^3"}), 0.0, 0.0)
    assert {i: named.read(i).split for i in ("3", "31", "5")} == {"3": "test", "31": "test", "5": "train"}


def test_joint_missing_in_the_file_is_a_reject_row(tmp_path):
    (tmp_path / "a.bvh").write_text(_ARM)
    result = BvhSource(str(tmp_path), identity_mapping()).read("a")
    assert isinstance(result, Rejected) and result.reason_code == "BAD_BVH" and "no joint 'pelvis'" in result.detail


def test_path_errors_are_named(tmp_path):
    with pytest.raises(DataError, match="no such path"):
        build_source(config(tmp_path / "o", source="bvh", path=str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"\*\.bvh files"):
        BvhSource(str(tmp_path), identity_mapping()).ids()
    (tmp_path / "x.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match="tar archive"):
        BvhSource(str(tmp_path / "x.tar"), identity_mapping()).ids()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joints": {"pelvis": "Hips"}}, "22 SMPL joints"),
        ({"up": "x"}, "up must be"),
        ({"unit_m": 0.0}, "unit_m"),
        ({"rotations": {n: [n, "+x", "+y", "-z"] for n in T2M.joint_names}}, "right-handed"),
        ({"rotations": {n: [n, "+x", "+y"] for n in T2M.joint_names}}, "must be"),
        ({"splits": {"dev": "x"}}, "splits"),
        ({"styles": {"normal": ""}}, "styles.normal must be"),
        ({"contents": {"walk": ["walk"]}}, "contents.walk must be"),
    ],
)
def test_bad_mapping_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        identity_mapping(**changes)


def test_mapping_files_are_checked(tmp_path):
    assert load_mapping().name == "bandai_namco"
    with pytest.raises(DataError, match="No such file"):
        load_mapping(str(tmp_path / "none.yaml"))
    for text, message in (("a: [", "YAML"), ("nmae: x", "nmae"), ("- 1", "no map"), ("name: x", "missing")):
        (tmp_path / "m.yaml").write_text(text)
        with pytest.raises(DataError, match=message):
            load_mapping(str(tmp_path / "m.yaml"))


def test_bundled_mapping_describes_file_names():
    mapping = load_mapping()
    captions, class_name = mapping.describe("dataset-1_walk-back_not-confident_001")
    assert len(captions) == 8 and captions[0] == "a person walks backwards without confidence."
    assert "someone takes steps backwards in an unsure way." in captions
    assert mapping.describe("dataset-1_walk_elderly_001")[1] == mapping.describe("dataset-2_walk_old_001")[1]
    assert class_name == "walk|backward|not-confident"
    assert mapping.describe("dataset-2_wave-left-hand_normal_012")[0][0] == "a person waves the left hand."
    assert mapping.describe("something_else") == ((), "")


def test_real_clips_equal_the_reference_conversion(tmp_path):
    archive = shared_path("data/bandai_namco/dataset-1.tar.xz")
    reference = shared_path("data/humanml3d_format")
    folder = tmp_path / "bvh"
    wanted = ("bow_active", "walk-back_angry", "run_happy")
    with tarfile.open(archive) as tar:
        for member in tar:
            if any(w in member.name for w in wanted):
                (folder / Path(member.name).name).parent.mkdir(exist_ok=True)
                (folder / Path(member.name).name).write_bytes(tar.extractfile(member).read())
    options = {"source": "bvh", "path": str(folder), "val_frac": 0.0, "test_frac": 0.0, "max_frames": 400}
    prepare(config(tmp_path / "out", **options))
    clips = ClipTable.open(Dataset.open(tmp_path / "out"), "train")
    assert len(clips) == 3 and set(clips.rot_sources) == {"bvh"}
    released = [np.load(p) for p in sorted((reference / "new_joint_vecs").glob("*.npy"))]
    for row in range(3):
        assert clips.qc_flags[row] & QcFlag.RESAMPLED and clips.captions[row]
        mine = clips.frames(row, Representation.KINEMATIC)
        same = [x for x in released if len(x) == len(mine) and np.abs(x[:, :67] - mine[:, :67]).max() < 1e-4]
        assert len(same) == 1, clips.item_ids[row]
        joints = {r: to_joints(clips.motion(row, r), r) for r in Representation}
        distance = (joints[Representation.ROTATION] - joints[Representation.JOINT]).norm(dim=-1)
        assert float(distance.mean()) < 0.05  # hips of the two bodies sit differently; directions are exact
        parents = list(T2M.parents[1:])
        bones = [
            torch.nn.functional.normalize(joints[r][:, 1:] - joints[r][:, parents], dim=-1)
            for r in (Representation.ROTATION, Representation.JOINT)
        ]
        single = [j - 1 for j in range(1, 22) if len(T2M.children[T2M.parents[j]]) == 1]
        # 2.5 degrees: between two recorded frames, positions are interpolated linearly and rotations spherically
        assert float((bones[0] * bones[1]).sum(-1)[:, single].min()) > 0.999
