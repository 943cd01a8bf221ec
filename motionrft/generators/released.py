"""What a family's released files become, and the form in which a family says how to read and write them.

Files are opened elsewhere (`training.released`), without running anything they hold; here their content is plain data:
tensors, numbers, text, lists and mappings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from motionrft.core.errors import CheckpointError, explain
from motionrft.generators.base import Generator, ModelConfig


@dataclass(frozen=True)
class ReleasedGenerator:
    """A released model in this project's terms. Names and shapes are still to be checked against `model`."""

    model: ModelConfig
    """Variant and sizes, derived from the tensors and the settings beside them."""
    network: Mapping[str, Tensor]
    """State of `Generator.network` under our names."""
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    """State of `Generator.frozen` under our names, as far as the files hold it."""
    mean: Tensor | None = None
    """(D,) statistics of the motion, where the files hold them."""
    std: Tensor | None = None
    """(D,)"""
    text_encoder: str = ""
    """Which text features it reads, named as for `nn.text.load_text_encoder`: "clip:openai/clip-vit-large-patch14"."""
    token_dim: int = 0
    """Features per text token it reads; 0 = it reads none."""
    pooled_dim: int = 0
    """Features of the sentence vector it reads; 0 = it reads none."""
    max_frames: int = 196
    """Longest motion."""
    fps: float = 20.0
    """Frames per second of the motion it decodes."""
    train_steps: int = 1000
    """Diffusion steps of its schedule."""
    sampling_steps: int = 50
    """Denoising steps it was published with."""
    guidance: float | None = None
    """Guidance scale it was published with; None = the family's."""
    solver: str = ""
    """Sampler it was published with."""
    dropped: tuple[str, ...] = ()
    """Names in the files that are not part of the generator (text encoders, evaluators, optimiser)."""
    variant: str = ""
    """Which published model this is, as far as the content tells."""


class ReleasedFormat(ABC):
    """How one family's released files are named, read and written back."""

    family: ClassVar[str]
    """As on the command line: `motionrft import FAMILY PATH`."""
    text: ClassVar[str]
    """One line of help: which files."""
    licence: ClassVar[str]
    """Note for the model card."""
    options: ClassVar[Mapping[str, str]] = {}
    """Further options of the import, name -> help: what the files leave open (e.g. `variant`)."""

    @abstractmethod
    def patterns(self) -> Mapping[str, tuple[str, ...]]:
        """Return role -> glob patterns below the given folder, best first.

        Role "weights" is the file itself when PATH is one; other roles are then looked for in its folder.
        """

    @abstractmethod
    def read(self, files: Mapping[str, Any], options: Mapping[str, str]) -> ReleasedGenerator:
        """Return the model in our terms.

        Args:
            files: role -> content, for the roles that were found: torch files as nested plain data with tensors, .npy
                as tensors, .json and .yaml as data, .txt as text.
            options: what the user gave of `options`.

        Raises:
            CheckpointError: a role is missing, or the content is not of this family.
            ConfigError: the files leave something open that no option answers.
        """

    @abstractmethod
    def write(self, generator: Generator) -> dict[str, Any]:
        """Return file name -> content in the released format: names, nesting and shapes as published."""


def renamed(
    tensors: Mapping[str, Tensor], prefix: str, dropped: tuple[str, ...] = (), where: str = ""
) -> tuple[dict[str, Tensor], list[str]]:
    """Return (tensors below `prefix` without it, names that belong to `dropped` prefixes).

    Prefixes are matched at the start only. Names under neither are an error: nothing is left out silently.

    Raises:
        CheckpointError: names under neither prefix, or none under `prefix`.
    """
    kept = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    rest = [name for name in tensors if not name.startswith(prefix)]
    left = [name for name in rest if name.startswith(dropped)] if dropped else []
    unknown = sorted(set(rest) - set(left))
    if unknown or not kept:
        got = f"unknown names {unknown[:6]}" if unknown else f"no name that starts with {prefix!r}"
        expected = f"names that start with {prefix!r}" + (f" or one of {dropped}" if dropped else "")
        raise CheckpointError(explain(expected, got, where, "Check which released file this is."))
    return kept, left
