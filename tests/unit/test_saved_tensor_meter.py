"""The byte counter of autograd's saved tensors, and the memory benchmark's shape."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from motionrft.core.memory import SavedTensorMeter, memory_trace, peak_rss_bytes
from motionrft.evaluation.benchmarks import memory
from motionrft.finetune.strategies import STRATEGIES, EasyTune


def test_known_graphs_have_known_sizes() -> None:
    x = torch.ones(100, requires_grad=True)
    with SavedTensorMeter() as meter:
        y = x.exp()  # saves its result
        assert meter.live_bytes == 400
        z = y.sin()  # saves its input: the same storage
        assert meter.live_bytes == 400
        z.cos()  # saves z, at once let go
        assert meter.live_bytes == 400 and meter.peak_bytes == 800
        z.sum().backward()
        assert meter.live_bytes == 0
    assert meter.peak_bytes == 800
    torch.testing.assert_close(x.grad, (x.exp().cos() * x.exp()).detach())


def test_views_of_one_storage_count_once_and_graphs_out_of_scope_not_at_all() -> None:
    x = torch.ones(10, 10, requires_grad=True)
    with SavedTensorMeter() as meter:
        y = x.exp()
        parts = [part.sin() for part in y.split(2)]
        assert meter.live_bytes == 400
        del parts, y
        gc.collect()
        assert meter.live_bytes == 0


def test_parameters_are_not_counted_and_no_grad_saves_nothing() -> None:
    layer = nn.Linear(50, 60)
    x = torch.ones(7, 50)
    with SavedTensorMeter(ignore=layer.parameters()) as meter:
        with torch.no_grad():
            layer(x)
        assert meter.peak_bytes == 0
        out = layer(x)
        assert meter.live_bytes == 7 * 50 * 4
        del out
    with SavedTensorMeter(ignore=layer.parameters()) as meter:
        layer(x.requires_grad_()).sum().backward()
    assert meter.peak_bytes == 7 * 50 * 4


def test_counting_ends_with_the_context() -> None:
    x = torch.ones(10, requires_grad=True)
    with SavedTensorMeter() as meter:
        pass
    x.exp().sum().backward()
    assert meter.peak_bytes == 0


def test_peak_resident_memory_is_at_least_what_is_held() -> None:
    before = peak_rss_bytes()
    block = torch.ones(16 << 20)
    assert peak_rss_bytes() >= block.numel() * 4 and peak_rss_bytes() >= before > 1 << 20


def test_measured_rollouts_are_flat_for_easytune_and_linear_for_full_backpropagation() -> None:
    easy = [memory.measure("easytune", steps)["saved_bytes"] for steps in (10, 20)]
    full = [memory.measure("full_backprop", steps)["saved_bytes"] for steps in (2, 4)]
    assert easy[0] == easy[1] > 0
    assert full[1] == 2 * full[0] or abs(full[1] / full[0] - 2) < 0.02


def test_benchmark_reports_methods_by_step_count() -> None:
    chosen = {name: memory.METHODS[name] for name in ("full_backprop", "sampling")}
    result = memory.run(num_steps=(2, 3), methods=chosen)
    assert set(result) >= {f"{m}_{k}" for m in chosen for k in ("saved_bytes", "peak_rss_bytes")}
    two, three = result["full_backprop_saved_bytes"].values()
    assert list(result["full_backprop_saved_bytes"]) == ["2", "3"]
    assert result["bytes_per_step"] == {"full_backprop": three - two, "sampling": 0.0}
    assert result["growth"] == {"full_backprop": three / two, "sampling": 1.0}
    assert result["full_backprop_peak_rss_bytes"]["2"] > 0


def test_every_strategy_is_measured_by_default() -> None:
    differentiating = {s for s in STRATEGIES.values() if s.differentiates_reward}
    assert {type(s) for s in memory.METHODS.values() if s is not None} == differentiating
    assert memory.measure("sampling", 2)["saved_bytes"] == 0
    windows = [memory.measure(EasyTune(window=k, timesteps="last"), 3)["saved_bytes"] for k in (1, 3)]
    assert windows[0] == windows[1] > 0


def test_the_trace_follows_what_is_kept() -> None:
    x = torch.ones(100, requires_grad=True)
    with SavedTensorMeter(trace_points=50) as meter:
        y = x.exp()
        z = y.exp()
        z.sum().backward()
    assert [kept for _, kept in meter.trace] == [0, 400, 800, 400, 0, 0]
    seconds = [at for at, _ in meter.trace]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    with SavedTensorMeter() as silent:
        x.exp()
    assert silent.trace == [] and silent.peak_bytes == 400


def test_a_long_trace_is_thinned_evenly_and_keeps_its_highs_lows_and_ends() -> None:
    kept: list[torch.Tensor] = []

    def run() -> None:
        held = torch.ones(50, requires_grad=True).exp()
        for i in range(1, 501):
            torch.ones(2000 if i == 177 else i, requires_grad=True).exp().sum().backward()
            if i == 320:  # the only dip
                del held
                held = torch.ones(50, requires_grad=True).exp()
        kept.append(held)

    seconds, live = memory_trace(run, points=100)
    assert 50 <= len(live) <= 110 and len(seconds) == len(live) and seconds == sorted(seconds)
    assert max(live) == 8200 and live.count(0) == 2 and live[0] == 0 and live[-1] == 200
    hills = [value for value in live if 200 < value < 8200]  # each as high as it is late
    early = sum(value < 200 + 4 * 250 for value in hills)
    assert hills == sorted(hills) and 0.3 < early / len(hills) < 0.7
    with pytest.raises(ValueError, match="points"):
        memory_trace(run, points=4)


def test_a_rollouts_trace_shows_every_update_of_easytune_and_one_hill_of_full_backpropagation() -> None:
    peaks = {}
    for name in ("easytune", "full_backprop"):
        _, live = memory.trace(name, 5)
        assert live[0] == live[-1] == 0 and len(set(live)) > 5
        top = max(live)
        # A hill: from below half to above 0.9 of the top.
        hills, low = 0, True
        for value in live:
            if low and value > 0.9 * top:
                hills, low = hills + 1, False
            low = low or value < 0.5 * top
        peaks[name] = (hills, top)
    assert peaks["easytune"][0] == 5 and peaks["full_backprop"][0] == 1
    assert peaks["full_backprop"][1] > 4 * peaks["easytune"][1]
