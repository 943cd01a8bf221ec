"""Pairs: graded damage against milder damage, generated against captured, both through one conversion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.pairs import DAMAGE, build_authenticity_pairs, build_preference_pairs
from data_prep.pipeline import prepare
from motionrft.config.prepare import PrepareConfig
from motionrft.core.errors import DataError
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.data.pairs import PairTable
from motionrft.data.tables import ClipTable


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipTable:
    out = tmp_path_factory.mktemp("pairs") / "data"
    prepare(PrepareConfig(out=str(out), num_clips=24, max_frames=80, text_encoder="stub"))
    return ClipTable.open(Dataset.open(out), "train")


def test_damage_grows_with_its_grade_and_grade_zero_is_none(clips: ClipTable) -> None:
    joints = clips.frames(0, Representation.JOINT).astype(np.float64).reshape(-1, 22, 3)
    for name, damage in DAMAGE.items():
        far = [np.abs(damage(joints, float(g), np.random.default_rng(1)) - joints).mean() for g in (1, 2, 3)]
        if far[2] > 1e-9:  # a standing clip has no path to stretch
            assert far[0] < far[1] < far[2], name
        assert damage(joints, 2.0, np.random.default_rng(1)).shape == joints.shape


def test_preference_pairs_have_one_length_and_the_same_bytes_each_time(clips: ClipTable, tmp_path: Path) -> None:
    count = build_preference_pairs(clips, tmp_path, "train", seed=3, per_clip=2, max_clips=6)
    first = (tmp_path / "preference_train.parquet").read_bytes()
    build_preference_pairs(clips, tmp_path, "train", seed=3, per_clip=2, max_clips=6)
    assert count == 12 and (tmp_path / "preference_train.parquet").read_bytes() == first
    table = PairTable.open(tmp_path, "preference", "train")
    inputs = table.inputs([0, 1, 5], list(Representation), "cpu")
    for r in Representation:
        assert inputs["preferred"][r.value].shape == inputs["rejected"][r.value].shape
        assert not torch.equal(inputs["preferred"][r.value], inputs["rejected"][r.value])
    assert torch.equal(inputs["preferred_lengths_B"], inputs["rejected_lengths_B"])


def test_authenticity_pairs_are_balanced_and_leak_no_length(clips: ClipTable, tmp_path: Path) -> None:
    rows = [0, 2, 4]
    made = [clips.frames(r, Representation.KINEMATIC)[::-1].copy() for r in rows]
    lengths = [len(m) for m in made]
    padded = [np.pad(m, ((0, 90 - len(m)), (0, 0))) for m in made]
    build_authenticity_pairs(clips, rows, padded, lengths, Representation.KINEMATIC, tmp_path, "val", seed=0)
    inputs = PairTable.open(tmp_path, "authenticity", "val").inputs(range(3), [Representation.JOINT], "cpu")
    assert inputs["labels_B"].tolist() == [0, 0, 0, 1, 1, 1]
    assert inputs["lengths_B"].tolist() == [n - 1 for n in lengths] * 2
    # contacts of both members are recomputed: exactly 0 or 1 in either
    kinematic = PairTable.open(tmp_path, "authenticity", "val").inputs(range(3), [Representation.KINEMATIC], "cpu")
    contacts = kinematic["motions"]["kinematic"][..., 259:]
    assert set(contacts.unique().tolist()) <= {0.0, 1.0}


def test_missing_tables_and_missing_motions_explain(clips: ClipTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        PairTable.open(tmp_path, "preference", "val")
    with pytest.raises(DataError, match="generated motions"):
        build_authenticity_pairs(clips, [], [], [], Representation.KINEMATIC, tmp_path, "val", seed=0)
