"""Frozen text encoders behind one protocol: captions in, `core.types.Condition` out.

Letters: B captions, L tokens, D features per token, P features of the sentence vector. Everything is float32; token
states are zero where masked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from motionrft.core.errors import ConfigError, explain
from motionrft.core.rng import keyed_normal, stable_key
from motionrft.core.types import Condition, valid_mask
from motionrft.nn.clip import MDM_TOKENS, ClipText, ClipTokens
from motionrft.nn.distilbert import DistilBert
from motionrft.nn.frozen import mean_pooled
from motionrft.nn.hub import model_folder, sentence_folder
from motionrft.nn.qwen import ChatStates, HYMotionText, read_prompt
from motionrft.nn.sentence_folder import is_t5, read_object
from motionrft.nn.sentence_models import MiniLM, SentenceT5

__all__ = ["TEXT_ENCODER_HELP", "MiniLM", "SentenceT5", "StubEncoder", "TextEncoder", "load_text_encoder"]


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


_KINDS: dict[str, Callable[[str], TextEncoder]] = {
    "clip": lambda name: ClipText(model_folder(name)),
    "clip-mdm": lambda name: ClipText(model_folder(name), max_tokens=MDM_TOKENS),
    "clip-tokens": lambda name: ClipTokens(model_folder(name)),
    "clip-pooler": lambda name: ClipText(model_folder(name), project=False),
    "distilbert": lambda name: DistilBert(model_folder(name)),
    "hymotion": lambda names: _hymotion(names),
}
_KIND_OF = {"clip": "clip", "clip_text_model": "clip", "qwen3": "hymotion"}  # model_type -> what to write before it
TEXT_ENCODER_HELP = (
    "minilm; a sentence-transformer FOLDER (MiniLM, Sentence-T5); clip:FOLDER (MLD, ACMDM), clip-mdm:FOLDER, "
    "clip-tokens:FOLDER (MotionDiffuse), clip-pooler:FOLDER, distilbert:FOLDER (MDM), or "
    "hymotion:QWEN_FOLDER,CLIP_FOLDER,PROMPT_FILE. A FOLDER may be owner/model in the hub's cache"
)
"""One line for options that name an encoder."""


def load_text_encoder(name: str) -> TextEncoder:
    """Return the encoder called `name`.

    Names::

        minilm                 all-MiniLM-L6-v2 of the installed package
        stub                   hash-seeded word vectors, for tests
        FOLDER                 sentence transformer; what it holds is read there (MiniLM, Sentence-T5)
        clip:FOLDER            CLIP states and projected end token (original MLD: ViT-L/14, ACMDM: ViT-B/32)
        clip-mdm:FOLDER        the same of captions cut to 22 tokens (MDM: ViT-B/32)
        clip-tokens:FOLDER     all 77 states, filled up with token 0, end token last (MotionDiffuse: ViT-B/32)
        clip-pooler:FOLDER     as clip, end token not projected
        distilbert:FOLDER      states of all tokens (MDM's decoder variant: distilbert-base-uncased)
        hymotion:QWEN_FOLDER,CLIP_FOLDER,PROMPT_FILE
                               states of Qwen3 over the caption in a chat, and clip-pooler (HY-Motion: Qwen3-8B in
                               bfloat16, ViT-L/14). PROMPT_FILE holds the system prompt, which is checked. Append
                               ",any-prompt" to accept another, ",float32" to compute in float32

    A FOLDER is a local one in the layout of the Hugging Face hub, or "owner/model": taken from the hub's local cache,
    downloaded only if HF_HUB_OFFLINE is not set. `ClipText`, `ClipTokens`, `DistilBert`, `ChatStates` and `SentenceT5`
    say what the features are.

    Raises:
        ConfigError: if the name is neither known nor an existing folder, its weights are not there, or the folder
            holds another kind of model.
        CheckpointError: if weights are damaged, incomplete or unsafe.
    """
    if name == "stub":
        return StubEncoder()
    if name == "minilm":
        return MiniLM()
    kind, colon, rest = name.partition(":")
    if colon and not Path(name).is_dir():
        if kind not in _KINDS:
            raise ConfigError(explain(f"one of {', '.join(_KINDS)} before ':'", repr(kind), name, "Correct the name."))
        return _KINDS[kind](rest)
    if not Path(name).is_dir() and "/" not in name:
        raise ConfigError(
            explain("'minilm', 'stub' or a model folder", repr(name), "text encoder", "Check the name or the path.")
        )
    folder = sentence_folder(name)
    config = folder / "config.json"
    model_type = read_object(config).get("model_type") if config.is_file() else None
    if model_type in _KIND_OF:
        do = f"Write {_KIND_OF[model_type]}:{name}, or another of {', '.join(_KINDS)}, as the generator needs it."
        raise ConfigError(explain("a sentence transformer", f"model_type {model_type!r}", str(config), do))
    return SentenceT5(folder) if is_t5(folder) else MiniLM(folder)


def _hymotion(names: str) -> HYMotionText:
    """Return the encoder of "QWEN_FOLDER,CLIP_FOLDER,PROMPT_FILE", with the options "any-prompt" and "float32"."""
    parts = names.split(",")
    options = set(parts[3:])
    if len(parts) < 3 or not all(parts) or options - {"any-prompt", "float32"}:
        expected = "hymotion:QWEN_FOLDER,CLIP_FOLDER,PROMPT_FILE, then any of ,any-prompt ,float32"
        raise ConfigError(explain(expected, f"hymotion:{names}", "text encoder", "Correct the name."))
    qwen, clip, prompt_file = parts[:3]
    prompt = read_prompt(Path(prompt_file), "any-prompt" in options)  # first: it costs nothing
    pooled = ClipText(model_folder(clip), project=False)
    dtype = torch.float32 if "float32" in options else torch.bfloat16
    return HYMotionText(ChatStates(model_folder(qwen), prompt, dtype), pooled)
