"""Metrics against recorded outputs of the public reference implementations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from motionrft.evaluation import intervals, metrics, preference, quality, retrieval
from motionrft.evaluation.pools import permutation_pools
from tests.paths import shared_path

pytestmark = pytest.mark.parity

FLOAT32 = {"rtol": 1e-5}
FLOAT64 = {"rtol": 1e-9}


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(shared_path(f"golden/metrics_{name}.npz"), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def test_r_precision_and_matching_score_equal_the_reference():
    g = golden("core")
    groups = np.arange(128).reshape(4, 32)
    result = metrics.r_precision(g["text"], g["motion"], groups)
    np.testing.assert_allclose(result.values, g["r_precision"], **FLOAT64)
    np.testing.assert_allclose(result.hits_NK.reshape(4, 32, 3).sum(1), g["topk_counts_per_batch"])
    assert metrics.mm_dist(g["text"], g["motion"]) == pytest.approx(float(g["mm_dist"]), rel=1e-5)


def test_deduplicated_captions_equal_the_reference():
    g = golden("core")
    _, first = np.unique(g["dedup_captions"], return_index=True)
    result = metrics.r_precision(g["text"][:32], g["motion"][:32], [first])
    np.testing.assert_allclose(32 * np.array(result.values), g["dedup_topk_corrected"])


def test_moments_and_fid_of_the_core_set_equal_the_reference():
    g = golden("core")
    for name in ("motion", "gt"):
        moments = metrics.GaussianMoments.of(g[name])
        np.testing.assert_allclose(moments.mean, g[f"mean_{name}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(moments.covariance, g[f"cov_{name}"], rtol=1e-5, atol=1e-6)
    assert metrics.fid(g["motion"], g["gt"]) == pytest.approx(float(g["fid_float64"]), rel=1e-9)
    assert metrics.fid(g["motion"], g["gt"]) == pytest.approx(float(g["fid"]), rel=1e-6)


def test_diversity_and_multimodality_equal_the_reference_on_its_pairs():
    g = golden("core")
    found = metrics.diversity_of_pairs(g["motion"], g["div_first"], g["div_second"])
    assert found == pytest.approx(float(g["diversity"]), rel=1e-5)
    found = metrics.multimodality_of_pairs(g["multimodal_acts"], g["mm_first"], g["mm_second"])
    assert found == pytest.approx(float(g["multimodality"]), rel=1e-5)


def test_both_interval_half_widths_equal_the_reference():
    g = golden("core")
    assert intervals.ci95_normal(g["ci_values"]) == pytest.approx(float(g["ci_half"]), rel=1e-9)
    assert intervals.ci95_student(g["ci_values"]) == pytest.approx(float(g["ci_half_t_ddof1"]), rel=1e-6)


def test_fid_equals_square_root_nuclear_and_closed_form_routes():
    g = golden("fid")
    found = metrics.fid(g["a"], g["b"])
    for key in ("fid_ab", "fid_ab_eigh", "fid_ab_nuclear"):
        assert found == pytest.approx(float(g[key]), rel=1e-9), key
    low = metrics.fid(g["low_x"], g["low_y"])
    for key in ("fid_low", "fid_low_eigh", "fid_low_nuclear"):
        assert low == pytest.approx(float(g[key]), abs=1e-4), key
    assert metrics.fid(g["a"], g["a"]) < 1e-12
    assert metrics.fid(g["low_x"], g["low_x"]) < 1e-5
    one = metrics.GaussianMoments(2, g["diag_mu1"], np.diag(g["diag_var1"]))
    two = metrics.GaussianMoments(2, g["diag_mu2"], np.diag(g["diag_var2"]))
    assert metrics.frechet_distance(one, two) == pytest.approx(float(g["fid_diag_closed"]), rel=1e-9)


def test_merged_shards_equal_the_whole():
    g = golden("fid")
    bounds = g["shard_bounds"]
    shards = [metrics.GaussianMoments.of(g["a"][i:j]) for i, j in itertools.pairwise(bounds)]
    for shard, mean, scatter in zip(shards, g["shard_means"], g["shard_m2"]):
        np.testing.assert_allclose(shard.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(shard.scatter, scatter, rtol=1e-10, atol=1e-10)
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = shards[order[0]].merge(shards[order[1]]).merge(shards[order[2]])
        np.testing.assert_allclose(merged.mean, g["merged_mean"], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(merged.covariance, g["merged_cov"], rtol=1e-12, atol=1e-12)


def test_retrieval_protocols_equal_the_reference():
    g = golden("retrieval")
    sims = retrieval.cosine_matrix(g["text"], g["motion"])
    np.testing.assert_allclose(sims, g["sims"], atol=1e-6)
    found = retrieval.pooled_recall(sims, np.arange(64).reshape(2, 32))
    np.testing.assert_allclose(found, g["droplast32_t2m_m2t"], rtol=1e-9)
    for key, matrix in (("full_t2m", sims), ("full_m2t", sims.T)):
        table = retrieval.recall_table(retrieval.ranks(matrix))
        np.testing.assert_allclose([table[f"R{k:02d}"] for k in retrieval.KS], g[key], atol=6e-4)


@pytest.mark.parametrize(
    ("key", "sims", "threshold"),
    [("tmr_normal", "sims", None), ("tmr_threshold_095", "sims", 0.95), ("tmr_tied_averaging", "tied_sims", None)],
)
def test_whole_set_ranks_equal_the_reference(key: str, sims: str, threshold: float | None):
    g = golden("retrieval")
    same = None if threshold is None else retrieval.similar_captions(g["sent_emb"], threshold)
    found = {}
    for direction, matrix in (("t2m", g[sims]), ("m2t", g[sims].T)):
        table = retrieval.recall_table(retrieval.ranks(matrix, same))
        found |= {f"{direction}/{name}": value for name, value in table.items()}
    np.testing.assert_allclose([found[k] for k in g["tmr_keys"]], g[key], rtol=1e-9)


def test_reference_padding_of_the_last_pool_explains_its_numbers():
    """The exact protocol differs from the published one only by its random top-up rows and its rounding."""
    g = golden("retrieval")
    for direction, sims in (("t2m", g["sims"]), ("m2t", g["sims"].T)):
        groups = np.concatenate([np.arange(70), g[f"upstream_pad_idx_{direction}"]]).reshape(3, 32)
        cost = -np.stack([sims[np.ix_(rows, rows)] for rows in groups])
        found = 100 * metrics.hit_probability(cost, retrieval.KS).mean((0, 1))
        np.testing.assert_allclose(found, g[f"upstream_bs32_{direction}"], atol=2.0)


def test_permutation_pools_drop_the_remainder_of_the_golden_set():
    assert permutation_pools(70, seed=0).shape == (2, 32)


def test_preference_scores_equal_the_reference():
    g = golden("preference")
    better, worse = g["scores"].T
    ties = better == worse
    assert ties.sum() == int(g["n_ties"])
    # The reference counts ties as wrong.
    found = preference.preference_accuracy(better, worse) - 0.5 * ties.mean()
    assert found == pytest.approx(float(g["acc_pairwise"]), rel=1e-9)
    loss = preference.preference_cross_entropy(better, worse)
    assert loss == pytest.approx(float(g["pairwise_ce"]), rel=1e-5)
    swapped = preference.swapped_pairs(better, worse, g["swap_mask"])
    assert [swapped[k] for k in ("tp", "fp", "fn", "tn")] == g["confusion_tp_fp_fn_tn"].tolist()
    for key in ("precision", "recall", "f1"):
        assert swapped[key] == pytest.approx(float(g[key]), rel=1e-9), key
    assert swapped["accuracy"] == pytest.approx(float(g["acc_swapped"]), rel=1e-9)


def test_authenticity_scores_equal_the_reference():
    g = golden("preference")
    logit = g["auth_logits"][:, 1].astype(np.float64) - g["auth_logits"][:, 0]
    found = preference.authenticity_scores(logit, g["auth_labels"] == 1)
    assert [found[k] for k in ("tp", "fp", "fn", "tn")] == g["auth_confusion_tp_fp_fn_tn"].tolist()
    keys = {
        "accuracy": "acc", "precision": "precision", "recall": "recall", "f1": "f1", "specificity": "specificity",
        "balanced_accuracy": "balanced_acc", "auroc": "auroc", "average_precision": "ap", "mcc": "mcc",
    }  # fmt: skip
    for ours, theirs in keys.items():
        assert found[ours] == pytest.approx(float(g[f"auth_{theirs}"]), rel=1e-6), ours


def test_contrastive_margin_distances_equal_the_reference():
    g = golden("contrastive")
    # The reference adds 1e-6 to every difference before the norm.
    found = metrics.pair_distances(g["a"] + 1e-6, g["b"])
    assert float((found**2).mean()) == pytest.approx(float(g["loss_pos"]), rel=1e-5)
    hinge = np.maximum(float(g["margin"]) - found, 0.0) ** 2
    assert float(hinge.mean()) == pytest.approx(float(g["loss_neg"]), rel=1e-5)


def test_motion_quality_equals_the_reference():
    g = golden("motion_quality")
    joints, full = g["joints"], np.array([60, 60, 60])
    np.testing.assert_allclose(quality.foot_skate_ratio(joints, full, 20.0), g["skating_ratio"], rtol=1e-9)
    np.testing.assert_allclose(quality.contact_speed(joints, full, 20.0), g["skate_vel"], rtol=1e-4, atol=1e-5)
    curves = quality.jerk_curves(joints, g["lengths"])
    np.testing.assert_allclose(curves, g["jerk_max_l1_per_frame"], rtol=1e-4, atol=1e-6)
    peak, area = quality.peak_jerk_and_area(curves, 0.033031363)
    assert peak == pytest.approx(float(g["peak_jerk"]), rel=1e-5)
    assert area == pytest.approx(float(g["auj_vs_0p033031363"]), rel=1e-5)
    clean, noisy = joints[0], joints[1]
    np.testing.assert_allclose(quality.acceleration_error(noisy, clean), g["accel_err_1_vs_0"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(quality.joint_error(noisy, clean), g["mpjpe_root_aligned"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(quality.joint_error(noisy, clean, align_root=False), g["mpjpe_unaligned"], rtol=1e-5)
