"""Clips and text features in memory, as the Arrow tables they were read from: decoding is a slice, nothing is copied.

Letters: N items, T frames, D features, B captions, L tokens, P features of a sentence vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from motionrft.core.errors import DataError, explain
from motionrft.core.rng import stable_key
from motionrft.core.types import Condition, Representation, valid_mask
from motionrft.data.manifest import Dataset
from motionrft.data.schema import CLIP_SCHEMA, MOTION_COLUMNS, TEXT_SCHEMA, crc

_ALL = tuple(Representation)


class ListColumn:
    """A `list<float>` column as value buffers and offsets: row i is a read-only view."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._values: list[np.ndarray] = []
        offsets, chunks = [], []
        for chunk in column.chunks:
            if chunk.null_count:
                raise DataError(explain("no missing motion", f"{chunk.null_count} nulls", "a motion column", _AGAIN))
            if len(chunk):
                # `offsets` respects slicing of the chunk, `values` does not: they belong together.
                offsets.append(chunk.offsets.to_numpy().astype(np.int64))
                chunks.append(np.full(len(chunk), len(self._values)))
                self._values.append(chunk.values.to_numpy(zero_copy_only=True))
        empty = np.zeros(0, dtype=np.int64)
        self._starts = np.concatenate([o[:-1] for o in offsets]) if offsets else empty
        self._stops = np.concatenate([o[1:] for o in offsets]) if offsets else empty
        self._chunks = np.concatenate(chunks) if chunks else empty

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def sizes(self) -> np.ndarray:
        """Number of values per row, (N,)."""
        return self._stops - self._starts

    def row(self, index: int) -> np.ndarray:
        """Return the values of one row, 1-d, without copying."""
        return self._values[self._chunks[index]][self._starts[index] : self._stops[index]]


_AGAIN = "Prepare the dataset again."


class ClipTable:
    """Items of one split. Rows keep their order in the files; read-only.

    Attributes:
        item_ids: N unique names.
        lengths: (N,) int64 frames.
        class_ids: (N,) int64, -1 = unknown.
        class_names: N names, "" = unknown.
        captions: N tuples, possibly empty.
        keys: (N,) int64 stable hash of the item id: seeds per-sample noise, crops and caption choice.
        clip_ids: N names; mirrors and segments of one recording share one.
        rot_sources: N names of where rotations come from.
        fps: frames per second of every item.
        representations: what was loaded.
    """

    def __init__(self, table: pa.Table, representations: Iterable[Representation] = _ALL, verify: bool = True) -> None:
        self.representations = tuple(Representation(r) for r in representations)
        _require_columns(table, self.representations)
        self.item_ids: tuple[str, ...] = tuple(table["item_id"].to_pylist())
        self.clip_ids: tuple[str, ...] = tuple(table["clip_id"].to_pylist())
        self.lengths: Tensor = torch.tensor(table["n_frames"].to_numpy().astype(np.int64))
        self.class_ids: Tensor = torch.tensor(table["class_id"].to_numpy().astype(np.int64))
        self.class_names: tuple[str, ...] = tuple(table["class_name"].to_pylist())
        self.captions: tuple[tuple[str, ...], ...] = tuple(tuple(c or ()) for c in table["captions"].to_pylist())
        self.rot_sources: tuple[str, ...] = tuple(table["rot_source"].to_pylist())
        self.qc_flags: np.ndarray = table["qc_flags"].to_numpy().astype(np.int64)
        self.keys: Tensor = torch.tensor([stable_key(i) for i in self.item_ids], dtype=torch.int64)
        rates = set(table["fps"].to_pylist())
        if len(rates) > 1:
            raise DataError(explain("one frame rate", f"{sorted(rates)}", "clip table", "Prepare into one rate."))
        self.fps: float = float(rates.pop()) if rates else 0.0
        if len(set(self.item_ids)) != len(self.item_ids):
            raise DataError(explain("unique item ids", "duplicates", "clip table", "Open each file once."))
        self._motions = {r: ListColumn(table[r.value]) for r in self.representations}
        for r, column in self._motions.items():
            if not np.array_equal(column.sizes, self.lengths.numpy() * r.dim):
                raise DataError(explain(f"T x {r.dim} numbers per row", "other sizes", f"column {r.value!r}", _AGAIN))
        if verify:
            self._verify(table)

    @classmethod
    def open(
        cls, dataset: Dataset, split: str, representations: Iterable[Representation] = _ALL, verify: bool = True
    ) -> ClipTable:
        """Read one split; files are mapped and only the asked representations are decoded.

        Raises:
            DataError: unknown or empty split, or a row whose checksum differs.
        """
        representations = tuple(Representation(r) for r in representations)
        columns = cls.columns(representations)
        tables = [pq.ParquetFile(path).read(columns=columns) for path in dataset.clip_files(split)]
        return cls.from_arrow(tables, representations, verify)

    @classmethod
    def from_arrow(
        cls,
        tables: pa.Table | Sequence[pa.Table],
        representations: Iterable[Representation] = _ALL,
        verify: bool = True,
    ) -> ClipTable:
        """Wrap tables that are in memory already, e.g. the blocks a training worker receives."""
        if isinstance(tables, pa.Table):
            tables = [tables]
        if not tables:
            raise DataError(explain("at least one table", "none", "clip table", "Check the split and the filter."))
        return cls(pa.concat_tables(tables, promote_options="permissive"), representations, verify)

    @staticmethod
    def columns(representations: Iterable[Representation] = _ALL) -> list[str]:
        """Return the columns to read for these representations; give them to column projection."""
        wanted = {Representation(r).value for r in representations}
        skip = {c for m in MOTION_COLUMNS if m not in wanted for c in (m, f"crc_{m}")}
        return [name for name in CLIP_SCHEMA.names if name not in skip]

    def __len__(self) -> int:
        return len(self.item_ids)

    def frames(self, row: int, representation: Representation) -> np.ndarray:
        """Return the motion of a row as a read-only view (T, D) float32."""
        representation = Representation(representation)
        return self._motions[representation].row(row).reshape(-1, representation.dim)

    def motion(self, row: int, representation: Representation) -> Tensor:
        """Return the motion of a row, (T, D) float32 in physical units; a copy."""
        return torch.from_numpy(self.frames(row, representation).copy())

    def rows(self, min_frames: int = 1, max_frames: int | None = None, with_captions: bool = False) -> list[int]:
        """Return the rows that pass a filter, in order."""
        longest = int(self.lengths.max()) if max_frames is None and len(self) else max_frames or 0
        return [
            i
            for i, n in enumerate(self.lengths.tolist())
            if min_frames <= n <= longest and (self.captions[i] or not with_captions)
        ]

    def _verify(self, table: pa.Table) -> None:
        for r, column in self._motions.items():
            expected = table[f"crc_{r.value}"].to_numpy()
            for row in range(len(self)):
                got = crc(column.row(row))
                if got != expected[row]:
                    raise DataError(
                        explain(
                            f"checksum {int(expected[row]):08x}",
                            f"{got:08x}",
                            f"item {self.item_ids[row]!r}, column {r.value!r}",
                            "The file is damaged: copy the dataset again or prepare it again.",
                        )
                    )


class TextTable:
    """Features of captions, computed once by a frozen encoder.

    Attributes:
        captions: all captions, in file order.
        fingerprint: of the encoder.
        dim: D, features per token.
        pooled_dim: P, features of the sentence vector.
    """

    def __init__(self, table: pa.Table, fingerprint: str) -> None:
        missing = [name for name in TEXT_SCHEMA.names if name not in table.column_names]
        if missing:
            raise DataError(explain("a text feature table", f"no column {missing}", "text features", _AGAIN))
        self.fingerprint = fingerprint
        self.captions: tuple[str, ...] = tuple(table["caption"].to_pylist())
        self._rows = {caption: row for row, caption in enumerate(self.captions)}
        self._tokens, self._pooled = ListColumn(table["tokens"]), ListColumn(table["pooled"])
        self._counts = table["n_tokens"].to_numpy().astype(np.int64)
        self.dim = int(self._tokens.sizes.sum() // max(self._counts.sum(), 1))
        self.pooled_dim = int(self._pooled.sizes[0]) if len(self.captions) else 0

    @classmethod
    def open(cls, dataset: Dataset) -> TextTable:
        """Read the text features of a dataset.

        Raises:
            DataError: there are none.
        """
        files = dataset.text_files()
        if not files:
            raise DataError(explain("text features", "none", str(dataset.root), _AGAIN))
        return cls(read_tables(files), dataset.manifest.text_encoder)

    @classmethod
    def open_for(cls, dataset: Dataset, fingerprint: str) -> TextTable:
        """Read the features that the encoder with this fingerprint made: the dataset's own, or added ones.

        Raises:
            DataError: the dataset has none of this encoder.
        """
        if fingerprint == dataset.manifest.text_encoder:
            return cls.open(dataset)
        return cls(read_tables([dataset.added_text_file(fingerprint)]), fingerprint)

    def __len__(self) -> int:
        return len(self.captions)

    def __contains__(self, caption: str) -> bool:
        return caption in self._rows

    def condition(self, captions: Sequence[str]) -> Condition:
        """Return features of captions: tokens (B, L, D), mask (B, L), pooled (B, P); L is the longest of these.

        Raises:
            DataError: a caption that was not encoded.
        """
        unknown = [c for c in captions if c not in self._rows]
        if unknown:
            raise DataError(
                explain(
                    "captions of this dataset",
                    f"{len(unknown)} others, e.g. {unknown[0]!r}",
                    "text features",
                    "Encode new captions with the text encoder itself.",
                )
            )
        rows = [self._rows[c] for c in captions]
        lengths_B = torch.from_numpy(self._counts[rows]) if rows else torch.zeros(0, dtype=torch.int64)
        longest = int(lengths_B.max()) if rows else 0
        tokens = np.zeros((len(rows), longest, self.dim), dtype=np.float32)
        pooled = np.zeros((len(rows), self.pooled_dim), dtype=np.float32)
        for i, row in enumerate(rows):
            tokens[i, : self._counts[row]] = self._tokens.row(row).reshape(-1, self.dim)
            pooled[i] = self._pooled.row(row)
        return Condition(torch.from_numpy(tokens), valid_mask(lengths_B, longest), torch.from_numpy(pooled))


def read_tables(files: Sequence[Path]) -> pa.Table:
    """Return the rows of Parquet files one after another."""
    return pa.concat_tables([pq.ParquetFile(path).read() for path in files])


def _require_columns(table: pa.Table, representations: tuple[Representation, ...]) -> None:
    missing = [name for name in ClipTable.columns(representations) if name not in table.column_names]
    if missing:
        raise DataError(
            explain(
                f"columns {', '.join(ClipTable.columns(representations))}",
                f"none called {', '.join(missing)}",
                "clip table",
                "Read the dataset with ClipTable.columns(representations).",
            )
        )
