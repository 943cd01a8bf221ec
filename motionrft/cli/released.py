"""`motionrft import KIND PATH` and `motionrft export KIND FOLDER`: released weights in, released weights out.

A kind is one row of `KINDS`: how its options are named, and what imports and exports it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from motionrft.core.errors import ConfigError, explain
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.data.normalizers import load_normalizers, read_array_normalizers
from motionrft.generators.registry import FAMILIES, FORMATS
from motionrft.generators.released import ReleasedFormat
from motionrft.nn.text import TEXT_ENCODER_HELP, load_text_encoder
from motionrft.representations.normalize import Normalizer
from motionrft.reward.released import PUBLISHED
from motionrft.training.recipes.released_generator import GeneratorImport, export_generator, import_generator
from motionrft.training.recipes.released_reward import (
    PARTS,
    ImportChoices,
    export_motionreward,
    find_parts,
    import_motionreward,
)

SENTENCE_T5, SENTENCE_T5_DIM = "sentence-t5-large", 1024
"""The encoder the released weights were trained with. Without its folder it is recorded by name, not by fingerprint."""


@dataclass(frozen=True)
class Kind:
    """One family of released weights."""

    text: str
    import_arguments: Callable[[argparse.ArgumentParser], None]
    run_import: Callable[[argparse.Namespace], None]
    export_arguments: Callable[[argparse.ArgumentParser], None]
    run_export: Callable[[argparse.Namespace], None]


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add one sub-command per kind."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, kind in KINDS.items():
        sub = kinds.add_parser(name, help=kind.text, description=kind.text)
        (kind.import_arguments if verb == "import" else kind.export_arguments)(sub)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def run(options: argparse.Namespace) -> int:
    """Import or export, and print what was written."""
    kind = KINDS[options.kind]
    (kind.run_import if options.verb == "import" else kind.run_export)(options)
    return 0


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR", type=Path, help="folder of the five .pth files")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--suffix", default="", help="of the file names, e.g. _r128")
    parser.add_argument("--preset", default="", help=f"size, where the files do not say: {', '.join(PUBLISHED)}")
    statistics = parser.add_mutually_exclusive_group()
    statistics.add_argument("--stats", type=Path, help="folder with Mean.npy, Std.npy, Mean_22x3.npy, Mean_135.npy ...")
    statistics.add_argument("--dataset", type=Path, help="prepared dataset whose statistics are those of the weights")
    parser.add_argument(
        "--text-encoder",
        default="",
        metavar="FOLDER",
        help=f"folder of the text encoder of the weights ({SENTENCE_T5}), so that datasets can be checked against it",
    )
    parser.add_argument("--clean-timestep", choices=("none", "0"), default="none", help="time token of clean motion")
    parser.add_argument("--lora-alpha", type=float, default=0.0, help="where adapter files do not say")


def _run_import(options: argparse.Namespace) -> None:
    normalizers = _statistics(options)
    choices = ImportChoices(
        options.suffix,
        options.preset,
        "none_when_clean" if options.clean_timestep == "none" else "always",
        options.lora_alpha,
    )
    encoder = load_text_encoder(options.text_encoder) if options.text_encoder else None
    mark, text_dim = (SENTENCE_T5, SENTENCE_T5_DIM) if encoder is None else (encoder.fingerprint, encoder.dim)
    found = import_motionreward(options.path, options.out, normalizers, mark, choices, text_dim)
    sizes = found.config
    print(f"width {sizes.unified_dim}, latent {sizes.latent_dim}, {sizes.num_layers} blocks, {sizes.num_heads} heads, "
          f"adapters of rank {found.adapter.rank} and alpha {found.adapter.alpha:g}")  # fmt: skip
    if found.ignored:
        print(f"left out {len(found.ignored)} tensors that are not part of the backbone, e.g. {found.ignored[0]}")
    if encoder is None:
        print(
            f"warning: the text encoder is recorded by name only ({SENTENCE_T5}). Of a dataset only the width of its "
            f"features ({SENTENCE_T5_DIM}) can be checked, not which encoder made them: give --text-encoder FOLDER"
        )
    print("authenticity of rotation motion was never trained in the published adapter: scoring it is refused")
    for name, folder in found.folders.items():
        print(f"inputs.reward.{name}={folder}")


def _statistics(options: argparse.Namespace) -> dict[Representation, Normalizer]:
    if options.stats is not None:
        return read_array_normalizers(options.stats)
    if options.dataset is not None:
        return load_normalizers(Dataset.open(options.dataset))
    raise ConfigError(
        explain(
            "the statistics the weights were trained with",
            "none",
            "motionrft import motionreward",
            "The files do not hold them: give --stats DIR (HumanML3D arrays) or --dataset PREPARED_FOLDER.",
        )
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FOLDER", type=Path, help="folder of an import or of a quickstart")
    parser.add_argument("--out", required=True, type=Path, help="folder to write the five .pth files to")
    parser.add_argument("--suffix", default="", help="of the file names, e.g. _r128")
    for name in PARTS:
        parser.add_argument(f"--{name}", default="", help=f"model folder of the {name}, if it lies elsewhere")


def _run_export(options: argparse.Namespace) -> None:
    parts = find_parts(options.path, {name: getattr(options, name) for name in PARTS})
    paths, notes = export_motionreward(parts, options.out, options.suffix)
    for note in notes:
        print(f"note: {note}")
    for path in paths:
        print(path)


# ----------------------------------------------------------------------------------------------------- generators


def _generator_kind(released: ReleasedFormat) -> Kind:
    """Return how one family of generators is imported and exported."""

    def import_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("path", metavar="PATH", type=Path, help=released.text)
        parser.add_argument("--out", required=True, type=Path, help="model folder to write")
        parser.add_argument("--text-encoder", default="", metavar="NAME", help=TEXT_ENCODER_HELP)
        statistics = parser.add_mutually_exclusive_group()
        statistics.add_argument("--stats", type=Path, help="folder of the published Mean and Std arrays")
        statistics.add_argument("--dataset", type=Path, help="prepared dataset with the statistics of the weights")
        for name, text in released.options.items():
            parser.add_argument(f"--{name.replace('_', '-')}", default="", help=text)

    def run_import(options: argparse.Namespace) -> None:
        normalizers: dict[Representation, Normalizer] = {}
        if options.stats is not None:
            kinds = FAMILIES[released.family][0].representations
            normalizers = read_array_normalizers(options.stats, kinds[:1])
        elif options.dataset is not None:
            normalizers = load_normalizers(Dataset.open(options.dataset))
        encoder = load_text_encoder(options.text_encoder) if options.text_encoder else None
        given = {name: str(getattr(options, name)) for name in released.options if getattr(options, name)}
        choices = GeneratorImport(options.text_encoder, encoder, normalizers, given)
        imported = import_generator(released, options.path, options.out, choices)
        count = sum(p.numel() for p in imported.generator.network.parameters())
        spec = imported.generator.spec
        print(f"{imported.found.variant or released.family}: {count:,} parameters, {spec.representation.value}, "
              f"{spec.fps:g} frames per second, {imported.found.sampling_steps} steps, "
              f"guidance {spec.guidance_scale:g}")  # fmt: skip
        for note in imported.notes:
            print(note)
        print(f"inputs.generator={imported.folder}")

    def export_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("path", metavar="FOLDER", type=Path, help="model folder")
        parser.add_argument("--out", required=True, type=Path, help="folder to write the released files to")

    def run_export(options: argparse.Namespace) -> None:
        for path in export_generator(released, options.path, options.out):
            print(path)

    return Kind(f"{released.family}: {released.text}", import_arguments, run_import, export_arguments, run_export)


KINDS = {
    **{name: _generator_kind(released) for name, released in FORMATS.items()},
    "motionreward": Kind(
        "MotionReward: backbone, preference and authenticity adapters",
        _import_arguments,
        _run_import,
        _export_arguments,
        _run_export,
    ),
}
