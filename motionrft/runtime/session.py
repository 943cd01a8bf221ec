"""Starting or joining Ray for the length of a `with` block, and checking that the cluster is large enough."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from motionrft.config.hardware import HardwareConfig
from motionrft.core.errors import ClusterError

_LOG = logging.getLogger(__name__)
_PROBE_INTERVAL_S = 0.5


@contextmanager
def ray_session(hardware: HardwareConfig, *, dashboard: bool | None = None) -> Iterator[None]:
    """Provide a connected Ray that is large enough; on exit, stop only what this call started.

    Inside an existing connection of this process, that one is used and left open. A local cluster gets the workers'
    logical CPUs plus `extra_cpus`, whatever the machine has. The network surface is Ray's own: only the dashboard
    obeys loopback, so a shared machine needs `auth_mode: token` and a firewall.

    Args:
        hardware: workers and Ray settings.
        dashboard: override of `ray.dashboard`, e.g. off for a job that only maps shards.

    Raises:
        ClusterError: nobody answers at the address, the token is refused, or the cluster is too small.
    """
    started = not ray.is_initialized()
    with _environment(environment_of(hardware)):
        if started:
            _connect(hardware, hardware.ray.dashboard if dashboard is None else dashboard)
        try:
            check_capacity(hardware, ray.cluster_resources())
            yield
        finally:
            if started:
                ray.shutdown()


def environment_of(hardware: HardwareConfig) -> dict[str, str]:
    """Return the environment variables that the driver exports before Ray reads them."""
    config = hardware.ray
    return {
        "RAY_AUTH_MODE": config.auth_mode,  # Ray's defaults differ between head and client, and then they hang
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # the default, 15, starves training on a machine that does anything else
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(config.health_check_interval_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(config.worker_start_timeout_s),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(config.collective_timeout_s),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def worker_environment(hardware: HardwareConfig) -> dict[str, str]:
    """Return the environment variables of every worker process."""
    threads = str(hardware.workers.threads_per_worker)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore::FutureWarning"}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _connect(hardware: HardwareConfig, dashboard: bool) -> None:
    config = hardware.ray
    options: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "log_to_driver": True,
        "runtime_env": {"env_vars": worker_environment(hardware)},
    }
    if config.address is None:
        workers = hardware.workers
        options |= {
            "address": "local",  # never the cluster of an inherited RAY_ADDRESS
            "num_cpus": math.ceil(workers.num_workers * workers.cpus_per_worker) + config.extra_cpus,
            "include_dashboard": dashboard,
            "dashboard_host": "127.0.0.1",
        }
        if not workers.use_gpu:
            options["num_gpus"] = 0
        if config.object_store_gib:
            options["object_store_memory"] = int(config.object_store_gib * 2**30)
        ray.init(**options)
        return
    started = time.monotonic()
    _wait_for_listener(config.address, config.connect_timeout_s)
    remaining = config.connect_timeout_s - (time.monotonic() - started)
    _init_within(config.address, max(remaining, 1.0), options)
    _LOG.info("connected to Ray at %s (auth %s)", config.address, config.auth_mode)


def _wait_for_listener(address: str, timeout_s: float) -> None:
    """Wait until something accepts connections at host:port; "auto" has no port to try."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto" or not port.isdigit():
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=min(2.0, timeout_s)):
                return
        except OSError as error:
            if time.monotonic() + _PROBE_INTERVAL_S >= deadline:
                raise _nobody_answers(address, str(error), timeout_s) from error
            time.sleep(_PROBE_INTERVAL_S)


def _init_within(address: str, timeout_s: float, options: Mapping[str, Any]) -> None:
    """Run `ray.init` in a thread: with a refused token or a foreign service it retries far longer than `timeout_s`."""
    outcome: list[BaseException | None] = []

    def attempt() -> None:
        try:
            ray.init(address=address, **options)
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread, which raises it
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise _nobody_answers(address, "the connection was not accepted", timeout_s)
    if outcome[0] is not None:
        raise _nobody_answers(address, str(outcome[0]).strip().splitlines()[0], timeout_s) from outcome[0]


def _nobody_answers(address: str, reason: str, timeout_s: float) -> ClusterError:
    return ClusterError(
        f"no Ray cluster answered at {address!r} within {timeout_s:g} s ({reason}). Check that the head is running "
        "(`ray status`), that the port is reachable, and that ray.auth_mode matches the cluster's RAY_AUTH_MODE "
        "(token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH); or leave ray.address empty to start a local cluster."
    )


def check_capacity(hardware: HardwareConfig, resources: Mapping[str, float]) -> None:
    """Refuse a cluster that could never place the workers and one data task: Ray would wait silently.

    Args:
        hardware: what is asked for.
        resources: total cluster resources, as `ray.cluster_resources()` gives them.

    Raises:
        ClusterError: with the numbers and what to change.
    """
    workers = hardware.workers
    problems = []
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if cpus < hardware.required_cpus:
        problems.append(
            f"{workers.num_workers} workers x {workers.cpus_per_worker:g} CPU + 1 for data tasks = "
            f"{hardware.required_cpus:g} CPUs, the cluster has {cpus:g}"
        )
    if gpus < hardware.required_gpus:
        problems.append(
            f"{workers.num_workers} workers x {workers.gpus_per_worker:g} GPU = {hardware.required_gpus:g} GPUs, "
            f"the cluster has {gpus:g}"
        )
    if problems:
        raise ClusterError(
            f"the cluster is too small: {'; '.join(problems)}. Lower workers.num_workers or workers.cpus_per_worker, "
            "choose a smaller hardware profile, or add nodes."
        )
