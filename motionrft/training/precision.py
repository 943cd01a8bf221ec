"""Where low precision begins and ends: inside an engine's forward, never outside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Return `value` with every floating-point tensor in it (tuples, lists, mappings included) as `dtype`.

    Differentiable. Double, integer and bool tensors, and other objects, pass unchanged: what was made double is not
    meant to be rounded, above all the flow time, of which a network reads the sine of a thousandfold.
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, tuple):
        cast = [cast_floats(item, dtype) for item in value]
        return type(value)(*cast) if hasattr(value, "_fields") else tuple(cast)
    if isinstance(value, list):
        return [cast_floats(item, dtype) for item in value]
    if isinstance(value, Mapping):
        return {key: cast_floats(item, dtype) for key, item in value.items()}
    return value
