from __future__ import annotations

import pytest
import torch
from torch import nn

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.training.ema import Ema
from motionrft.training.optim import OptimConfig, param_groups
from motionrft.training.single import SingleEngine


def net() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    return module


def test_cosine_warms_up_linearly_and_ends_at_zero_and_stays_there() -> None:
    config = OptimConfig(warmup_steps=4, total_steps=20)
    assert [config.lr_factor(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert config.lr_factor(4) == 1.0
    assert config.lr_factor(12) == pytest.approx(0.5)
    assert config.lr_factor(20) == config.lr_factor(1000) == 0.0  # the periodic curve would rise again


def test_constant_needs_no_total() -> None:
    assert OptimConfig(schedule="constant").lr_factor(10**9) == 1.0
    assert OptimConfig(schedule="constant", warmup_steps=2).lr_factor(0) == 0.5


def test_cosine_without_total_is_refused() -> None:
    with pytest.raises(ConfigError, match="total_steps"):
        OptimConfig(schedule="cosine").lr_factor(0)


@pytest.mark.parametrize("total", [7, 10, 50])
def test_onecycle_equals_torch(total: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total)
    config = OptimConfig(schedule="onecycle", total_steps=total)
    for step in range(total):
        assert config.lr_factor(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        if step < total - 1:
            reference.step()


def test_all_config_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        OptimConfig(lr=0, schedule="linear", warmup_steps=5, total_steps=5, grad_clip=-1)
    for word in ("lr", "schedule", "warmup_steps", "grad_clip"):
        assert word in str(caught.value)


def test_vectors_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    module = net()
    module[0].weight.requires_grad_(False)
    decayed, plain = param_groups(module, OptimConfig(weight_decay=0.1))
    assert decayed["weight_decay"] == 0.1 and [p.shape for p in decayed["params"]] == [(2, 4)]
    assert plain["weight_decay"] == 0.0 and all(p.ndim == 1 for p in plain["params"]) and len(plain["params"]) == 4


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        SingleEngine(net().requires_grad_(False), OptimConfig(schedule="constant"))


def test_accumulated_backwards_are_one_step_on_the_sum() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    states = []
    for parts in ([x], [x[:3], x[3:]]):
        engine = SingleEngine(net(), OptimConfig(lr=0.1, schedule="constant", grad_clip=0.3))
        for part in parts:
            engine.backward(engine(part).square().sum())
        assert engine.step().applied
        states.append(engine.export_state())
    assert max(float((states[0][k] - states[1][k]).abs().max()) for k in states[0]) < 1e-6


def test_grad_norm_is_reported_before_clipping() -> None:
    engine = SingleEngine(net(), OptimConfig(lr=0.1, schedule="constant", grad_clip=1e-3))
    engine.backward(engine(torch.ones(1, 3)).square().sum())
    assert engine.step().grad_norm > 0.1


def test_nan_in_one_of_two_losses_refuses_the_whole_step() -> None:
    engine = SingleEngine(net(), OptimConfig(lr=0.1, schedule="constant"))
    before = engine.export_state()
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.backward(engine(torch.ones(1, 3)).sum() * float("nan"))
    assert not engine.step().applied
    assert (engine.steps, engine.skipped) == (0, 1)
    after = engine.export_state()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_infinite_gradient_of_a_finite_loss_is_refused() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    engine = SingleEngine(module, OptimConfig(lr=0.1, schedule="constant"))
    engine.backward(engine(torch.ones(1, 1)).sqrt().sum())  # derivative of sqrt at 0
    assert not engine.step().applied
    assert float(module.weight.detach()) == 0.0


def test_import_lists_missing_unexpected_and_misshaped_names() -> None:
    engine = SingleEngine(net(), OptimConfig(schedule="constant"))
    state = engine.export_state()
    del state["exp_avg/0.weight"]
    state["param/2.bias"] = torch.zeros(5)
    state["param/ghost"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        engine.import_state(state, 1)
    for name in ("exp_avg/0.weight", "param/2.bias: expected (2,), got (5,)", "param/ghost"):
        assert name in str(caught.value)


def test_ema_round_trips_and_applies_only_inside_the_context() -> None:
    engine = SingleEngine(net(), OptimConfig(lr=0.1, schedule="constant"))
    ema = Ema(engine.trainable_tensors(), decay=0.5)
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 3)).square().sum())
        engine.step()
        ema.update(engine.trainable_tensors())
    live = engine.module[0].weight.detach().clone()
    with ema.applied(engine.module):
        averaged = engine.module[0].weight.detach().clone()
    assert torch.equal(engine.module[0].weight, live) and not torch.allclose(averaged, live)
    other = Ema(engine.trainable_tensors(), decay=0.5)
    other.import_state(ema.export_state())
    with other.applied(engine.module):
        assert torch.equal(engine.module[0].weight, averaged)
    assert other.updates == 3


def test_ema_is_the_weighted_sum_it_says() -> None:
    values = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])]
    ema = Ema({"w": values[0]}, decay=0.99)
    ema.update({"w": values[1]})  # d = min(0.99, 1/10)
    ema.update({"w": values[2]})  # d = min(0.99, 2/11)
    expected = 2 / 11 * (0.1 * 1 + 0.9 * 2) + 9 / 11 * 4
    assert float(ema.export_state()["avg/w"]) == pytest.approx(expected, rel=1e-6)


def test_ema_every_other_batch_moves_as_far_as_two_moves() -> None:
    start, still = torch.tensor([1.0]), torch.tensor([3.0])
    each, pairs = Ema({"w": start}, decay=0.9), Ema({"w": start}, decay=0.9, every=2)
    each.updates = pairs.updates = 1000  # past the warm-up
    for done in range(1, 5):
        for ema in (each, pairs):
            if ema.due(done):
                ema.update({"w": still})
    assert pairs.updates == 1002 and each.updates == 1004
    assert float(pairs.export_state()["avg/w"]) == pytest.approx(float(each.export_state()["avg/w"]), rel=1e-6)
    with pytest.raises(ConfigError, match="every"):
        Ema({"w": start}, every=0)
