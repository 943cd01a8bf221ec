"""The only place where statistics are made and applied: `Normalizer`, `Moments`, HumanML3D's group averaging.

Letters: N rows, D features.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionrft.core.errors import NumericalError, RepresentationError, explain
from motionrft.core.types import Representation
from motionrft.representations.kinematic_layout import KIT_LAYOUT, layout_of

_SCHEMA = 1
_WIDTHS = {
    Representation.KINEMATIC: (Representation.KINEMATIC.dim, KIT_LAYOUT.dim),
    Representation.JOINT: (Representation.JOINT.dim, KIT_LAYOUT.num_joints * 3),
    Representation.ROTATION: (Representation.ROTATION.dim, 3 + KIT_LAYOUT.num_joints * 6),
}


@dataclass(frozen=True)
class Normalizer:
    """(x - mean) / std of one representation, with where the numbers come from. Never trained, never mutated."""

    mean: Tensor  # (D,) float32
    std: Tensor  # (D,) float32, > 0
    representation: Representation
    provenance: Mapping[str, Any] = field(default_factory=dict)  # source, n_frames, ids hash, variant, floored dims

    def __post_init__(self) -> None:
        """Bring the tensors to float32 and check width, finiteness and sign."""
        object.__setattr__(self, "representation", Representation(self.representation))
        object.__setattr__(self, "mean", self.mean.detach().to(torch.float32).clone())
        object.__setattr__(self, "std", self.std.detach().to(torch.float32).clone())
        widths = _WIDTHS[self.representation]
        if self.mean.shape != self.std.shape or self.mean.ndim != 1 or self.mean.shape[0] not in widths:
            raise RepresentationError(
                explain(
                    f"mean and std of {self.representation.dim} features for {self.representation.value!r}",
                    f"shapes {tuple(self.mean.shape)} and {tuple(self.std.shape)}",
                    "normaliser",
                    "Name the right representation; 3 pooled values per axis go through Normalizer.from_pooled.",
                )
            )
        if not bool(self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise RepresentationError(
                explain(
                    "finite means and positive finite standard deviations",
                    f"std in [{float(self.std.min()):g}, {float(self.std.max()):g}]",
                    f"normaliser for {self.representation.value!r}",
                    "Recompute the statistics; finalise() floors constant features.",
                )
            )

    @classmethod
    def from_pooled(
        cls, mean: Tensor, std: Tensor, representation: Representation, provenance: Mapping[str, Any] | None = None
    ) -> Normalizer:
        """Return a normaliser for joints from 3 pooled values per axis, repeated for every joint."""
        if mean.shape != (3,) or std.shape != (3,) or representation is not Representation.JOINT:
            raise RepresentationError(
                explain(
                    "(3,) per-axis statistics of joints",
                    f"shapes {tuple(mean.shape)}, {tuple(std.shape)} for {representation.value!r}",
                    "pooled normaliser",
                    "Only joint statistics are pooled over joints.",
                )
            )
        joints = representation.dim // 3
        return cls(mean.repeat(joints), std.repeat(joints), representation, {**(provenance or {}), "pooled": True})

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over representation and the little-endian float32 bytes of mean and std; provenance does not count."""
        digest = hashlib.sha256(self.representation.value.encode())
        for tensor in (self.mean, self.std):
            digest.update(tensor.cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def normalise(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (x - mean) / std for x (..., D); with a bool mask (...), zeros where it is False."""
        self._check(x)
        result = (x - self.mean) / self.std
        return result if mask is None else torch.where(mask[..., None], result, 0.0)

    def denormalise(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return x * std + mean; with a bool mask (...), zeros where it is False."""
        self._check(x)
        result = x * self.std + self.mean
        return result if mask is None else torch.where(mask[..., None], result, 0.0)

    def to(self, device: torch.device | str) -> Normalizer:
        """Return a copy on `device`."""
        return replace(self, mean=self.mean.to(device), std=self.std.to(device))

    def save(self, path: str | Path) -> None:
        """Write an .npz atomically: mean, std, and JSON text for the rest."""
        path = Path(path)
        card = {
            "schema": _SCHEMA,
            "representation": self.representation.value,
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, mean=self.mean.cpu().numpy(), std=self.std.cpu().numpy(), card=np.array(json.dumps(card)))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path, representation: Representation) -> Normalizer:
        """Read a file written by `save` and check that it belongs to `representation`.

        Raises:
            RepresentationError: missing or foreign file, another representation or width, or changed numbers.
        """
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                card = json.loads(str(file["card"]))
                mean, std = torch.from_numpy(file["mean"]), torch.from_numpy(file["std"])
        except (OSError, KeyError, ValueError) as error:
            raise RepresentationError(
                explain(
                    f"a normaliser file for {Representation(representation).value!r}",
                    f"{type(error).__name__}: {error}",
                    str(path),
                    "Build the dataset's statistics with `motionrft prepare`.",
                )
            ) from error
        if card.get("representation") != Representation(representation).value or card.get("schema") != _SCHEMA:
            raise RepresentationError(
                explain(
                    f"a normaliser (schema {_SCHEMA}) for {Representation(representation).value!r}",
                    f"schema {card.get('schema')} for {card.get('representation')!r}",
                    str(path),
                    "Point to the statistics of the representation in use.",
                )
            )
        result = cls(mean, std, Representation(representation), card["provenance"])
        if result.fingerprint != card["fingerprint"]:
            raise RepresentationError(
                explain(
                    f"fingerprint {card['fingerprint'][:12]}",
                    result.fingerprint[:12],
                    str(path),
                    "The file was edited or damaged: rebuild it.",
                )
            )
        return result

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.mean.shape[0]:
            raise RepresentationError(
                explain(
                    f"{self.mean.shape[0]} features per frame for {self.representation.value!r}",
                    f"shape {tuple(x.shape)}",
                    "normaliser",
                    "Convert the motion first, or use the normaliser of its representation.",
                )
            )


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations per feature, in float64, that merge exactly."""

    count: int
    mean: Tensor  # (D,) float64
    m2: Tensor  # (D,) float64

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Return the moments of nothing."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64))

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Return the moments of rows (N, D).

        Raises:
            NumericalError: a value is not finite; drop and count such clips first.
        """
        rows = rows.to(torch.float64)
        if not bool(rows.isfinite().all()):
            raise NumericalError(
                explain(
                    "finite rows",
                    f"{int((~rows.isfinite()).any(-1).sum())} rows with NaN or inf",
                    "statistics",
                    "Reject broken clips before taking statistics.",
                )
            )
        if rows.shape[0] == 0:
            return cls.empty(rows.shape[1])
        mean = rows.mean(0)
        return cls(rows.shape[0], mean, ((rows - mean) ** 2).sum(0))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together. Merge in a fixed order for bit-equal results."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta**2 * (self.count * other.count / count),
        )

    @staticmethod
    def merge_all(parts: Iterable[Moments]) -> Moments:
        """Return the merge of at least one part by a balanced tree in the given order."""
        level = list(parts)
        if not level:
            raise ValueError("no moments to merge")
        while len(level) > 1:
            pairs = [a.merge(b) for a, b in zip(level[::2], level[1::2])]
            level = pairs + ([level[-1]] if len(level) % 2 else [])
        return level[0]

    def pooled_axes(self, axes: int = 3) -> Moments:
        """Return moments pooled over joints: feature d of axis d mod `axes`; count becomes N times the joints."""
        columns = [Moments(self.count, m, q) for m, q in zip(self.mean.view(-1, axes), self.m2.view(-1, axes))]
        return Moments.merge_all(columns)

    def std(self, ddof: int = 0) -> Tensor:
        """Return the standard deviation (D,) float64."""
        if self.count <= ddof:
            raise NumericalError(
                explain(f"more than {ddof} rows", str(self.count), "statistics", "Add clips to the training split.")
            )
        return torch.sqrt(self.m2 / (self.count - ddof))


def grouped_std(std: Tensor) -> Tensor:
    """Return K's std (D,) averaged inside its seven groups, as HumanML3D does: features keep their proportions."""
    result = std.clone()
    for group in layout_of(std.shape[-1]).groups.values():
        result[group] = std[group].mean()
    return result


def finalise(
    moments: Moments,
    representation: Representation,
    provenance: Mapping[str, Any] | None = None,
    *,
    grouped: bool = False,
    pooled_axes: bool = False,
    root_weight: float = 1.0,
    floor: float = 1e-3,
) -> Normalizer:
    """Return the normaliser of training-split moments.

    Args:
        moments: of all valid rows, (D,).
        representation: of the rows.
        provenance: recorded with the count and the choices made here.
        grouped: K only: average std inside feature groups.
        pooled_axes: J only: one mean and std per axis for all joints.
        root_weight: K only: divide std of the four root features and the contacts by this (reference: 5), which makes
            them count more.
        floor: smallest std as a fraction of the median one; floored features are listed in the provenance.
    """
    representation = Representation(representation)
    if (grouped or root_weight != 1.0) and representation is not Representation.KINEMATIC:
        raise ValueError("grouped and root_weight belong to kinematic features")
    if pooled_axes and representation is not Representation.JOINT:
        raise ValueError("pooled_axes belongs to joints")
    mean, std = moments.mean, moments.std()
    if pooled_axes:
        pooled = moments.pooled_axes()
        repeats = mean.shape[0] // 3
        mean, std = pooled.mean.repeat(repeats), pooled.std().repeat(repeats)
    if grouped:
        std = grouped_std(std)
    if root_weight != 1.0:
        layout = layout_of(std.shape[-1])
        std = std.clone()
        std[: layout.root_height.stop] /= root_weight
        std[layout.contacts] /= root_weight
    lowest = max(floor * float(std.median()), 1e-8)
    floored = (std < lowest).nonzero()[:, 0].tolist()
    card = {
        **(provenance or {}),
        "n_frames": moments.count,
        "grouped": grouped,
        "pooled": pooled_axes,
        "root_weight": root_weight,
        "floored": floored,
    }
    return Normalizer(mean, std.clamp_min(lowest), representation, card)
