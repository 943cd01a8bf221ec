"""`core.protocols.Executor` over Ray tasks: the order of the shards, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from motionrft.core.errors import ConfigError, MotionRFTError

Item = TypeVar("Item")
Out = TypeVar("Out")


@ray.remote
def _call(fn: Callable[[Any], Any], shard: Any) -> Any:
    return fn(shard)


class RayExecutor:
    """Runs a function over shards as Ray tasks, a bounded number at a time.

    Args:
        num_workers: tasks in flight.
        cpus: logical CPUs per task.
        gpus: GPUs per task.
        max_retries: re-runs of a task whose process died (not of one that raised).
    """

    def __init__(self, num_workers: int, *, cpus: float = 1.0, gpus: float = 0.0, max_retries: int = 2) -> None:
        if num_workers < 1:
            raise ConfigError(f"executor num_workers must be >= 1, got {num_workers}")
        self._num_workers = num_workers
        self._task = _call.options(num_cpus=cpus, num_gpus=gpus, max_retries=max_retries)

    def map_shards(
        self, fn: Callable[[Item], Out], shards: Sequence[Item], after: Sequence[int | None] | None = None
    ) -> list[Out]:
        """Return [fn(shard) for shard in shards], computed in parallel; shard i starts once `after[i]` is finished.

        `fn` travels once; what it closes over should be small or an object reference. `after` names earlier shards.

        Raises:
            MotionRFTError: the project's own errors come back as they were raised; others as Ray wraps them.
        """
        shared = ray.put(fn)
        results: list[Any] = [None] * len(shards)
        needs = list(after) if after is not None else [None] * len(shards)
        if any(need is not None and need >= i for i, need in enumerate(needs)):
            raise ValueError("a shard can only wait for an earlier one")
        waiting = list(range(len(shards)))
        finished: set[int | None] = {None}
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                ready = [i for i in waiting if needs[i] in finished]
                for index in ready[: self._num_workers - len(running)]:
                    waiting.remove(index)
                    running[self._task.remote(shared, shards[index])] = index
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                index = running.pop(done)  # before get raises: cancelling a task that ends now aborts the process
                results[index] = ray.get(done)
                finished.add(index)
        except RayTaskError as error:
            if isinstance(error.cause, MotionRFTError):
                raise error.cause from error
            raise
        finally:
            for reference in running:
                ray.cancel(reference)
        return results
