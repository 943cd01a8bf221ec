"""Metrics against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from motionrft.core.errors import NumericalError
from motionrft.evaluation import intervals, metrics, preference, retrieval


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


GROUPS = np.arange(64).reshape(2, 32)


def test_perfect_embeddings_have_precision_one():
    x = rng().normal(size=(64, 8))
    assert metrics.r_precision(x, x, GROUPS).values == (1.0, 1.0, 1.0)


def test_collapsed_motions_have_precision_k_over_32():
    text, motion = rng().normal(size=(64, 8)), np.ones((64, 8))
    assert metrics.r_precision(text, motion, GROUPS).values == pytest.approx((1 / 32, 2 / 32, 3 / 32))


def test_two_equal_candidates_share_the_first_place():
    text = np.eye(32)
    motion = text.copy()
    motion[1] = motion[0]
    hits = metrics.r_precision(text, motion, [np.arange(32)]).hits_NK
    assert hits[0].tolist() == [0.5, 1.0, 1.0]
    assert hits[2].tolist() == [1.0, 1.0, 1.0]


def test_precision_grows_with_k_and_is_one_at_the_pool_size():
    x, y = rng().normal(size=(2, 64, 4))
    values = metrics.r_precision(x, y, GROUPS, ks=tuple(range(1, 33))).values
    assert list(values) == sorted(values)
    assert values[-1] == 1.0


def test_precision_and_distance_ignore_a_common_rotation():
    x, y = rng().normal(size=(2, 64, 6))
    turn, _ = np.linalg.qr(rng().normal(size=(6, 6)))
    before, after = metrics.r_precision(x, y, GROUPS), metrics.r_precision(x @ turn, y @ turn, GROUPS)
    assert before.values == after.values
    assert metrics.mm_dist(x, y) == pytest.approx(metrics.mm_dist(x @ turn, y @ turn))


def test_matching_score_of_a_shift_is_its_length():
    x = rng().normal(size=(50, 3))
    assert metrics.mm_dist(x + [3.0, 4.0, 0.0], x) == pytest.approx(5.0)


def test_fid_of_a_shift_is_its_squared_length():
    x = rng().normal(size=(80, 5))
    shift = np.array([1.0, 2.0, 0.0, 0.0, 2.0])
    assert metrics.fid(x + shift, x) == pytest.approx(9.0)
    assert metrics.fid(x[::-1], x) == pytest.approx(0.0, abs=1e-9)


def test_fid_of_a_scaling_is_the_sum_of_squared_std_differences():
    x = rng().normal(size=(200, 4))
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
    x = x - x.mean(0)
    assert metrics.fid(3.0 * x, x) == pytest.approx(float(4.0 * eigenvalues.sum()))


def test_a_broken_row_is_refused_by_name():
    x = rng().normal(size=(10, 3))
    y = x.copy()
    y[4, 1] = np.nan
    with pytest.raises(NumericalError, match="clip-4"):
        metrics.fid(y, x, ids=[f"clip-{i}" for i in range(10)])
    with pytest.raises(NumericalError, match="row 4"):
        metrics.mm_dist(x, y)


def test_fid_floor_shrinks_with_the_number_of_clips():
    x = rng().normal(size=(800, 6))
    assert 0 < metrics.fid_floor(x, rng()) < metrics.fid_floor(x[:100], rng())


def test_expected_diversity_of_two_opposite_points_is_half_their_distance():
    x = np.zeros((40, 3))
    x[:20, 0], x[20:, 0] = 2.0, -2.0
    assert metrics.expected_diversity(x) == pytest.approx(2.0)


def test_sampled_diversity_estimates_its_expectation():
    x = rng().normal(size=(400, 16))
    assert metrics.diversity(x, rng(), 300) == pytest.approx(metrics.expected_diversity(x), rel=0.03)
    with pytest.raises(ValueError, match="needs as many"):
        metrics.diversity(x[:20], rng())


def test_identical_generations_have_no_multimodality():
    x = np.repeat(rng().normal(size=(5, 1, 4)), 12, axis=1)
    assert metrics.multimodality(x, rng()) == 0.0


def test_student_quantiles_match_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 4, 19, 30, 31, 50, 200):
        assert intervals.student_t_975(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=2e-5), degrees


def test_one_seed_has_no_student_interval():
    assert math.isnan(intervals.ci95_student([0.5]))


def test_bootstrap_interval_of_a_mean_has_the_normal_width():
    x = rng().normal(size=400)
    draws = intervals.resamples(400, rng(), 2000)
    found = intervals.bootstrap(lambda rows: float(x[rows].mean()), 400, draws)
    assert found.half_width == pytest.approx(1.96 * x.std() / 20, rel=0.08)


def test_clusters_widen_the_interval():
    x = np.repeat(rng().normal(size=200), 2)
    plain = intervals.paired_difference(np.zeros(400), x, intervals.resamples(400, rng()))
    clusters = intervals.resamples(400, rng(), clusters=np.repeat(np.arange(200), 2))
    assert intervals.paired_difference(np.zeros(400), x, clusters).half_width > 1.25 * plain.half_width


def test_pairing_removes_the_difficulty_of_the_prompts():
    difficulty = 10 * rng().normal(size=300)
    after = difficulty + 0.2 + 0.1 * np.random.default_rng(8).normal(size=300)
    found = intervals.paired_difference(difficulty, after, intervals.resamples(300, rng()))
    assert found.excludes_zero
    assert found.value == pytest.approx(0.2, abs=0.02)


def test_a_constant_scorer_has_preference_accuracy_one_half():
    assert preference.preference_accuracy(np.ones(7), np.ones(7)) == 0.5
    assert preference.preference_accuracy([2.0, 1.0], [1.0, 0.0]) == 1.0


def test_auroc_and_average_precision_match_scikit_learn_with_ties():
    sklearn = pytest.importorskip("sklearn.metrics")
    score, truth = rng().integers(0, 6, 200) / 3.0, rng().uniform(size=200) < 0.3
    assert preference.auroc(score, truth) == pytest.approx(sklearn.roc_auc_score(truth, score))
    assert preference.average_precision(score, truth) == pytest.approx(sklearn.average_precision_score(truth, score))


def test_equal_similarities_share_the_mean_rank():
    assert retrieval.ranks(np.ones((5, 5))).tolist() == [3.0] * 5
