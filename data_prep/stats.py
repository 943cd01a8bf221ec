"""Training statistics while rows stream by: float64 moments of fixed row groups, merged in a fixed order.

Letters: M rows of all clips of a group, D features.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from motionrft.core.types import Representation
from motionrft.data.manifest import stats_file
from motionrft.data.tables import ListColumn
from motionrft.representations.normalize import Moments, Normalizer, finalise


class TrainStatistics:
    """Collects moments of the training split, one part per row group."""

    def __init__(self) -> None:
        self._parts: dict[Representation, list[Moments]] = {r: [] for r in Representation}
        self._ids = hashlib.sha256()
        self.clips = 0

    def add(self, table: pa.Table) -> None:
        """Take the clips of one row group (`CLIP_SCHEMA`); groups must come in file order."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # one order of summation
        try:
            for r, parts in self._parts.items():
                column = ListColumn(table[r.value])
                rows = [torch.from_numpy(column.row(i).reshape(-1, r.dim).copy()) for i in range(len(column))]
                parts.append(Moments.of(torch.cat(rows)))
        finally:
            torch.set_num_threads(threads)
        for item_id in table["item_id"].to_pylist():
            self._ids.update(item_id.encode() + b"\n")
            self.clips += 1

    def normalizers(self, provenance: dict[str, Any]) -> dict[Representation, Normalizer]:
        """Return the finished normalisers; empty where no clip came."""
        card = {**provenance, "split": "train", "clips": self.clips, "ids_sha256": self._ids.hexdigest()}
        return {r: finalise(Moments.merge_all(parts), r, card) for r, parts in self._parts.items() if parts}


def save_statistics(root: Path, normalizers: dict[Representation, Normalizer]) -> None:
    """Write ROOT/stats/*.npz."""
    for representation, normalizer in normalizers.items():
        normalizer.save(stats_file(root, representation))
