from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from motionrft.core.errors import CheckpointError, ConfigError, DataError, NumericalError, RepresentationError
from motionrft.core.types import Representation, valid_mask
from motionrft.evaluation.card import evaluator_id, load_evaluator, make_card, save_evaluator
from motionrft.evaluation.evaluator import Evaluator, EvaluatorConfig, EvaluatorObjective
from motionrft.evaluation.gates import GateConfig, run_gates
from motionrft.evaluation.motions import MotionSet, damaged, joint_noise
from motionrft.evaluation.pools import class_pools
from motionrft.evaluation.protocol import SUMMARY_KEYS, Reference, paired_changes, score_motions, summarise
from motionrft.evaluation.verdicts import judge
from motionrft.evaluation.vocabulary import UNKNOWN, Vocabulary
from motionrft.representations.normalize import Moments, Normalizer, finalise
from tests.toy_motion import Toy, toy_split

SMALL = EvaluatorConfig(latent_dim=32, conv_dim=64, hidden_dim=48, word_dim=32, seed=3)


def normalizer(toy: Toy) -> Normalizer:
    rows = toy.features[valid_mask(toy.lengths, toy.features.shape[1])]
    return finalise(Moments.of(rows), Representation.KINEMATIC, grouped=True)


def forward_inputs(objective: EvaluatorObjective, toy: Toy, rows: torch.Tensor, step: int) -> dict:
    captions = [toy.captions[i] for i in rows.tolist()]
    ids, lengths = objective.evaluator.vocabulary.encode(captions, 32)
    return {
        "motion_BTD": toy.features[rows],
        "lengths_B": toy.lengths[rows],
        "word_ids_BL": ids,
        "word_lengths_B": lengths,
        "class_ids_B": toy.class_ids[rows],
        "caption_keys_B": torch.arange(len(rows)),
        "keys_B": rows,
        "step": step,
    }


@pytest.fixture(scope="module")
def train() -> Toy:
    return toy_split(10, seed=1)


@pytest.fixture(scope="module")
def val() -> Toy:
    return toy_split(2, seed=2)


@pytest.fixture(scope="module")
def untrained(train: Toy) -> Evaluator:
    return Evaluator(SMALL, Vocabulary.of(train.captions), normalizer(train)).eval()


@pytest.fixture(scope="module")
def trained(train: Toy) -> Evaluator:
    objective = EvaluatorObjective(Evaluator(SMALL, Vocabulary.of(train.captions), normalizer(train)))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 200)
    generator = torch.Generator().manual_seed(0)
    objective.train()
    for step in range(200):
        rows = torch.randperm(len(train.captions), generator=generator)[:96]
        loss, _ = objective(**forward_inputs(objective, train, rows, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return objective.evaluator.eval()


def motion_set(toy: Toy) -> MotionSet:
    return MotionSet(toy.features, toy.lengths, Representation.KINEMATIC)


def test_a_trained_evaluator_passes_every_gate_on_real_motion(trained: Evaluator, val: Toy):
    report = run_gates(trained, motion_set(val), val.captions, val.class_ids)
    assert report.accepted, report.to_text()
    assert all(gate.passed for gate in report.gates), report.to_text()
    assert report.real["fid_floor"] > 0
    assert json.loads(json.dumps(report.to_dict()))["accepted"] is True
    report.require("toy")


def test_an_untrained_evaluator_is_refused_with_the_reason(untrained: Evaluator, val: Toy):
    report = run_gates(untrained, motion_set(val), val.captions, val.class_ids, GateConfig(n_pools=20))
    assert not report.accepted
    assert "REFUSED" in report.to_text()
    with pytest.raises(DataError, match="real_top1"):
        report.require("toy")


def test_too_few_clips_leave_an_evaluator_unjudged_and_rows_without_retrieval(
    trained: Evaluator, val: Toy, caplog: pytest.LogCaptureFixture
):
    few = MotionSet(val.features[:8], val.lengths[:8], Representation.KINEMATIC)
    report = run_gates(trained, few, val.captions[:8], None)
    assert not report.accepted and report.gates == () and "NOT JUDGED" in report.to_text()
    report.require("few")
    assert "trust none of its numbers" in caplog.text and "this split has 8" in caplog.text
    scores = score_motions(trained, few, val.captions[:8], Reference.of(trained, few), None)
    row = summarise("few", [scores], draws=20).to_dict()["metrics"]
    for key in ("r_precision_top1", "r_precision_top3", "fid"):
        assert math.isnan(row[key]["mean"])
    assert math.isfinite(row["mm_dist"]["mean"]) and math.isfinite(row["jerk"]["ci95"])
    assert {v.metric for v in judge(row, row) if v.passed is None} == {"r_precision_top1", "fid"}


def test_embeddings_do_not_depend_on_padding_order_or_batch(trained: Evaluator, val: Toy):
    whole = trained.encode_motion(val.features, val.lengths)
    assert whole.norm(dim=-1) == pytest.approx(np.ones(len(whole)), abs=1e-5)
    junk = torch.cat([val.features, torch.full((len(whole), 9, 263), 7.0)], dim=1)
    for i in (0, 5, 17):
        length = int(val.lengths[i])
        tight = trained.encode_motion(val.features[i : i + 1, :length], val.lengths[i : i + 1])
        assert torch.allclose(tight[0], whole[i], atol=1e-5), i
    assert torch.allclose(trained.encode_motion(junk, val.lengths), whole, atol=1e-5)
    flipped = trained.encode_motion(val.features.flip(0), val.lengths.flip(0)).flip(0)
    assert torch.allclose(flipped, whole, atol=1e-5)


def test_clips_shorter_than_one_token_still_embed(trained: Evaluator, val: Toy):
    found = trained.encode_motion(val.features[:2, :2], torch.tensor([1, 2]))
    assert bool(found.isfinite().all())


def test_caption_embeddings_keep_the_order_of_the_question(trained: Evaluator, val: Toy):
    both = trained.encode_text([val.captions[3], val.captions[90], val.captions[3]])
    assert torch.equal(both[0], both[2])
    assert torch.allclose(both[1], trained.encode_text([val.captions[90]])[0], atol=1e-6)


def test_another_seed_gives_other_weights_and_the_global_generator_is_left_alone(untrained: Evaluator, train: Toy):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    other = Evaluator(replace(SMALL, seed=4), untrained.vocabulary, normalizer(train))
    assert torch.equal(torch.rand(1), expected)
    assert evaluator_id(other) != evaluator_id(untrained)


def test_one_class_offers_no_negatives(untrained: Evaluator, train: Toy):
    objective = EvaluatorObjective(untrained).eval()
    inputs = forward_inputs(objective, train, torch.arange(12), step=0)
    loss, metrics = objective(**inputs | {"class_ids_B": torch.zeros(12, dtype=torch.int64)})
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["retrieval/batch_top1"]) == 1.0
    loss, _ = objective(**inputs | {"class_ids_B": torch.full((12,), -1)})
    assert loss.item() > 0.5
    loss, _ = objective(
        **inputs | {"class_ids_B": torch.full((12,), -1), "caption_keys_B": torch.zeros(12, dtype=torch.int64)}
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_an_evaluator_survives_the_disk_and_notices_changed_files(trained: Evaluator, val: Toy, tmp_path):
    card = make_card(trained, "toy", 20.0, ["b", "a"], {"fid_floor": 1.0})
    save_evaluator(tmp_path / "e", trained, card)
    loaded, found = load_evaluator(tmp_path / "e")
    assert found.id == card.id == evaluator_id(trained)
    assert found.train_items == make_card(trained, "toy", 20.0, ["a", "b"]).train_items
    assert torch.equal(
        loaded.encode_motion(val.features, val.lengths), trained.encode_motion(val.features, val.lengths)
    )
    words = json.loads((tmp_path / "e" / "vocabulary.json").read_text())
    (tmp_path / "e" / "vocabulary.json").write_text(json.dumps(words[::-1]))
    with pytest.raises(CheckpointError, match="changed or mixed"):
        load_evaluator(tmp_path / "e")
    with pytest.raises(CheckpointError, match="Train the evaluator"):
        load_evaluator(tmp_path / "nothing")


def test_unknown_words_are_one_word(untrained: Evaluator):
    ids, lengths = untrained.vocabulary.encode(["A person juggles!", ""], 32)
    assert ids[0, 2] == UNKNOWN
    assert ids[1, 0] == UNKNOWN
    assert lengths.tolist() == [3, 1]
    assert untrained.vocabulary.unknown_share(["a person juggles"]) == pytest.approx(1 / 3)


def test_contradictory_settings_are_reported_together():
    with pytest.raises(ConfigError, match=r"latent_dim.*word_dropout"):
        EvaluatorConfig(latent_dim=0, word_dropout=1.0)


def test_wrong_width_is_refused(untrained: Evaluator, val: Toy):
    with pytest.raises(RepresentationError, match="263"):
        untrained.encode_motion(val.features[..., :66], val.lengths)


@pytest.fixture(scope="module")
def scores(trained: Evaluator, val: Toy):
    real = motion_set(val)
    reference = Reference.of(trained, real)
    pools = class_pools(val.class_ids, seed=0, n_pools=50)
    sets = {
        "real": real,
        "shaky": damaged(real, joint_noise(0.05), seed=0),
        "shakier": damaged(real, joint_noise(0.05), seed=1),
    }
    rewards = {"total": np.linspace(0, 1, len(real))}
    return {k: score_motions(trained, s, val.captions, reference, pools, rewards=rewards) for k, s in sets.items()}


def test_damage_costs_score_and_real_motion_has_fid_zero(scores):
    real, shaky = scores["real"].values, scores["shaky"].values
    assert real["fid"] == pytest.approx(0.0, abs=1e-6)
    assert real["r_precision_top1"] >= 0.9
    assert real["reward_total"] == pytest.approx(0.5)
    for key in ("fid", "mm_dist", "jerk", "bone_drift"):
        assert shaky[key] > real[key], key


def test_a_row_of_one_seed_has_bootstrap_intervals_and_of_two_seeds_student_ones(scores):
    one = summarise("one", [scores["shaky"]], draws=50)
    two = summarise("two", [scores["shaky"], scores["shakier"]])
    assert {e.method for e in one.metrics.values()} == {"bootstrap"}
    assert {e.method for e in two.metrics.values()} == {"student_t"}
    assert one.metrics["r_precision_top1"].mean == scores["shaky"].values["r_precision_top1"]
    assert 0 < one.metrics["jerk"].ci95 < one.metrics["jerk"].mean
    gap = abs(scores["shaky"].values["jerk"] - scores["shakier"].values["jerk"])
    assert two.metrics["jerk"].ci95 == pytest.approx(12.706205 * gap / 2, rel=1e-5)
    plain = one.to_dict()["metrics"]
    assert set(SUMMARY_KEYS) <= set(plain)
    assert math.isnan(plain["reward_semantic"]["mean"])


def test_paired_changes_find_the_damage(scores):
    changes = paired_changes([scores["real"]], [scores["shaky"]], draws=100)
    assert changes["jerk"].low > 0
    assert changes["mm_dist"].excludes_zero


def test_verdicts_see_jerk_and_pass_an_unchanged_model_except_for_its_lack_of_gain(scores):
    real = summarise("real", [scores["real"]], draws=30).to_dict()["metrics"]
    shaky = summarise("shaky", [scores["shaky"]], draws=30).to_dict()["metrics"]
    worse = {v.metric: v.passed for v in judge(real, shaky)}
    assert worse["jerk"] is False
    assert worse["bone_drift"] is False
    same = {v.metric: v.passed for v in judge(real, real)}
    assert same.pop("r_precision_top1") is False
    assert all(same.values())


def test_a_broken_motion_fails_the_score_by_name(trained: Evaluator, val: Toy):
    features = val.features.clone()
    features[7, 3] = float("nan")
    broken = MotionSet(features, val.lengths, Representation.KINEMATIC)
    reference = Reference.of(trained, motion_set(val))
    ids = [f"item-{i}" for i in range(len(broken))]
    with pytest.raises(NumericalError, match="item-7"):
        score_motions(trained, broken, val.captions, reference, class_pools(val.class_ids, 0, 5), ids)


def test_joints_and_features_of_one_clip_score_alike(trained: Evaluator, val: Toy):
    by_features = trained.encode_motion(*motion_set(val).kinematic)
    lengths = val.lengths + 1
    by_joints = trained.encode_motion(*MotionSet.from_joints(val.joints, lengths).kinematic)
    assert torch.allclose(by_features, by_joints, atol=2e-3)
