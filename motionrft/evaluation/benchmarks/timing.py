"""Timing several ways of doing one thing so that their ratio is fair: in turns, a fixed number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_seconds(
    works: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Return the seconds of each work in its fastest round: what disturbs a measurement only ever adds to it.

    Every round runs each once, in turns, so that other load on the machine disturbs none more than the others; one
    round before them warms up and is not counted.

    Args:
        works: name -> what is timed.
        rounds: counted rounds, at least 1.
        clock: processor time for one thread, `time.perf_counter` for several.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            started = clock()
            work()
            taken[name].append(clock() - started)
    return {name: min(seconds[1:]) for name, seconds in taken.items()}
