"""Low-rank adapters on a generator's network: W x + (alpha / r) B A x with only A and B trained.

Source: LoRA (Hu et al.), Eq. 3; PEFT holds the layers while training, merging is plain arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.generators.base import ModelConfig

_NAME = "default"
_PARAMETER = re.compile(rf"(.+\.lora_[AB])\.{_NAME}\.weight")


@dataclass(frozen=True)
class Adapter:
    """Size and place of one adapter."""

    rank: int
    """r, the width of the update."""
    alpha: float
    """The update is scaled by alpha / rank."""
    targets: str
    """Regular expression that the whole name of a Linear of the network matches."""


def adapter_for(model: ModelConfig, rank: int, alpha: float, preset: str = "") -> Adapter:
    """Return the adapter that one of the family's presets describes; "" = its first.

    Raises:
        ConfigError: the family names no such preset.
    """
    presets = model.lora_targets
    name = preset or next(iter(presets), "")
    if name not in presets:
        raise ConfigError(
            explain(f"one of {list(presets)}", repr(preset), f"lora_preset of {model.family}", "Choose one of them.")
        )
    return Adapter(rank, alpha, presets[name])


def add_adapter(network: nn.Module, adapter: Adapter) -> list[str]:
    """Put the adapter into the network, freeze everything else, and return the names of the layers it changes.

    B starts at zero: outputs do not change. A comes from torch's global generator (seed it first).

    Raises:
        ConfigError: no Linear of the network matches the targets.
    """
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(adapter.targets, name)
    ]
    if not names:
        raise ConfigError(
            explain("a Linear of the network", f"none that matches {adapter.targets!r}", "lora targets", "Correct it.")
        )
    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
        bias="none",
        target_modules=names,
    )
    network.requires_grad_(False)
    inject_adapter_in_model(settings, network, adapter_name=_NAME)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_PARAMETER.fullmatch(name) is not None)
    return names


def adapter_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter's tensors among a network's, as `LAYER.lora_A.weight` (r, in) and `LAYER.lora_B.weight`."""
    found = ((_PARAMETER.fullmatch(name), tensor) for name, tensor in tensors.items())
    return {f"{match[1]}.weight": tensor for match, tensor in found if match is not None}


@torch.no_grad()
def merge_adapter(network: nn.Module, state: Mapping[str, Tensor], scale: float) -> None:
    """Add scale B A to the weights of a plain network, so that it computes what the adapted one did.

    Args:
        network: without adapters.
        state: what `adapter_state` gave.
        scale: alpha / rank.

    Raises:
        CheckpointError: a layer that the network does not have, or of other sizes.
    """
    layers = sorted({name.rpartition(".lora_")[0] for name in state})
    for layer in layers:
        a, b = state.get(f"{layer}.lora_A.weight"), state.get(f"{layer}.lora_B.weight")
        weight = dict(network.named_parameters()).get(f"{layer}.weight")
        if a is None or b is None or weight is None or weight.shape != (b.shape[0], a.shape[1]):
            shapes = [None if t is None else tuple(t.shape) for t in (a, b)]
            got = "no such layer" if weight is None else f"weight {tuple(weight.shape)}, A and B {shapes}"
            raise CheckpointError(
                explain("a layer with weight (out, in), A (r, in) and B (out, r)", got, layer, "Name its own base.")
            )
        weight.add_((scale * b.double() @ a.double()).to(weight))
