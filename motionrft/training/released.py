"""Released weight files (torch pickles) read without running anything they hold, and written in the same format.

The only place that calls `torch.load`. Allowed beside tensors and plain values are numpy float64 scalars, which
released files keep among their metrics. Training frameworks pickle more than that into their files (callbacks, argument
namespaces): where a caller says so, such objects are read as `Unread`, which holds nothing and does nothing.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
import yaml
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, explain

_scalar = np.float64(0).__reduce__()[0]
# Written as `numpy.core` by numpy 1 and as `numpy._core` by numpy 2.
_NUMPY_SCALARS: list[Any] = [
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    (type(np.dtype(np.float64)), "numpy.dtypes.Float64DType"),
]
_AGAIN = "Download the file again from where it was published"


class Unread:
    """Stands for an object of a class that is not loaded; whatever the file wants to put into it is dropped."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Take any arguments."""
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Unread:
        """Stand for what a call would have made."""
        return Unread()

    def __setstate__(self, _: Any) -> None:
        """Drop it."""

    def __setitem__(self, _: Any, __: Any) -> None:
        """Drop it."""

    def append(self, _: Any) -> None:
        """Drop it."""

    def extend(self, _: Any) -> None:
        """Drop it."""


_MADE = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}


class _InertUnpickler(pickle.Unpickler):
    """Knows how tensors are put together; every other name becomes `Unread`, so that nothing of a file is run."""

    def find_class(self, module: str, name: str) -> Any:
        return _MADE.get((module, name), Unread)


def read_released(path: Path, drop_objects: bool = False) -> dict[str, Any]:
    """Return the top level of a released file: tensors and plain values on CPU.

    Args:
        path: the file.
        drop_objects: read objects of other classes as `Unread` instead of refusing the file. Nothing is run either way.

    Raises:
        CheckpointError: missing, cut, not a mapping, or holding objects that could run code.
    """
    if not path.is_file():
        raise CheckpointError(explain("a released weight file", "no such file", str(path), "Check the folder."))
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except pickle.UnpicklingError as error:
        # torch's own text advises to load without the restriction; only its reason is passed on.
        if drop_objects and zipfile.is_zipfile(path):
            return _mapping(_without_objects(path), path)
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        got = f"a reference to {found[1]}" if found else "something else, or a damaged file"
        raise CheckpointError(
            explain("tensors and plain values only", f"{got}; nothing of it was run", str(path), f"{_AGAIN}.")
        ) from None
    except Exception as error:  # a damaged stream fails in many ways, assertions and lookups included
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            explain("a whole torch file", f"a cut or damaged one ({reason})", str(path), f"{_AGAIN}.")
        ) from error
    return _mapping(content, path)


def _mapping(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise CheckpointError(explain("a mapping", type(content).__name__, str(path), "Check which file this is."))
    return dict(content)


def _without_objects(path: Path) -> Any:
    inert = SimpleNamespace(Unpickler=_InertUnpickler, __name__="inert")
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert)  # noqa: TID251
    except Exception as error:  # a damaged stream fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        got = f"a damaged one ({reason})"
        raise CheckpointError(explain("a whole torch file", got, str(path), f"{_AGAIN}.")) from error


def released_tensors(content: Mapping[str, Any], keys: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    """Return the tensors under the first of `keys`, or the content itself where it is a bare mapping of tensors.

    Raises:
        CheckpointError: neither is there, or a value is no finite float32 tensor.
    """
    key = next((k for k in keys if k in content), None)
    found = content if key is None else content[key]
    if key is None and not (content and all(isinstance(v, Tensor) for v in content.values())):
        got = f"keys {sorted(map(str, content))[:8]}"
        raise CheckpointError(explain(f"{' or '.join(keys)}, or bare tensors", got, str(path), "Check the file."))
    if not isinstance(found, Mapping):
        raise CheckpointError(explain("a mapping of tensors", type(found).__name__, f"{path}: {key}", "Check it."))
    problems = [text for name, value in found.items() if (text := _unfit(name, value))]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(explain("finite float32 tensors", shown, str(path), f"{_AGAIN}."))
    return dict(found)


def _unfit(name: Any, value: Any) -> str:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return f"{name} is {type(value).__name__}"
    if value.dtype != torch.float32:
        return f"{name} is {str(value.dtype).removeprefix('torch.')}"
    return "" if bool(value.isfinite().all()) else f"{name} holds NaN or infinity"


def plain(value: Any) -> Any:
    """Return JSON data for what a released file says beside its tensors; anything unknown becomes its text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)  # JSON has no NaN
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def read_content(path: Path) -> Any:
    """Return what a file of a released set holds: torch files as nested plain data, arrays as tensors, data, or text.

    Raises:
        CheckpointError: unreadable, damaged, or holding what only running code could read.
    """
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.suffix in (".yaml", ".yml"):
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.suffix == ".txt":
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError, TypeError, EOFError, yaml.YAMLError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(explain(f"a readable {path.suffix} file", reason, str(path), f"{_AGAIN}.")) from error
    return read_released(path, drop_objects=True)


def write_released(folder: Path, files: Mapping[str, Any]) -> list[Path]:
    """Write released files into `folder`, each whole or absent, and return their paths.

    Args:
        folder: may exist.
        files: name -> content; .npy, .json, .yaml and .txt are written as such, everything else by torch.

    Raises:
        ConfigError: one of them is there already; nothing is overwritten.
        CheckpointError: the disk refuses.
    """
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise ConfigError(explain("a folder without these files", ", ".join(there), str(folder), "Choose another."))
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _write(folder / name, content)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(f"{folder} could not be written: {error}. Free space or choose another folder") from error
    return [folder / name for name in files]


def _write(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as handle:
            if path.suffix == ".npy":
                np.save(handle, content.detach().cpu().numpy() if isinstance(content, Tensor) else content)
            elif path.suffix == ".json":
                handle.write(json.dumps(content, indent=1).encode())
            elif path.suffix in (".yaml", ".yml"):
                handle.write(yaml.safe_dump(content, sort_keys=False).encode())
            elif path.suffix == ".txt":
                handle.write(str(content).encode())
            else:
                torch.save(dict(content), handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
