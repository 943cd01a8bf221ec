"""Flat names of an engine's exported state, and strict comparison of two sets of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from motionrft.core.errors import CheckpointError
from motionrft.training.optim import trainable

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("param", *MOMENTS)
_REBUILD = "Build the model with the configuration in the checkpoint's MANIFEST.json, or choose another checkpoint."


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return {NAME: tensor} of the keys `prefix/NAME`."""
    head = f"{prefix}/"
    return {key[len(head) :]: value for key, value in state.items() if key.startswith(head)}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return {prefix/NAME: tensor}."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to the module's state (running statistics and the like), by name."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in module.state_dict().items() if name not in parameters}


def require_same_tensors(
    expected: Mapping[str, tuple[int, ...]], got: Mapping[str, Tensor], where: str, do: str = _REBUILD
) -> None:
    """Check names and shapes, both ways.

    Args:
        expected: name -> shape.
        got: name -> tensor.
        where: what the tensors are, for the message.
        do: what helps, for the message.

    Raises:
        CheckpointError: listing every missing, unexpected and mis-shaped name (first eight of each).
    """
    missing = sorted(set(expected) - set(got))
    unexpected = sorted(set(got) - set(expected))
    shapes = [
        f"{name}: expected {tuple(expected[name])}, got {tuple(got[name].shape)}"
        for name in sorted(set(expected) & set(got))
        if tuple(expected[name]) != tuple(got[name].shape)
    ]
    problems = [
        f"{label} ({len(names)}): {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit this model: {'; '.join(problems)}. {do}")


def check_engine_state(module: nn.Module, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that an exported state covers exactly the module's trainable tensors, parameters and moments.

    Raises:
        CheckpointError: as `require_same_tensors`.
    """
    names = [name for name, _ in trainable(module)]
    expected = {f"{p}/{name}": shapes[name] for p in PARTS for name in names}
    require_same_tensors(expected, state, "the saved optimiser state")


def cpu_copy(tensor: Tensor) -> Tensor:
    """Return an independent contiguous fp32 copy on CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
