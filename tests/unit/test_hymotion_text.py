"""HY-Motion's text features and DistilBERT's: the library by hand, the crop of the chat, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DistilBertModel, PreTrainedTokenizerFast, Qwen3ForCausalLM

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.nn import qwen
from motionrft.nn.distilbert import DistilBert
from motionrft.nn.qwen import ChatStates
from motionrft.nn.text import TextEncoder, load_text_encoder
from tests.text_model_fixtures import (
    BERT_TOKENS,
    BERT_WIDTH,
    CLIP_WIDTH,
    PROMPT,
    QWEN_WIDTH,
    edit_json,
    write_clip,
    write_distilbert,
    write_qwen3,
)

CAPTIONS = ["a person walks", "A man sits down, then walks.", "", "walk " * 200, "q", "a person walks"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the folders clip, bert and qwen and the file prompt.txt."""
    root = tmp_path_factory.mktemp("models")
    write_clip(root / "clip")
    write_distilbert(root / "bert")
    write_qwen3(root / "qwen")
    (root / "prompt.txt").write_bytes(PROMPT.encode())
    return root


def hymotion(root: Path, options: str = ",any-prompt,float32", qwen_folder: str = "qwen") -> Any:
    return load_text_encoder(f"hymotion:{root / qwen_folder},{root / 'clip'},{root / 'prompt.txt'}{options}")


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, atol=2e-5, rtol=2e-5)


# -------------------------------------------------------------------------------------------------------- HY-Motion


def chat_ids(root: Path, caption: str) -> tuple[list[int], int]:
    """Return the ids of the chat and where the caption begins in them."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(root / "qwen" / "tokenizer.json"))
    opening = f"<|im_start|>system\n{PROMPT}<|im_end|>\n<|im_start|>user\n"
    count = len(tokenizer(opening)["input_ids"])
    ids = tokenizer(f"{opening}{caption}<|im_end|>\n")["input_ids"]
    assert ids[:count] == tokenizer(opening)["input_ids"]
    return ids, count


def test_tokens_are_the_language_models_last_states_over_the_caption(models: Path) -> None:
    encoder = hymotion(models)
    assert isinstance(encoder, TextEncoder)
    assert (encoder.dim, encoder.pooled_dim) == (QWEN_WIDTH, CLIP_WIDTH)
    found = encoder.encode(CAPTIONS)
    assert found.tokens_BLD.shape == (6, 128, QWEN_WIDTH)
    head = Qwen3ForCausalLM.from_pretrained(models / "qwen", dtype=torch.float32).eval()
    for row, caption in enumerate(CAPTIONS):
        ids, start = chat_ids(models, caption.strip())
        with torch.no_grad():
            output = head(input_ids=torch.tensor([ids]), output_hidden_states=True)
        states = output.hidden_states[-1][0, start : start + 128]  # after the final norm
        assert int(found.mask_BL[row].sum()) == len(states) == min(len(ids) - start, 128)
        close(found.tokens_BLD[row, : len(states)], states)
        assert (found.tokens_BLD[row, len(states) :] == 0).all()
    assert int(found.mask_BL[2].sum()) == 2 and int(found.mask_BL[3].sum()) == 128  # nothing but the end of the turn


def test_the_sentence_vector_is_clips_end_token_without_projection(models: Path) -> None:
    pooled = load_text_encoder(f"clip-pooler:{models / 'clip'}").encode(CAPTIONS).pooled_BD
    close(hymotion(models).encode(CAPTIONS).pooled_BD, pooled)


def test_company_and_surrounding_spaces_change_nothing(models: Path) -> None:
    encoder = hymotion(models)
    encoder._chat._batch_size = 2
    together = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([f" {caption}\n"])
        count = alone.tokens_BLD.shape[1]
        assert int(together.mask_BL[row].sum()) == count
        close(together.tokens_BLD[row, :count], alone.tokens_BLD[0])
        close(together.pooled_BD[row], alone.pooled_BD[0])
    none = encoder.encode([])
    assert none.tokens_BLD.shape == (0, 0, QWEN_WIDTH) and none.pooled_BD.shape == (0, CLIP_WIDTH)


def test_the_default_computes_in_bfloat16_and_gives_float32(models: Path) -> None:
    half, full = hymotion(models, ",any-prompt"), hymotion(models)
    assert {p.dtype for p in half._chat._model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in full._chat._model.parameters()} == {torch.float32}
    a, b = half.encode(CAPTIONS).tokens_BLD, full.encode(CAPTIONS).tokens_BLD
    assert a.dtype == b.dtype == torch.float32
    error = float((a - b).norm() / b.norm())
    assert 1e-4 < error < 0.1
    assert half.fingerprint != full.fingerprint


def test_only_the_prompt_of_the_released_model_is_taken_unless_another_is_allowed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"sha256 b9c55290b778.*got another text of 50 bytes.*append ',any-prompt'"):
        hymotion(models, ",float32")
    allowed = hymotion(models)
    monkeypatch.setattr(qwen, "PROMPT_SHA256", hashlib.sha256(PROMPT.encode()).hexdigest())
    checked = hymotion(models, ",float32")
    assert checked.fingerprint == allowed.fingerprint  # the same text, the same features
    root = Path(shutil.copytree(models, tmp_path / "models"))
    (root / "prompt.txt").write_bytes(PROMPT.encode() + b"\n")
    with pytest.raises(ConfigError, match="got another text of 51 bytes"):
        hymotion(root, ",float32")
    other = hymotion(root)
    assert other.fingerprint != allowed.fingerprint
    assert not torch.allclose(other.encode(["q"]).tokens_BLD, allowed.encode(["q"]).tokens_BLD, atol=1e-3)
    (root / "prompt.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8 text"):
        hymotion(root)
    (root / "prompt.txt").unlink()
    with pytest.raises(ConfigError, match="a file with the system prompt; got no such file"):
        hymotion(root)


def test_the_published_prompt_is_named_by_its_hash_only() -> None:
    assert len(qwen.PROMPT_SHA256) == 64 and qwen.PROMPT_SHA256.startswith("b9c55290b778c017")


@pytest.mark.parametrize("names", ["a,b", "a,,c", "a,b,c,float16", ""])
def test_an_incomplete_name_says_its_form(names: str) -> None:
    with pytest.raises(ConfigError, match="hymotion:QWEN_FOLDER,CLIP_FOLDER,PROMPT_FILE, then any of"):
        load_text_encoder(f"hymotion:{names}")


def _drop(name: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shard = folder / index["weight_map"][name]
        tensors = {n: t for n, t in load_file(shard).items() if n != name}
        save_file(tensors, shard, {"format": "pt"})

    return run


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no shard": (lambda f: (f / "model-00002-of-00004.safetensors").unlink(), "every shard.*no file model-00002"),
    "shards elsewhere": (
        lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"a": "../b.safetensors"}),
        r"a weight_map to files beside it; got \['\.\./b\.safetensors'\]",
    ),
    "index of nothing": (lambda f: edit_json(f / "model.safetensors.index.json", weight_map=3), "a weight_map"),
    "no weights": (lambda f: (f / "model.safetensors.index.json").unlink(), r"model\.safetensors\.index\.json or"),
    "tensor missing": (_drop("model.layers.1.mlp.up_proj.weight"), "1 missing, e.g. layers.1.mlp.up_proj.weight"),
    "shard cut": (
        lambda f: (f / "model-00001-of-00004.safetensors").write_bytes(b"x" * 90),
        r"whole weights.*model\.safetensors\.index\.json",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"file tokenizer\.json; got no such file"),
    "another model": (lambda f: edit_json(f / "config.json", model_type="qwen2"), "a Qwen3 model .*'qwen2'"),
    "no chat": (lambda f: write_qwen3(f, chat_tokens=["<|im_start|>"]), r"the token <\|im_end\|>; got none"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_qwen_folder_that_is_broken_or_another_is_refused_by_name(fault: str, models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "qwen", tmp_path / "qwen"))
    change, message = FAULTS[fault]
    change(folder)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        hymotion(models, qwen_folder=str(folder))


def test_the_fingerprint_is_of_every_shard(models: Path, tmp_path: Path) -> None:
    base = ChatStates(models / "qwen", PROMPT).fingerprint
    folder = Path(shutil.copytree(models / "qwen", tmp_path / "qwen"))
    assert ChatStates(folder, PROMPT).fingerprint == base
    shard = folder / "model-00003-of-00004.safetensors"
    save_file({n: t + 1 for n, t in load_file(shard).items()}, shard, {"format": "pt"})
    assert ChatStates(folder, PROMPT).fingerprint != base


def test_a_hub_name_is_taken_from_the_hubs_cache_with_its_shards(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, file: str) -> str:
        asked.append((name, file))
        path = models / name.removeprefix("owner/") / file
        if not path.is_file():
            raise OSError(f"no {file} for {name}")
        return str(path)

    monkeypatch.setattr("transformers.utils.cached_file", hub)
    name = f"hymotion:owner/qwen,owner/clip,{models / 'prompt.txt'},any-prompt,float32"
    assert load_text_encoder(name).fingerprint == hymotion(models).fingerprint
    files = {f"owner/{p.parent.name}/{p.name}" for m in ("qwen", "clip") for p in (models / m).iterdir()}
    assert files - {"/".join(pair) for pair in asked} == {"owner/qwen/generation_config.json"}
    assert ("owner/clip", "pytorch_model.bin") not in asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE forbids.*hf download owner/none --local-dir FOLDER"):
        load_text_encoder("clip:owner/none")


def test_a_plain_folder_of_a_language_model_says_what_to_write(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_type 'qwen3'.*Write hymotion:"):
        load_text_encoder(str(models / "qwen"))


# -------------------------------------------------------------------------------------------------------- DistilBERT


def bert_ids(folder: Path, caption: str) -> list[int]:
    """Return ids by greedy longest match: words of the tiny vocabulary, ending in ##s or not."""
    words = (folder / "vocab.txt").read_text().split()
    ids = []
    for word in caption.lower().replace(",", " , ").replace(".", " . ").split():
        if word in words:
            ids.append(words.index(word))
        elif word.endswith("s") and word[:-1] in words:
            ids += [words.index(word[:-1]), words.index("##s")]
        else:
            ids.append(words.index("[UNK]"))
    return [words.index("[CLS]"), *ids[: BERT_TOKENS - 2], words.index("[SEP]")]


def test_distilbert_gives_the_librarys_states_with_both_end_tokens(models: Path) -> None:
    encoder: Any = load_text_encoder(f"distilbert:{models / 'bert'}")
    encoder._batch_size = 2
    assert isinstance(encoder, TextEncoder) and isinstance(encoder, DistilBert)
    assert encoder.dim == encoder.pooled_dim == BERT_WIDTH
    found = encoder.encode(CAPTIONS)
    assert found.tokens_BLD.shape == (6, BERT_TOKENS, BERT_WIDTH)  # the longest is cut at the model's positions
    library = DistilBertModel.from_pretrained(models / "bert", dtype=torch.float32).eval()
    for row, caption in enumerate(CAPTIONS):
        ids = bert_ids(models / "bert", caption)
        with torch.no_grad():
            states = library(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert int(found.mask_BL[row].sum()) == len(ids)
        close(found.tokens_BLD[row, : len(ids)], states)
        assert (found.tokens_BLD[row, len(ids) :] == 0).all()
        close(found.pooled_BD[row], states.mean(0))
        close(encoder.encode([caption]).pooled_BD[0], found.pooled_BD[row])
    assert int(found.mask_BL[2].sum()) == 2


def test_distilbert_reads_the_older_layout(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "bert", tmp_path / "bert"))
    want = load_text_encoder(f"distilbert:{folder}").encode(CAPTIONS)
    (folder / "tokenizer.json").unlink()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = load_text_encoder(f"distilbert:{folder}").encode(CAPTIONS)
    close(found.tokens_BLD, want.tokens_BLD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "vocab.txt").unlink() or (f / "tokenizer.json").unlink(), r"tokenizer\.json or vocab\.txt"),
        (lambda f: edit_json(f / "config.json", model_type="bert"), "DistilBERT .*model_type 'bert'"),
        (lambda f: edit_json(f / "config.json", n_layers=3), r"missing, e\.g\. transformer\.layer\.2\."),
        (lambda f: edit_json(f / "tokenizer.json", post_processor=None), r"between \[CLS\] and \[SEP\]; got \[\]"),
    ],
)
def test_a_distilbert_folder_that_is_broken_or_another_is_refused_by_name(
    change: Callable[[Path], Any], message: str, models: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models / "bert", tmp_path / "bert"))
    change(folder)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load_text_encoder(f"distilbert:{folder}")
