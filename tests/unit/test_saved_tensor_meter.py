"""The byte counter of autograd's saved tensors, and the memory benchmark's shape."""

from __future__ import annotations

import gc

import torch
from torch import nn

from motionrft.core.memory import SavedTensorMeter, peak_rss_bytes
from motionrft.evaluation.benchmarks import memory


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


def test_benchmark_reports_both_methods_by_step_count() -> None:
    result = memory.run(num_steps=(2,))
    assert set(result) >= {f"{m}_{k}" for m in ("easytune", "full_backprop") for k in ("saved_bytes", "peak_rss_bytes")}
    assert set(result["easytune_saved_bytes"]) == {"2"}
    assert result["full_backprop_peak_rss_bytes"]["2"] > 0
