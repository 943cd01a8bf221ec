"""`motionrft merge-adapters FOLDER --out OUT`: an adapter and its base to one whole model."""

from __future__ import annotations

import argparse
from pathlib import Path

from motionrft.core.errors import ConfigError, explain
from motionrft.training.checkpoint import load_checkpoint
from motionrft.training.recipes.generator_files import ADAPTER_KIND, load_description, load_generator, save_weights


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("path", metavar="FOLDER", type=Path, help="model folder of a fine-tuning run with adapters")
    parser.add_argument("--out", required=True, type=Path, help="model folder to write")
    parser.add_argument("--base", default="", help="model the adapter belongs to, if it has moved since")


def run(options: argparse.Namespace) -> int:
    """Merge, write, and print the folder."""
    checkpoint = load_checkpoint(options.path, with_optimizer=False)
    if checkpoint.card.kind != ADAPTER_KIND:
        raise ConfigError(
            explain(
                "an adapter", f"kind {checkpoint.card.kind!r}", str(options.path), "A whole model needs no merging."
            )
        )
    if options.out.exists():
        raise ConfigError(explain("a new folder", "one that exists", str(options.out), "Choose another."))
    generator = load_generator(options.path, base=options.base)
    card, fixed = load_description(options.path, options.base)
    merged = type(card)(card.kind, {**card.config, "origin": checkpoint.card.config["origin"]}, card.fingerprints)
    found = checkpoint.snapshot
    weights = dict(generator.network.state_dict())
    print(save_weights(options.out, weights, merged, fixed, found.batches, found.optimizer_step).parent)
    return 0
