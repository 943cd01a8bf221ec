"""A run is a list of stages; each has a folder, and a finished one is never repeated.

The same list runs in one process (`run_local`) or in a group of Ray Train workers (`runtime.train.run_on_ray`): a stage
is a function of (runtime, plain config, folder, data) and cannot tell which.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.core.protocols import Runtime
from motionrft.training.checkpoint import fingerprint

_LOG = logging.getLogger(__name__)
RECORD = "stage.json"
"""In a stage's folder once it is finished: configuration fingerprint, seconds, result."""

# stage(runtime, config, folder, data) -> JSON-safe result; `data` maps names to values or Arrow tables
StageFn = Callable[[Any, Mapping[str, Any], Path, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One training job of a run. Its folder is RUN_DIR/name; the name "." is the run folder itself.

    `fn` is an import path "package.module:function" or a function that can be imported or pickled.
    """

    name: str
    fn: str | StageFn
    config: Mapping[str, Any] = field(default_factory=dict)  # JSON; the worker rebuilds objects from it

    def __post_init__(self) -> None:
        if self.name != "." and (not self.name or "/" in self.name or self.name.startswith(".")):
            raise ConfigError(f"stage name {self.name!r} must be a plain folder name")


def check_stages(stages: Sequence[Stage], folder: Path, resume: bool) -> None:
    """Refuse clashing names, and folders in use unless `resume`.

    Raises:
        ConfigError: names the stages that have run before.
    """
    names = [stage.name for stage in stages]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"stages need distinct names and at least one stage, got {names}")
    used = [name for name in names if _in_use(folder / name)]
    if used and not resume:
        raise ConfigError(
            f"run folder {folder} already holds {', '.join(used)}. "
            "Pass --resume to continue it, or choose another folder"
        )


def _in_use(place: Path) -> bool:
    return (place / RECORD).exists() or (place / "checkpoints").exists()


def run_stages(
    stages: Sequence[Stage],
    runtime: Runtime,
    folder: Path,
    data: Mapping[str, Any],
    on_error: Callable[[str, Exception], None] | None = None,
) -> None:
    """Run every stage that is not finished, in order. Collective: every rank calls it with the same stages.

    Args:
        stages: what to run.
        runtime: of this process.
        folder: the run folder, on storage all ranks see.
        data: handed to every stage.
        on_error: told of (stage, error) before the error goes on.
    """
    for stage in stages:
        place = folder / stage.name
        done = finished(place, stage.config)
        runtime.barrier()  # nobody starts writing before everybody has looked
        if done is not None:
            _LOG.info("stage %s was finished before", stage.name)
            continue
        started = time.perf_counter()
        if runtime.rank == 0:
            _LOG.info("stage %s starts", stage.name)
        try:
            result = _resolve(stage.fn)(runtime, stage.config, place, data)
        except Exception as error:
            if on_error is not None:
                on_error(stage.name, error)
            raise
        runtime.barrier()
        if runtime.rank == 0:
            seconds = time.perf_counter() - started
            place.mkdir(parents=True, exist_ok=True)
            record = {"config_fingerprint": fingerprint(stage.config), "seconds": seconds, "result": dict(result)}
            write_json(place / RECORD, record)
            _LOG.info("stage %s finished in %.1f s", stage.name, seconds)
        runtime.barrier()


def run_local(
    stages: Sequence[Stage],
    runtime: Runtime,
    run_dir: Path | str,
    data: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Mapping[str, Any]]:
    """Run stages in this process and return {stage name: result}.

    Raises:
        ConfigError: the folder is in use and `resume` is off.
        MotionRFTError: whatever a stage raised.
    """
    folder = Path(run_dir).resolve()
    check_stages(stages, folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    run_stages(stages, runtime, folder, data or {})
    return results(stages, folder)


def results(stages: Sequence[Stage], folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return {stage name: result} of finished stages."""
    return {stage.name: finished(folder / stage.name, stage.config) or {} for stage in stages}


def seconds_of(folder: Path) -> float:
    """Return how long the finished stage in `folder` took."""
    record = read_json(folder / RECORD)
    if record is None:
        raise CheckpointError(f"stage folder {folder} is not finished: it has no {RECORD}")
    return float(record["seconds"])


def finished(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a finished stage's result, or None.

    Raises:
        CheckpointError: if it was finished with another configuration.
    """
    record = read_json(folder / RECORD)
    if record is None:
        return None
    if record["config_fingerprint"] != fingerprint(config):
        raise CheckpointError(
            f"stage folder {folder} was finished with another configuration. Choose another run folder, or remove it"
        )
    return record["result"]  # type: ignore[no-any-return]


def _resolve(fn: str | StageFn) -> StageFn:
    if not isinstance(fn, str):
        return fn
    module, _, name = fn.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in `path`, None where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, value: Mapping[str, Any], unique: str = "") -> None:
    """Write JSON atomically; `unique` keeps ranks apart that write the same file."""
    temporary = path.with_name(f".{path.name}.{unique or os.getpid()}.writing")
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
