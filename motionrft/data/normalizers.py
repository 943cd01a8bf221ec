"""The normalisers of a dataset, checked against its manifest."""

from __future__ import annotations

from collections.abc import Iterable

from motionrft.core.errors import RepresentationError, explain
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.representations.normalize import Normalizer


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
