from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from motionrft.core.errors import CheckpointError
from motionrft.training.checkpoint import (
    Card,
    CheckpointStore,
    Snapshot,
    best,
    changed_keys,
    complete_checkpoints,
    fingerprint,
    latest,
    load_checkpoint,
    load_into,
    save_checkpoint,
)

CARD = Card("generator/mdm", {"optim": {"lr": 0.1}, "layers": 2}, {"normaliser": "abc", "representation": "kinematic"})


def snapshot(batches: int, value: float = 1.0) -> Snapshot:
    return Snapshot(
        batches=batches,
        optimizer_step=3 * batches,
        model={"w": torch.full((2, 3), value), "count": torch.tensor([7])},
        optimizer={"exp_avg/w": torch.zeros(2, 3), "exp_avg_sq/w": torch.ones(2, 3)},
        extras={"ema": {"avg/w": torch.full((2, 3), -value)}},
        state={"seeding": {"seed": 5}},
    )


def test_everything_comes_back_with_its_type(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(12, 0.25), CARD, {"val/fid": 3.5, "val/broken": float("nan")})
    loaded = load_checkpoint(path, expected_kind="generator/mdm", expected_fingerprints={"normaliser": "abc"})
    assert path.name == "step_00000012"
    assert (loaded.snapshot.batches, loaded.snapshot.optimizer_step) == (12, 36)
    assert torch.equal(loaded.snapshot.model["w"], torch.full((2, 3), 0.25))
    assert loaded.snapshot.model["count"].dtype == torch.int64
    assert torch.equal(loaded.snapshot.extras["ema"]["avg/w"], torch.full((2, 3), -0.25))
    assert set(loaded.snapshot.optimizer) == {"exp_avg/w", "exp_avg_sq/w"}
    assert loaded.snapshot.state == {"seeding": {"seed": 5}}
    assert loaded.card == CARD and loaded.metrics == {"val/fid": 3.5}


def test_manifest_describes_every_other_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(1), CARD)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert set(manifest["files"]) | {"MANIFEST.json"} == {p.name for p in path.iterdir()}
    assert manifest["schema"] == 1 and manifest["kind"] == "generator/mdm"
    assert manifest["config_fingerprint"] == fingerprint({"layers": 2, "optim": {"lr": 0.1}})
    assert manifest["code"]["torch"] == torch.__version__


def test_tied_weights_are_stored(tmp_path: Path) -> None:
    shared = torch.ones(3)
    data = Snapshot(1, 1, {"a": shared, "b": shared, "view": shared[:2]}, {})
    loaded = load_checkpoint(save_checkpoint(tmp_path, data, CARD))
    assert torch.equal(loaded.snapshot.model["view"], torch.ones(2))


def test_inference_skips_the_moments(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(1), CARD)
    (path / "optimizer.safetensors").unlink()
    assert load_checkpoint(path, with_optimizer=False).snapshot.optimizer == {}


def test_a_run_folder_stands_for_its_latest_checkpoint(tmp_path: Path) -> None:
    for batches in (5, 200, 30):
        save_checkpoint(tmp_path, snapshot(batches), CARD)
    assert latest(tmp_path).name == "step_00000200"
    assert load_checkpoint(tmp_path).snapshot.batches == 200


def test_retention_keeps_the_best_and_the_two_latest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, CARD, keep_last=2, best_metric="val/fid")
    for batches, fid in [(1, 9.0), (2, 1.0), (3, 5.0), (4, 6.0), (5, 7.0)]:
        store.save(snapshot(batches), {"val/fid": fid})
    assert [p.name[-1] for p in complete_checkpoints(tmp_path)] == ["2", "4", "5"]
    assert best(tmp_path, "val/fid").name.endswith("2")
    assert best(tmp_path, "val/fid", "max").name.endswith("5")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_0000000{n}" for n in (2, 4, 5)]


def test_keeping_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last"):
        CheckpointStore(tmp_path, CARD, keep_last=1)


def test_continuing_with_a_changed_configuration_names_the_field(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, CARD).save(snapshot(1))
    changed = CheckpointStore(tmp_path, Card(CARD.kind, {"optim": {"lr": 0.2}, "layers": 2}, CARD.fingerprints))
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.1 -> 0\.2"):
        changed.load_latest()


def test_tuples_and_lists_are_the_same_configuration(tmp_path: Path) -> None:
    card = Card("k", {"betas": (0.9, 0.99)})
    CheckpointStore(tmp_path, card).save(snapshot(1))
    assert CheckpointStore(tmp_path, card).load_latest() is not None


def test_changed_keys_sees_added_and_removed() -> None:
    assert changed_keys({"a": 1, "b": {"c": 2}}, {"b": {"c": 2, "d": 3}}) == [
        "a: 1 -> '<absent>'",
        "b.d: '<absent>' -> 3",
    ]


def test_load_into_is_strict_both_ways(tmp_path: Path) -> None:
    module = nn.BatchNorm1d(3)
    state = {k: v + 1 for k, v in module.state_dict().items()}
    load_into(module, load_checkpoint(save_checkpoint(tmp_path / "whole", Snapshot(1, 1, state, {}), CARD)))
    assert float(module.running_mean[0]) == 1.0 and int(module.num_batches_tracked) == 1
    del state["weight"]
    state["extra"] = torch.zeros(1)
    partial = load_checkpoint(save_checkpoint(tmp_path / "part", Snapshot(1, 1, state, {}), CARD))
    with pytest.raises(CheckpointError, match=r"missing \(1\): weight; unexpected \(1\): extra"):
        load_into(module, partial)
