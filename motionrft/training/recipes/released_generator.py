"""Released generators to model folders of this project, and back. What a family's files mean is its `ReleasedFormat`.

The importer checks everything before it writes anything: every tensor of the network has its counterpart, statistics
and text encoder are named and never guessed, and the card says where the weights came from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.plain import to_plain
from motionrft.core.types import Representation
from motionrft.data.manifest import sha256_of
from motionrft.data.normalizers import normalizer_of
from motionrft.generators.base import Generator
from motionrft.generators.registry import GeneratorConfig, TextSide, build_generator, generator_card
from motionrft.generators.released import ReleasedFormat, ReleasedGenerator
from motionrft.nn.text import TextEncoder
from motionrft.representations.normalize import Normalizer
from motionrft.training.recipes.generator_files import Fixed, generator_checkpoint_card, load_generator, save_weights
from motionrft.training.released import read_content, write_released
from motionrft.training.state_dict import require_same_tensors

_CHECK = "Check that the files are those of this variant and unchanged."
_FINGERPRINT = re.compile("[0-9a-f]{64}")
BUILT = "null"
"""Prefix of frozen tensors that no released file holds: features of the empty caption, made with the text encoder."""


@dataclass(frozen=True)
class GeneratorImport:
    """What the files leave open."""

    text_encoder: str = ""
    """Name of the encoder as given, for comparison with the one the weights were trained with."""
    encoder: TextEncoder | None = None
    """The encoder itself; None = recorded by name only."""
    normalizers: Mapping[Representation, Normalizer] = field(default_factory=dict)
    """Statistics for weights whose files hold none."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the family's format."""


@dataclass(frozen=True)
class ImportedGenerator:
    """What an import found and wrote."""

    folder: Path
    found: ReleasedGenerator
    generator: Generator
    notes: tuple[str, ...]
    """What a user should know: what was left out, what is recorded by name only."""


def import_generator(released: ReleasedFormat, path: Path, out: Path, choices: GeneratorImport) -> ImportedGenerator:
    """Read released files and write the model folder OUT.

    Args:
        released: the family's format.
        path: the weight file, or the folder that holds it with what belongs to it.
        out: folder to write; must not exist.
        choices: what the files leave open.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe; names or shapes do not agree (all are listed).
        ConfigError: text encoder or statistics are missing or do not fit, or OUT is in use.
    """
    if out.exists():
        raise ConfigError(explain("a new folder", "one that exists", str(out), "Choose another."))
    places = locate(released, path)
    found = released.read({role: read_content(place) for role, place in places.items()}, choices.options)
    _require_encoder(found, choices, path)
    normalizer = _statistics(found, choices, path)
    config = GeneratorConfig(
        found.model,
        max_frames=found.max_frames,
        train_steps=found.train_steps,
        guidance=found.guidance,
        solver=found.solver,
        sampling_steps=found.sampling_steps,
    )
    text = _text_side(found, choices, path)
    with torch.random.fork_rng(devices=[]):
        generator = build_generator(config, normalizer, text, found.fps)
    _load(generator, found, path)
    description = generator_card(config, normalizer, text, found.fps) | {
        "variant": found.variant,
        "licence": released.licence,
    }
    origin = {
        "released": released.family,
        "files": {role: {"name": p.name, "sha256": sha256_of(p)} for role, p in places.items()},
        "left_out": len(found.dropped),
        "trained_with_text": found.text_encoder,
    }
    card = generator_checkpoint_card(to_plain(description), normalizer, origin)
    weights = {name: tensor.detach() for name, tensor in generator.network.state_dict().items()}
    save_weights(out, weights, card, Fixed.of(generator), 0, 0)
    return ImportedGenerator(out, found, generator.to("cpu"), tuple(_notes(found, choices, released)))


def locate(released: ReleasedFormat, path: Path) -> dict[str, Path]:
    """Return role -> file, as the format names them, below a folder or beside a weight file.

    Raises:
        CheckpointError: no weight file, or several that fit equally well.
    """
    if not path.exists():
        raise CheckpointError(explain("a released file or folder", "nothing there", str(path), "Check the path."))
    places: dict[str, Path] = {"weights": path} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    for role, patterns in released.patterns().items():
        if role in places:
            continue
        fits = next((hits for pattern in patterns if (hits := sorted(folder.glob(pattern)))), [])
        if len(fits) > 1:
            names = ", ".join(p.name for p in fits[:6])
            raise CheckpointError(
                explain(f"one file for {role}", f"{len(fits)}: {names}", str(folder), "Give the weight file itself.")
            )
        if fits:
            places[role] = fits[0]
    if "weights" not in places:
        names = " or ".join(released.patterns().get("weights", ()))
        raise CheckpointError(explain(f"a file {names}", "none", str(folder), "Give the weight file itself."))
    return places


def text_kind(name: str) -> str:
    """Return the kind of an encoder's name, "clip" of "clip:FOLDER"; "" for sentence encoders: a folder alone."""
    kind, colon, _ = name.partition(":")
    return kind if colon and len(kind) > 1 else ""  # one letter: a Windows drive


def _require_encoder(found: ReleasedGenerator, choices: GeneratorImport, path: Path) -> None:
    given, needed = choices.encoder, found.text_encoder
    if given is None:
        if found.model.needs_null:
            raise ConfigError(
                explain(
                    f"--text-encoder {needed}",
                    "none",
                    str(path),
                    "The empty caption is encoded when importing: this family guides away from it.",
                )
            )
        return
    if _FINGERPRINT.fullmatch(needed):  # exported by this project
        if needed != given.fingerprint:
            named = f"{choices.text_encoder} ({given.fingerprint[:12]})"
            raise ConfigError(
                explain(f"text encoder {needed[:12]}", named, str(path), "Name the one it was trained with.")
            )
    elif text_kind(choices.text_encoder) != text_kind(needed):
        raise ConfigError(
            explain(
                f"a text encoder like {needed!r}",
                repr(choices.text_encoder),
                str(path),
                "Other features of the same size load as well, and every motion would be wrong.",
            )
        )
    for name, want, got in (
        ("features per token", found.token_dim, given.dim),
        ("features of the sentence vector", found.pooled_dim, given.pooled_dim),
    ):
        if want not in (0, got):
            raise ConfigError(explain(f"{want} {name} ({needed})", str(got), choices.text_encoder, "Name another."))


def _text_side(found: ReleasedGenerator, choices: GeneratorImport, path: Path) -> TextSide:
    encoder = choices.encoder
    if encoder is None:
        return TextSide(found.text_encoder, found.token_dim, found.pooled_dim)
    null = encoder.encode([""]) if found.model.needs_null else None
    return TextSide(encoder.fingerprint, encoder.dim, encoder.pooled_dim, null)


def _statistics(found: ReleasedGenerator, choices: GeneratorImport, path: Path) -> Normalizer:
    kind = found.model.representations[0]
    if found.mean is not None and found.std is not None:
        return normalizer_of(found.mean, found.std, kind, {"source": "released", "file": str(path)})
    if kind not in choices.normalizers:
        raise ConfigError(
            explain(
                f"the {kind.value} statistics the weights were trained with",
                "none",
                str(path),
                "The files do not hold them: give --stats DIR (published arrays) or --dataset PREPARED_FOLDER.",
            )
        )
    return choices.normalizers[kind]


def _load(generator: Generator, found: ReleasedGenerator, path: Path) -> None:
    """Copy the tensors; everything that does not fit is reported together."""
    frozen = {n: t for n, t in generator.frozen.state_dict().items() if not n.startswith(BUILT)}
    own = {f"network.{n}": t for n, t in generator.network.state_dict().items()}
    own |= {f"frozen.{n}": t for n, t in frozen.items()}
    got = {f"network.{n}": t for n, t in found.network.items()} | {f"frozen.{n}": t for n, t in found.frozen.items()}
    require_same_tensors({n: tuple(t.shape) for n, t in own.items()}, got, str(path), _CHECK)
    broken = [n for n, t in got.items() if not t.is_floating_point() or not bool(t.isfinite().all())]
    if broken:
        raise CheckpointError(explain("finite numbers", f"none in {broken[:8]}", str(path), _CHECK))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(got[name])


def _notes(found: ReleasedGenerator, choices: GeneratorImport, released: ReleasedFormat) -> list[str]:
    notes = [f"licence: {released.licence}"]
    if found.dropped:
        notes.append(f"left out {len(found.dropped)} entries that are not the generator, e.g. {found.dropped[0]}")
    if choices.encoder is None:
        notes.append(
            f"warning: the text encoder is recorded by name only ({found.text_encoder}): whether captions are encoded "
            "as the weights expect cannot be checked. Give --text-encoder"
        )
    if found.mean is None:
        notes.append("statistics are those given; the files hold none to compare with")
    return notes


def export_generator(released: ReleasedFormat, folder: Path, out: Path) -> list[Path]:
    """Write a model folder of the family in its released format and return the files.

    Raises:
        ConfigError: a model of another family, or files that exist.
        CheckpointError: a damaged model, or a full disk.
    """
    generator = load_generator(folder)
    if generator.spec.family != released.family:
        raise ConfigError(
            explain(f"a model of family {released.family!r}", repr(generator.spec.family), str(folder), "Change KIND.")
        )
    return write_released(out, {name: _plain_tensors(content) for name, content in released.write(generator).items()})


def _plain_tensors(content: Any) -> Any:
    """Return content with independent contiguous CPU tensors, so that files hold nothing but what they name."""
    if isinstance(content, Tensor):
        return content.detach().cpu().contiguous().clone()
    return {k: _plain_tensors(v) for k, v in content.items()} if isinstance(content, Mapping) else content
