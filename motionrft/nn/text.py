"""Frozen text encoders behind one protocol: captions in, `core.types.Condition` out.

Letters: B captions, L tokens, D features per token, P features of the sentence vector. Everything is float32; token
states are zero where masked.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from motionrft.core.errors import ConfigError, explain
from motionrft.core.rng import keyed_normal, stable_key
from motionrft.core.types import Condition, valid_mask
from motionrft.nn.sentence_folder import PICKLED_WEIGHTS, SAFE_WEIGHTS, TOKENIZERS, is_t5, modules_of
from motionrft.nn.sentence_models import MiniLM, SentenceT5, mean_pooled

__all__ = ["MiniLM", "SentenceT5", "StubEncoder", "TextEncoder", "load_text_encoder"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("sentence_bert_config.json", "tokenizer_config.json", *TOKENIZERS)


@runtime_checkable
class TextEncoder(Protocol):
    """What turns captions into features. Two encoders with one fingerprint give the same features."""

    fingerprint: str
    dim: int  # D
    pooled_dim: int  # P, not always D

    def encode(self, captions: list[str]) -> Condition:
        """Return features of `captions`, row i for caption i: tokens (B, L, D), mask (B, L), pooled (B, P)."""
        ...


class StubEncoder:
    """Hash-seeded word vectors for tests: no weights, no download, captions sharing words are alike.

    Args:
        dim: feature size D.
    """

    def __init__(self, dim: int = 32) -> None:
        if dim < 2:
            raise ConfigError(explain("dim >= 2", str(dim), "StubEncoder", "Choose a larger feature size."))
        self.dim = self.pooled_dim = dim
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
        mask_BL = valid_mask(lengths_B, longest)
        return Condition(tokens_BLD, mask_BL, mean_pooled(tokens_BLD, mask_BL))


def load_text_encoder(name: str) -> TextEncoder:
    """Return the encoder called `name`.

    Args:
        name: "minilm", "stub", the path of a local sentence-transformer folder (what it holds is read there), or
            "owner/model" on the Hugging Face hub: taken from its local cache, downloaded only if HF_HUB_OFFLINE is
            not set.

    Raises:
        ConfigError: if the name is neither known nor an existing folder, or its weights are not there.
        CheckpointError: if weights are damaged or unsafe.
    """
    if name == "stub":
        return StubEncoder()
    if name == "minilm":
        return MiniLM()
    folder = Path(name)
    if not folder.is_dir():
        if not _HUB_NAME.fullmatch(name):
            raise ConfigError(
                explain("'minilm', 'stub' or a model folder", repr(name), "text encoder", "Check the name or the path.")
            )
        folder = _hub_folder(name)
    return SentenceT5(folder) if is_t5(folder) else MiniLM(folder)


def _hub_folder(name: str) -> Path:
    """Return the folder in the hub's local cache that holds a model, after downloading what is missing and allowed."""
    from transformers.utils import cached_file

    def fetch(file: str) -> bool:
        try:
            return cached_file(name, file) is not None
        except OSError:
            return False

    try:
        folder = Path(str(cached_file(name, "modules.json"))).parent
    except OSError as error:
        offline = bool(os.environ.get("HF_HUB_OFFLINE"))
        got = "neither, and HF_HUB_OFFLINE forbids asking the hub" if offline else str(error).splitlines()[0]
        raise ConfigError(
            explain(
                f"a folder {name!r} or a model of that name in the hub's cache",
                got,
                "text encoder",
                f"Where there is a network: `hf download {name} --local-dir FOLDER`; then give the path of that FOLDER "
                f"with config.json, {SAFE_WEIGHTS}, tokenizer.json, modules.json and its sub-folders.",
            )
        ) from error
    # What is not there is missed by the folder's own check, which names it.
    fetch("config.json")
    for file in _HUB_FILES:
        fetch(file)
    for kind, path in modules_of(folder):
        prefix = f"{path}/" if path else ""
        if kind in ("Pooling", "Dense"):
            fetch(f"{prefix}config.json")
        if kind in ("Transformer", "Dense") and not fetch(f"{prefix}{SAFE_WEIGHTS}"):
            fetch(f"{prefix}{PICKLED_WEIGHTS}")
    return folder
