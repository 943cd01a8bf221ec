"""A whole fine-tuning stage: probes, snapshots, time budget, alarm and selection, and continuing anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from motionrft.core.plain import to_plain
from motionrft.finetune.strategies import DiffusionDPO, EasyTune, SoPo, Strategy
from motionrft.generators.mdm_network import MDMConfig
from motionrft.generators.registry import GeneratorConfig
from motionrft.training.checkpoint import complete_checkpoints, load_checkpoint
from motionrft.training.metrics import read_metrics
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes import finetune, watch
from motionrft.training.recipes.common import TrainConfig
from motionrft.training.recipes.evaluate import RewardFolders
from motionrft.training.recipes.finetune import FinetuneJob, FinetuneRecipe
from motionrft.training.recipes.generator import PretrainJob, PretrainRecipe, run_pretrain
from motionrft.training.recipes.reward import run_semantic
from motionrft.training.runtime_local import LocalRuntime
from tests.prepare_fixtures import make_dataset

SIZES = {"unified_dim": 16, "latent_dim": 8, "num_layers": 3, "decoder_layers": 1, "num_heads": 2, "text_heads": 2,
         "ff_dim": 32, "proj_hidden": 16, "text_token_dim": 32, "max_positions": 80}  # fmt: skip
SECONDS = 10.0  # what the fake clock says a batch takes


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dataset, a generator and a reward: one step of training each."""
    root = tmp_path_factory.mktemp("parts")
    make_dataset(root / "data", 20)
    train = TrainConfig(steps=1, batch_size=4)
    pretrain = PretrainJob(
        str(root / "data"),
        generator=GeneratorConfig(model=MDMConfig(latent_dim=16, layers=1, heads=2, ff=16), max_frames=32),
        recipe=PretrainRecipe(train),
    )
    run_pretrain(LocalRuntime(), to_plain(pretrain), root / "generator", {})
    reward = {"dataset": str(root / "data"), "recipe": {"model": SIZES, "train": to_plain(train), "max_frames": 32}}
    run_semantic(LocalRuntime(), reward, root / "reward", {})
    return root


def tune(parts: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"strategy": EasyTune(window=2), "weights": {"semantic": 1.0, "similarity": 0.5}}
    settings |= {"num_steps": 4, "batches": 4, "batch_size": 4, "max_frames": 32, "checkpoint_every": 1}
    settings |= {"optim": OptimConfig(lr=1e-3, schedule="constant"), **changes}
    job = FinetuneJob(
        str(parts / "data"),
        str(parts / "generator" / "model"),
        RewardFolders(str(parts / "reward" / "model")),
        recipe=FinetuneRecipe(**settings),
        evaluators={"A": "nowhere"},
    )
    return finetune.run(LocalRuntime(), to_plain(job), folder, {})


def rows(folder: Path, prefix: str) -> dict[int, dict[str, float]]:
    found = read_metrics(folder / "metrics.jsonl")
    return {r["step"]: r for r in found if any(name.startswith(prefix) for name in r)}


def model(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(folder).snapshot.model)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every look at the stopwatch's clock take SECONDS; nothing else sees it."""
    now = iter(range(10**6))
    monkeypatch.setattr(watch, "clock", lambda: SECONDS * next(now))


def test_probes_are_taken_before_training_at_their_cadence_and_at_the_end(parts: Path, tmp_path: Path) -> None:
    tune(parts, tmp_path, probe_every=2, probe_clips=3, batches=3)
    found = rows(tmp_path, "probe/")
    assert list(found) == [0, 2, 3]
    assert [row["probe/updates"] for row in found.values()] == [0, 4, 6]
    seconds = [row["probe/train_seconds"] for row in found.values()]
    assert seconds[0] == 0 < seconds[1] < seconds[2]
    for row in found.values():
        total = row["probe/reward/semantic/raw"] + 0.5 * row["probe/reward/similarity/raw"]
        assert row["probe/reward/total"] == pytest.approx(total, abs=1e-6) and row["probe/reward/total_error"] > 0
    # against itself the model it starts from is as similar as can be
    assert found[0]["probe/reward/similarity/raw"] == pytest.approx(1.0, abs=1e-5)
    assert found[3]["probe/reward/similarity/raw"] < 1.0 - 1e-5


def test_probing_and_keeping_models_changes_nothing_of_the_training(parts: Path, tmp_path: Path) -> None:
    tune(parts, tmp_path / "watched", probe_every=1, snapshot_updates=(3,))
    tune(parts, tmp_path / "alone")
    watched, alone = model(tmp_path / "watched" / "model"), model(tmp_path / "alone" / "model")
    assert all(torch.equal(watched[name], alone[name]) for name in alone)


def test_snapshots_are_the_models_at_their_batch_boundary(parts: Path, tmp_path: Path, ticking: None) -> None:
    tune(parts, tmp_path, snapshot_updates=(3, 4, 100), snapshot_seconds=(5.0, 30.0))
    kept = {p.name: [c.name for c in complete_checkpoints(p)] for p in (tmp_path / "snapshots").iterdir()}
    assert kept == {
        "updates_3": ["step_00000002"],
        "updates_4": ["step_00000002"],
        "seconds_5": ["step_00000001"],
        "seconds_30": ["step_00000003"],
    }
    trained = load_checkpoint(tmp_path / "checkpoints" / "step_00000003").snapshot.model
    kept_model = model(tmp_path / "snapshots" / "seconds_30")
    assert all(torch.equal(kept_model[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("crash_at", [0, 1, 2])
def test_a_time_budget_ends_the_run_once_and_for_all(
    parts: Path, tmp_path: Path, ticking: None, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    settings = {"max_seconds": 2.5 * SECONDS, "batches": 9, "probe_every": 5, "snapshot_seconds": (10.0,)}
    settings |= {"log_every": 2, "checkpoint_every": 1}
    crash(monkeypatch, crash_at, parts, tmp_path, **settings)
    result = tune(parts, tmp_path, **settings)
    assert result["batches"] == 3 and result["train_seconds"] == 3 * SECONDS and "25 seconds" in result["stopped"]
    assert list(rows(tmp_path, "probe/")) == [0, 3] and list(rows(tmp_path, "reward/")) == [2, 3]
    assert len(complete_checkpoints(tmp_path / "snapshots" / "seconds_10")) == 1
    before = model(tmp_path / "model")
    again = tune(parts, tmp_path, **settings)
    assert (again["batches"], again["updates"], again["stopped"]) == (3, 6, result["stopped"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model(tmp_path / "model").items())


@pytest.mark.parametrize("strategy", [DiffusionDPO(samples=2, draws=2), SoPo(draws=2)], ids=["dpo", "sopo"])
def test_preference_methods_run_as_a_stage_with_what_they_need(parts: Path, tmp_path: Path, strategy: Strategy) -> None:
    # The similarity of the objective is to the reference: the clips are loaded because the method reads them.
    result = tune(parts, tmp_path, strategy=strategy, batches=2)
    assert result["updates"] == 4
    assert len(rows(tmp_path, f"loss/{strategy.name}")) == 2
    trained, start = model(tmp_path / "model"), model(parts / "generator" / "model")
    assert any(not torch.equal(trained[name], start[name]) for name in trained)


class Halt(Exception):
    """A crash: nothing gets a chance to save."""


def crash(monkeypatch: pytest.MonkeyPatch, at: int, parts: Path, folder: Path, **settings: Any) -> None:
    """Run until batch `at` begins and die there."""
    step = finetune.rollout_step

    def dying(*args: Any, **named: Any) -> dict[str, float]:
        if named["step"] == at:
            raise Halt
        return step(*args, **named)

    monkeypatch.setattr(finetune, "rollout_step", dying)
    with pytest.raises(Halt):
        tune(parts, folder, **settings)
    monkeypatch.setattr(finetune, "rollout_step", step)
