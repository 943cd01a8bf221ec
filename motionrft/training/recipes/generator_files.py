"""Generators on disk: whole models, and adapters that name the model they belong to.

    FOLDER/step_XXXXXXXX   model.safetensors, normalizer.safetensors, frozen.safetensors (autoencoder and the like)
                           card: family, sizes, text encoder, statistics, frame rate; for an adapter also its base

`load_generator` returns a plain network either way: an adapter is merged into its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, explain
from motionrft.core.types import Representation
from motionrft.generators.base import Generator
from motionrft.generators.lora import Adapter, adapter_state, merge_adapter
from motionrft.generators.registry import generator_from_card
from motionrft.representations.normalize import Normalizer
from motionrft.training.checkpoint import (
    Card,
    Checkpoint,
    Snapshot,
    latest,
    load_checkpoint,
    load_into,
    read_manifest,
    save_checkpoint,
)
from motionrft.training.state_dict import require_same_tensors

KIND, ADAPTER_KIND = "generator", "generator-adapter"


def generator_checkpoint_card(
    description: Mapping[str, Any], normalizer: Normalizer, origin: Mapping[str, Any]
) -> Card:
    """Return the card of a generator's checkpoint: how to rebuild it, what it was trained with, where it comes from."""
    prints = {
        f"normalizer/{normalizer.representation.value}": normalizer.fingerprint,
        "text_encoder": str(description["text_encoder"]),
    }
    return Card(KIND, {"generator": dict(description), "origin": dict(origin)}, prints)


def take_frozen(generator: Generator, found: Mapping[str, Tensor], folder: str) -> None:
    """Copy the frozen parts of a model folder, which must be those of the same family and sizes.

    Raises:
        CheckpointError: naming what is missing, unknown or mis-shaped.
    """
    own = {name: tuple(tensor.shape) for name, tensor in generator.frozen.state_dict().items()}
    require_same_tensors(own, found, f"{folder}: frozen parts", "Train the autoencoder with the same generator.model.")
    generator.frozen.load_state_dict(found, strict=True)


@dataclass(frozen=True)
class Fixed:
    """What a generator's checkpoint holds beside its trained weights."""

    normalizer: Normalizer
    frozen: Mapping[str, Tensor]
    """Autoencoder, latent statistics, empty caption; possibly nothing."""

    @classmethod
    def of(cls, generator: Generator) -> Fixed:
        """Return the fixed parts of a generator, copied to the CPU."""
        frozen = {name: t.detach().cpu().contiguous().clone() for name, t in generator.frozen.state_dict().items()}
        return cls(generator.normalizer.to("cpu"), frozen)

    def extras(self) -> dict[str, Mapping[str, Tensor]]:
        """Return them as files of a checkpoint."""
        statistics = {"mean": self.normalizer.mean.cpu().clone(), "std": self.normalizer.std.cpu().clone()}
        return {"normalizer": statistics, **({"frozen": self.frozen} if self.frozen else {})}


def save_weights(
    place: Path, weights: Mapping[str, Tensor], card: Card, fixed: Fixed, done: int, optimizer_steps: int
) -> Path:
    """Write a generator's weights with its fixed parts to PLACE and return the checkpoint folder."""
    model = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    return save_checkpoint(place, Snapshot(done, optimizer_steps, model, {}, fixed.extras()), card)


def save_adapter(
    place: Path, weights: Mapping[str, Tensor], card: Card, adapter: Adapter, base: Path, done: int, steps: int
) -> Path:
    """Write the adapter among a network's tensors to PLACE, bound to the model it was trained on.

    Args:
        place: folder to write.
        weights: trained tensors by name.
        card: of the adapted generator.
        adapter: its size.
        base: model folder it belongs to.
        done: batches done.
        steps: optimiser steps applied.
    """
    config = {
        **card.config,
        "adapter": {"rank": adapter.rank, "alpha": adapter.alpha, "targets": adapter.targets},
        "base": str(base.resolve()),
    }
    prints = {**card.fingerprints, "base": weights_fingerprint(base)}
    model = {n: t.detach().float().cpu().contiguous() for n, t in adapter_state(weights).items()}
    return save_checkpoint(place, Snapshot(done, steps, model, {}), Card(ADAPTER_KIND, config, prints))


def weights_fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a model folder's weights, as its manifest states it."""
    return str(read_manifest(_newest(folder))["files"]["model.safetensors"]["sha256"])


def load_generator(folder: Path | str, device: torch.device | str = "cpu", base: Path | str = "") -> Generator:
    """Return the generator whose weights lie in a model folder, in eval mode; adapters are merged into their base.

    Args:
        folder: of a model or of an adapter.
        device: where it goes.
        base: model folder of an adapter's base, if it is not where it was when the adapter was trained.

    Raises:
        CheckpointError: missing, damaged, of something else, or an adapter of other weights.
    """
    checkpoint = load_checkpoint(Path(folder), with_optimizer=False)
    card = checkpoint.card
    if card.kind == ADAPTER_KIND:
        place = _base_of(checkpoint, base)
        generator = load_generator(place)
        settings = card.config["adapter"]
        merge_adapter(generator.network, checkpoint.snapshot.model, settings["alpha"] / settings["rank"])
        return generator.to(device)
    if card.kind != KIND:
        raise CheckpointError(explain("a generator", f"kind {card.kind!r}", str(folder), "Check the path."))
    with torch.random.fork_rng(devices=[]):  # the weights are overwritten: callers keep their random state
        _, generator = generator_from_card(card.config["generator"], _normalizer_of(checkpoint))
    load_into(generator.network, checkpoint)
    take_frozen(generator, checkpoint.snapshot.extras.get("frozen", {}), str(folder))
    generator.network.eval()
    return generator.to(device)


def _base_of(adapter: Checkpoint, given: Path | str) -> Path:
    """Return the folder of the model an adapter belongs to, after comparing its weights."""
    place = Path(given) if given else Path(str(adapter.card.config["base"]))
    expected = adapter.card.fingerprints["base"]
    got = weights_fingerprint(place) if place.is_dir() else "no such folder"
    if got != expected:
        raise CheckpointError(
            explain(
                f"the model with weights {expected[:12]} that this adapter was trained on",
                got[:14],
                f"{adapter.path}: base {place}",
                "Give --base FOLDER of that model.",
            )
        )
    return place


def _newest(folder: Path) -> Path:
    return latest(folder) or folder


def _normalizer_of(checkpoint: Checkpoint) -> Normalizer:
    packed = checkpoint.snapshot.extras["normalizer"]
    kind = Representation(checkpoint.card.config["generator"]["representation"])
    return Normalizer(packed["mean"], packed["std"], kind)


def load_description(folder: Path | str, base: Path | str = "") -> tuple[Card, Fixed]:
    """Return a model's card and fixed parts, to save weights derived from it; of an adapter those of its base."""
    checkpoint = load_checkpoint(Path(folder), with_optimizer=False)
    if checkpoint.card.kind == ADAPTER_KIND:
        return load_description(_base_of(checkpoint, base))
    return checkpoint.card, Fixed(_normalizer_of(checkpoint), checkpoint.snapshot.extras.get("frozen", {}))
