"""Text features of HY-Motion: states of a language model over a chat about the caption, and CLIP's end token.

Letters: B captions, L tokens, D features per token, P features of the sentence vector.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from motionrft.core.errors import ConfigError, explain
from motionrft.core.types import Condition
from motionrft.nn.clip import ClipText
from motionrft.nn.frozen import FrozenEncoder
from motionrft.nn.pretrained import AGAIN, config_of, load_model, load_tokenizer, weight_files
from motionrft.nn.sentence_folder import fingerprint_of

PROMPT_SHA256 = "b9c55290b778c01739a337a36315c2065ef6ccfbfa0a1898b727377ed4965283"
"""Of the system prompt HY-Motion was trained with, PROMPT_TEMPLATE_ENCODE_HUMAN_MOTION, as UTF-8. The text itself is
the user's to supply."""
CAPTION_TOKENS = 128


class ChatStates(FrozenEncoder):
    """States of Qwen3 after its final norm over the tokens of a caption, in a chat that opens with a system prompt.

    The chat is one system turn and one user turn, thinking off and no answer begun. States of the user turn's content
    are kept, with the end of turn and the newline that follow it, up to 128; an empty caption has these two.

    Args:
        folder: model folder; a language-model head that lies in it is left out.
        prompt: system prompt.
        dtype: of the computation. bfloat16 is the published one, float32 takes twice the memory; features are float32.
        batch_size: captions per forward.

    Raises:
        ConfigError: a file is missing, or the folder describes another kind of model or tokenizer.
        CheckpointError: weights are damaged, incomplete, of other sizes, or not plain tensors.
    """

    def __init__(self, folder: Path, prompt: str, dtype: torch.dtype = torch.bfloat16, batch_size: int = 16) -> None:
        folder = Path(folder)
        from transformers import Qwen3Config, Qwen3Model

        config = config_of(folder, {"qwen3": Qwen3Config}, "a Qwen3 model")
        weights = weight_files(folder)
        self._tokenizer, files = load_tokenizer(folder, int(config.vocab_size))
        for mark in ("<|im_start|>", "<|im_end|>"):
            if len(self._tokenizer(mark)["input_ids"]) != 1:
                expected = f"a chat tokenizer with the token {mark}"
                raise ConfigError(explain(expected, "none", str(files[0]), AGAIN))
        self._opening = f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\n"
        # A caption begins where chats about different ones part.
        chats = [self._tokenizer(self._chat(marker))["input_ids"] for marker in "ab"]
        self._num_skipped = next(i for i, (a, b) in enumerate(zip(*chats)) if a != b)
        self.max_tokens = self._num_skipped + CAPTION_TOKENS
        self._batch_size = batch_size
        self._model = load_model(Qwen3Model, folder, weights, dtype)
        self.dim = self.pooled_dim = int(config.hidden_size)
        settings = {
            "kind": "qwen3-chat",
            "prompt": hashlib.sha256(prompt.encode()).hexdigest(),
            "max_tokens": CAPTION_TOKENS,
            "dtype": str(dtype),
        }
        self.fingerprint = fingerprint_of(settings, [folder / "config.json", *files, *weights])

    def _clean(self, caption: str) -> str:
        return caption.strip()  # spaces in front would merge with the newline that opens the turn

    def _token_ids(self, captions: list[str]) -> list[list[int]]:
        return super()._token_ids([self._chat(caption) for caption in captions])

    def _chat(self, caption: str) -> str:
        return f"{self._opening}{caption}<|im_end|>\n"


class HYMotionText:
    """What HY-Motion reads: tokens from `ChatStates` (Qwen3-8B: 4096), the sentence vector from CLIP (ViT-L/14: 768).

    The sentence vector is `pooler_output`, without projection.

    Args:
        chat: states of the caption's tokens.
        clip: features of the sentence.
    """

    def __init__(self, chat: ChatStates, clip: ClipText) -> None:
        self._chat, self._clip = chat, clip
        self.dim, self.pooled_dim = chat.dim, clip.pooled_dim
        parts = {"kind": "hymotion", "tokens": chat.fingerprint, "pooled": clip.fingerprint}
        self.fingerprint = fingerprint_of(parts, [])

    def encode(self, captions: list[str]) -> Condition:
        """Return features of captions: tokens (B, L <= 128, D), mask (B, L), sentence vectors (B, P)."""
        tokens = self._chat.encode(captions)
        return Condition(tokens.tokens_BLD, tokens.mask_BL, self._clip.encode(captions).pooled_BD)

    def to(self, device: torch.device | str) -> HYMotionText:
        """Move both models; features are returned on CPU."""
        self._chat.to(device)
        self._clip.to(device)
        return self


def read_prompt(path: Path, any_prompt: bool = False) -> str:
    """Return the system prompt in a text file, to the last newline.

    Args:
        path: UTF-8 file.
        any_prompt: accept another text than the published one.

    Raises:
        ConfigError: no such file, no text, or not the text HY-Motion was trained with.
    """
    if not path.is_file():
        raise ConfigError(explain("a file with the system prompt", "no such file", str(path), "Check the path."))
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != PROMPT_SHA256 and not any_prompt:
        raise ConfigError(
            explain(
                f"the system prompt HY-Motion was trained with (sha256 {PROMPT_SHA256[:12]}...)",
                f"another text of {len(content)} bytes (sha256 {digest[:12]}...)",
                str(path),
                "Write PROMPT_TEMPLATE_ENCODE_HUMAN_MOTION of HY-Motion's model_constants.py to the file exactly, with "
                "the newline and spaces it begins with and the newline it ends with; or append ',any-prompt' for a "
                "model that was trained with another.",
            )
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(explain("UTF-8 text", str(error), str(path), "Save the file as UTF-8.")) from error
