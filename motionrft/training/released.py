"""Released weight files (torch pickles) read without running anything they hold, and written in the same format.

The only place that calls `torch.load`. Allowed beside tensors and plain values are numpy float64 scalars, which
released files keep among their metrics.
"""

from __future__ import annotations

import os
import pickle
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


def read_released(path: Path) -> dict[str, Any]:
    """Return the top level of a released file: tensors and plain values on CPU.

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
    if not isinstance(content, Mapping):
        raise CheckpointError(explain("a mapping", type(content).__name__, str(path), "Check which file this is."))
    return dict(content)


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


def write_released(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Write released files into `folder`, each whole or absent, and return their paths.

    Raises:
        ConfigError: one of them is there already; nothing is overwritten.
        CheckpointError: the disk refuses.
    """
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise ConfigError(explain("a folder without these files", ", ".join(there), str(folder), "Choose another."))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write(folder / name, content)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(f"{folder} could not be written: {error}. Free space or choose another folder") from error
    return [folder / name for name in files]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as handle:
            torch.save(dict(content), handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
