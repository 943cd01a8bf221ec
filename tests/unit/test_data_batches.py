"""Batches depend on (seed, epoch, item) alone: not on layout, worker count or where a run resumes."""

from __future__ import annotations

import pytest
import torch

from motionrft.core.errors import ConfigError, DataError
from motionrft.core.types import Representation
from motionrft.data.collate import choose_captions, choose_starts, collate, training_batch, window_lengths
from motionrft.data.manifest import Dataset
from motionrft.data.sampler import EpochSampler, eval_batches
from motionrft.data.tables import ClipTable, TextTable
from motionrft.representations.convert import to_joints
from motionrft.representations.kinematics import facing_yaw
from tests.prepare_fixtures import make_dataset

K, J, R = Representation


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> tuple[ClipTable, TextTable]:
    root = tmp_path_factory.mktemp("batches") / "moving"
    make_dataset(root, 30, {"c001": {"captions": ()}})
    dataset = Dataset.open(root)
    return ClipTable.open(dataset, "train"), TextTable.open(dataset)


def test_evaluation_batch_is_the_start_and_the_first_caption(tables):
    clips, text = tables
    batch = collate(clips, text, [4, 0], max_frames=25)
    assert batch.captions == (clips.captions[4][0], clips.captions[0][0])
    assert batch.lengths_B.tolist() == [25, 25] and batch.fps == 20.0
    for r in Representation:
        torch.testing.assert_close(batch.motions[r][1], clips.motion(0, r)[:25], atol=0, rtol=0)


def test_padding_is_zero_and_masked(tables):
    clips, text = tables
    batch = collate(clips, text, [0, 5], pad_to=60)
    assert batch.mask_BT.shape == (2, 60)
    for motion in batch.motions.values():
        assert motion[~batch.mask_BT].abs().max() == 0
    with pytest.raises(ValueError, match="pad_to"):
        collate(clips, text, [0], pad_to=5)
    with pytest.raises(ValueError, match="at least one row"):
        collate(clips, text, [])


def test_clip_without_caption_gets_the_empty_one(tables):
    clips, text = tables
    row = clips.item_ids.index("c001")
    batch = training_batch(clips, text, [row], seed=0, epoch=0, max_frames=20)
    assert batch.captions == ("",)


def test_lengths_become_multiples_of_the_unit():
    lengths = torch.tensor([3, 4, 7, 50, 200])
    assert window_lengths(lengths, 196, 4).tolist() == [3, 4, 4, 48, 196]


def test_windows_and_captions_are_keyed_by_item_not_by_layout(tables):
    clips, text = tables
    rows = list(range(8))
    whole = training_batch(clips, text, rows, seed=1, epoch=3, max_frames=20)
    for part in ([6, 2], [5]):
        small = training_batch(clips, text, part, seed=1, epoch=3, max_frames=20)
        for i, row in enumerate(part):
            assert small.captions[i] == whole.captions[row]
            for r in Representation:
                assert torch.equal(small.motions[r][i], whole.motions[r][row])


def test_draws_change_with_seed_and_epoch_and_cover_everything(tables):
    clips, _ = tables
    starts = {(s, e): tuple(choose_starts(clips, range(10), 20, s, e)) for s in (0, 1) for e in (0, 1)}
    assert len(set(starts.values())) == 4
    row, room = 2, int(clips.lengths[2]) - 20
    assert {choose_starts(clips, [row], 20, 0, e)[0] for e in range(400)} == set(range(room + 1))
    assert {choose_captions(clips, [row], 0, e)[0] for e in range(50)} == {0, 1}


@pytest.mark.parametrize("start", [1, 7])
def test_windows_are_canonical(tables, start):
    clips, text = tables
    batch = collate(clips, text, [0], max_frames=20, crop=[start])
    joints = to_joints(batch.motions[J], J)[0]
    assert joints[0, 0, [0, 2]].abs().max() < 1e-6
    assert facing_yaw(joints[0]).abs() < 1e-5
    torch.testing.assert_close(to_joints(batch.motions[R], R)[0], joints, atol=3e-6, rtol=0)
    original = to_joints(clips.motion(0, J), J)[start : start + 20]
    torch.testing.assert_close(torch.cdist(joints, joints), torch.cdist(original, original), atol=1e-3, rtol=0)
    torch.testing.assert_close(batch.motions[K][0], clips.motion(0, K)[start : start + 20])


def test_window_outside_a_clip_is_an_error(tables):
    clips, text = tables
    with pytest.raises(ValueError, match="leave their clips"):
        collate(clips, text, [0], max_frames=20, crop=[25])


def test_an_epoch_takes_every_row_at_most_once():
    sampler = EpochSampler(23, 5, seed=4)
    rows = [r for step in range(sampler.steps_per_epoch) for r in sampler.batch(step)]
    assert sampler.steps_per_epoch == 4 and len(rows) == len(set(rows)) == 20
    assert sampler.batch(0) != sampler.batch(4) and sampler.epoch(4) == 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_see_the_global_batch(world):
    ranks = [EpochSampler(50, 8, seed=1, rank=r, world=world) for r in range(world)]
    alone = EpochSampler(50, 8, seed=1)
    for step in (0, 5, 6, 33):
        assert [row for s in ranks for row in s.batch(step)] == alone.batch(step)


def test_sampler_resumes_by_step_alone():
    run = EpochSampler(50, 8, seed=1)
    before = [run.batch(step) for step in range(20)]
    assert [EpochSampler(50, 8, seed=1).batch(step) for step in range(11, 20)] == before[11:]
    with pytest.raises(ValueError, match="step"):
        run.batch(-1)


def test_sampler_refuses_what_cannot_be_shared():
    with pytest.raises(ConfigError, match="divisible by 3"):
        EpochSampler(50, 8, world=3)
    with pytest.raises(ConfigError, match="rank"):
        EpochSampler(50, 8, rank=2, world=2)
    with pytest.raises(DataError, match="at least 8 rows"):
        EpochSampler(7, 8)


def test_eval_batches_cover_all_rows_in_order():
    assert eval_batches(5, 2) == [[0, 1], [2, 3], [4]]
