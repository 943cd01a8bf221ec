"""Ray Train: a list of training stages in one worker group, each continued from its own run folder after a failure.

Starting a group costs seconds, so one `fit()` runs as many stages as need no isolation from one another. Checkpoints
are the project's own folders under `run_dir`, on storage that all workers see; Ray is only told of progress. When a
worker dies Ray restarts the group and calls the same function again: finished stages are skipped by their stage.json,
the interrupted one finds its latest checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import nn

from motionrft.config.hardware import HardwareConfig, ZeroConfig
from motionrft.config.profiles import hardware_from_mapping
from motionrft.core import errors
from motionrft.core.errors import ClusterError, MotionRFTError
from motionrft.runtime.collective import TorchCollective
from motionrft.runtime.deepspeed_engine import DeepSpeedEngine
from motionrft.runtime.session import ray_session, worker_environment
from motionrft.training.optim import OptimConfig
from motionrft.training.stages import RECORD, Stage, check_stages, read_json, results, run_stages, write_json

_LOG = logging.getLogger(__name__)
_REFUSED = "REFUSED.json"


class RayTrainRuntime(TorchCollective):
    """`core.protocols.Runtime` inside a Ray Train worker."""

    def __init__(self, zero: ZeroConfig) -> None:
        super().__init__(get_device())
        self._zero = zero

    def build_engine(self, module: nn.Module, optim: OptimConfig) -> DeepSpeedEngine:
        """Return a DeepSpeed engine around the module, moved to this worker's device. A collective."""
        return DeepSpeedEngine(module.to(self.device), optim, self._zero)

    def report(self, metrics: Mapping[str, float], checkpoint_dir: Path | None = None) -> None:
        """Tell Ray of progress, without uploading anything. A barrier: call it on every rank, at checkpoint cadence."""
        where = {"checkpoint_dir": str(checkpoint_dir)} if checkpoint_dir is not None else {}
        ray.train.report({**{name: float(value) for name, value in metrics.items()}, **where})


def run_on_ray(
    stages: Sequence[Stage],
    *,
    hardware: HardwareConfig,
    run_dir: Path | str,
    datasets: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Mapping[str, Any]]:
    """Run stages one after another in one group of workers and return {stage name: result}.

    Args:
        stages: executed in order; each sees the folders of those before it.
        hardware: workers, ZeRO, Ray.
        run_dir: the run folder, on storage every worker sees.
        datasets: name -> object references (see `runtime.data`), handed to every stage.
        resume: continue a run folder that already has stages; without it, such a folder is refused.

    Raises:
        MotionRFTError: the error a stage raised, as it was raised.
        ClusterError: workers kept dying, or the cluster cannot run this.
        ConfigError: the folder is in use and `resume` is off.
    """
    folder = Path(run_dir).resolve()  # workers have another working directory
    check_stages(stages, folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    attempt = uuid.uuid4().hex[:8]
    (folder / _REFUSED).unlink(missing_ok=True)
    with ray_session(hardware):
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "stages": list(stages),
                "hardware": asdict(hardware),
                "run_dir": str(folder),
                "attempt": attempt,
                "data": dict(datasets or {}),
            },
            torch_config=_torch_config(hardware),
            scaling_config=_scaling_config(hardware),
            run_config=RunConfig(  # type: ignore[call-arg]
                # Unique: Ray silently continues an experiment of the same name with its own bookkeeping.
                name=f"{folder.name}-{attempt}",
                storage_path=str(Path(hardware.ray.storage_path or folder / ".ray_train").resolve()),
                failure_config=FailureConfig(max_failures=hardware.ray.max_failures),
                logging_config=LoggingConfig(log_level="WARNING"),
                worker_runtime_env={"env_vars": worker_environment(hardware)},
            ),
        )
        try:
            with _interruptible(stages, folder):
                trainer.fit()
        except TrainingFailedError as error:
            raise _own_error(error, folder) from error
    refused = read_json(folder / _REFUSED)
    if refused is not None:
        raise _rebuild(refused)
    return results(stages, folder)


@contextmanager
def _interruptible(stages: Sequence[Stage], folder: Path) -> Iterator[None]:
    """Turn Ray Train's answer to Ctrl-C into a KeyboardInterrupt that says what is kept.

    Its handler aborts the workers and leaves by `sys.exit`, which no one would report; and it stays installed after
    `fit`, where it would end whatever comes next without a word.
    """
    in_main = threading.current_thread() is threading.main_thread()
    former = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    except SystemExit:
        kept = [stage.name for stage in stages if read_json(folder / stage.name / RECORD) is not None]
        raise KeyboardInterrupt(
            f"finished stages kept: {', '.join(kept) or 'none'}; others continue from their last checkpoint. "
            f"Run the same command with --resume to go on in {folder}."
        ) from None
    finally:
        if in_main:
            signal.signal(signal.SIGINT, former)


def _torch_config(hardware: HardwareConfig) -> TorchConfig:
    backend = "nccl" if hardware.workers.use_gpu else "gloo"
    return TorchConfig(backend=backend, timeout_s=hardware.ray.collective_timeout_s)


def _scaling_config(hardware: HardwareConfig) -> ScalingConfig:
    workers = hardware.workers
    resources = {"CPU": workers.cpus_per_worker}
    if workers.use_gpu:
        resources["GPU"] = workers.gpus_per_worker
    return ScalingConfig(num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker=resources)


# --------------------------------------------------------------------------------------------------- in the workers


def _worker(loop: dict[str, Any]) -> None:
    """Run every stage that is not finished. Called again by Ray, from the start, after any worker failed."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _log_to(Path(loop["run_dir"]), ray.train.get_context().get_world_rank())
    folder = Path(loop["run_dir"])
    refused = read_json(folder / _REFUSED)
    if refused is not None and refused["attempt"] == loop["attempt"]:
        return  # the error is deterministic: restarting cannot cure it, and the driver raises it from the file
    runtime = RayTrainRuntime(hardware_from_mapping(loop["hardware"]).zero)
    data = {name: _fetch(value) for name, value in loop["data"].items()}

    def record(stage: str, error: Exception) -> None:
        if isinstance(error, MotionRFTError):
            text = {"attempt": loop["attempt"], "stage": stage, "type": type(error).__name__, "message": str(error)}
            write_json(folder / _REFUSED, text, unique=f"rank{runtime.rank}")

    run_stages(loop["stages"], runtime, folder, data, record)


def _log_to(folder: Path, rank: int) -> None:
    """Write this worker's records to FOLDER/worker_RANK.log; rank 0 also speaks to the driver's terminal."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(logging.INFO)
    shape = logging.Formatter(f"%(asctime)s rank {rank} %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"worker_{rank}.log", encoding="utf-8")]
    if rank == 0:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(shape)
        handler.addFilter(lambda record: record.name.split(".")[0] in ("motionrft", "data_prep"))
        root.addHandler(handler)


def _fetch(value: Any) -> Any:
    """Turn an object reference, or a list of them, into values (zero-copy for Arrow tables)."""
    if isinstance(value, ray.ObjectRef):
        return ray.get(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, ray.ObjectRef) for v in value):
        return ray.get(list(value))
    return value


# ----------------------------------------------------------------------------------------------------------- errors


def _own_error(error: TrainingFailedError, folder: Path) -> MotionRFTError:
    """Translate Ray's failure: the stage's own error if there was one, else a ClusterError with the message."""
    refused = read_json(folder / _REFUSED)
    if refused is not None:
        return _rebuild(refused)
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for rank in sorted(failures):
        cause: BaseException | None = failures[rank]
        while cause is not None:
            if isinstance(cause, MotionRFTError):
                return cause
            cause = cause.__cause__
    shown = "; ".join(f"worker {rank}: {_last_line(failures[rank])}" for rank in sorted(failures)) or _last_line(error)
    return ClusterError(
        f"training stopped after the allowed restarts: {shown}. Finished stages and checkpoints in {folder} are kept: "
        "correct the cause and run the same command with --resume."
    )


def _rebuild(refused: Mapping[str, Any]) -> MotionRFTError:
    kind = getattr(errors, refused["type"], MotionRFTError)
    return kind(f"stage {refused['stage']}: {refused['message']}")  # type: ignore[no-any-return]


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
