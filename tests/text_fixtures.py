"""A Sentence-T5 folder in the published layout with random weights of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel

from motionrft.core.rng import generator

WIDTH, SENTENCE, LIMIT = 24, 10, 12  # of tokens, of the sentence vector; tokens per caption, the end token included
_WORDS = "a person walks forward someone sits down slowly on chair and then waves sways to the left right moves".split()
MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize"))
DENSE = {
    "in_features": WIDTH,
    "out_features": SENTENCE,
    "bias": False,
    "activation_function": "torch.nn.modules.linear.Identity",
}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_modules(folder: Path, modules: tuple[tuple[str, str], ...] = MODULES) -> None:
    rows = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)]  # fmt: skip
    write_json(folder / "modules.json", rows)


def write_tokenizer(path: Path, closes: bool = True) -> int:
    """Write a unigram tokenizer of known words and single letters; return the number of its tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0 - 0.1 * i) for i, word in enumerate(_WORDS)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    if closes:
        tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))
    return len(pieces)


def write_sentence_t5(folder: Path, seed: int = 0) -> Path:
    """Write the folder: float16 transformer, float32 Dense, as published; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder / "tokenizer.json")
    config = T5Config(vocab_size=size, d_model=WIDTH, d_kv=6, d_ff=32, num_layers=2, num_heads=4)
    rng = generator("tiny-sentence-t5", seed)
    with torch.random.fork_rng(devices=[]):
        model = T5EncoderModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=rng) + (parameter.dim() == 1))
    model.half().save_pretrained(folder)
    write_modules(folder)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": LIMIT, "do_lower_case": False})
    modes = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, **modes})
    write_json(folder / "2_Dense" / "config.json", DENSE)
    save_file({"linear.weight": torch.randn(SENTENCE, WIDTH, generator=rng)}, folder / "2_Dense" / "model.safetensors")
    (folder / "3_Normalize").mkdir(exist_ok=True)
    return folder
