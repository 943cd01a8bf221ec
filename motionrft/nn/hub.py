"""Model folders by name: a local folder, or "owner/model" in the Hugging Face hub's cache.

What a cache lacks is downloaded only if HF_HUB_OFFLINE is not set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from motionrft.core.errors import ConfigError, explain
from motionrft.nn.pretrained import SHARD_INDEX, listed_shards
from motionrft.nn.sentence_folder import PICKLED_WEIGHTS, SAFE_WEIGHTS, TOKENIZERS, modules_of

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_VOCABULARIES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt")
_SENTENCE_FILES = ("config.json", "sentence_bert_config.json", "tokenizer_config.json", *TOKENIZERS)


def model_folder(name: str) -> Path:
    """Return the folder of a transformer with its tokenizer.

    Raises:
        ConfigError: neither a folder nor a model in the hub's cache.
    """
    if Path(name).is_dir():
        return Path(name)
    folder, fetch = _snapshot(name, "config.json", "config.json, weights and tokenizer files")
    # What is not there is missed by the check of the folder, which names it.
    for file in _VOCABULARIES:
        fetch(file)
    if not fetch(SAFE_WEIGHTS):
        if fetch(SHARD_INDEX):
            for shard in listed_shards(folder / SHARD_INDEX):
                fetch(shard)
        else:
            fetch(PICKLED_WEIGHTS)
    return folder


def sentence_folder(name: str) -> Path:
    """Return the folder of a sentence transformer: a transformer with modules.json and a sub-folder per module.

    Raises:
        ConfigError: neither a folder nor a model in the hub's cache.
    """
    if Path(name).is_dir():
        return Path(name)
    needed = f"config.json, {SAFE_WEIGHTS}, tokenizer.json, modules.json and its sub-folders"
    folder, fetch = _snapshot(name, "modules.json", needed)
    for file in _SENTENCE_FILES:
        fetch(file)
    for kind, path in modules_of(folder):
        prefix = f"{path}/" if path else ""
        if kind in ("Pooling", "Dense"):
            fetch(f"{prefix}config.json")
        if kind in ("Transformer", "Dense") and not fetch(f"{prefix}{SAFE_WEIGHTS}"):
            fetch(f"{prefix}{PICKLED_WEIGHTS}")
    return folder


def _snapshot(name: str, key_file: str, needed: str) -> tuple[Path, Callable[[str], bool]]:
    """Return the folder in the cache that holds `key_file`, and what brings a further file and says if it is there."""
    if not _HUB_NAME.fullmatch(name):
        expected = "a model folder or owner/model on the hub"
        raise ConfigError(explain(expected, repr(name), "text encoder", "Check the name or the path."))
    from transformers.utils import cached_file

    def fetch(file: str) -> bool:
        try:
            return cached_file(name, file) is not None
        except OSError:
            return False

    try:
        return Path(str(cached_file(name, key_file))).parent, fetch
    except OSError as error:
        offline = bool(os.environ.get("HF_HUB_OFFLINE"))
        got = "neither, and HF_HUB_OFFLINE forbids asking the hub" if offline else str(error).splitlines()[0]
        raise ConfigError(
            explain(
                f"a folder {name!r} or a model of that name in the hub's cache",
                got,
                "text encoder",
                f"Where there is a network: `hf download {name} --local-dir FOLDER`; then give the path of that FOLDER "
                f"with {needed}.",
            )
        ) from error
