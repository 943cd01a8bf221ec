"""One progress line every few seconds: how far, how fast, how long still."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

_LOG = logging.getLogger(__name__)


class Progress:
    """Logs on rank 0, at most once per `every_s` seconds, plus once at the end."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        label: str = "step",
        every_s: float = 10.0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._label, self._every_s, self._enabled, self._clock = total, label, every_s, enabled, clock
        self._start, self._started = start, clock()
        self._last_line = self._started

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Log a line if it is time."""
        now = self._clock()
        if not self._enabled or (now - self._last_line < self._every_s and done < self._total):
            return
        self._last_line = now
        rate = (done - self._start) / max(now - self._started, 1e-9)
        remaining = (self._total - done) / rate if rate > 0 else float("inf")
        shown = "".join(f"  {name}={value:.4g}" for name, value in sorted((values or {}).items()))
        _LOG.info("%s %d/%d  %.3g/s  eta %s%s", self._label, done, self._total, rate, format_seconds(remaining), shown)


def format_seconds(seconds: float) -> str:
    """Return 42s, 3m05s, 2h07m, or ? when unknown."""
    if not seconds < 1e8:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
