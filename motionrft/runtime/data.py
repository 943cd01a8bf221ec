"""From Parquet to training workers: read once with Ray Data, keep as Arrow in the object store, map without copying.

Streaming splits would tie the global order to the number of workers. Here every worker sees all rows (one copy per
node, in shared memory) and the deterministic sampler picks its slice, so 1 and 8 workers see the same global batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from motionrft.core.errors import ClusterError, DataError

_LOG = logging.getLogger(__name__)
_USABLE_FRACTION = 0.8  # of the object store: Ray spills to disk above it


def load_blocks(files: Sequence[Path | str], columns: Sequence[str]) -> list[Any]:
    """Read Parquet files with column projection and return references to Arrow tables, in file and row order.

    Give them to `run_on_ray(datasets=...)`: workers receive the tables, zero-copy on each node.

    Args:
        files: Parquet files on storage every node sees, in the wanted order.
        columns: the columns to read; the rest never leaves the disk.

    Raises:
        DataError: no file, or a column that is not there.
        ClusterError: the object store is too small.
    """
    paths = [str(Path(file).resolve()) for file in files]
    needed = uncompressed_bytes(paths, columns)
    check_object_store(needed, ray.cluster_resources().get("object_store_memory", 0.0))
    with _ordered_execution():
        # No partition columns from folder names: the files carry everything.
        dataset = ray.data.read_parquet(paths, columns=list(columns), partitioning=None).materialize()
        references = dataset.to_arrow_refs()
    _LOG.info("loaded %d files, %.2f GiB, as %d blocks", len(paths), needed / 2**30, len(references))
    return list(references)


def uncompressed_bytes(files: Sequence[str], columns: Sequence[str]) -> int:
    """Return the in-memory size of the selected columns, from the files' footers.

    Raises:
        DataError: no file, an unreadable one, or a missing column.
    """
    if not files:
        raise DataError("no Parquet file to read: run `motionrft prepare` for this dataset, or check data.root")
    total = 0
    for file in files:
        try:
            metadata = pq.read_metadata(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file} is not a readable Parquet file ({error}). Prepare the dataset again") from error
        missing = sorted(set(columns) - set(metadata.schema.to_arrow_schema().names))
        if missing:
            raise DataError(f"{file} has no column {', '.join(missing)}. Prepare the dataset with these included")
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for index in range(row_group.num_columns):
                column = row_group.column(index)
                if column.path_in_schema.split(".")[0] in columns:
                    total += column.total_uncompressed_size
    return total


def check_object_store(needed: int, available: float) -> None:
    """Refuse data that would spill.

    Raises:
        ClusterError: with the numbers and what to change.
    """
    if needed > _USABLE_FRACTION * available:
        raise ClusterError(
            f"the data needs {needed / 2**30:.2f} GiB of shared memory, {_USABLE_FRACTION:.0%} of the object store is "
            f"{_USABLE_FRACTION * available / 2**30:.2f} GiB. Raise ray.object_store_gib (and /dev/shm in containers), "
            "or read fewer representations."
        )


@contextmanager
def _ordered_execution() -> Iterator[None]:
    """Keep file order (Ray Data returns blocks as they finish), no progress bars or plans; put the settings back."""
    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    before = context.execution_options.preserve_order, context.enable_progress_bars
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    try:
        yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before
        logger.setLevel(level)
