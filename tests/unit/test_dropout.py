"""Dropout with cheap masks is dropout: right rate in every lane, independent, scaled, from the global generator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from motionrft.nn import dropout as module
from motionrft.nn.attention import SelfAttention
from motionrft.nn.dropout import Dropout, attention, dropout
from motionrft.reward.backbone import build_backbone
from motionrft.reward.config import reward_preset
from motionrft.reward.heads import ScoreHead

COUNT = 1_000_000


def dropped(p: float, count: int = COUNT, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return dropout(torch.ones(count), p) == 0


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_rate_is_p_in_each_of_the_four_lanes_of_a_word(p: float) -> None:
    # 8-bit masks would drop 0.1016 for 0.1, and a word of 63 random bits would never set the last lane's sign
    lanes = dropped(p, 4 * COUNT).view(-1, 4).double().mean(0)
    torch.testing.assert_close(lanes, torch.full((4,), p).double(), rtol=0, atol=5 * math.sqrt(p * (1 - p) / COUNT))


def test_elements_are_dropped_independently_of_their_neighbours() -> None:
    x = dropped(0.3).double() - 0.3
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 5 * 0.21 / math.sqrt(COUNT), lag


def test_what_is_kept_is_scaled_so_that_the_mean_stays_exact() -> None:
    torch.manual_seed(1)
    kept = dropout(torch.ones(1000, dtype=torch.float64), 0.1).unique()
    rate = round(0.1 * 65536) / 65536  # what the 16 bits can express
    torch.testing.assert_close(kept, torch.tensor([0.0, 1 / (1 - rate)], dtype=torch.float64), rtol=1e-15, atol=0)
    assert abs(rate - 0.1) < 2**-17


def test_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(3, 5, 7, requires_grad=True)
    y = dropout(x, 0.5)
    y.backward(torch.full_like(y, 3.0))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, 6.0))
    assert 0 < int((y == 0).sum()) < y.numel()


def test_masks_follow_the_global_generator_and_not_the_threads() -> None:
    first, again, other = dropped(0.5, 999), dropped(0.5, 999), dropped(0.5, 999, seed=1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, dropout(torch.ones(999), 0.5) == 0)  # the generator moved on
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = dropped(0.5)
        torch.set_num_threads(1)
        assert torch.equal(two, dropped(0.5))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_shape_layout_and_precision(dtype: torch.dtype) -> None:
    for x in (torch.ones(0, 3), torch.ones(()), torch.ones(5), torch.ones(4, 6).T, torch.ones(1, 3).expand(50, 3)):
        y = dropout(x.to(dtype), 0.5)
        assert y.shape == x.shape and y.dtype == dtype
    assert int((dropout(torch.ones(1, 3).expand(50, 3).to(dtype), 0.5) == 0).any(0).sum()) == 3


def test_nothing_is_drawn_or_changed_outside_training_or_at_rate_zero() -> None:
    layer, x = Dropout(0.5), torch.randn(100)
    state = torch.get_rng_state()
    assert torch.equal(layer.eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(100))
    assert not torch.equal(layer.train()(x), x)


def test_other_devices_use_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, training: calls.append((p, training)) or x)
    Dropout(0.25)(torch.ones(3, device="meta"))
    assert calls == [(0.25, True)]
    fused = []
    monkeypatch.setattr(module, "scaled_dot_product_attention", lambda q, k, v, **rest: fused.append(rest) or q)
    q = torch.ones(1, 2, 3, 4, device="meta")
    attention(q, q, q, torch.ones(1, 3, dtype=torch.bool, device="meta"), 0.25)
    assert fused[0]["dropout_p"] == 0.25


def make_attention(keys: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    q, k = torch.randn(2, 3, 4, keys, dtype=torch.float64), torch.randn(2, 3, keys, keys, dtype=torch.float64)
    mask = torch.arange(keys) < torch.tensor([keys, keys - 2])[:, None]
    return q, k, mask


def test_attention_drops_weights_and_nothing_else() -> None:
    q, k, mask = make_attention()
    values = torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6)  # the output is the weights themselves
    whole = scaled_dot_product_attention(q, k, values, attn_mask=mask[:, None, None])
    torch.testing.assert_close(attention(q, k, values, mask, 0.0), whole)
    thinned = attention(q, k, values, mask, 0.5)
    kept = thinned != 0
    torch.testing.assert_close(thinned[kept], 2 * whole[kept])
    assert not kept[1, :, :, 4:].any() and 0.3 < float(kept[0].double().mean()) < 0.7


def test_attention_averages_to_attention_without_dropout() -> None:
    q, k, mask = make_attention()
    v = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    whole = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    draws = torch.stack([attention(q, k, v, mask, 0.2) for _ in range(2000)])
    error = (draws.mean(0) - whole) / draws.std(0).mul(2000**-0.5)
    assert float(error.abs().max()) < 5


def test_every_dropout_of_the_reward_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [*build_backbone(reward_preset("quickstart", dropout=0.1), 0).modules(), *ScoreHead(8, 1).modules()]
    found = [m for m in modules if isinstance(m, nn.Dropout)]
    assert len(found) > 10 and all(type(m) is Dropout for m in found)
    monkeypatch.setattr(module, "scaled_dot_product_attention", None)  # torch's would draw masks of its own
    tokens, mask = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    layer = SelfAttention(8, 2, dropout=0.5).train()
    first, second = layer(tokens, mask), layer(tokens, mask)
    assert not torch.equal(first, second)
