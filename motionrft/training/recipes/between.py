"""What happens between two batches of fine-tuning: models are kept, probed and validated, and the run may end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrft.core.protocols import Engine, Runtime
from motionrft.training.ema import Ema
from motionrft.training.guard import Guard, Look
from motionrft.training.loop import LoopResult
from motionrft.training.recipes.common import whole_parameters
from motionrft.training.recipes.watch import (
    VALIDATED,
    Probe,
    Snapshots,
    Stopwatch,
    Store,
    Validation,
    copy_model,
    kept_snapshots,
    save_once,
    validation_score,
)

_LOG = logging.getLogger(__name__)


@dataclass
class Between:
    """The hooks of `training.loop.run_loop`. Every method but `begin` is collective."""

    engine: Engine
    ema: Ema | None
    runtime: Runtime
    store: Store
    folder: Path
    snapshots: Snapshots
    guard: Guard
    batches: int
    """In the whole run."""
    max_seconds: float
    """Of training; 0 = no limit."""
    until_snapshots: bool
    """End when every model of `snapshots` is kept."""
    probe_every: int
    """Batches; 0 = with validation only."""
    probe: Probe | None
    validate_every: int
    """Batches; 0 = never."""
    validate: Validation | None
    """Needs the probe."""

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.runtime, self.runtime.device)
        self._began: dict[str, float] = {}

    def begin(self) -> None:
        """A batch begins."""
        self._began = self._position()
        self.stopwatch.start()

    def on_start(self) -> dict[str, float]:
        """Return what the model is before training."""
        found = self._probed()
        return found | self._look(0, found, self.validate.base()) if self.validate is not None else found

    def on_step(self, done: int) -> dict[str, float]:
        """Keep, probe and validate the model where it is due."""
        self.stopwatch.stop()
        steps = self.engine.steps
        ends = done == self.batches or bool(self._race_is_over())
        if due := self.snapshots.crossed(self._began, self._position()):
            weights = whole_parameters(self.engine, self.ema)
            for place in due if self.runtime.rank == 0 else []:
                save_once(self.store, place, weights, done, self._position())
        look = self.validate if self.validate_every and (ends or done % self.validate_every == 0) else None
        probes = look is not None or (self.probe_every > 0 and (ends or done % self.probe_every == 0))
        found = self._probed() if probes else {}
        if look is not None:
            found |= self._look(done, found, look(whole_parameters(self.engine, self.ema), done, steps))
        return found

    def stop(self) -> str:
        """Return why the run ends here, "" = it does not."""
        return self._race_is_over() or self.guard.stop_reason()

    def finish(self, outcome: LoopResult) -> dict[str, Any]:
        """Write FOLDER/model and return how the run went. Collective."""
        last, best, keep = whole_parameters(self.engine, self.ema), self.guard.best, self.guard.config.keep
        differs = best is not None and best.batches != outcome.step
        if self.runtime.rank == 0:
            place = "model_last" if differs and keep == "best" else "model"
            self.store.save(self.folder / place, last, outcome.step, outcome.optimizer_steps)
            if self.validate is not None and best is not None and differs:
                other = "model" if place == "model_last" else "model_best"
                copy_model(self.validate.place(int(best.batches)), self.folder / other)
        result = {
            "updates": outcome.optimizer_steps,
            "batches": outcome.step,
            "train_seconds": self.stopwatch.seconds,
            "stopped": outcome.stopped,
            "snapshots": kept_snapshots(self.folder / "snapshots"),
        }
        if best is None:
            return result
        base, kept = self.guard.looks[0], best if keep == "best" else self.guard.looks[-1]
        validation = {**_values(kept), "base": {key: getattr(base, key) for key in VALIDATED}}
        validation |= {"batches": int(kept.batches), "best_batches": int(best.batches)}
        return {**result, "alarms": self.guard.alarms(), "validation": validation}

    def _look(self, done: int, probed: Mapping[str, float], found: Mapping[str, float]) -> dict[str, float]:
        """Tell the guard of a validation and return it by path."""
        reward = probed["probe/reward/total"], probed["probe/reward/total_error"]
        metrics = {key: found[key] for key in VALIDATED}
        base = {key: getattr(self.guard.looks[0], key) for key in VALIDATED} if self.guard.looks else metrics
        look = Look(done, *reward, **metrics, score=validation_score(base, metrics), clips=found["clips"])
        self.guard.add(look)
        alarm = self.guard.alarm(len(self.guard.looks) - 1)
        if alarm and self.runtime.rank == 0:
            _LOG.warning("batch %d: this looks like reward hacking: %s", done, alarm)
        return {**_values(look), "val/alarm": float(bool(alarm))}

    def _probed(self) -> dict[str, float]:
        if self.probe is None:
            return {}
        return {
            **self.probe(),
            "probe/train_seconds": self.stopwatch.seconds,
            "probe/updates": float(self.engine.steps),
        }

    def _position(self) -> dict[str, float]:
        return {"updates": float(self.engine.steps), "seconds": self.stopwatch.seconds}

    def _race_is_over(self) -> str:
        if self.until_snapshots and self.snapshots.all_reached(self._position()):
            return "every snapshot is kept"
        late = 0.0 < self.max_seconds <= self.stopwatch.seconds
        return f"{self.max_seconds:g} seconds of training are over" if late else ""


def _values(look: Look) -> dict[str, float]:
    return {f"val/{key}": getattr(look, key) for key in (*VALIDATED, "score")}
