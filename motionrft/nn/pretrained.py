"""Published transformer folders: what lies in them, loaded strictly or refused by name.

Layout: config.json, weights (one safetensors file, safetensors shards with their index, or one pickled file of plain
tensors) and the files of a tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.nn.sentence_folder import PICKLED_WEIGHTS, SAFE_WEIGHTS, read_object

SHARD_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
AGAIN = "Copy the folder again from where it was published."
_COMPLETE = "Give a complete model folder."


def config_of(folder: Path, kinds: Mapping[str, Any], what: str) -> Any:
    """Return a folder's config.json as the library reads it.

    Args:
        folder: model folder.
        kinds: accepted `model_type` -> the library's class for its config.
        what: what such a model is, for the message.

    Raises:
        ConfigError: no such file, another kind of model, or sizes that are none.
    """
    path = folder / "config.json"
    kind = str(read_object(path).get("model_type"))
    if kind not in kinds:
        expected = f"{what} (model_type {' or '.join(kinds)})"
        raise ConfigError(explain(expected, f"model_type {kind!r}", str(path), "Give the folder of such a model."))
    try:
        return kinds[kind].from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library checks types in its own ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(explain(f"sizes of {what}", reason, str(path), AGAIN)) from error


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights: safetensors if there are, in one or in shards, else pickled.

    Raises:
        ConfigError: none is there, a shard is missing, or the index is none.
    """
    index = folder / SHARD_INDEX
    if not (folder / SAFE_WEIGHTS).is_file() and index.is_file():
        shards = [folder / name for name in listed_shards(index)]
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise ConfigError(explain("every shard of the index", f"no file {absent[0]}", str(index), _COMPLETE))
        return shards
    for name in (SAFE_WEIGHTS, PICKLED_WEIGHTS):
        if (folder / name).is_file():
            return [folder / name]
    expected = f"file {SAFE_WEIGHTS} or {SHARD_INDEX} or {PICKLED_WEIGHTS}"
    raise ConfigError(explain(expected, "no such file", str(folder), _COMPLETE))


def listed_shards(index: Path) -> list[str]:
    """Return the names of the weight files an index lists, sorted; whether they are there is not checked.

    Raises:
        ConfigError: the file lists none, or a file elsewhere.
    """
    places = read_object(index).get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ConfigError(explain("a weight_map to files beside it", f"{names[:1]}", str(index), AGAIN))
    return names


def load_model(
    model_class: Any, folder: Path, weights: Sequence[Path], dtype: torch.dtype = torch.float32, config: Any = None
) -> Any:
    """Return a frozen model in eval mode with exactly its published weights; other weights in the files are left out.

    Args:
        model_class: class of the library to make; never taken from the folder.
        folder: model folder.
        weights: its weight files.
        dtype: of the computation; published files come in several.
        config: replaces the folder's.

    Raises:
        CheckpointError: weights are damaged, incomplete, of other sizes, or not plain tensors.
    """
    file = weights[0] if len(weights) == 1 else folder / SHARD_INDEX
    try:
        with quiet():
            model, report = model_class.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=file.name != PICKLED_WEIGHTS,
                weights_only=True,
                dtype=dtype,  # the default would keep the file's
                output_loading_info=True,
            )
    except Exception as error:  # a damaged file fails in many ways, and sizes that disagree in one more
        raise unreadable(file, error) from error
    missing = sorted(report["missing_keys"])
    if missing:  # the library would fill them with random numbers
        got = f"{len(missing)} missing, e.g. {missing[0]}"
        raise CheckpointError(explain(f"all weights of a {model_class.__name__}", got, str(file), AGAIN))
    return model.eval().requires_grad_(False)


def load_tokenizer(
    folder: Path, vocab_size: int, tokenizer_class: Any = None, vocabulary: Sequence[str] = ()
) -> tuple[Any, list[Path]]:
    """Return a folder's tokenizer and the files that decide what it does.

    tokenizer.json is followed as it stands; without it `tokenizer_class` reads the `vocabulary` files.

    Args:
        folder: model folder.
        vocab_size: tokens the model knows.
        tokenizer_class: of the library, for folders of the older layout; None = they are refused.
        vocabulary: file names it reads.

    Raises:
        ConfigError: files are missing or unreadable, or know more tokens than the model.
    """
    from transformers import PreTrainedTokenizerFast

    files, older = [folder / TOKENIZER], not (folder / TOKENIZER).is_file()
    if older:
        files = [folder / name for name in vocabulary]
        if not files or not all(path.is_file() for path in files):
            expected = f"file {TOKENIZER}" + (f" or {' and '.join(vocabulary)}" if vocabulary else "")
            raise ConfigError(explain(expected, "no such file", str(folder), _COMPLETE))
        files += [path for path in [folder / "tokenizer_config.json"] if path.is_file()]
    try:
        with quiet():
            tokenizer: Any = (
                tokenizer_class.from_pretrained(folder, local_files_only=True)
                if older
                else PreTrainedTokenizerFast(tokenizer_file=str(files[0]))
            )
    except Exception as error:  # the reader raises plain Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(explain("a tokenizer", reason, str(files[0]), AGAIN)) from error
    if len(tokenizer) > vocab_size:
        expected = f"at most {vocab_size} tokens, as config.json says"
        raise ConfigError(explain(expected, str(len(tokenizer)), str(files[0]), AGAIN))
    return tokenizer, files


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a weight file that the library could not read."""
    if path.name == PICKLED_WEIGHTS:
        # Libraries advise to load pickles without the restriction: their text is not passed on.
        expected, got = "tensors only, whole and of the sizes in config.json", "something else; nothing of it was run"
    else:
        expected = "whole weights of the sizes in config.json"
        got = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(explain(expected, got, str(path), AGAIN))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library from listing the tensors a model leaves out, and from drawing progress bars."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
