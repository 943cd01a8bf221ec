"""A dataset folder opens only when it is whole, and hands out exactly what was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from motionrft.core.errors import DataError, RepresentationError
from motionrft.core.types import Representation
from motionrft.data.manifest import MANIFEST, UNFINISHED, Dataset
from motionrft.data.normalizers import load_normalizer, load_normalizers
from motionrft.data.schema import CLIP_SCHEMA
from motionrft.data.tables import ClipTable, ListColumn, TextTable
from motionrft.representations.convert import to_joints
from tests.prepare_fixtures import make_dataset

K, J, R = Representation


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dataset") / "moving"
    make_dataset(root, 20)
    return root


@pytest.fixture
def root(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def test_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match="no such path"):
        Dataset.open(tmp_path / "nowhere")


def test_file_is_no_dataset(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(DataError, match="a file"):
        Dataset.open(tmp_path / "x")


def test_folder_without_manifest_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match="no dataset"):
        Dataset.open(tmp_path)


def test_interrupted_preparation_says_so(root):
    (root / MANIFEST).unlink()
    (root / UNFINISHED).touch()
    with pytest.raises(DataError, match=r"interrupted preparation.*again"):
        Dataset.open(root)


@pytest.mark.parametrize(("schema", "hint"), [(99, "Update motionrft"), (0, "Prepare the dataset again")])
def test_other_schema_is_refused(root, schema, hint):
    data = json.loads((root / MANIFEST).read_text())
    (root / MANIFEST).write_text(json.dumps({**data, "schema": schema}))
    with pytest.raises(DataError, match=hint):
        Dataset.open(root)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"schema": 1, "splits": 3, "classes": [], "files": {}}'])
def test_damaged_manifest_is_refused(root, text):
    (root / MANIFEST).write_text(text)
    with pytest.raises(DataError, match="manifest"):
        Dataset.open(root)


def test_missing_file_is_named(root):
    (root / "stats" / "joint.npz").unlink()
    with pytest.raises(DataError, match=r"no such file .*joint\.npz"):
        Dataset.open(root)


def test_changed_bytes_are_found_by_hash(root):
    path = Dataset.open(root).clip_files("train")[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="sha256"):
        Dataset.open(root, verify=True)


def test_rows_carry_checksums(root):
    path = Dataset.open(root).clip_files("val")[0]
    table = pq.read_table(path, schema=CLIP_SCHEMA)
    column = table["crc_joint"].to_numpy().copy()
    column[1] ^= 1
    table = table.set_column(CLIP_SCHEMA.get_field_index("crc_joint"), "crc_joint", pa.array(column, pa.uint32()))
    with pytest.raises(DataError, match=r"item 'c008', column 'joint'"):
        ClipTable.from_arrow(table)
    assert len(ClipTable.from_arrow(table, [K, R])) == 4


def test_unknown_and_empty_split(root, tmp_path):
    with pytest.raises(DataError, match="train, val, test"):
        Dataset.open(root).clip_files("dev")
    make_dataset(tmp_path / "few", 3)
    with pytest.raises(DataError, match=r"none .*'val': 0"):
        ClipTable.open(Dataset.open(tmp_path / "few"), "val")


def test_exchanged_statistics_are_found_on_opening(root):
    shutil.copy(root / "stats" / "joint.npz", root / "stats" / "kinematic.npz")
    with pytest.raises(DataError, match=r"kinematic\.npz"):
        Dataset.open(root)


def test_statistics_of_another_representation_are_refused(root):
    dataset = Dataset.open(root)
    shutil.copy(root / "stats" / "joint.npz", root / "stats" / "kinematic.npz")
    with pytest.raises(RepresentationError, match="'joint'"):
        load_normalizer(dataset, K)


def test_statistics_of_another_dataset_are_refused(root, tmp_path):
    dataset = Dataset.open(root)
    make_dataset(tmp_path / "other", 10)
    shutil.copy(tmp_path / "other" / "stats" / "joint.npz", root / "stats" / "joint.npz")
    with pytest.raises(RepresentationError, match="own statistics"):
        load_normalizer(dataset, J)


def test_normalisers_are_those_of_the_training_rows(pristine):
    dataset = Dataset.open(pristine)
    clips, normalizers = ClipTable.open(dataset, "train"), load_normalizers(dataset)
    for r in Representation:
        rows = torch.cat([clips.motion(i, r) for i in range(len(clips))]).double()
        torch.testing.assert_close(normalizers[r].mean.double(), rows.mean(0), atol=1e-6, rtol=1e-6)
        std = rows.std(0, correction=0)
        free = [d for d in range(r.dim) if d not in normalizers[r].provenance["floored"]]
        torch.testing.assert_close(normalizers[r].std.double()[free], std[free], atol=1e-6, rtol=1e-5)


def test_representations_describe_the_same_frames(pristine):
    clips = ClipTable.open(Dataset.open(pristine), "train")
    for row in range(len(clips)):
        joints = to_joints(clips.motion(row, J), J)
        torch.testing.assert_close(to_joints(clips.motion(row, K), K), joints, atol=2e-6, rtol=0)
        torch.testing.assert_close(to_joints(clips.motion(row, R), R), joints, atol=2e-6, rtol=0)
        assert len(joints) == clips.lengths[row]
    assert set(clips.rot_sources) == {"body_model"}


def test_class_ids_are_consistent_over_splits(pristine):
    dataset = Dataset.open(pristine)
    for split in ("train", "val", "test"):
        clips = ClipTable.open(dataset, split)
        assert [dataset.manifest.classes[i] for i in clips.class_ids.tolist()] == list(clips.class_names)


def test_table_reads_only_asked_representations(pristine):
    dataset = Dataset.open(pristine)
    clips = ClipTable.open(dataset, "val", [J])
    assert clips.frames(0, J).shape == (int(clips.lengths[0]), 66)
    with pytest.raises(KeyError):
        clips.frames(0, K)
    assert "kinematic" not in ClipTable.columns([J]) and "crc_rotation" not in ClipTable.columns([J])


def test_frames_are_views_and_motions_are_copies(pristine):
    clips = ClipTable.open(Dataset.open(pristine), "val")
    assert not clips.frames(0, K).flags.writeable and not clips.frames(0, K).flags.owndata
    before = clips.frames(0, K).copy()
    clips.motion(0, K).zero_()
    np.testing.assert_array_equal(clips.frames(0, K), before)


def test_blocks_in_any_cut_make_the_same_table(pristine):
    table = pq.read_table(Dataset.open(pristine).clip_files("train")[0], schema=CLIP_SCHEMA)
    whole = ClipTable.from_arrow(table)
    cut = ClipTable.from_arrow([table.slice(0, 5), table.slice(5, 0), table.slice(5, 1), table.slice(6)])
    assert cut.item_ids == whole.item_ids and cut.captions == whole.captions
    for row in range(len(whole)):
        np.testing.assert_array_equal(cut.frames(row, R), whole.frames(row, R))


def test_missing_column_is_named(pristine):
    table = pq.read_table(Dataset.open(pristine).clip_files("train")[0], schema=CLIP_SCHEMA)
    with pytest.raises(DataError, match="crc_joint"):
        ClipTable.from_arrow(table.drop_columns(["crc_joint"]))
    with pytest.raises(DataError, match="unique"):
        ClipTable.from_arrow([table, table])
    with pytest.raises(DataError, match="at least one table"):
        ClipTable.from_arrow([])


def test_null_motion_is_refused():
    with pytest.raises(DataError, match="nulls"):
        ListColumn(pa.chunked_array([pa.array([[1.0], None], pa.list_(pa.float32()))]))


def test_row_filter(pristine):
    clips = ClipTable.open(Dataset.open(pristine), "train")
    kept = clips.rows(min_frames=32, max_frames=36, with_captions=True)
    assert kept == [i for i, n in enumerate(clips.lengths.tolist()) if 32 <= n <= 36] and kept


def test_text_table_gives_the_encoder_features(pristine):
    from motionrft.nn.text import StubEncoder

    dataset = Dataset.open(pristine)
    text, captions = TextTable.open(dataset), ["someone moves left slowly", "", "a person sways to the right"]
    got, expected = text.condition(captions), StubEncoder().encode(captions)
    assert text.fingerprint == StubEncoder().fingerprint and text.dim == StubEncoder().dim and "" in text
    torch.testing.assert_close(got.tokens_BLD, expected.tokens_BLD, atol=2e-3, rtol=1e-3)  # stored as float16
    assert torch.equal(got.mask_BL, expected.mask_BL)
    assert torch.equal(got.pooled_BD, expected.pooled_BD)


def test_unknown_caption_is_an_error(pristine):
    with pytest.raises(DataError, match="a fish swims"):
        TextTable.open(Dataset.open(pristine)).condition(["a fish swims"])
