"""The reward benchmarks at small sizes: what they report, what they refuse to compare, and typical lengths."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from motionrft.cli import bench
from motionrft.core.errors import NumericalError
from motionrft.core.rng import generator
from motionrft.evaluation.benchmarks import reward_score, reward_train
from motionrft.evaluation.benchmarks.sizes import caption_tokens, clip_lengths
from motionrft.evaluation.benchmarks.timing import fastest_seconds, torch_threads
from motionrft.nn.text import StubEncoder
from motionrft.reward.motion_reward import MotionReward
from tests.reward_fixtures import TINY

SMALL = replace(TINY, max_positions=200)


def test_score_benchmark_reports_rates_and_their_ratios() -> None:
    found = reward_score.run(rounds=1, batch=2, config=SMALL)
    semantic, every, five = (found[f"{n}_scores_per_s"] for n in ("semantic", "all_terms", "five_pass"))
    assert semantic > every > 0 and five > 0
    assert found["all_over_semantic"] == pytest.approx(semantic / every)
    assert found["all_over_five_pass"] == pytest.approx(five / every)
    unmerged = found["all_terms_unmerged_scores_per_s"]
    assert found["merged_over_unmerged"] == pytest.approx(unmerged / every)
    assert found["max_difference"] <= reward_score.TOLERANCE
    assert (found["batch"], found["frames"]) == (2.0, 196.0)


def test_score_benchmark_refuses_to_time_ways_that_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = MotionReward.freeze_for_scoring

    def wrong(self: MotionReward) -> MotionReward:
        folded(self)
        assert self.merged is not None
        self.merged["preference"].dist.weight.mul_(1.01)
        return self

    monkeypatch.setattr(MotionReward, "freeze_for_scoring", wrong)
    with pytest.raises(NumericalError, match="scores and gradients"):
        reward_score.run(rounds=1, batch=2, config=SMALL)


class StubCaptions:
    """Counts how often captions are encoded."""

    num_parameters = 7

    def __init__(self, tokens_B: torch.Tensor) -> None:
        self._encoder = StubEncoder(16)
        self.dim, self.calls, self.captions = 16, 0, ["a person walks"] * len(tokens_B)
        CREATED.append(self)

    def __call__(self):
        self.calls += 1
        return self._encoder.encode(self.captions)


CREATED: list[StubCaptions] = []


def test_train_benchmark_encodes_text_once_or_in_every_step() -> None:
    small_t5 = dict(vocab_size=50, d_model=16, d_kv=4, num_heads=2, num_layers=1, d_ff=8)
    encoders = {"stub": StubCaptions, "t5": lambda tokens_B: reward_train.T5Captions(tokens_B, small_t5, 8)}
    found = reward_train.run(rounds=1, batch=2, threads=1, encoders=encoders, config=SMALL)
    for name in encoders:
        part = found[name]
        assert set(part["clips_per_s"]) == {"kinematic", "joint", "rotation", "all"}
        assert part["encoder_bytes"] == 4 * part["encoder_parameters"] > 0
        for mix, ratio in part["cached_over_uncached"].items():
            assert ratio == pytest.approx(part["clips_per_s"][mix] / part["uncached_clips_per_s"][mix])
    assert CREATED.pop().calls == 4 * (1 + 2)  # per mix: once for the cache, and warm-up and one round without it
    assert found["peak_rss_bytes"] > 0 and found["frames"] == 196


def test_the_large_text_encoder_has_the_true_number_of_weights() -> None:
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(feed_forward_proj="relu", **reward_train.T5_LARGE))
    assert sum(p.numel() for p in encoder.parameters()) == 334_939_648
    small = dict(vocab_size=50, d_model=16, d_kv=4, num_heads=2, num_layers=1, d_ff=8)
    parameters = (reward_train.T5Captions(torch.tensor([5, 3]), small, d).num_parameters for d in (8, 9))
    assert -next(parameters) + next(parameters) == 16  # the sentence projection counts, without bias


def test_clips_and_captions_are_as_long_as_the_dataset_says() -> None:
    rng = generator("test")
    frames, words = clip_lengths(20_000, rng).double(), caption_tokens(20_000, rng).double() - 1
    assert float(frames.mean()) == pytest.approx(142, rel=0.01)
    assert (frames.min(), frames.max()) == (40, 196)
    assert float(words.mean()) == pytest.approx(12, rel=0.03) and float(words.median()) == 10


def test_works_take_turns_and_the_fastest_counted_round_is_reported() -> None:
    order: list[str] = []
    now = [0.0]
    costs = {"a": [0.1, 3.0, 2.0], "b": [9.0, 5.0, 7.0]}  # the first round warms up

    def work(name: str) -> None:
        now[0] += costs[name][order.count(name)]
        order.append(name)

    works = {name: (lambda name=name: work(name)) for name in costs}
    assert fastest_seconds(works, 2, lambda: now[0]) == pytest.approx({"a": 2.0, "b": 5.0})
    assert order == ["a", "b"] * 3
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_figures_are_one_json_object_or_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"reward-train", "reward-score"} <= set(bench.BENCHMARKS)
    found = {"minilm": {"clips_per_s": {"all": 1.5}}, "batch": 16}
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: SimpleNamespace(run=lambda: found))
    assert bench.run(Namespace(name="reward-train", json=True)) == 0
    assert json.loads(capsys.readouterr().out) == found
    bench.run(Namespace(name="reward-train", json=False))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["minilm.clips_per_s.all", "1.5"],
        ["batch", "16"],
    ]
