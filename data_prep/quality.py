"""Nothing vanishes silently: every rejected or odd clip is a row of quality.parquet and a line of quality.txt."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from data_prep.sources.base import Rejected
from motionrft.data.schema import QUALITY_SCHEMA, QcFlag, parquet_writer

_MEANING = {
    "TOO_SHORT": "fewer frames than min_frames",
    "TOO_LONG": "more frames than max_frames with long_clips=reject",
    "NONFINITE": "NaN or inf",
    "WRONG_SHAPE": "not (T, 22, 3) or a shape that can be read as it",
    "UNKNOWN_FPS": "no frame rate",
    "ZERO_BONE": "a bone without length",
    "WRONG_UNIT": "sizes that are not metres",
    "WRONG_UP_AXIS": "head below feet",
    "UNREADABLE": "the reader failed",
    "MISSING_FILE": "listed in a split, but no file",
    "BAD_CAPTION_LINE": "a caption line that does not parse",
}


@dataclass
class QualityLog:
    """Collects rows while clips stream by.

    Severities: "rejected" = an id that was read and is not in the dataset; "source" = a problem beyond the ids;
    "flagged" = kept, but odd.
    """

    rows: list[tuple[str, str, str, str, str, str]] = field(default_factory=list)
    read: int = 0
    clips: int = 0  # without mirrored copies

    def reject(self, rejected: Rejected, severity: str = "rejected") -> None:
        """Add one unusable clip (or source problem)."""
        r = rejected
        self.rows.append((r.clip_id, r.split, r.source, severity, r.reason_code, r.detail))

    def flag(self, item_id: str, split: str, source: str, flags: int) -> None:
        """Add one row per flag of a kept clip."""
        for flag in QcFlag:
            if flags & flag:
                self.rows.append((item_id, split, source, "flagged", str(flag.name), ""))

    def count(self, severity: str) -> int:
        """Return the number of rows of a severity."""
        return sum(row[3] == severity for row in self.rows)

    def codes(self, *severities: str) -> dict[str, int]:
        """Return rows per code, most frequent first."""
        counts = Counter(row[4] for row in self.rows if row[3] in severities)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def missing(self) -> int:
        """Return how many clips a split lists that do not exist."""
        return sum(row[3] == "source" and row[4] == "MISSING_FILE" for row in self.rows)

    def summary(self) -> str:
        """Return the readable report."""
        lines = [f"{self.read} clips read: {self.clips} in the dataset, {self.count('rejected')} rejected."]
        for severity, title in (
            ("rejected", "Rejected"),
            ("source", "Problems of the source"),
            ("flagged", "Kept but unusual"),
        ):
            codes = self.codes(severity)
            if codes:
                lines += ["", f"{title}:"]
            for code, count in codes.items():
                example = next(row for row in self.rows if row[3] == severity and row[4] == code)
                meaning = f" ({_MEANING[code]})" if code in _MEANING else ""
                detail = f": {example[5]}" if example[5] else ""
                lines.append(f"  {count:6d}  {code}{meaning}, e.g. {example[0]}{detail}")
        return "\n".join(lines) + "\n"

    def write(self, root: Path) -> int:
        """Write ROOT/quality.parquet and ROOT/quality.txt; return the number of rows."""
        columns = list(zip(*self.rows)) if self.rows else [()] * len(QUALITY_SCHEMA)
        table = pa.Table.from_arrays([pa.array(c, pa.string()) for c in columns], schema=QUALITY_SCHEMA)
        with parquet_writer(str(root / "quality.parquet"), QUALITY_SCHEMA) as writer:
            writer.write_table(table)
        (root / "quality.txt").write_text(self.summary())
        return len(self.rows)
