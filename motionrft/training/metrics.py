"""Metrics as JSON lines, one file per run, written by rank 0. Names are paths: `reward/semantic/raw`."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from motionrft.core.errors import DataError

_PATH = re.compile(r"[a-z0-9_]+(/[A-Za-z0-9_.@=+-]+)+")


def check_metric_name(name: str) -> str:
    """Return `name` if it is a metric path (`group/name`, lower-case group).

    Raises:
        ValueError: otherwise.
    """
    if not _PATH.fullmatch(name):
        raise ValueError(f"metric name {name!r} is not a path like 'loss/total' or 'reward/semantic/raw'")
    return name


class RunningMeans:
    """Weighted means since the last reset, by name. A name may be absent from some updates."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def update(self, values: Mapping[str, float], weight: float = 1.0) -> None:
        """Add one observation of each value."""
        for name, value in values.items():
            check_metric_name(name)
            self._sums[name] = self._sums.get(name, 0.0) + weight * float(value)
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        """Return the means, sorted by name."""
        return {name: self._sums[name] / self._weights[name] for name in sorted(self._sums)}

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self._weights.clear()

    def export_state(self) -> dict[str, list[Any]]:
        """Return {name: [mean, weight]}, JSON-safe (non-finite values as text)."""
        return {name: [_encode(mean), self._weights[name]] for name, mean in self.means().items()}

    def import_state(self, state: Mapping[str, list[Any]]) -> None:
        """Restore `export_state`."""
        self._sums = {name: float(mean) * weight for name, (mean, weight) in state.items()}
        self._weights = {name: float(weight) for name, (_, weight) in state.items()}


class MetricsWriter:
    """Appends {"step": n, "name": value, ...} lines. Every line is whole on disk before the next begins."""

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path = Path(path)
        self._enabled = enabled
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self.path.open("a", encoding="ascii")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line.

        Raises:
            ValueError: if a name is not a metric path.
        """
        row = {"step": step, **{check_metric_name(n): _encode(float(v)) for n, v in values.items()}}
        if self._enabled:
            self._handle.write(json.dumps(row) + "\n")
            self._handle.flush()

    def rewind(self, step: int) -> None:
        """Drop lines after `step` and a torn last line: a resumed run writes them again."""
        if not self._enabled:
            return
        self._handle.close()
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        temporary = self.path.with_suffix(".rewinding")
        with temporary.open("w", encoding="ascii") as handle:
            handle.writelines(json.dumps({k: _encode(v) for k, v in row.items()}) + "\n" for row in kept)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, self.path)
        self._handle = self.path.open("a", encoding="ascii")

    def close(self) -> None:
        """Close the file."""
        if self._enabled:
            self._handle.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a torn last line is left out.

    Raises:
        DataError: if a line before the last is not JSON.
    """
    lines = Path(path).read_text(encoding="ascii").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"metrics file {path} is damaged at line {number}: {error}") from error
        rows.append({k: float(v) if isinstance(v, str) else v for k, v in row.items()})
    return rows


def _encode(value: float) -> float | str:
    """JSON has no NaN or infinity: they travel as text and `read_metrics` turns them back."""
    return value if math.isfinite(value) else str(value)
