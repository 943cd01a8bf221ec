"""The nouns of the project as frozen dataclasses. Shapes stand in the field comments.

Letters: B batch, T frames, J joints, D feature dim, E embedding, L text tokens, S denoising steps.
Masks are bool, True = valid. Lengths are int64. Motions are float32 in physical units (metres, radians per frame,
as the representation defines) unless a name says `normalised`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor


class Representation(StrEnum):
    """The paper's set O = {K, J, R}."""

    KINEMATIC = "kinematic"
    JOINT = "joint"
    ROTATION = "rotation"

    @property
    def dim(self) -> int:
        """Features per frame: 263 (22 joints), 66 = 22 x 3, 135 = 3 + 22 x 6."""
        return {"kinematic": 263, "joint": 66, "rotation": 135}[self.value]


def valid_mask(lengths_B: Tensor, num_frames: int) -> Tensor:
    """Return the (B, T) bool mask that is True on frames before each clip's length."""
    return torch.arange(num_frames, device=lengths_B.device)[None, :] < lengths_B[:, None]


@dataclass(frozen=True)
class Condition:
    """Encoded captions, as frozen text encoders give them. `index` selects rows; `to` moves them."""

    tokens_BLD: Tensor  # (B, L, D) float32, zeros where masked
    mask_BL: Tensor  # (B, L) bool
    pooled_BD: Tensor  # (B, D) float32, sentence embedding (unit norm for sentence encoders); its D may be another

    def __len__(self) -> int:
        return self.pooled_BD.shape[0]

    def index(self, rows: Tensor | slice) -> Condition:
        """Return the selected rows."""
        return Condition(self.tokens_BLD[rows], self.mask_BL[rows], self.pooled_BD[rows])

    def to(self, device: torch.device | str) -> Condition:
        """Return a copy on `device`."""
        return Condition(self.tokens_BLD.to(device), self.mask_BL.to(device), self.pooled_BD.to(device))


@dataclass(frozen=True)
class MotionBatch:
    """A batch of clips with every requested representation of the same frames, padded with zeros to one T."""

    item_ids: tuple[str, ...]
    motions: Mapping[Representation, Tensor]  # representation -> (B, T, D) float32, physical units
    lengths_B: Tensor  # (B,) int64, 1 <= length <= T
    fps: float
    captions: tuple[str, ...]
    text: Condition  # features of `captions`
    class_ids_B: Tensor  # (B,) int64 semantic class; -1 = unknown
    keys_B: Tensor  # (B,) int64, stable hash of item id: seeds per-sample noise on any layout
    generator_text: Condition | None = None  # features for a generator whose text encoder is not the dataset's

    @property
    def prompt(self) -> Condition:
        """Features of the captions as the generator reads them; rewards and evaluators read `text`."""
        return self.text if self.generator_text is None else self.generator_text

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def mask_BT(self) -> Tensor:
        """(B, T) bool, True = real frame."""
        num_frames = next(iter(self.motions.values())).shape[1]
        return valid_mask(self.lengths_B, num_frames)

    def slice(self, start: int, stop: int) -> MotionBatch:
        """Return rows [start, stop)."""
        return self.index(torch.arange(len(self))[start:stop])

    def index(self, rows: Tensor) -> MotionBatch:
        """Return the rows at int64 positions, in their order; a row may come more than once."""
        positions = rows.tolist()
        return replace(
            self,
            item_ids=tuple(self.item_ids[i] for i in positions),
            motions={r: m[rows] for r, m in self.motions.items()},
            lengths_B=self.lengths_B[rows],
            captions=tuple(self.captions[i] for i in positions),
            text=self.text.index(rows),
            class_ids_B=self.class_ids_B[rows],
            keys_B=self.keys_B[rows],
            generator_text=None if self.generator_text is None else self.generator_text.index(rows),
        )

    def parts(self, count: int) -> list[MotionBatch]:
        """Return the rows in `count` equal parts.

        Raises:
            ValueError: if the rows do not divide evenly.
        """
        size, rest = divmod(len(self), count)
        if rest:
            raise ValueError(f"{len(self)} rows do not divide into {count} equal parts")
        return [self.slice(i * size, (i + 1) * size) for i in range(count)] if count > 1 else [self]

    def to(self, device: torch.device | str) -> MotionBatch:
        """Return a copy on `device`."""
        return replace(
            self,
            motions={r: m.to(device) for r, m in self.motions.items()},
            lengths_B=self.lengths_B.to(device),
            text=self.text.to(device),
            class_ids_B=self.class_ids_B.to(device),
            keys_B=self.keys_B.to(device),
            generator_text=None if self.generator_text is None else self.generator_text.to(device),
        )


@dataclass(frozen=True)
class StepOutput:
    """What one denoising step hands to its reader."""

    index: int  # 0 = noisiest
    x_in: Tensor  # state the network saw
    x_prev: Tensor  # next-cleaner state
    x0_hat: Tensor  # one-step clean estimate (Eq. 19)
    scored: str  # "none" | "x0_hat" | "x_prev"
    update: bool  # the caller takes an optimiser step after this output
    noise_level: float  # of the scored tensor times `scale`, sqrt(1 - alpha_bar): 0 clean .. 1 pure noise
    scale: float = 1.0  # makes the scored tensor variance-preserving, sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
    mean: Tensor | None = None  # x_prev before fresh noise was added, where the loop says so


@dataclass(frozen=True)
class RewardTerms:
    """Named per-sample reward terms before weighting (Eq. 20)."""

    values: Mapping[str, Tensor]  # name -> (B,) float32, differentiable with respect to the motion

    def total(self, weights: Mapping[str, float]) -> Tensor:
        """Return sum_i w_i r_i, shape (B,). A weight without a term is an error, never a silent zero."""
        missing = [n for n, w in weights.items() if w != 0 and n not in self.values]
        if missing:
            raise ValueError(f"weights name terms that were not computed: {missing}; computed {sorted(self.values)}")
        parts = [w * self.values[n] for n, w in weights.items() if w != 0]
        if not parts:
            raise ValueError("every reward weight is zero: nothing to optimise")
        return torch.stack(parts).sum(0)
