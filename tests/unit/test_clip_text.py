"""CLIP text features: the library's and a hand-written tokenizer's, what padding may not change, what is refused."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from motionrft.config.prepare import PrepareConfig
from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.core.types import Condition
from motionrft.nn.clip import ClipText, clean_caption
from motionrft.nn.text import TextEncoder, load_text_encoder
from tests.text_fixtures import write_json, write_sentence_t5
from tests.text_model_fixtures import (
    CLIP_JOINT,
    CLIP_MERGES,
    CLIP_TOKENS,
    CLIP_WIDTH,
    byte_symbols,
    clip_vocabulary,
    edit_json,
    write_clip,
)

LONG = "walk then on " * 40
CAPTIONS = ["a person walks on", "someone's 2nd walk, then the walk!", "", LONG, "q", "a person walks on"]
KINDS = ("clip", "clip-mdm", "clip-tokens", "clip-pooler")
VOCABULARY = clip_vocabulary()
START, END = len(VOCABULARY) - 2, len(VOCABULARY) - 1


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip-tiny")


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """Return a copy that may be broken."""
    return Path(shutil.copytree(published, tmp_path / "model"))


@pytest.fixture(params=KINDS)
def encoder(request: pytest.FixtureRequest, published: Path) -> Any:
    found: Any = load_text_encoder(f"{request.param}:{published}")
    found._batch_size = 2
    return found


def token_ids(caption: str, limit: int = CLIP_TOKENS) -> list[int]:
    """Return ids by the definition of byte-pair encoding: the earliest merge of the list, as long as there is one."""
    symbols, ranks = byte_symbols(), {tuple(m.split()): r for r, m in enumerate(CLIP_MERGES)}
    ids = []
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", caption.lower()):
        parts = [symbols[b] for b in word.encode()]
        parts[-1] += "</w>"
        while True:
            at = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
            if not at:
                break
            first = min(at)[1]
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        ids += [VOCABULARY.index(part) for part in parts]
    return [START, *ids[: limit - 2], END]


def by_hand(folder: Path, ids: list[int], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the library's states (77, D), projected and unprojected end token of one caption filled up to 77."""
    config = CLIPTextConfig.from_pretrained(folder)
    config.projection_dim = CLIP_JOINT
    padded = torch.tensor([ids + [pad] * (CLIP_TOKENS - len(ids))])
    model = CLIPTextModelWithProjection.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        whole, tower = model(input_ids=padded), model.text_model(input_ids=padded)
    return whole.last_hidden_state[0], whole.text_embeds[0], tower.pooler_output[0]


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, atol=2e-5, rtol=2e-5)


def same(a: Condition, b: Condition) -> None:
    assert torch.equal(a.mask_BL, b.mask_BL)
    close(a.tokens_BLD, b.tokens_BLD)
    close(a.pooled_BD, b.pooled_BD)


@pytest.mark.parametrize("kind", ["clip", "clip-mdm", "clip-pooler"])
def test_features_are_the_librarys_up_to_the_end_token(kind: str, published: Path) -> None:
    limit = 22 if kind == "clip-mdm" else CLIP_TOKENS
    encoder = load_text_encoder(f"{kind}:{published}")
    assert isinstance(encoder, TextEncoder)
    assert (encoder.dim, encoder.pooled_dim) == (CLIP_WIDTH, CLIP_WIDTH if kind == "clip-pooler" else CLIP_JOINT)
    found = encoder.encode(CAPTIONS)
    assert found.tokens_BLD.shape == (len(CAPTIONS), limit, CLIP_WIDTH)
    for row, caption in enumerate(CAPTIONS):
        ids = token_ids(caption, limit)
        states, projected, plain = by_hand(published, ids, pad=END)
        assert int(found.mask_BL[row].sum()) == len(ids)
        close(found.tokens_BLD[row, : len(ids)], states[: len(ids)])
        close(found.pooled_BD[row], plain if kind == "clip-pooler" else projected)
    assert (found.pooled_BD.norm(dim=-1) - 1).abs().min() > 1e-2  # it is not normalised


def test_motiondiffuse_gets_all_states_with_padding_0_and_the_end_token_last(published: Path) -> None:
    found = load_text_encoder(f"clip-tokens:{published}").encode(CAPTIONS)
    assert found.tokens_BLD.shape == (len(CAPTIONS), CLIP_TOKENS, CLIP_WIDTH) and found.mask_BL.all()
    for row, caption in enumerate(CAPTIONS):
        ids = token_ids(caption)
        states, projected, plain = by_hand(published, ids, pad=0)
        close(found.tokens_BLD[row, -1], plain)
        close(found.tokens_BLD[row, -len(ids) :], states[: len(ids)])
        close(found.tokens_BLD[row, : CLIP_TOKENS - len(ids)], states[len(ids) :])
        close(found.pooled_BD[row], projected)
    ids = token_ids("q")
    differs = by_hand(published, ids, pad=END)[0] - by_hand(published, ids, pad=0)[0]
    assert differs[: len(ids)].abs().max() < 1e-5 and differs[len(ids) :].abs().max() > 0.1


def test_configs_that_state_a_wrong_end_token_give_the_same_as_right_ones(published: Path, tmp_path: Path) -> None:
    right = write_clip(tmp_path / "right", legacy=False)
    assert CLIPTextConfig.from_pretrained(published).eos_token_id == 2
    assert CLIPTextConfig.from_pretrained(right).eos_token_id == END
    for kind in KINDS:
        a, b = (load_text_encoder(f"{kind}:{f}").encode(CAPTIONS) for f in (published, right))
        same(a, b)
    whole = CLIPModel.from_pretrained(published, dtype=torch.float32).eval()
    with torch.no_grad():
        output = whole.get_text_features(input_ids=torch.tensor([token_ids("q")]))
    close(load_text_encoder(f"clip:{published}").encode(["q"]).pooled_BD, output.pooler_output)


def test_mdm_differs_from_clip_in_long_captions_only(published: Path) -> None:
    clip, mdm = (load_text_encoder(f"{kind}:{published}").encode(CAPTIONS) for kind in ("clip", "clip-mdm"))
    change_B = (clip.pooled_BD - mdm.pooled_BD).abs().amax(1)
    assert [bool(change > 1e-2) for change in change_B] == [len(token_ids(c)) > 22 for c in CAPTIONS]
    assert int(mdm.mask_BL[3].sum()) == 22


def test_padding_and_company_change_nothing(encoder: ClipText) -> None:
    together = encoder.encode(CAPTIONS)
    assert together.tokens_BLD.dtype == together.pooled_BD.dtype == torch.float32
    assert (together.tokens_BLD[~together.mask_BL] == 0).all()
    assert torch.equal(together.pooled_BD[0], together.pooled_BD[5])
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        count = alone.tokens_BLD.shape[1]
        assert int(together.mask_BL[row].sum()) == count and alone.mask_BL.all()
        close(together.tokens_BLD[row, :count], alone.tokens_BLD[0])
        close(together.pooled_BD[row], alone.pooled_BD[0])
    none = encoder.encode([])
    assert none.tokens_BLD.shape == (0, 0, CLIP_WIDTH) and none.pooled_BD.shape == (0, encoder.pooled_dim)


def test_equal_captions_are_run_once_however_they_are_written(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = load_text_encoder(f"clip:{published}")
    rows = []
    forward = encoder._model.forward
    monkeypatch.setattr(encoder._model, "forward", lambda **kw: rows.append(len(kw["input_ids"])) or forward(**kw))
    found = encoder.encode(["A  dog's Walk\n", "a dog’s walk", "a dog&#39;s walk", "a dog&amp;#39;s walk", "on"])
    assert rows == [2] and len(found.pooled_BD.unique(dim=0)) == 2


def test_captions_are_cleaned_as_by_openai() -> None:
    assert clean_caption(" A\tMan “jumps” &amp;quot;up&amp;quot;  ") == 'a man "jumps" "up"'
    assert clean_caption("") == clean_caption(" \n") == ""


def test_a_caption_that_spells_the_end_token_ends_there(published: Path) -> None:
    for kind in KINDS:
        found = load_text_encoder(f"{kind}:{published}").encode(["walk<|endoftext|>on the walk", "walk"])
        assert torch.equal(found.mask_BL[0], found.mask_BL[1])
        close(found.tokens_BLD[0], found.tokens_BLD[1])
        close(found.pooled_BD[0], found.pooled_BD[1])


# ------------------------------------------------------------------------------------------------------- the folder


def test_older_layouts_give_the_same(folder: Path, published: Path) -> None:
    want = load_text_encoder(f"clip:{published}").encode(CAPTIONS)
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(CLIP_TOKENS)[None]  # once a stored buffer
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    same(load_text_encoder(f"clip:{folder}").encode(CAPTIONS), want)


def test_a_text_tower_alone_serves_the_kinds_it_can(published: Path, tmp_path: Path) -> None:
    config = CLIPTextConfig.from_pretrained(published)
    config.projection_dim = CLIP_JOINT
    towers = {"clip": CLIPTextModelWithProjection, "clip-pooler": CLIPTextModel}
    for kind, tower in towers.items():
        own = Path(shutil.copytree(published, tmp_path / kind))
        tower.from_pretrained(published, config=config, dtype=torch.float32).save_pretrained(own)
        assert json.loads((own / "config.json").read_text())["model_type"] == "clip_text_model"
        want = load_text_encoder(f"{kind}:{published}").encode(CAPTIONS)
        same(load_text_encoder(f"{kind}:{own}").encode(CAPTIONS), want)
    with pytest.raises(CheckpointError, match=r"1 missing, e\.g\. text_projection\.weight"):
        load_text_encoder(f"clip:{tmp_path / 'clip-pooler'}")


def test_half_precision_weights_are_computed_in_float32_and_frozen(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({n: t.half() for n, t in load_file(path).items()}, path, {"format": "pt"})
    encoder: Any = load_text_encoder(f"clip:{folder}")
    assert {p.dtype for p in encoder._model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in encoder._model.parameters()) and not encoder._model.training
    tokens = encoder.encode(["walk"]).tokens_BLD
    assert not tokens.requires_grad and not torch.equal(tokens, tokens.half().float())


def test_the_image_tower_is_left_out_without_a_word_and_the_librarys_level_stays(published: Path) -> None:
    library, told = logging.getLogger("transformers"), []
    handler = logging.Handler()
    handler.emit = told.append
    level = library.level
    library.addHandler(handler)
    library.setLevel(logging.WARNING)
    try:
        load_text_encoder(f"clip:{published}")
        assert not told and library.level == logging.WARNING
    finally:
        library.removeHandler(handler)
        library.setLevel(level)


def test_the_fingerprint_is_of_features_and_not_of_places(folder: Path, published: Path, tmp_path: Path) -> None:
    def fingerprint(kind: str, place: Path) -> str:
        return load_text_encoder(f"{kind}:{place}").fingerprint

    base = {kind: fingerprint(kind, published) for kind in KINDS}
    assert base == {kind: fingerprint(kind, folder) for kind in KINDS}
    changes: list[Callable[[Path], Any]] = [
        lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "),
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text() + " "),
        lambda f: (f / "tokenizer.json").unlink(),
        lambda f: write_clip(f, seed=1),
    ]
    prints = set(base.values())
    for index, change in enumerate(changes):
        other = Path(shutil.copytree(folder, tmp_path / f"other{index}"))
        change(other)
        prints.add(fingerprint("clip", other))
    assert len(prints) == len(KINDS) + len(changes)


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def run(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return run


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink()


def _text_config(**changes: Any) -> Callable[[Path], Any]:
    def run(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit_json(folder / "config.json", text_config={**config["text_config"], **changes})

    return run


def _unframed(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", post_processor=None)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"file config\.json; got no such file"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"file model\.safetensors or .* or pytorch_model\.bin",
    ),
    "no tokenizer": (_no_tokenizer, r"file tokenizer\.json or vocab\.json and merges\.txt; got no such file"),
    "text tensor missing": (
        _tensors(lambda t: t.pop("text_model.encoder.layers.1.mlp.fc2.bias")),
        r"all weights of a CLIPTextModelWithProjection; got 1 missing, e\.g\. .*layers\.1\.mlp\.fc2\.bias",
    ),
    "projection missing": (_tensors(lambda t: t.pop("text_projection.weight")), r"e\.g\. text_projection\.weight"),
    "projection of another size": (lambda f: edit_json(f / "config.json", projection_dim=9), r"sizes in config\.json"),
    "tower of another size": (_text_config(intermediate_size=48), r"sizes in config\.json"),
    "sizes are no sizes": (_text_config(hidden_size="wide"), "sizes of a CLIP model"),
    "weights cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-40]),
        r"whole weights.*model\.safetensors",
    ),
    "another model": (lambda f: edit_json(f / "config.json", model_type="bert"), "a CLIP model .*'bert'"),
    "captions without frame": (_unframed, f"the end token {END}; got \\[\\] around nothing"),
    "another end token": (_text_config(eos_token_id=7), "the end token 7; got"),
    "no tokenizer inside": (lambda f: write_json(f / "tokenizer.json", {}), "expected a tokenizer; got"),
    "vocabulary too small": (_text_config(vocab_size=20), "at most 20 tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_broken_or_another_is_refused_by_name(fault: str, folder: Path) -> None:
    change, message = FAULTS[fault]
    change(folder)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load_text_encoder(f"clip:{folder}")


class Attack:
    """Runs a command when it is unpickled without restriction."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({**load_file(folder / "model.safetensors"), "x": Attack(marker)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensors only.*pytorch_model\.bin"):
        load_text_encoder(f"clip:{folder}")
    assert not marker.exists()


# --------------------------------------------------------------------------------------------------------- the names


def test_names_without_or_with_a_wrong_kind_say_what_to_write(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"got model_type 'clip'.*Write clip:{folder}"):
        load_text_encoder(str(folder))
    with pytest.raises(ConfigError, match=r"one of clip, clip-mdm, .*; got 'clop'"):
        load_text_encoder(f"clop:{folder}")
    with pytest.raises(ConfigError, match="a model folder or owner/model on the hub"):
        load_text_encoder("clip:nowhere")
    with pytest.raises(ConfigError, match=r"a CLIP model .*model_type 't5'"):
        load_text_encoder(f"clip-tokens:{write_sentence_t5(tmp_path / 't5')}")


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("minilm", "minilm"),
        ("/data/sentence-t5-large", "sentence-t5-large"),
        ("clip-mdm:openai/clip-vit-base-patch32", "clip-mdm:clip-vit-base-patch32"),
        ("hymotion:/a/Qwen3-8B,b/clip,c/prompt.txt,float32", "hymotion:Qwen3-8B,clip,prompt.txt,float32"),
    ],
)
def test_a_dataset_records_the_kind_of_its_features_and_not_where_the_models_lay(name: str, recorded: str) -> None:
    assert PrepareConfig(out="data", text_encoder=name).options()["text_encoder"] == recorded


def test_no_library_of_models_is_imported_before_an_encoder_is_asked_for() -> None:
    code = "import sys, motionrft.nn.text; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
