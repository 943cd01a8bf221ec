"""How much memory autograd keeps alive, counted on any device, and the process's peak resident memory."""

from __future__ import annotations

import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


class SavedTensorMeter:
    """Counts the bytes that autograd graphs built inside the context keep for their backward pass.

    Every tensor saved by an operation passes through a hook. The hook hands autograd a small holder instead; when the
    graph is freed, by backward or by going out of scope, the holder dies and its bytes are subtracted. Bytes belong to
    storages: a storage saved by several operations, or through views, counts once while any holder of it lives.
    Parameters are alive anyway, so their storages (`ignore`) do not count. What runs inside another meter, or inside
    activation checkpointing, is hidden from this one.

    Args:
        ignore: tensors whose storages are not counted, usually `module.parameters()`.
        trace_points: keep a course of at most so many points; 0 = none.

    Attributes:
        live_bytes: kept now.
        peak_bytes: largest `live_bytes` so far.
        trace: (seconds since entering, bytes kept from then on), complete once the context is left.
    """

    def __init__(self, ignore: Iterable[Tensor] = (), trace_points: int = 0) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self.trace: list[tuple[float, int]] = []
        self._trace_points, self._started = trace_points, time.perf_counter()
        self._recent: list[tuple[float, int]] = []
        self._stride = 1
        self._ignored = {t.untyped_storage().data_ptr() for t in ignore}
        self._holders: dict[int, int] = {}  # storage address -> live holders; a held storage cannot be reused
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> SavedTensorMeter:
        self.trace, self._started = [], time.perf_counter()
        self._note()
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        if self._trace_points:
            self.trace += [*_extremes(self._recent), self._point()]

    def _pack(self, tensor: Tensor) -> _Holder:
        holder = _Holder(tensor)
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._ignored:
            if address not in self._holders:
                self._holders[address] = 0
                self.live_bytes += size
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                self._note()
            self._holders[address] += 1
            weakref.finalize(holder, self._release, address, size).atexit = False
        return holder

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if self._holders[address] == 0:
            del self._holders[address]
            self.live_bytes -= size
            self._note()

    def _point(self) -> tuple[float, int]:
        return time.perf_counter() - self._started, self.live_bytes

    def _note(self) -> None:
        """Add the present to the trace: of every few changes the lowest and the highest, of more as it gets longer."""
        if not self._trace_points:
            return
        self._recent.append(self._point())
        if len(self._recent) >= 2 * self._stride:
            self.trace += _extremes(self._recent)
            self._recent = []
        if len(self.trace) > self._trace_points:
            self.trace = [kept for i in range(0, len(self.trace), 4) for kept in _extremes(self.trace[i : i + 4])]
            self._stride *= 2

    @staticmethod
    def _unpack(holder: _Holder) -> Tensor:
        return holder.tensor


def _extremes(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Return the points with the fewest and the most bytes, in order of time."""
    if not points:
        return []
    return sorted({min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])})


class _Holder:
    """Keeps one saved tensor; a plain object, so that its end can be noticed."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an operation's own output would keep its graph alive through itself


def memory_trace(
    run: Callable[[], object], ignore: Iterable[Tensor] = (), points: int = 1000
) -> tuple[list[float], list[int]]:
    """Return (seconds, bytes): how much autograd keeps for backward while `run` runs, from its start to its end.

    Counts what `SavedTensorMeter` counts: activations, not parameters, gradients or optimiser moments.

    Args:
        run: e.g. one fine-tuning rollout; called once.
        ignore: tensors not to count, usually the parameters of every module involved.
        points: longest trace; a longer one is thinned, its highest and lowest points kept.

    Raises:
        ValueError: fewer than 8 points.

    Source: the course over a training step of Fig. 9.
    """
    if points < 8:
        raise ValueError(f"points must be >= 8, got {points}")
    with SavedTensorMeter(ignore, trace_points=points) as meter:
        run()
    seconds, kept = zip(*meter.trace)
    return list(seconds), list(kept)


def peak_rss_bytes() -> int:
    """Return the largest resident memory this process has had.

    Linux's own counter is used where there is one: the portable one starts at the parent's value in a child process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
