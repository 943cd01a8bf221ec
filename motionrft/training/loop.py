"""The one training loop. Its unit is a batch; what a batch means (one step, k steps of a rollout) is the body's affair.

Everything the body draws must be a function of (seed, step): then stopping and continuing anywhere, on any number of
workers, gives the same run.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, NumericalError
from motionrft.core.protocols import Engine, Runtime
from motionrft.core.rng import derive_seed
from motionrft.training.checkpoint import Checkpoint, CheckpointStore, Snapshot
from motionrft.training.ema import Ema
from motionrft.training.metrics import MetricsWriter, RunningMeans
from motionrft.training.progress import Progress
from motionrft.training.state_dict import MOMENTS, part, persistent_buffers, require_same_tensors, with_prefix

_LOG = logging.getLogger(__name__)


class Stateful(Protocol):
    """Something beside the engine whose tensors belong in the checkpoint."""

    def export_state(self) -> dict[str, Tensor]:
        """Return the tensors, full and on CPU; called on every rank."""
        ...

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore them."""
        ...


@dataclass(frozen=True)
class LoopResult:
    """How a loop ended."""

    step: int  # batches done
    optimizer_steps: int
    refused_steps: int
    metrics: Mapping[str, float]  # the last logged values
    checkpoint: Path | None
    stopped: str = ""  # why it ended before its last batch


def run_loop(
    body: Callable[[int], Mapping[str, float]],
    *,
    total_steps: int,
    engine: Engine,
    runtime: Runtime,
    checkpoints: CheckpointStore,
    metrics: MetricsWriter,
    seed: int,
    log_every: int = 10,
    checkpoint_every: int = 100,
    ema: Ema | None = None,
    extras: Mapping[str, Stateful] | None = None,
    on_start: Callable[[], Mapping[str, float] | None] | None = None,
    on_step: Callable[[int], Mapping[str, float] | None] | None = None,
    stop: Callable[[], str] | None = None,
    item_ids: Callable[[int], Sequence[str]] | None = None,
    max_refused_in_row: int = 10,
    progress_every_s: float = 10.0,
) -> LoopResult:
    """Run batches `start .. total_steps - 1`, where start is the latest checkpoint's position (0 without one).

    Args:
        body: does everything batch `step` leads to, engine steps included, and returns this rank's metrics by path.
            Every rank must make the same number of engine calls and return the same names.
        total_steps: batches in the whole run.
        engine: holds the trainable module; `steps` and `skipped` are read around the body.
        runtime: rank, averages over ranks, reports.
        checkpoints: where to save and continue from. Continuing is automatic; whether a run folder may be reused at
            all is the launcher's decision.
        metrics: rows of means over ranks and over the batches since the last row.
        seed: run seed; torch's global generator (dropout) is set from (seed, step, rank) before every batch.
        log_every: batches between metric rows.
        checkpoint_every: batches between checkpoints; one is always written at the end.
        ema: parameter average, updated after each batch that changed the parameters.
        extras: further state to save, by file stem.
        on_start: called once before the first batch of the run; returned metrics get row 0.
        on_step: called with the number of batches done, before a checkpoint; returned metrics (e.g. validation) get
            their own row, and are recorded in a checkpoint written at the same point.
        stop: asked after every batch why the run should end here, "" = it should not; the same answer on every rank.
            A run that ended so does not go on when it is started again.
        item_ids: item ids of batch `step`, for messages.
        max_refused_in_row: batches in a row with a refused (non-finite) step before giving up.
        progress_every_s: seconds between progress lines.

    Raises:
        NumericalError: too many refused batches in a row; names the items of the last one.
        CheckpointError: the folder's checkpoint does not fit this run, or one could not be written.
        KeyboardInterrupt: after Ctrl-C, with a message saying what was saved. The first Ctrl-C finishes the batch.
    """
    if total_steps < 1 or log_every < 1 or checkpoint_every < 1 or max_refused_in_row < 1:
        raise ConfigError("total_steps, log_every, checkpoint_every and max_refused_in_row must be >= 1")
    run = _Run(engine, runtime, checkpoints, {**(extras or {}), **({"ema": ema} if ema is not None else {})}, seed)
    start = run.resume(metrics)
    progress = Progress(total_steps, start=start, every_s=progress_every_s, enabled=runtime.rank == 0)
    logged = dict(run.last_metrics)
    done = start
    if on_start is not None and run.path is None:
        if first := on_start():
            metrics.write(0, mean_over_ranks(first, runtime))
    with _Interrupts(enabled=runtime.world == 1) as interrupts:
        for step in range(start, start if run.stopped else total_steps):
            values = run.batch(body, step)
            done = step + 1
            if ema is not None and run.moved and ema.due(done):
                ema.update(engine.trainable_tensors())
            run.means.update(values)
            run.check_refusals(step, max_refused_in_row, item_ids)
            found = on_step(done) if on_step is not None else None
            found = mean_over_ranks(found, runtime) if found else {}
            run.stopped = stop() if stop is not None and done < total_steps else ""
            last = done == total_steps or bool(run.stopped)
            if done % log_every == 0 or last:
                logged = mean_over_ranks(run.means.means(), runtime) | {"optim/refused_steps": float(run.refused)}
                metrics.write(done, logged)
                run.means.reset()
            if found:
                metrics.write(done, found)
            progress.update(done, {k: v for k, v in values.items() if k in ("loss/total", "reward/total")})
            if done % checkpoint_every == 0 or last or interrupts.requested:
                run.save(done, {**logged, **found})
            if run.stopped:
                _LOG.info("ended after batch %d of %d: %s", done, total_steps, run.stopped)
                break
            if interrupts.requested and not last:
                raise KeyboardInterrupt(_stopped(done, run.path))
    return LoopResult(done, engine.steps, run.refused, logged, run.path, run.stopped)


def mean_over_ranks(values: Mapping[str, float], runtime: Runtime) -> dict[str, float]:
    """Return the average over ranks of each value; names must agree. One process: unchanged."""
    names = sorted(values)
    if runtime.world == 1 or not names:
        return {name: float(values[name]) for name in names}
    stacked = torch.tensor([float(values[n]) for n in names], dtype=torch.float64, device=runtime.device)
    return dict(zip(names, runtime.mean(stacked).tolist(), strict=True))


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Return what this process holds now and, on an accelerator, the most it held there so far, in GiB."""
    found = {"memory/resident_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        found["memory/accelerator_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


class _Run:
    """The moving parts of one loop: position, counters, saving and continuing."""

    def __init__(
        self, engine: Engine, runtime: Runtime, store: CheckpointStore, extras: Mapping[str, Stateful], seed: int
    ) -> None:
        self.engine, self.runtime, self.store, self.extras, self.seed = engine, runtime, store, extras, seed
        self.means = RunningMeans()
        self.path: Path | None = None
        self.last_metrics: Mapping[str, float] = {}
        self.refused = 0
        self.refused_in_row = 0
        self.moved = False
        self.stopped = ""

    def resume(self, metrics: MetricsWriter) -> int:
        """Restore the latest checkpoint, if any, and return the first batch to run."""
        checkpoint = self.store.load_latest()
        # Nobody writes before everybody has read the same folder.
        self.runtime.barrier()
        if checkpoint is None:
            metrics.rewind(-1)
            return 0
        saved = checkpoint.snapshot
        self._restore(checkpoint)
        counters = saved.state["counters"]
        self.refused, self.refused_in_row = counters["refused"], counters["refused_in_row"]
        self.means.import_state(saved.state["running_means"])
        self.stopped = saved.state.get("stopped", "")  # earlier versions always ran to their end
        self.path, self.last_metrics = checkpoint.path, checkpoint.metrics
        metrics.rewind(saved.batches)
        _LOG.info("continuing from %s (batch %d)", checkpoint.path, saved.batches)
        return saved.batches

    def _restore(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.snapshot
        seeding = saved.state["seeding"]
        if seeding["seed"] != self.seed:
            raise CheckpointError(
                f"checkpoint {checkpoint.path} was made with seed {seeding['seed']}, this run has {self.seed}. "
                "Restore the seed to continue it, or choose another run folder."
            )
        if set(saved.extras) != set(self.extras):
            raise CheckpointError(
                f"checkpoint {checkpoint.path} holds the extra state {sorted(saved.extras)}, this run expects "
                f"{sorted(self.extras)}. Switch the same options on or off as when it was written."
            )
        buffers = persistent_buffers(self.engine.module)
        params = {name: t for name, t in saved.model.items() if name not in buffers}
        self.engine.import_state({**with_prefix("param", params), **saved.optimizer}, saved.optimizer_step)
        shapes = {name: tuple(b.shape) for name, b in buffers.items()}
        found = {name: saved.model[name] for name in buffers if name in saved.model}
        require_same_tensors(shapes, found, f"checkpoint {checkpoint.path}")
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(found[name])
        for name, extra in self.extras.items():
            extra.import_state(saved.extras[name])

    def batch(self, body: Callable[[int], Mapping[str, float]], step: int) -> dict[str, float]:
        """Run one batch and return its metrics, timing included."""
        # Dropout can only draw from the global generator: keyed here, it needs no saving and survives any resume.
        torch.manual_seed(derive_seed(self.seed, "global", step, self.runtime.rank))
        steps, skipped, started = self.engine.steps, self.engine.skipped, time.perf_counter()
        try:
            values = dict(body(step))
        except KeyboardInterrupt:
            if self.engine.steps == steps and self.runtime.world == 1:  # still at the boundary: nothing is lost
                self.save(step, {})
            raise KeyboardInterrupt(_stopped(step, self.path)) from None
        values["time/batch_s"] = time.perf_counter() - started
        values |= memory_in_use(self.runtime.device)
        self.moved = self.engine.steps > steps
        refused = self.engine.skipped - skipped
        self.refused += refused
        self.refused_in_row = self.refused_in_row + 1 if refused else 0
        return values

    def check_refusals(self, step: int, limit: int, item_ids: Callable[[int], Sequence[str]] | None) -> None:
        """Raise after `limit` batches in a row with a refused step. The flag is the same on every rank."""
        if self.refused_in_row == 0:
            return
        ids = list(item_ids(step)) if item_ids is not None else []
        shown = f"items {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}" if ids else "item ids not recorded"
        _LOG.warning("batch %d: step refused, loss or gradient not finite (%s)", step, shown)
        if self.refused_in_row >= limit:
            raise NumericalError(
                f"loss or gradient was not finite in {self.refused_in_row} batches in a row, last in batch {step} "
                f"({shown}); {self.refused} steps refused so far. Look at these items with `motionrft doctor`, lower "
                f"optim.lr, or clip harder with optim.grad_clip. Last checkpoint: {self.path or 'none'}."
            )

    def save(self, done: int, values: Mapping[str, float]) -> None:
        """Write a checkpoint on rank 0, tell the launcher, and fail together if it could not be written."""
        engine_state = self.engine.export_state()
        extras = {name: extra.export_state() for name, extra in self.extras.items()}
        pending = RunningMeans()
        pending.import_state(self.means.export_state())
        running = _average_pending(pending, self.runtime)
        failure: CheckpointError | None = None
        if self.runtime.rank == 0:
            snapshot = Snapshot(
                batches=done,
                optimizer_step=self.engine.steps,
                model={**part(engine_state, "param"), **persistent_buffers(self.engine.module)},
                optimizer={k: v for k, v in engine_state.items() if k.startswith(MOMENTS)},
                extras=extras,
                state={
                    "seeding": {"scheme": "counter", "seed": self.seed, "next_batch": done},
                    "counters": {"refused": self.refused, "refused_in_row": self.refused_in_row},
                    "running_means": running,
                    "stopped": self.stopped,
                },
            )
            try:
                self.store.save(snapshot, values)
            except CheckpointError as error:
                failure = error
        if not self.runtime.all_true(failure is None):
            raise failure or CheckpointError("rank 0 could not write the checkpoint; its log says why")
        self.path = self.store.root / f"step_{done:08d}"
        self.runtime.report(values, self.path)


def _average_pending(means: RunningMeans, runtime: Runtime) -> dict[str, Any]:
    """Return the means gathered since the last row, averaged over ranks, so that any layout can continue them."""
    averaged = mean_over_ranks(means.means(), runtime)
    state = means.export_state()
    fresh = RunningMeans()
    for name, value in averaged.items():
        fresh.update({name: value}, state[name][1])
    return fresh.export_state()


def _stopped(step: int, path: Path | None) -> str:
    saved = f"saved {path}" if path is not None else "nothing was saved yet"
    return f"stopped at batch {step}; {saved}. Run the same command again to continue."


class _Interrupts:
    """Turns the first Ctrl-C into a request to stop after the batch; the second stops at once.

    Only the main thread may install handlers; Ray Train workers run elsewhere and are stopped by Ray.
    """

    def __init__(self, enabled: bool) -> None:
        self.requested = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()

    def _handle(self, _signum: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        _LOG.warning("stopping after this batch and saving; press Ctrl-C again to stop at once")

    def __enter__(self) -> _Interrupts:
        if self._enabled:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, self._previous)
