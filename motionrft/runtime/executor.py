"""`core.protocols.Executor` over a pool of Ray actors: the order of the shards, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from motionrft.core.errors import ConfigError, MotionRFTError

Item = TypeVar("Item")
Out = TypeVar("Out")


@ray.remote
class _Worker:
    """One process of the pool. What the functions it runs keep in their modules stays loaded while it lives."""

    def ready(self) -> None:
        """Answer once the process is there."""

    def call(self, fn: Callable[[Any], Any], shard: Any) -> Any:
        """Return fn(shard)."""
        return fn(shard)


class RayExecutor:
    """Runs a function over shards on a pool of actors, one shard at a time each.

    A function that loads a model through a cache (`functools.lru_cache` at module level) loads it once per actor, not
    once per shard: on plain tasks Ray would decide which processes live on, and what they hold of a GPU. Actors start
    with the first shards, are warm in later calls, and give their resources back when the executor is dropped.

    Args:
        num_workers: actors at most; fewer where shards or resources are.
        cpus: logical CPUs per actor.
        gpus: GPUs per actor.
        max_retries: re-runs of a shard whose process died (not of one that raised), and restarts of an actor.
    """

    def __init__(self, num_workers: int, *, cpus: float = 1.0, gpus: float = 0.0, max_retries: int = 2) -> None:
        if num_workers < 1:
            raise ConfigError(f"executor num_workers must be >= 1, got {num_workers}")
        self._num_workers = num_workers
        self._options = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_restarts": max_retries,
            "max_task_retries": max_retries,
        }
        self._pool: list[Any] = []

    def map_shards(
        self, fn: Callable[[Item], Out], shards: Sequence[Item], after: Sequence[int | None] | None = None
    ) -> list[Out]:
        """Return [fn(shard) for shard in shards], computed in parallel; shard i starts once `after[i]` is finished.

        `fn` travels once; what it closes over should be small or an object reference. `after` names earlier shards.

        Raises:
            MotionRFTError: the project's own errors come back as they were raised; others as Ray wraps them.
        """
        needs = list(after) if after is not None else [None] * len(shards)
        if any(need is not None and need >= i for i, need in enumerate(needs)):
            raise ValueError("a shard can only wait for an earlier one")
        shared = ray.put(fn)
        results: list[Any] = [None] * len(shards)
        waiting = list(range(len(shards)))
        finished: set[int | None] = {None}
        # An actor that the cluster has no room for yet is never ready: no shard waits for it while others are free.
        busy: dict[Any, tuple[Any, int | None]] = {w.ready.remote(): (w, None) for w in self._workers(len(shards))}
        idle: list[Any] = []
        try:
            while len(finished) <= len(shards):
                for index in [i for i in waiting if needs[i] in finished][: len(idle)]:
                    waiting.remove(index)
                    worker = idle.pop()
                    busy[worker.call.remote(shared, shards[index])] = (worker, index)
                (done, *_), _ = ray.wait(list(busy), num_returns=1)
                worker, shard = busy.pop(done)
                value = ray.get(done)
                idle.append(worker)
                if shard is not None:
                    results[shard] = value
                    finished.add(shard)
        except RayTaskError as error:
            if isinstance(error.cause, MotionRFTError):
                raise error.cause from error
            raise
        finally:
            for worker, shard in busy.values():
                if shard is not None:  # left over by an error: a running method cannot be cancelled, its process can
                    self._pool.remove(worker)
                    ray.kill(worker)
        return results

    def _workers(self, wanted: int) -> list[Any]:
        """Return at most `wanted` actors, the warm ones first."""
        size = min(self._num_workers, wanted)
        while len(self._pool) < size:
            self._pool.append(_Worker.options(**self._options).remote())  # type: ignore[attr-defined]
        return self._pool[:size]
