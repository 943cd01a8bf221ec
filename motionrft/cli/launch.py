"""Where stages run: this process, or workers of a local or remote Ray. The choice is made here and nowhere else."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from motionrft.config.hardware import HardwareConfig, WorkersConfig, ZeroConfig
from motionrft.config.profiles import load_profile
from motionrft.core.errors import ConfigError
from motionrft.core.protocols import Executor
from motionrft.data.manifest import Dataset
from motionrft.data.tables import ClipTable
from motionrft.training.runtime_local import LocalExecutor, LocalRuntime
from motionrft.training.stages import Stage, run_local

_LOG = logging.getLogger(__name__)
BACKENDS = ("single", "deepspeed")


def choose_hardware(hardware: HardwareConfig, backend: str | None) -> HardwareConfig:
    """Return the hardware for a backend: "single" is one plain process, "deepspeed" needs a Ray profile.

    Raises:
        ConfigError: unknown backend.
    """
    if backend is None:
        return hardware
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "single":
        many = hardware.workers
        threads = many.num_workers * many.threads_per_worker  # one process does the work of all
        workers = WorkersConfig(use_gpu=many.use_gpu, gpus_per_worker=many.gpus_per_worker, threads_per_worker=threads)
        precision = "autocast" if hardware.zero.precision != "fp32" else "fp32"
        return HardwareConfig("local", workers, ZeroConfig(precision=precision), hardware.ray)
    return hardware if hardware.launcher == "ray" else load_profile("cpu2")


@dataclass(frozen=True)
class Launcher:
    """Runs stages and shards on the chosen hardware."""

    hardware: HardwareConfig

    @property
    def distributed(self) -> bool:
        """True on Ray."""
        return self.hardware.launcher == "ray"

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep one Ray connection for everything inside; nothing for a single process."""
        if not self.distributed:
            yield
            return
        from motionrft.runtime.session import ray_session  # Ray takes a second to import: only where it is used

        with ray_session(self.hardware):
            yield

    def run(
        self,
        stages: Sequence[Stage],
        run_dir: Path,
        dataset: str = "",
        splits: Sequence[str] = ("train", "val"),
        resume: bool = False,
    ) -> dict[str, Mapping[str, Any]]:
        """Run stages and return {name: result}; clips of `splits` reach Ray workers through shared memory."""
        if not self.distributed:
            # More threads than cores, or two runs that take all cores each, cost a factor of ten: idle threads spin.
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", self.hardware.workers.threads_per_worker)))
            device = torch.device("cuda" if self.hardware.workers.use_gpu else "cpu")
            runtime = LocalRuntime(device, self.hardware.zero.precision)
            return run_local(stages, runtime, run_dir, resume=resume)
        from motionrft.runtime.data import load_blocks
        from motionrft.runtime.train import run_on_ray

        with self.session():
            datasets = {}
            if dataset:
                opened = Dataset.open(dataset)
                present = [s for s in splits if opened.manifest.splits.get(s) and opened.manifest.splits[s].clips]
                datasets = {f"clips/{s}": load_blocks(opened.clip_files(s), ClipTable.columns()) for s in present}
            return run_on_ray(stages, hardware=self.hardware, run_dir=run_dir, datasets=datasets, resume=resume)

    def executor(self) -> Executor:
        """Return what maps shards: a pool of Ray actors, started inside a session and kept, or this process."""
        if not self.distributed:
            return LocalExecutor()
        from motionrft.runtime.executor import RayExecutor

        workers = self.hardware.workers
        return RayExecutor(workers.num_workers, cpus=workers.cpus_per_worker, gpus=workers.gpus_per_worker)

    @property
    def prepare_workers(self) -> int:
        """Ray Data tasks at a time; 0 = this process."""
        return self.hardware.workers.num_workers if self.distributed else 0

    def with_ray(self, **changes: Any) -> Launcher:
        """Return a launcher with other Ray settings."""
        return Launcher(replace(self.hardware, ray=replace(self.hardware.ray, **changes)))
