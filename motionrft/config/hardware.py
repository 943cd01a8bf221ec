"""Where a run happens, as plain data: workers, ZeRO, Ray. `runtime` reads it; nothing here imports Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from motionrft.core.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "autocast")
LAUNCHERS = ("local", "ray")
AUTH_MODES = ("disabled", "token")


def _raise(section: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"{section}: " + "; ".join(problems))


@dataclass(frozen=True)
class WorkersConfig:
    """The processes that train together. The global batch is fixed; each takes global_batch / num_workers."""

    num_workers: int = 1
    cpus_per_worker: float = 1.0  # logical CPUs reserved in Ray
    gpus_per_worker: float = 0.0  # 0.25: four trials of a search share a GPU (its memory is theirs to divide)
    use_gpu: bool = False
    threads_per_worker: int = 1  # of torch in each process; OMP_NUM_THREADS, where set, wins in a single one

    def __post_init__(self) -> None:
        problems = []
        if self.num_workers < 1:
            problems.append(f"num_workers must be >= 1, got {self.num_workers}")
        if not self.cpus_per_worker > 0:
            problems.append(f"cpus_per_worker must be > 0, got {self.cpus_per_worker}")
        if self.threads_per_worker < 1:
            problems.append(f"threads_per_worker must be >= 1, got {self.threads_per_worker}")
        if self.use_gpu != (self.gpus_per_worker > 0):
            problems.append(f"use_gpu={self.use_gpu} contradicts gpus_per_worker={self.gpus_per_worker}")
        if self.gpus_per_worker > 1:
            problems.append(f"gpus_per_worker must be at most 1 (one process, one GPU), got {self.gpus_per_worker}")
        _raise("hardware.workers", problems)


@dataclass(frozen=True)
class ZeroConfig:
    """How DeepSpeed shares parameters, gradients and moments, and the precision of the forward."""

    stage: int = 0  # 0 replicate, 1 shard moments, 2 + gradients, 3 + parameters
    precision: str = "fp32"  # fp32 | bf16 (bf16 weights, fp32 master) | autocast (fp32 weights, bf16 compute)
    bucket_size: int = 20_000_000  # elements per communication bucket
    offload: bool = False  # moments in host memory

    def __post_init__(self) -> None:
        problems = []
        if self.stage not in (0, 1, 2, 3):
            problems.append(f"stage must be 0, 1, 2 or 3, got {self.stage}")
        if self.precision not in PRECISIONS:
            problems.append(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.precision == "bf16" and self.stage == 0:
            # DeepSpeed's stage-0 bf16 optimiser starts with Adam's counter at 1: the first update is 0.74 x lr.
            problems.append("bf16 needs stage 1, 2 or 3 (at stage 0 the updates are wrong); use precision: autocast")
        if self.bucket_size < 1:
            problems.append(f"bucket_size must be >= 1, got {self.bucket_size}")
        if self.offload and self.stage == 0:
            problems.append("offload needs stage 1, 2 or 3")
        _raise("hardware.zero", problems)


@dataclass(frozen=True)
class RayConfig:
    """Which Ray cluster, and how patient to be with it."""

    address: str | None = None  # None: start a local one; "auto"; "HOST:6379"; "ray://HOST:10001"
    auth_mode: str = "disabled"  # "token" on any shared cluster; always exported, never left to Ray's defaults
    extra_cpus: int = 2  # logical CPUs beside the workers, for Ray Data and tasks; a local cluster gets this many more
    storage_path: str = ""  # folder every node sees, for Ray's own bookkeeping; "" = inside the run folder
    dashboard: bool = True  # on loopback, 0.4 s; without it Ray cannot free the workers of a driver that died
    connect_timeout_s: float = 20.0
    max_failures: int = 2  # restarts of the worker group before giving up
    collective_timeout_s: int = 300  # a lost peer is noticed after this long at the latest
    health_check_interval_s: float = 0.2  # also the rate at which progress reports are consumed
    worker_start_timeout_s: int = 60
    object_store_gib: float = 0.0  # local cluster only; 0 = Ray's default, 30 % of memory

    def __post_init__(self) -> None:
        problems = []
        if self.auth_mode not in AUTH_MODES:
            problems.append(f"auth_mode must be one of {', '.join(AUTH_MODES)}, got {self.auth_mode!r}")
        if self.extra_cpus < 1:
            problems.append(f"extra_cpus must be >= 1: without a spare CPU Ray Data never runs; got {self.extra_cpus}")
        if self.max_failures < 0:
            problems.append(f"max_failures must be >= 0, got {self.max_failures}")
        for name in ("connect_timeout_s", "collective_timeout_s", "health_check_interval_s", "worker_start_timeout_s"):
            if not getattr(self, name) > 0:
                problems.append(f"{name} must be > 0, got {getattr(self, name)}")
        if self.object_store_gib < 0:
            problems.append(f"object_store_gib must be >= 0, got {self.object_store_gib}")
        _raise("hardware.ray", problems)


@dataclass(frozen=True)
class HardwareConfig:
    """One hardware profile. `launcher: local` is one plain torch process; `ray` is Ray Train with DeepSpeed."""

    launcher: str = "local"
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        problems = []
        if self.launcher not in LAUNCHERS:
            problems.append(f"launcher must be one of {', '.join(LAUNCHERS)}, got {self.launcher!r}")
        if self.launcher == "local":
            if self.workers.num_workers != 1:
                problems.append(f"launcher local is one process, got num_workers={self.workers.num_workers}; use ray")
            if self.zero.stage != 0 or self.zero.offload:
                problems.append("launcher local has no ZeRO: set zero.stage 0 without offload, or launcher ray")
        _raise("hardware", problems)

    @property
    def required_cpus(self) -> float:
        """Logical CPUs a cluster must have: the workers and one spare for data tasks."""
        return self.workers.num_workers * self.workers.cpus_per_worker + 1

    @property
    def required_gpus(self) -> float:
        """GPUs a cluster must have."""
        return self.workers.num_workers * self.workers.gpus_per_worker
