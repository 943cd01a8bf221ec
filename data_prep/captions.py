"""Captions: mirroring of words, and their features, encoded once.

Letters: L tokens, D features.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from motionrft.core.errors import DataError, explain
from motionrft.data.schema import TEXT_SCHEMA, parquet_writer
from motionrft.nn.text import TextEncoder, load_text_encoder

BATCH = 128  # captions per forward: fixed, so that features do not depend on the number of workers
_PAIRS = (
    ("left", "right"),
    ("leftward", "rightward"),
    ("leftwards", "rightwards"),
    ("lefthand", "righthand"),
    ("clockwise", "counterclockwise"),
)
_SWAPS = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])} | {
    "anticlockwise": "clockwise",
    "counter-clockwise": "clockwise",
}
_WORD = re.compile(r"\b(?:" + "|".join(sorted(map(re.escape, _SWAPS), key=len, reverse=True)) + r")\b", re.IGNORECASE)


def mirror_text(caption: str) -> str:
    """Return the caption of the mirrored motion: left and right, clockwise and counterclockwise exchanged."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        other = _SWAPS[word.lower()]
        return other.capitalize() if word[0].isupper() else other

    return _WORD.sub(swap, caption)


def mirror_class(class_name: str) -> str:
    """Return the class of the mirrored motion: parts such as "left" or "left_hand" are exchanged."""
    return "|".join("_".join(mirror_text(w) for w in part.split("_")) for part in class_name.split("|"))


def caption_batches(captions: Iterable[str]) -> list[list[str]]:
    """Return unique captions and "" in a fixed order, shortest first, in batches that never depend on layout."""
    unique = sorted({"", *captions}, key=lambda c: (len(c), c))
    return [unique[i : i + BATCH] for i in range(0, len(unique), BATCH)]


@dataclass(frozen=True)
class EncoderCard:
    """Which encoder made features."""

    name: str
    fingerprint: str
    dim: int  # features per token


class CaptionEncoder:
    """Encodes batches of captions to `TEXT_SCHEMA` tables; one instance per process, weights loaded once."""

    def __init__(self, name: str) -> None:
        self._encoder: TextEncoder = load_text_encoder(name)
        self.card = EncoderCard(name, self._encoder.fingerprint, self._encoder.dim)

    def __call__(self, captions: Sequence[str]) -> pa.Table:
        """Return one row per caption, tokens rounded to float16."""
        condition = self._encoder.encode(list(captions))
        counts = condition.mask_BL.sum(1).tolist()
        tokens = condition.tokens_BLD.numpy().astype(np.float16)
        flat = [tokens[i, :n].reshape(-1) for i, n in enumerate(counts)]
        offsets = np.concatenate([[0], np.cumsum([len(f) for f in flat])]).astype(np.int32)
        pooled = condition.pooled_BD.numpy()
        pooled_offsets = np.arange(len(counts) + 1, dtype=np.int32) * pooled.shape[1]
        return pa.Table.from_arrays(
            [
                pa.array(list(captions), pa.string()),
                pa.array(counts, pa.int32()),
                pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(flat), pa.float16())),
                pa.ListArray.from_arrays(pooled_offsets, pa.array(pooled.reshape(-1), pa.float32())),
            ],
            schema=TEXT_SCHEMA,
        )


class TextCache:
    """Features shared by datasets, keyed by (caption, encoder fingerprint): one Parquet file per encoder."""

    def __init__(self, folder: str, fingerprint: str) -> None:
        self._path = Path(folder) / f"{fingerprint}.parquet" if folder else None
        self.table = TEXT_SCHEMA.empty_table()
        if self._path is not None and self._path.is_file():
            try:
                self.table = pq.ParquetFile(self._path).read().cast(TEXT_SCHEMA)
            except (OSError, pa.ArrowException, ValueError) as error:
                raise DataError(
                    explain("a text cache file", str(error), str(self._path), "Delete it: it will be rebuilt.")
                ) from error
        self._rows = {c: i for i, c in enumerate(self.table["caption"].to_pylist())}

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Return the captions without features, in order."""
        return [c for c in captions if c not in self._rows]

    def add(self, tables: Sequence[pa.Table]) -> None:
        """Add newly encoded captions and write the file atomically."""
        if not tables:
            return
        self.table = pa.concat_tables([self.table, *(t.cast(TEXT_SCHEMA) for t in tables)])
        self._rows = {c: i for i, c in enumerate(self.table["caption"].to_pylist())}
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        write_text(partial, self.table)
        partial.replace(self._path)

    def take(self, captions: Sequence[str]) -> pa.Table:
        """Return the rows of these captions, in their order."""
        return self.table.take(pa.array([self._rows[c] for c in captions], pa.int64()))


def write_text(path: Path, table: pa.Table) -> None:
    """Write text features in row groups of fixed size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with parquet_writer(str(path), TEXT_SCHEMA) as writer:
        for start in range(0, len(table), 4096):
            writer.write_table(table.slice(start, 4096).combine_chunks())
