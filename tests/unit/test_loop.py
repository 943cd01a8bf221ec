from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from motionrft.core.errors import CheckpointError, ConfigError, DataError, NumericalError
from motionrft.training.checkpoint import Card, CheckpointStore, complete_checkpoints, load_checkpoint
from motionrft.training.ema import Ema
from motionrft.training.loop import run_loop
from motionrft.training.metrics import MetricsWriter, RunningMeans, read_metrics
from motionrft.training.optim import OptimConfig
from motionrft.training.progress import Progress, format_seconds
from motionrft.training.runtime_local import LocalExecutor, LocalRuntime

TOTAL = 7


class Net(nn.Module):
    """Dropout (global generator) and a running statistic (buffer): what a naive resume forgets."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.a, self.norm, self.drop, self.b = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


class Halt(Exception):
    """A crash: nothing gets a chance to save."""


def run(folder: Path, *, crash_at: int = -1, poison: tuple[int, ...] = (), inner: int = 2, hook=None, **options):
    runtime = LocalRuntime()
    engine = runtime.build_engine(Net(), OptimConfig(lr=0.05, warmup_steps=3, total_steps=inner * TOTAL))
    ema = Ema(engine.trainable_tensors(), 0.9)

    def body(step: int) -> dict[str, float]:
        if step == crash_at:
            raise Halt
        total = 0.0
        for k in range(inner):  # one batch leads to several engine steps
            if hook is not None:
                hook(step, k)
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(100 * step + k))
            loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
            engine.backward(loss * (float("nan") if step in poison else 1.0))
            engine.step()
            total += float(loss.detach())
        return {"loss/total": total}

    arguments = {"log_every": 1, "checkpoint_every": 1, **options}
    seed = arguments.pop("seed", 11)
    config = arguments.pop("config", {})
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        result = run_loop(
            body,
            total_steps=TOTAL,
            engine=engine,
            runtime=runtime,
            checkpoints=CheckpointStore(folder / "checkpoints", Card("test", config), keep_last=50),
            metrics=metrics,
            seed=seed,
            ema=ema,
            **arguments,
        )
    return result, {**engine.export_state(), **ema.export_state(), **engine.module.state_dict()}


def curve(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(1, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("crash_at", range(TOTAL))
def test_crash_at_any_batch_and_resume_gives_the_same_curve_and_state(
    tmp_path: Path, crash_at: int, log_every: int, checkpoint_every: int
) -> None:
    every = {"log_every": log_every, "checkpoint_every": checkpoint_every}
    straight, state = run(tmp_path / "straight", **every)
    with pytest.raises(Halt):
        run(tmp_path / "crashed", crash_at=crash_at, **every)
    resumed, again = run(tmp_path / "crashed", **every)
    assert curve(tmp_path / "crashed") == curve(tmp_path / "straight")
    assert {k for k in state if not torch.equal(state[k], again[k])} == set()
    assert resumed.optimizer_steps == straight.optimizer_steps == 2 * TOTAL


def test_finished_run_started_again_does_nothing_and_returns_its_result(tmp_path: Path) -> None:
    first, state = run(tmp_path)
    again, same = run(tmp_path, crash_at=0)
    assert again.checkpoint == first.checkpoint and again.metrics["loss/total"] == first.metrics["loss/total"]
    assert all(torch.equal(state[k], same[k]) for k in state)


def test_checkpoint_is_written_at_the_end_whatever_the_cadence(tmp_path: Path) -> None:
    run(tmp_path, checkpoint_every=1000)
    assert [p.name for p in complete_checkpoints(tmp_path / "checkpoints")] == [f"step_{TOTAL:08d}"]


def test_checkpoint_holds_the_whole_model(tmp_path: Path) -> None:
    run(tmp_path)
    Net().load_state_dict(dict(load_checkpoint(tmp_path / "checkpoints").snapshot.model), strict=True)


def test_refused_batch_is_counted_named_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result, state = run(tmp_path, poison=(2,), item_ids=lambda step: [f"clip_{step}"], max_refused_in_row=2)
    assert result.refused_steps == 2 and result.optimizer_steps == 2 * TOTAL - 2
    assert "clip_2" in caplog.text
    assert all(torch.isfinite(t).all() for t in state.values())
    assert curve(tmp_path)[-1]["optim/refused_steps"] == 2.0


def test_too_many_refused_batches_in_a_row_stop_the_run_naming_items(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"2 batches in a row, last in batch 4 \(items clip_4\)"):
        run(tmp_path, poison=(1, 3, 4, 5), item_ids=lambda step: [f"clip_{step}"], max_refused_in_row=2)


def test_refusals_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    with pytest.raises(Halt):
        run(tmp_path, poison=(2, 3), crash_at=3, max_refused_in_row=2)
    with pytest.raises(NumericalError, match="last in batch 3"):
        run(tmp_path, poison=(2, 3), max_refused_in_row=2)


def test_ctrl_c_finishes_the_batch_saves_and_says_so(tmp_path: Path) -> None:
    def press(step: int, inner: int) -> None:
        if (step, inner) == (3, 1):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped at batch 4; saved .*step_00000004.*same command"):
        run(tmp_path / "stopped", hook=press, checkpoint_every=1000)
    assert signal.getsignal(signal.SIGINT) is before
    _, state = run(tmp_path / "straight")
    _, again = run(tmp_path / "stopped")
    assert all(torch.equal(state[k], again[k]) for k in state)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "straight")


@pytest.mark.parametrize(("inner", "saved"), [(0, "step_00000003"), (1, "nothing was saved")])
def test_interrupt_inside_a_batch_saves_only_a_state_between_batches(tmp_path: Path, inner: int, saved: str) -> None:
    def strike(step: int, k: int) -> None:
        if (step, k) == (3, inner):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=saved):
        run(tmp_path / "stopped", hook=strike, checkpoint_every=1000)
    _, state = run(tmp_path / "straight")
    _, again = run(tmp_path / "stopped")
    assert all(torch.equal(state[k], again[k]) for k in state)


def test_validation_metrics_get_their_row_and_choose_the_best(tmp_path: Path) -> None:
    values = {2: 5.0, 4: 1.0, 6: 3.0}
    run(tmp_path, on_step=lambda done: {"val/fid": values[done]} if done in values else None)
    rows = [row for row in curve(tmp_path) if "val/fid" in row]
    assert {row["step"]: row["val/fid"] for row in rows} == values
    assert load_checkpoint(tmp_path / "checkpoints" / "step_00000004").metrics["val/fid"] == 1.0
    assert "val/fid" not in load_checkpoint(tmp_path / "checkpoints" / "step_00000005").metrics


@pytest.mark.parametrize(("change", "word"), [({"seed": 12}, "seed"), ({"config": {"x": 1}}, "x")])
def test_resuming_another_run_is_refused(tmp_path: Path, change: dict, word: str) -> None:
    with pytest.raises(Halt):
        run(tmp_path, crash_at=2)
    with pytest.raises(CheckpointError, match=word):
        run(tmp_path, **change)


def test_zero_cadence_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run(tmp_path, log_every=0)


def test_reports_reach_the_launcher_at_checkpoint_cadence() -> None:
    seen = []
    runtime = LocalRuntime(on_report=seen.append)
    runtime.report({"loss/total": 1.0})
    assert seen == [{"loss/total": 1.0}]


def test_metric_rows_survive_non_finite_values_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"loss/a": float("inf")})
        writer.write(2, {"loss/a": 0.5})
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "loss/a": float("inf")}, {"step": 2, "loss/a": 0.5}]
    with MetricsWriter(path) as writer:
        writer.rewind(1)
        writer.write(2, {"loss/a": 0.25})
    assert [row["loss/a"] for row in read_metrics(path)] == [float("inf"), 0.25]
    path.write_text("garbage\n" + path.read_text())
    with pytest.raises(DataError, match="line 1"):
        read_metrics(path)


@pytest.mark.parametrize("name", ["loss", "Loss/a", "a//b", "a/b c", "/a"])
def test_metric_names_are_paths(name: str) -> None:
    with pytest.raises(ValueError, match="path"):
        RunningMeans().update({name: 1.0})


def test_only_rank_zero_touches_the_metrics_file(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl", enabled=False) as writer:
        writer.rewind(0)
        writer.write(1, {"loss/a": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_progress_line_has_rate_and_eta_at_most_every_n_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    progress = Progress(100, start=20, every_s=10, clock=lambda: now[0])
    for done in range(21, 61):
        now[0] += 1.0
        progress.update(done, {"loss/total": 0.5})
    assert len(caplog.records) == 4
    assert "60/100  1/s  eta 40s  loss/total=0.5" in caplog.records[-1].getMessage()
    assert [format_seconds(s) for s in (42, 185, 7620, float("inf"))] == ["42s", "3m05s", "2h07m", "?"]


def test_local_executor_keeps_order() -> None:
    assert LocalExecutor().map_shards(lambda n: n * n, [3, 1, 2]) == [9, 1, 4]
