"""Rows in, shards out: per split, row groups and files of fixed size, in the order of arrival."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from motionrft.data.schema import CLIP_SCHEMA, ROW_GROUP, parquet_writer


class SplitWriter:
    """Writes clips/split=NAME/part-*.parquet. The sizes of incoming tables do not show in the output."""

    def __init__(self, root: Path, split: str, clips_per_shard: int, on_group: Callable[[pa.Table], None]) -> None:
        self._folder = root / "clips" / f"split={split}"
        self._shard_rows, self._on_group = clips_per_shard, on_group
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._rows_in_shard = 0
        self.files: dict[Path, int] = {}  # path -> rows
        self.clips = self.frames = self.captions = 0

    def add(self, table: pa.Table) -> None:
        """Take rows of `CLIP_SCHEMA`; full row groups are written at once."""
        self._pending.append(table)
        self._pending_rows += len(table)
        while self._pending_rows >= self._room():
            self._write(self._room())

    def close(self) -> None:
        """Write what is left and finish the last file."""
        while self._pending_rows:
            self._write(min(self._pending_rows, self._room()))
        self._finish_shard()

    def _room(self) -> int:
        return min(ROW_GROUP, self._shard_rows - self._rows_in_shard)

    def _write(self, rows: int) -> None:
        merged = pa.concat_tables(self._pending)
        group, rest = merged.slice(0, rows).combine_chunks(), merged.slice(rows)
        self._pending, self._pending_rows = [rest] if len(rest) else [], len(rest)
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"part-{len(self.files):05d}.parquet"
            self._writer = parquet_writer(str(path), CLIP_SCHEMA)
            self.files[path] = 0
        self._writer.write_table(group, row_group_size=len(group))
        self.files[next(reversed(self.files))] += rows
        self._rows_in_shard += rows
        self.clips += rows
        self.frames += sum(group["n_frames"].to_pylist())
        self.captions += sum(map(len, group["captions"].to_pylist()))
        self._on_group(group)
        if self._rows_in_shard == self._shard_rows:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._rows_in_shard = None, 0
