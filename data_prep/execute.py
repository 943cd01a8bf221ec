"""Where work runs: in this process, or as a Ray Data pipeline. Both give the same tables in the same order."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from data_prep.captions import CaptionEncoder
from data_prep.rows import GROUP, process_group
from data_prep.sources.base import Source
from motionrft.config.prepare import PrepareConfig
from motionrft.core.errors import ClusterError, explain

_BATCHES_PER_ENCODER = 4  # an encoder process costs seconds to start: worth it from this many batches on


def clip_tables(source: Source, ids: Sequence[str], config: PrepareConfig) -> Iterator[pa.Table]:
    """Yield rows (`ROW_SCHEMA`) of all ids in order, whatever the number of workers."""
    groups = [list(ids[i : i + GROUP]) for i in range(0, len(ids), GROUP)]
    if config.workers == 0:
        for group in groups:
            yield process_group(source, group, config)
        return
    items = [{"ids": group} for group in groups]
    yield from _mapped(_GroupTask(source, config), items, num_cpus=1, concurrency=config.workers)


def text_tables(batches: Sequence[Sequence[str]], encoder: CaptionEncoder, workers: int) -> Iterator[pa.Table]:
    """Yield features (`TEXT_SCHEMA`) of batches of captions in order.

    Few captions are encoded here, many by a pool of actors that load the encoder once each.
    """
    actors = min(workers, len(batches) // _BATCHES_PER_ENCODER)
    if actors == 0:
        with one_thread():
            for batch in batches:
                yield encoder(batch)
        return
    import ray.data

    pool = ray.data.ActorPoolStrategy(size=actors)
    items = [{"captions": list(batch)} for batch in batches]
    yield from _mapped(_EncodeActor, items, compute=pool, num_cpus=1, fn_constructor_args=(encoder.card.name,))


def require_ray() -> None:
    """Refuse to map over workers without a connection.

    Raises:
        ClusterError: Ray is not initialised.
    """
    import ray  # here and below: preparing in one process never pays for it

    if not ray.is_initialized():
        raise ClusterError(
            explain("an initialised Ray", "none", "prepare", "Open a ray_session first, or set workers to 0.")
        )


class _GroupTask:
    def __init__(self, source: Source, config: PrepareConfig) -> None:
        self._source, self._config = source, config

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        return pa.concat_tables([process_group(self._source, list(ids), self._config) for ids in batch["ids"]])


class _EncodeActor:
    def __init__(self, encoder: str) -> None:
        self._encoder = CaptionEncoder(encoder)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        with one_thread():
            return pa.concat_tables([self._encoder(list(captions)) for captions in batch["captions"]])


def _mapped(task: Any, items: Sequence[dict[str, list[str]]], **options: Any) -> Iterator[pa.Table]:
    """Yield the tables of `task` for one item at a time, in the order of the items."""
    if not items:
        return
    import ray.data

    with _quiet_and_ordered():
        dataset = ray.data.from_items(list(items), override_num_blocks=len(items))
        mapped = dataset.map_batches(task, batch_size=1, batch_format="numpy", **options)
        yield from mapped.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one torch thread, so that sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_and_ordered() -> Iterator[None]:
    import ray.data

    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    level = logger.level
    before = context.execution_options.preserve_order, context.enable_progress_bars
    logger.setLevel(logging.ERROR)
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    try:
        yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before
        logger.setLevel(level)
