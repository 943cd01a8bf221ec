"""What people see on the terminal: log lines, one moving progress line, tables, and errors as one block."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from motionrft.core.errors import MotionRFTError
from motionrft.training.progress import format_seconds

_QUIET = ("ray", "deepspeed", "DeepSpeed", "transformers", "filelock", "urllib3", "matplotlib")


def set_up_logging(run_dir: Path | None = None, debug: bool = False) -> None:
    """Send the project's records to standard error, and to RUN_DIR/log.txt."""
    root = logging.getLogger()
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    shape = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(shape)
        root.addHandler(handler)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.ERROR)


@contextmanager
def progress_line(label: str, every_s: float = 5.0) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (stage, done, total) that logs rate and time left now and then."""
    log = logging.getLogger(__name__)
    began: dict[str, float] = {}
    last: dict[str, float] = {}

    def tell(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = began.setdefault(stage, now)
        if done < total and now - last.get(stage, start) < every_s:
            return
        last[stage] = now
        rate = done / max(now - start, 1e-9)
        left = (total - done) / rate if rate > 0 else float("inf")
        log.info("%s: %s %d/%d  %.3g/s  eta %s", label, stage, done, total, rate, format_seconds(left))

    yield tell


def table(rows: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str], digits: Mapping[str, int]) -> str:
    """Return rows of {metric: {"mean", "ci95"}} as aligned text, one metric per line."""
    names = list(rows)
    lines = [f"{'':24}" + "".join(f"{name:>22}" for name in names)]
    for key, label in keys.items():
        cells = [_cell(rows[name].get(key) or {}, digits.get(key, 3)) for name in names]
        lines.append(f"{label:24}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any], digits: int) -> str:
    mean, half = cell.get("mean"), cell.get("ci95")
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def show_error(error: MotionRFTError) -> None:
    """Print a user's error as one block."""
    print(f"\nerror ({type(error).__name__}): {error}\n", file=sys.stderr)
