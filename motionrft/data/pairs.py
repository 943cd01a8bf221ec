"""Pairs of motions for the adapters: ranked ones (preference) and captured against generated ones (authenticity).

Both members of a pair have one length and went through the same conversion, so nothing but the motion tells them apart.
Letters: B pairs, T frames, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from motionrft.core.errors import DataError, explain
from motionrft.core.rng import stable_key
from motionrft.core.types import Representation
from motionrft.data.collate import pad
from motionrft.data.tables import ListColumn

MEMBERS = ("first", "second")
"""Preference: preferred, rejected. Authenticity: captured, generated."""
KINDS = ("preference", "authenticity")

PAIR_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("clip_id", pa.string()),
        ("kind", pa.string()),  # what was done: "jitter 1>2", "generated"
        ("n_frames", pa.int32()),
        *((f"{r.value}_{m}", pa.list_(pa.float32())) for m in MEMBERS for r in Representation),
    ]
)
"""Columns of KIND_SPLIT.parquet."""


def pair_file(folder: Path, name: str, split: str) -> Path:
    """Return where a pair table lies."""
    return folder / f"{name}_{split}.parquet"


class PairTable:
    """One pair table in memory.

    Attributes:
        name: "preference" or "authenticity".
        pair_ids: unique names.
        kinds: what was done to the second member.
    """

    def __init__(self, table: pa.Table, name: str) -> None:
        missing = [c for c in PAIR_SCHEMA.names if c not in table.column_names]
        if name not in KINDS or missing:
            raise DataError(explain(f"a pair table of {KINDS}", f"{name!r} without {missing}", "pairs", "Build pairs."))
        self.name = name
        self.pair_ids: tuple[str, ...] = tuple(table["pair_id"].to_pylist())
        self.kinds: tuple[str, ...] = tuple(table["kind"].to_pylist())
        self.lengths = torch.tensor(table["n_frames"].to_numpy().astype("int64"))
        self.keys = torch.tensor([stable_key(i) for i in self.pair_ids], dtype=torch.int64)
        self._columns = {(r, m): ListColumn(table[f"{r.value}_{m}"]) for r in Representation for m in MEMBERS}
        for (r, m), column in self._columns.items():
            if (column.sizes != self.lengths.numpy() * r.dim).any():
                raise DataError(explain(f"T x {r.dim} numbers", "other sizes", f"{r.value}_{m}", "Build pairs again."))

    @classmethod
    def open(cls, folder: Path, name: str, split: str) -> PairTable:
        """Read FOLDER/NAME_SPLIT.parquet.

        Raises:
            DataError: missing, damaged, or empty.
        """
        path = pair_file(Path(folder), name, split)
        if not path.is_file():
            raise DataError(explain("a pair table", "no such file", str(path), "Build the pairs of this split first."))
        try:
            table = pq.ParquetFile(path).read()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(explain("a Parquet file", str(error), str(path), "Build the pairs again.")) from error
        if not len(table):
            raise DataError(explain("at least one pair", "none", str(path), "Use more clips."))
        return cls(table, name)

    def __len__(self) -> int:
        return len(self.pair_ids)

    def motions(
        self, rows: Sequence[int], member: str, representations: Sequence[Representation], device: torch.device | str
    ) -> dict[str, Tensor]:
        """Return one member of each pair, representation -> (B, T, D), zeros beyond each length."""
        frames = int(self.lengths[list(rows)].max())
        found = {}
        for r in representations:
            column = self._columns[r, member]
            found[r.value] = pad([column.row(i).reshape(-1, r.dim) for i in rows], frames, r.dim).to(device)
        return found

    def inputs(
        self, rows: Sequence[int], representations: Sequence[Representation], device: torch.device | str
    ) -> dict[str, Any]:
        """Return the keyword arguments of the adapter's objective (without `step`) for these pairs.

        Authenticity gets 2B motions, captured (label 0) before generated (label 1): every batch is balanced.
        """
        rows = list(rows)
        lengths, keys = self.lengths[rows].to(device), self.keys[rows].to(device)
        first, second = (self.motions(rows, m, representations, device) for m in MEMBERS)
        if self.name == "preference":
            return {
                "preferred": first,
                "rejected": second,
                "preferred_lengths_B": lengths,
                "rejected_lengths_B": lengths,
                "keys_B": keys,
            }
        labels = torch.cat([torch.zeros_like(lengths), torch.ones_like(lengths)])
        return {
            "motions": {n: torch.cat([first[n], second[n]]) for n in first},
            "lengths_B": lengths.repeat(2),
            "labels_B": labels,
            "keys_B": keys.repeat(2),
        }
