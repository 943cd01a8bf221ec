"""What lies in a sentence-transformers folder, read and checked before any weight is loaded.

Layout of a Sentence-T5 folder::

    config.json, model.safetensors            the transformer (or pytorch_model.bin)
    tokenizer.json                            or spiece.model
    modules.json                              Transformer -> Pooling -> Dense -> Normalize, with their folders
    sentence_bert_config.json                 max_seq_length
    1_Pooling/config.json                     mean
    2_Dense/config.json, model.safetensors    in_features, out_features, no bias, identity (or pytorch_model.bin)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrft.core.errors import ConfigError, explain

SAFE_WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"
TOKENIZERS = ("tokenizer.json", "spiece.model")
_T5_MODULES = ["Transformer", "Pooling", "Dense", "Normalize"]
_COMPLETE = "Give a complete model folder, as it was published."
_ANOTHER = "This loader computes Sentence-T5 as published; give such a folder."


@dataclass(frozen=True)
class T5Folder:
    """A checked Sentence-T5 folder: what is needed to load it."""

    root: Path
    weights: Path
    tokenizer: Path
    dense: Path  # weights of the Dense layer
    width: int  # features per token
    pooled_width: int  # features of the sentence vector
    max_tokens: int  # end token included
    fingerprint: str


def is_t5(folder: Path) -> bool:
    """Return whether a folder holds a T5 encoder or names a Dense layer, as Sentence-T5 does and MiniLM does not."""
    config = folder / "config.json"
    if config.is_file() and read_object(config).get("model_type") == "t5":
        return True
    return "Dense" in [kind for kind, _ in modules_of(folder)]


def read_t5_folder(folder: Path) -> T5Folder:
    """Return what a Sentence-T5 folder holds.

    Raises:
        ConfigError: a file is missing or unreadable, modules are others or in another order, pooling is not the mean,
            the Dense layer has a bias or an activation, or sizes do not agree.
    """
    modules = modules_of(folder)
    kinds = [kind for kind, _ in modules]
    if kinds != _T5_MODULES or modules[0][1]:
        got = " -> ".join(f"{kind} in {path!r}" if path else kind for kind, path in modules) or "no modules.json"
        raise ConfigError(explain(f"modules {' -> '.join(_T5_MODULES)}", got, str(folder / "modules.json"), _COMPLETE))
    pooling, dense = folder / modules[1][1] / "config.json", folder / modules[2][1]
    config = read_object(folder / "config.json")
    width = _size(config, "d_model", folder / "config.json")
    if config.get("model_type") != "t5":
        got = f"model_type {config.get('model_type')!r}"
        raise ConfigError(explain("a T5 encoder", got, str(folder / "config.json"), _ANOTHER))
    require_mean_pooling(pooling, width)
    pooled_width = _check_dense(dense / "config.json", width)
    max_tokens = _max_t5_tokens(folder)
    weights, dense_weights = weights_in(folder), weights_in(dense)
    tokenizer = _first(folder, TOKENIZERS)
    settings = {"kind": "sentence-t5", "pool": "mean", "normalise": True, "max_tokens": max_tokens}
    content = [folder / "config.json", tokenizer, weights, dense / "config.json", dense_weights]
    return T5Folder(
        folder, weights, tokenizer, dense_weights, width, pooled_width, max_tokens, fingerprint_of(settings, content)
    )


def modules_of(folder: Path) -> list[tuple[str, str]]:
    """Return (kind, sub-folder) of the modules in order; empty without modules.json.

    Raises:
        ConfigError: the file is no list of modules.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        return [(str(m["type"]).rsplit(".", 1)[-1], str(m["path"])) for m in json.loads(path.read_text("utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(explain("a list of modules", repr(error), str(path), "Copy the file again.")) from error


def require_mean_pooling(path: Path, width: int) -> None:
    """Refuse pooling that is not the plain mean, or of another width, in either spelling of its config.

    Raises:
        ConfigError: naming what it is instead.
    """
    config = read_object(path)
    stated = config.get("pooling_mode")
    modes = [stated] if isinstance(stated, str) else list(stated or ())
    modes += [k.removeprefix("pooling_mode_").removesuffix("_tokens") for k, on in config.items()
              if k.startswith("pooling_mode_") and on]  # fmt: skip
    if modes != ["mean"]:
        raise ConfigError(explain("mean pooling", f"{modes}", str(path), "Choose a mean-pooled model."))
    got = config.get("word_embedding_dimension", config.get("embedding_dimension", width))
    if got != width:
        raise ConfigError(explain(f"pooling of {width} features", f"{got}", str(path), _ANOTHER))


def weights_in(folder: Path) -> Path:
    """Return the weight file of a folder: safetensors where there is one, else the pickled file.

    Raises:
        ConfigError: neither is there.
    """
    return _first(folder, (SAFE_WEIGHTS, PICKLED_WEIGHTS))


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ConfigError: no such file, or no JSON object.
    """
    if not path.is_file():
        raise ConfigError(explain(f"file {path.name}", "no such file", str(path), _COMPLETE))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(explain("JSON", str(error), str(path), "Copy the file again.")) from error
    if not isinstance(value, dict):
        raise ConfigError(explain("a JSON object", type(value).__name__, str(path), "Copy the file again."))
    return value


def fingerprint_of(settings: Mapping[str, Any], files: Sequence[Path]) -> str:
    """Return a sha256 over settings and the content of files, in order; where they lie does not matter."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _check_dense(path: Path, width: int) -> int:
    config = read_object(path)
    activation = str(config.get("activation_function", "Tanh")).rsplit(".", 1)[-1]  # what the format means by silence
    wrong = [
        text
        for bad, text in (
            (config.get("bias", True), "a bias"),
            (activation != "Identity", f"activation {activation}"),
            (config.get("use_residual", False), "a residual"),
            (config.get("in_features") != width, f"in_features {config.get('in_features')}"),
        )
        if bad
    ]
    if wrong:
        expected = f"a Dense layer of {width} features without bias, activation or residual"
        raise ConfigError(explain(expected, ", ".join(wrong), str(path), _ANOTHER))
    return _size(config, "out_features", path)


def _max_t5_tokens(folder: Path) -> int:
    path, newer = folder / "sentence_bert_config.json", folder / "tokenizer_config.json"
    settings = read_object(path)
    if settings.get("do_lower_case"):
        raise ConfigError(explain("captions as they are", "do_lower_case", str(path), _ANOTHER))
    if settings.get("max_seq_length") is None and newer.is_file():  # sentence-transformers 6 writes it there
        return _size(read_object(newer), "model_max_length", newer)
    return _size(settings, "max_seq_length", path)


def _size(config: Mapping[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 20:
        raise ConfigError(explain(f"a positive {name}", repr(value), str(path), _COMPLETE))
    return value


def _first(folder: Path, names: Sequence[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(explain(f"file {' or '.join(names)}", "no such file", str(folder), _COMPLETE))
    return found
