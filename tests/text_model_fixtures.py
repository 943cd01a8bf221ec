"""Folders of CLIP, DistilBERT and Qwen3 in their published layouts, with random weights of a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from motionrft.core.rng import generator
from tests.text_fixtures import write_json

CLIP_WIDTH, CLIP_JOINT, CLIP_TOKENS = 16, 12, 77
BERT_WIDTH, BERT_TOKENS = 16, 24
QWEN_WIDTH = 16
PROMPT = "\n    Say in one paragraph\n    how the body moves.\n"
CLIP_MERGES = ["w a", "wa l", "wal k</w>", "a n", "o n</w>", "t h", "th e</w>"]


def byte_symbols() -> list[str]:
    """Return the printable symbols that stand for the bytes 0 to 255, as byte-level tokenizers write them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def randomise(model: nn.Module, seed: int, scale: float = 0.4) -> None:
    """Replace every weight, norms around one."""
    rng = generator("tiny-text-model", seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=rng) + centre)


# -------------------------------------------------------------------------------------------------------------- CLIP


def clip_vocabulary() -> list[str]:
    """Return bytes, bytes that end a word, merges, start and end token: OpenAI's order."""
    symbols = byte_symbols()
    ordered = sorted(symbols, key=lambda s: (ord(s) >= 256, ord(s)))
    merged = [merge.replace(" ", "") for merge in CLIP_MERGES]
    return [*ordered, *(s + "</w>" for s in ordered), *merged, "<|startoftext|>", "<|endoftext|>"]


def write_clip_tokenizer(folder: Path) -> int:
    """Write tokenizer.json, vocab.json and merges.txt; return the number of tokens."""
    vocabulary = {token: i for i, token in enumerate(clip_vocabulary())}
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *CLIP_MERGES, ""]), encoding="utf-8")
    end = "<|endoftext|>"
    pairs = [tuple(merge.split()) for merge in CLIP_MERGES]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, end_of_word_suffix="</w>", unk_token=end))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    start = "<|startoftext|>"
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocabulary[end]), (start, vocabulary[start]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([start, end])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    return len(vocabulary)


def write_clip(
    folder: Path, seed: int = 0, legacy: bool = True, width: int = CLIP_WIDTH, joint: int = CLIP_JOINT
) -> Path:
    """Write a whole CLIP, both towers; `legacy` configs say eos_token_id 2, as OpenAI's published ones do."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_clip_tokenizer(folder)
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 2} if legacy else {"bos_token_id": size - 2, "eos_token_id": size - 1}
    config = CLIPConfig(
        text_config={"vocab_size": size, "hidden_size": width, **sizes, **special},
        vision_config={"hidden_size": 8, "image_size": 8, "patch_size": 4, **sizes},
        projection_dim=joint,
    )
    with torch.random.fork_rng(devices=[]):
        model = CLIPModel(config)
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------------- DistilBERT


def write_distilbert(folder: Path, seed: int = 0) -> Path:
    """Write DistilBERT as distilbert-base-uncased is: with its language-model head, vocab.txt and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "person", "walk", "##s", "sits", "down", "then", "."]
    (folder / "vocab.txt").write_text("\n".join([*words, ""]), encoding="utf-8")
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["[CLS]", "$A", "[SEP]"], special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})
    config = DistilBertConfig(
        vocab_size=len(words), max_position_embeddings=BERT_TOKENS, n_layers=2, n_heads=2, dim=BERT_WIDTH, hidden_dim=32
    )
    with torch.random.fork_rng(devices=[]):
        model = DistilBertForMaskedLM(config)
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- Qwen3


def write_qwen3(folder: Path, seed: int = 0, chat_tokens: Iterable[str] = ("<|im_start|>", "<|im_end|>")) -> Path:
    """Write Qwen3 with its language-model head, bfloat16 in shards, and a byte-level tokenizer with chat tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary: dict[str, int] = {token: i for i, token in enumerate([*byte_symbols(), "wa", "al", "lk"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("w", "a"), ("l", "k")]))
    tokenizer.normalizer = normalizers.NFC()
    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    words = Regex(contractions + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", *chat_tokens)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size() + 5,  # published tables have spare rows
        hidden_size=QWEN_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen3ForCausalLM(config)
    randomise(model, seed)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="8KB")
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON object."""
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})
