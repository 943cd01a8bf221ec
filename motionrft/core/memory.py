"""How much memory autograd keeps alive, counted on any device, and the process's peak resident memory."""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


class SavedTensorMeter:
    """Counts the bytes that autograd graphs built inside the context keep for their backward pass.

    Every tensor saved by an operation passes through a hook. The hook hands autograd a small holder instead; when the
    graph is freed, by backward or by going out of scope, the holder dies and its bytes are subtracted. Bytes belong to
    storages: a storage saved by several operations, or through views, counts once while any holder of it lives.
    Parameters are alive anyway, so their storages (`ignore`) do not count.

    Args:
        ignore: tensors whose storages are not counted, usually `module.parameters()`.

    Attributes:
        live_bytes: kept now.
        peak_bytes: largest `live_bytes` so far.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self._ignored = {t.untyped_storage().data_ptr() for t in ignore}
        self._holders: dict[int, int] = {}  # storage address -> live holders; a held storage cannot be reused
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> SavedTensorMeter:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Holder:
        holder = _Holder(tensor)
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._ignored:
            if address not in self._holders:
                self._holders[address] = 0
                self.live_bytes += size
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self._holders[address] += 1
            weakref.finalize(holder, self._release, address, size).atexit = False
        return holder

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if self._holders[address] == 0:
            del self._holders[address]
            self.live_bytes -= size

    @staticmethod
    def _unpack(holder: _Holder) -> Tensor:
        return holder.tensor


class _Holder:
    """Keeps one saved tensor; a plain object, so that its end can be noticed."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an operation's own output would keep its graph alive through itself


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
