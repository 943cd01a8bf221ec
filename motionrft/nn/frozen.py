"""What frozen text encoders share: distinct captions, sorted by length, through a transformer in batches.

Letters: B captions, L tokens, D features per token, P features of the sentence vector.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from motionrft.core.types import Condition, valid_mask


class FrozenEncoder:
    """Base of encoders that are a tokenizer and a transformer. Subclasses set the fields.

    The sentence vector is the mean over valid tokens where a subclass does not say otherwise.
    """

    fingerprint: str
    dim: int
    pooled_dim: int
    max_tokens: int  # per caption, special tokens included
    _batch_size: int
    _tokenizer: Any
    _model: Any
    _num_skipped = 0  # leading tokens whose states are not features

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Condition:
        """Return last hidden states and sentence vectors; equal captions are encoded once."""
        cleaned = [self._clean(caption) for caption in captions]
        unique = list(dict.fromkeys(cleaned))
        if not unique:
            none = torch.zeros(0, 0, dtype=torch.bool)
            return Condition(torch.zeros(0, 0, self.dim), none, torch.zeros(0, self.pooled_dim))
        ids, skipped = self._token_ids(unique), self._num_skipped
        lengths_B = torch.tensor([len(row) for row in ids], dtype=torch.int64)
        tokens_BLD = torch.zeros(len(unique), int(lengths_B.max()) - skipped, self.dim)
        device = next(self._model.parameters()).device
        for rows in torch.argsort(lengths_B, stable=True).split(self._batch_size):
            mask = valid_mask(lengths_B[rows], int(lengths_B[rows].max()))
            padded = torch.zeros(mask.shape, dtype=torch.int64)
            padded[mask] = torch.tensor([token for row in rows.tolist() for token in ids[row]])
            states = self._model(input_ids=padded.to(device), attention_mask=mask.to(device).long()).last_hidden_state
            tokens_BLD[rows, : mask.shape[1] - skipped] = states[:, skipped:].float().cpu()
        mask_BL = valid_mask(lengths_B - skipped, tokens_BLD.shape[1])
        tokens_BLD *= mask_BL[..., None]
        order = {caption: row for row, caption in enumerate(unique)}
        rows = torch.tensor([order[caption] for caption in cleaned])
        return self._condition(ids, tokens_BLD, mask_BL).index(rows)

    def to(self, device: torch.device | str) -> Self:
        """Move the model; features are returned on CPU."""
        self._model.to(device)
        return self

    def _clean(self, caption: str) -> str:
        """Return the caption as it goes to the tokenizer."""
        return caption

    def _token_ids(self, captions: list[str]) -> list[list[int]]:
        return self._tokenizer(captions, truncation=True, max_length=self.max_tokens)["input_ids"]

    def _condition(self, ids: list[list[int]], tokens_BLD: Tensor, mask_BL: Tensor) -> Condition:
        """Return the features of distinct captions from their token ids and states, which are zero where masked."""
        del ids
        return Condition(tokens_BLD, mask_BL, self._pool(tokens_BLD, mask_BL))

    def _pool(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return sentence vectors (B, P), float32."""
        return mean_over_tokens(tokens_BLD, mask_BL).float()


def mean_over_tokens(tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Return the mean over valid tokens, (B, D) float64; masked tokens must be zero."""
    return tokens_BLD.double().sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)


def mean_pooled(tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Return the unit-norm mean over valid tokens, (B, D); masked tokens must be zero."""
    return F.normalize(mean_over_tokens(tokens_BLD, mask_BL), dim=-1).float()
