"""The normalisers of a dataset, checked against its manifest, and those of a folder of plain arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motionrft.core.errors import ConfigError, RepresentationError, explain
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.representations.normalize import Normalizer

ARRAY_FILES = {
    Representation.KINEMATIC: ("Mean.npy", "Std.npy"),
    Representation.JOINT: ("Mean_22x3.npy", "Std_22x3.npy"),
    Representation.ROTATION: ("Mean_135.npy", "Std_135.npy"),
}
"""Statistics beside a HumanML3D folder. Those of joints are (3,): one value per axis, over all joints."""


def load_normalizer(dataset: Dataset, representation: Representation) -> Normalizer:
    """Return the normaliser of one representation.

    Raises:
        RepresentationError: missing file, statistics of another representation, or of another dataset.
    """
    representation = Representation(representation)
    path = dataset.stats_file(representation)
    normalizer = Normalizer.load(path, representation)
    expected = dataset.manifest.stats.get(representation.value, "none")
    if normalizer.fingerprint != expected:
        raise RepresentationError(
            explain(
                f"the dataset's own statistics ({expected[:12]})",
                normalizer.fingerprint[:12],
                str(path),
                "The file belongs to another dataset: prepare this one again.",
            )
        )
    return normalizer


def load_normalizers(
    dataset: Dataset, representations: Iterable[Representation] = tuple(Representation)
) -> dict[Representation, Normalizer]:
    """Return the normalisers of several representations; see `load_normalizer`."""
    return {Representation(r): load_normalizer(dataset, r) for r in representations}


def read_array_normalizers(
    folder: Path, representations: Iterable[Representation] = tuple(Representation)
) -> dict[Representation, Normalizer]:
    """Return the normalisers in `ARRAY_FILES` of a folder; the provenance names files and their hashes.

    Raises:
        ConfigError: a file is missing or no array.
        RepresentationError: wrong shape, not finite, or a standard deviation that is not positive.
    """
    wanted = {Representation(r): ARRAY_FILES[Representation(r)] for r in representations}
    missing = [name for pair in wanted.values() for name in pair if not (folder / name).is_file()]
    if missing:
        # Zeros and ones would load as well, and every score would be wrong without a word.
        kinds = "all representations" if len(wanted) == len(Representation) else ", ".join(r.value for r in wanted)
        raise ConfigError(
            explain(f"statistics of {kinds}", f"no {', '.join(missing)}", str(folder), "Add these files.")
        )
    result: dict[Representation, Normalizer] = {}
    for representation, names in wanted.items():
        mean, std = (_read_array(folder / name) for name in names)
        hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        provenance = {"source": "arrays", "folder": str(folder.resolve()), "sha256": hashes}
        result[representation] = normalizer_of(mean, std, representation, provenance)
    return result


def normalizer_of(
    mean: torch.Tensor, std: torch.Tensor, representation: Representation, provenance: Mapping[str, Any]
) -> Normalizer:
    """Return the normaliser of published arrays; those of joints are one value per axis."""
    if representation is Representation.JOINT and (3,) in (tuple(mean.shape), tuple(std.shape)):
        return Normalizer.from_pooled(mean, std, representation, provenance)
    return Normalizer(mean, std, representation, provenance)


def _read_array(path: Path) -> torch.Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ConfigError(explain("a numeric .npy array", str(error), str(path), "Copy the file again.")) from error
