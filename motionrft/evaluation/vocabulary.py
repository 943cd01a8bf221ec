"""The evaluator's own text front end: words of the training captions, nothing shared with any reward."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from motionrft.core.errors import DataError, explain

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def words_of(caption: str) -> list[str]:
    """Return the lower-case words of a caption."""
    return _WORD.findall(caption.lower())


@dataclass(frozen=True)
class Vocabulary:
    """Known words in a fixed order. Index 0 pads, 1 stands for every unknown word, word i has index i + 2."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, captions: Iterable[str], min_count: int = 1) -> Vocabulary:
        """Return the words that occur at least `min_count` times in the training captions, sorted.

        Raises:
            DataError: no word is left.
        """
        counts = Counter(word for caption in captions for word in words_of(caption))
        kept = tuple(sorted(word for word, count in counts.items() if count >= min_count))
        if not kept:
            raise DataError(
                explain(
                    f"training captions with words seen {min_count} times or more",
                    f"{len(counts)} different words, none often enough",
                    "evaluator vocabulary",
                    "Lower min_count or check the captions of the training split.",
                )
            )
        return cls(kept)

    def __len__(self) -> int:
        return len(self.words) + 2

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: i + 2 for i, word in enumerate(self.words)}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of the ordered words."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def encode(self, captions: Sequence[str], max_words: int) -> tuple[Tensor, Tensor]:
        """Return word indices (B, L) int64, padded with 0, and lengths (B,); a caption without words is one unknown."""
        rows = [[self._index.get(w, UNKNOWN) for w in words_of(c)[:max_words]] or [UNKNOWN] for c in captions]
        lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        ids_BL = torch.zeros(len(rows), max((len(row) for row in rows), default=1), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids_BL[i, : len(row)] = torch.tensor(row)
        return ids_BL, lengths_B

    def unknown_share(self, captions: Iterable[str]) -> float:
        """Return the share of words in `captions` that are not known."""
        found = [word in self._index for caption in captions for word in words_of(caption)]
        return 1.0 - sum(found) / len(found) if found else 0.0
