"""A whole fine-tuning stage: probes, snapshots, time budget, alarm and selection, and continuing anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motionrft.core.errors import ConfigError
from motionrft.core.plain import to_plain
from motionrft.evaluation.protocol import Scores
from motionrft.finetune.strategies import DiffusionDPO, EasyTune, ReFL, SoPo, Strategy
from motionrft.generators.mdm_network import MDMConfig
from motionrft.generators.registry import GeneratorConfig
from motionrft.training.checkpoint import (
    Card,
    Snapshot,
    complete_checkpoints,
    latest,
    load_checkpoint,
    save_checkpoint,
)
from motionrft.training.guard import GuardConfig
from motionrft.training.metrics import read_metrics
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes import finetune, watch
from motionrft.training.recipes.common import TrainConfig
from motionrft.training.recipes.evaluate import RewardFolders
from motionrft.training.recipes.finetune import FinetuneJob, FinetuneRecipe
from motionrft.training.recipes.generator import PretrainJob, PretrainRecipe, run_pretrain
from motionrft.training.recipes.generator_files import load_generator
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


# --------------------------------------------------------------------------------------------- validation and guard


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """Validate without an evaluator: {row: (R@1, FID)}; other rows depend on the weights alone."""
    found: dict[str, tuple[float, float]] = {}

    def score(job: Any) -> dict[str, Scores]:
        weights = load_generator(job.generator).network.state_dict().values()
        spread = float(sum(w.double().abs().mean() for w in weights)) % 0.01
        r1, fid = found.get(job.row, (0.5 + 10 * spread, 20.0))
        values = {"r_precision_top1": r1, "fid": fid, "jerk": 300.0}
        return {"A": Scores(values, {"r_precision_top1": np.full(1000, r1)}, {}, np.empty(0), np.empty(0))}

    monkeypatch.setattr(watch, "score", score)
    return found


HACKED = {"base": (0.5, 20.0), "tuned_1": (0.6, 20.0), "tuned_2": (0.4, 20.0), "tuned_3": (0.3, 20.0)}


def rising_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every probe find a higher reward than the one before."""
    now = iter(range(100))
    found = {"probe/reward/total_error": 0.01}
    monkeypatch.setattr(watch.Probe, "__call__", lambda self: {**found, "probe/reward/total": float(next(now))})


@pytest.mark.parametrize("on_alarm", ["warn", "stop"])
def test_hacking_is_told_and_stops_the_run_if_asked(
    parts: Path,
    tmp_path: Path,
    scores: dict[str, tuple[float, float]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_alarm: str,
) -> None:
    scores |= HACKED
    rising_reward(monkeypatch)
    result = tune(parts, tmp_path, validate_every=1, guard=GuardConfig(on_alarm=on_alarm))
    found = rows(tmp_path, "val/")
    assert [found[step]["val/alarm"] for step in range(4)] == [0, 0, 0, 1]
    assert "since batch 1: reward 1 -> 3" in result["alarms"]["3"] and "R@1 0.600 -> 0.300" in caplog.text
    assert (result["batches"] == 3 and "reward hacking" in result["stopped"]) == (on_alarm == "stop")
    assert result["validation"]["base"]["r_precision_top1"] == 0.5 and result["validation"]["best_batches"] == 1


@pytest.mark.parametrize("keep", ["last", "best"])
def test_both_the_last_and_the_best_model_are_kept(
    parts: Path, tmp_path: Path, scores: dict[str, tuple[float, float]], keep: str
) -> None:
    scores |= {**HACKED, "tuned_4": (0.3, 20.0)}
    result = tune(parts, tmp_path, validate_every=1, guard=GuardConfig(keep=keep))
    first, other = ("model", "model_best") if keep == "last" else ("model_last", "model")
    assert latest(tmp_path / first).name == "step_00000004" and latest(tmp_path / other).name == "step_00000001"
    for folder, done in ((first, 4), (other, 1)):
        kept, validated = model(tmp_path / folder), model(tmp_path / "validation" / f"model_{done}")
        assert all(torch.equal(kept[name], tensor) for name, tensor in validated.items())
    assert result["validation"]["val/r_precision_top1"] == (0.3 if keep == "last" else 0.6)
    assert load_generator(tmp_path / "model").spec.family == "mdm"


def test_no_progress_ends_the_run(parts: Path, tmp_path: Path, scores: dict[str, tuple[float, float]]) -> None:
    scores |= HACKED
    result = tune(parts, tmp_path, validate_every=1, guard=GuardConfig(early_stop_patience=2))
    assert result["batches"] == 3 and "no better val/score than 0.6 of batch 1" in result["stopped"]


@pytest.mark.parametrize("at", [0, 4])
def test_continuing_at_any_batch_gives_the_same_curve_and_weights(
    parts: Path, tmp_path: Path, scores: dict[str, tuple[float, float]], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    settings = {"strategy": ReFL(last_steps=3), "batches": 6, "ema_decay": 0.9, "probe_every": 2, "validate_every": 3}
    settings |= {"guard": GuardConfig(keep="best"), "reference_pull": 0.1, "checkpoint_every": 1, "log_every": 4}
    straight = tune(parts, tmp_path / "straight", **settings)
    crash(monkeypatch, at, parts, tmp_path / "crashed", **settings)
    resumed = tune(parts, tmp_path / "crashed", **settings)

    def curve(folder: Path) -> list[dict[str, float]]:
        measured = ("time/", "memory/", "probe/train_seconds")
        return [
            {n: v for n, v in r.items() if not n.startswith(measured)} for r in read_metrics(folder / "metrics.jsonl")
        ]

    assert curve(tmp_path / "crashed") == curve(tmp_path / "straight")
    untimed = [{n: v for n, v in result.items() if n != "train_seconds"} for result in (straight, resumed)]
    assert untimed[0] == untimed[1] and straight["validation"]["batches"] in (3, 6)
    for name in ("model", "checkpoints"):
        want, got = (load_checkpoint(tmp_path / run / name).snapshot for run in ("straight", "crashed"))
        assert all(torch.equal(got.model[n], tensor) for n, tensor in want.model.items())
        assert all(torch.equal(got.optimizer[n], tensor) for n, tensor in want.optimizer.items())
    averages = [
        load_checkpoint(tmp_path / run / "checkpoints").snapshot.extras["ema"] for run in ("straight", "crashed")
    ]
    assert all(torch.equal(averages[0][n], averages[1][n]) for n in averages[0])


def test_the_average_is_what_is_probed_validated_and_saved(
    parts: Path, tmp_path: Path, scores: dict[str, tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[dict[str, torch.Tensor]] = []
    sample = watch.generate

    def witness(generator: Any, network: Any, *args: Any, **named: Any) -> torch.Tensor:
        module = getattr(network, "module", network)
        probed.append({name: p.detach().clone() for name, p in module.named_parameters()})
        return sample(generator, network, *args, **named)

    monkeypatch.setattr(watch, "generate", witness)
    tune(parts, tmp_path, ema_decay=0.9, validate_every=4, weights={"semantic": 1.0})
    found = load_checkpoint(tmp_path / "checkpoints").snapshot
    average = {name: found.extras["ema"][f"avg/{name}"] for name in found.model}
    for kept in (model(tmp_path / "model"), model(tmp_path / "validation" / "model_4"), probed[-1]):
        assert all(torch.equal(kept[name], tensor) for name, tensor in average.items())
    assert any(not torch.equal(average[name], tensor) for name, tensor in found.model.items())


def test_a_snapshot_is_not_taken_again_at_another_batch(tmp_path: Path) -> None:
    class Recorder:
        def save(self, place: Path, trained: Any, done: int, steps: int) -> None:
            save_checkpoint(place, Snapshot(done, steps, trained, {}), Card("test"))

    for done in (3, 4):
        position = {"updates": float(done), "seconds": 10.0 + done}
        watch.save_once(Recorder(), tmp_path / "seconds_10", {"w": torch.zeros(1)}, done, position)
    assert [p.name for p in complete_checkpoints(tmp_path / "seconds_10")] == ["step_00000003"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guard": GuardConfig(keep="best")}, "guard.keep=best need validate_every"),
        ({"guidance_gradient": "none"}, "guidance_gradient must be one of"),
        ({"snapshot_seconds": (0.0,)}, "must be positive"),
        ({"ema_decay": 1.0, "max_seconds": -1.0}, "max_seconds must not be negative.*ema_decay must be in"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneRecipe(**settings)
