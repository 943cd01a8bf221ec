from __future__ import annotations

import numpy as np
import pytest

from motionrft.core.errors import DataError
from motionrft.evaluation.pools import class_pools, permutation_pools, retrieval_pools, too_small

IDS = np.repeat(np.arange(40), 5)


def test_every_pool_holds_one_item_of_32_distinct_classes():
    pools = class_pools(IDS, seed=0)
    assert pools.shape == (200, 32)
    for rows in pools:
        assert len(set(IDS[rows])) == 32


def test_pools_depend_on_the_seed_alone():
    assert np.array_equal(class_pools(IDS, seed=1), class_pools(IDS, seed=1))
    assert not np.array_equal(class_pools(IDS, seed=1), class_pools(IDS, seed=2))


def test_all_takes_of_a_class_get_their_turn():
    assert set(np.unique(class_pools(IDS, seed=0))) == set(range(len(IDS)))


def test_unknown_classes_are_never_drawn():
    ids = np.concatenate([np.arange(32), np.full(10, -1)])
    assert class_pools(ids, seed=0, n_pools=20).max() < 32


def test_31_classes_are_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"31 classes.*R-precision.*needs more classes"):
        class_pools(np.arange(31), seed=0)


def test_groups_of_a_permutation_are_disjoint_and_drop_the_remainder():
    pools = permutation_pools(70, seed=0)
    assert pools.shape == (2, 32)
    assert len(np.unique(pools)) == 64
    assert permutation_pools(33, seed=0).shape == (1, 32)
    with pytest.raises(DataError, match="at least 32"):
        permutation_pools(31, seed=0)


def test_too_small_splits_are_named_and_everything_else_has_pools():
    assert "at least 32 clips, this split has 8" in too_small(np.full(8, -1))
    assert "at least 32 classes, this split has 31" in too_small(np.repeat(np.arange(31), 3))
    assert too_small(np.arange(32)) == "" == too_small(np.full(32, -1))
    assert np.array_equal(retrieval_pools(IDS, 3, 10), class_pools(IDS, 3, 10))
    some_unknown = np.concatenate([np.arange(32), [-1]])
    assert np.array_equal(retrieval_pools(some_unknown, 3), permutation_pools(33, 3))
