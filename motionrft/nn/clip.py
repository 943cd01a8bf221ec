"""CLIP's text tower: captions in, token states and the feature of the end token out.

A caption is a start token, its byte-pair tokens and an end token (EOT). Attention is causal, so that nothing after EOT
reaches it, and its state after the final norm, projected, is the sentence vector; it is not of unit norm. Letters:
B captions, L tokens, D features per token, P features of the sentence vector.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, explain
from motionrft.core.types import Condition
from motionrft.nn.frozen import FrozenEncoder
from motionrft.nn.pretrained import AGAIN, config_of, load_model, load_tokenizer, weight_files
from motionrft.nn.sentence_folder import fingerprint_of

MDM_TOKENS = 22  # MDM cuts captions to 20 tokens between start and end
_LEGACY_EOS = 2  # what configs published before 2023 say of a tokenizer whose EOT is the last token
_QUOTES = ((re.compile("[\u02bc\u2018-\u201b]"), "'"), (re.compile("[\u201c-\u201f]"), '"'))


class ClipText(FrozenEncoder):
    """CLIP text features, float32, from a local folder in the Hugging Face layout.

    Tokens are the states after the final norm, up to and including EOT. The sentence vector is the state of EOT, times
    the projection (`text_embeds`; ViT-B/32: 512, ViT-L/14: 768) or as it is (`pooler_output`). Captions are cleaned by
    `clean_caption`; longer ones are cut and keep their EOT. Original MLD reads ViT-L/14, ACMDM and MDM ViT-B/32.
    The published models were trained on features computed in half precision, which differ by about 1.5e-3 of their
    size.

    Args:
        folder: model folder: of a whole CLIP, or of its text tower (with the projection, if `project`).
        max_tokens: start and end token included; None = all the model has positions for (77).
        project: whether the sentence vector is projected.
        batch_size: captions per forward; captions are sorted by length so that little padding is computed.

    Raises:
        ConfigError: a file is missing, or the folder describes another kind of model.
        CheckpointError: weights are damaged, incomplete, of other sizes, or not plain tensors.
    """

    _states = "up to the end token"

    def __init__(
        self, folder: Path, *, max_tokens: int | None = None, project: bool = True, batch_size: int = 64
    ) -> None:
        folder = Path(folder)
        config = _text_config(folder)
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        weights = weight_files(folder)
        self._tokenizer, files = load_tokenizer(folder, config.vocab_size, CLIPTokenizer, ("vocab.json", "merges.txt"))
        self._eot = _end_token(self._tokenizer, config, files[0])
        self._batch_size = batch_size
        self.max_tokens = min(max_tokens or config.max_position_embeddings, config.max_position_embeddings)
        model = load_model(CLIPTextModelWithProjection if project else CLIPTextModel, folder, weights, config=config)
        self._model = model.text_model if project else model
        self._projection_PD: Tensor | None = model.text_projection.weight if project else None
        self.dim = int(config.hidden_size)
        self.pooled_dim = int(config.projection_dim) if project else self.dim
        settings = {
            "kind": "clip",
            "clean": "html, quotes, spaces, lower",
            "states": self._states,
            "max_tokens": self.max_tokens,
            "project": project,
        }
        self.fingerprint = fingerprint_of(settings, [folder / "config.json", *files, *weights])

    def _clean(self, caption: str) -> str:
        return clean_caption(caption)

    def _token_ids(self, captions: list[str]) -> list[list[int]]:
        # A caption that spells an end token ends there, as in the original, which pools at the first.
        return [row[: row.index(self._eot) + 1] for row in super()._token_ids(captions)]

    def _pool(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        # The library's pooling is not used: it depends on an eos_token_id that old configs state wrongly.
        eot_BD = tokens_BLD[torch.arange(len(tokens_BLD)), mask_BL.sum(1) - 1]
        if self._projection_PD is None:
            return eot_BD
        return (eot_BD.double() @ self._projection_PD.double().T).float()


class ClipTokens(ClipText):
    """All 77 states of CLIP's text tower, for MotionDiffuse (ViT-B/32: 512), which attends to all of them.

    As in OpenAI's tokenizer, captions are filled up with token 0; the Hugging Face default, the end token, gives other
    states there. All tokens are valid, and they are rolled so that the state of EOT comes last and a reader that
    needs it finds it; MotionDiffuse has no positions on text. Arguments and errors as for `ClipText`.
    """

    _states = "all, rolled to the end token"

    def _token_ids(self, captions: list[str]) -> list[list[int]]:
        return [row + [0] * (self.max_tokens - len(row)) for row in super()._token_ids(captions)]

    def _condition(self, ids: list[list[int]], tokens_BLD: Tensor, mask_BL: Tensor) -> Condition:
        eot_B = torch.tensor([row.index(self._eot) for row in ids])
        length = tokens_BLD.shape[1]
        source_BL = (torch.arange(length) + 1 + eot_B[:, None]) % length
        rolled_BLD = tokens_BLD.gather(1, source_BL[..., None].expand_as(tokens_BLD))
        return super()._condition(ids, rolled_BLD, mask_BL)


def clean_caption(caption: str) -> str:
    """Return the caption as OpenAI's tokenizer reads it: HTML entities, curly quotes, spaces and case made plain.

    Differs: the original also repairs wrongly decoded text, by the package ftfy. Features would then depend on what is
    installed, so that this is left out.
    """
    text = html.unescape(html.unescape(caption))
    for pattern, quote in _QUOTES:
        text = pattern.sub(quote, text)
    return " ".join(text.split()).lower()


def _text_config(folder: Path) -> Any:
    """Return the library's config of the text tower, with the projection of the size the whole model says."""
    from transformers import CLIPConfig, CLIPTextConfig

    config = config_of(folder, {"clip": CLIPConfig, "clip_text_model": CLIPTextConfig}, "a CLIP model")
    if config.model_type == "clip_text_model":
        return config
    config.text_config.projection_dim = config.projection_dim
    return config.text_config


def _end_token(tokenizer: Any, config: Any, path: Path) -> int:
    """Return the id of EOT, after checking that the tokenizer frames captions as the model expects."""
    eot = config.vocab_size - 1 if config.eos_token_id == _LEGACY_EOS else config.eos_token_id
    frame = tokenizer("")["input_ids"]
    if len(frame) != 2 or frame[0] == eot or frame[1] != eot:
        expected = f"a tokenizer that puts captions between a start token and the end token {eot}"
        raise ConfigError(explain(expected, f"{frame} around nothing", str(path), AGAIN))
    return int(eot)
