"""DDPO and Flow-GRPO through the rollout step, with every family: rewards, layouts, what must not learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.protocols import StepInfo
from motionrft.core.types import Condition, MotionBatch, RewardTerms, valid_mask
from motionrft.finetune.policy_gradient import PolicyGradient
from motionrft.finetune.step import Objective, rollout_step
from motionrft.finetune.strategies import DDPO, STRATEGIES, DRaFT, EasyTune, FlowGRPO
from motionrft.generators.base import Generator
from motionrft.reward import terms as terms_module
from motionrft.training.metrics import check_metric_name
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.finetune import FinetuneRecipe
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.single import SingleEngine
from tests import acmdm_fixtures as acmdm
from tests import hymotion_fixtures as hymotion
from tests import latent_fixtures as latent
from tests.unit import test_finetune_step as mdm
from tests.unit import test_motiondiffuse as motiondiffuse

RUNTIME = LocalRuntime()
FAMILIES: dict[str, tuple[Callable[[], Generator], Callable[[int], MotionBatch]]] = {
    "mdm": (mdm.make, mdm.make_batch),
    "motiondiffuse": (motiondiffuse.make, motiondiffuse.make_batch),
    "mld": (latent.small_mld, latent.batch_of),
    "motionlcm": (latent.small_lcm, latent.batch_of),
    "acmdm": (acmdm.make, acmdm.make_batch),
    "hymotion": (hymotion.make, hymotion.make_batch),
}
STEPS = 4


class Lift:
    """The mean over valid entries, times a sign; rounding it takes its gradient away."""

    def __init__(self, sign: float = 1.0, digits: int | None = None) -> None:
        self.sign, self.digits = sign, digits

    def encode_text(self, condition: Condition) -> Tensor:
        return condition.pooled_BD

    def score(self, motion_BTD: Tensor, lengths_B: Tensor, *args: object, terms: Sequence[str], **kw: object):
        mask = valid_mask(lengths_B, motion_BTD.shape[1])[..., None]
        assert not motion_BTD.requires_grad and not torch.is_grad_enabled()
        value = torch.where(mask, motion_BTD, 0.0).sum((1, 2)) / (lengths_B * motion_BTD.shape[2])
        value = value if self.digits is None else value.round(decimals=self.digits)
        return RewardTerms({name: self.sign * value for name in terms})


class Kept(SingleEngine):
    """Keeps the gradients of its updates, and whether the network was in eval mode."""

    def __init__(self, module: torch.nn.Module, lr: float = 0.0) -> None:
        super().__init__(module, OptimConfig(lr=lr or 1e-3, schedule="constant", grad_clip=0.0))
        self.moves, self.kept, self.training = lr > 0, [], False

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        self.training |= self.module.training
        return super().__call__(*args, **kwargs)

    def step(self) -> StepInfo:
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._params]
        self.kept.append(torch.cat([g.flatten() for g in found]))
        if self.moves:
            return super().step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepInfo(True, 0.0, 0.0)


def learn(
    strategy: PolicyGradient,
    generator: Generator,
    batch: MotionBatch,
    reward: Lift | None = None,
    lr: float = 0.0,
    rollouts: int = 1,
    reference: Generator | None = None,
    **changes: object,
) -> tuple[Kept, list[dict[str, float]]]:
    """Return the engine and each rollout's metrics."""
    engine = Kept(generator.network, lr)
    settings = {"num_steps": STEPS, "progress": 0.0, "seed": 0, "objective": Objective(), "collective": RUNTIME}
    found = [
        rollout_step(
            engine,
            generator,
            reference,
            reward or Lift(),
            batch,
            strategy=strategy,
            step=step,
            **{**settings, **changes},
        )
        for step in range(rollouts)
    ]
    return engine, found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ddpo", "flow_grpo"])
def test_every_family_starts_at_ratio_one(family: str, kind: str) -> None:
    make, make_batch = FAMILIES[family]
    generator, reference = make(), make()
    generator.network.train()
    strategy = STRATEGIES[kind](group=3)
    engine, (metrics,) = learn(strategy, generator, make_batch(2), reference=reference)
    assert metrics["policy/ratio"] == 1.0 and metrics["policy/clip_fraction"] == 0.0
    assert metrics["policy/approx_kl"] == 0.0 and metrics.get("policy/kl_reference", 0.0) == 0.0
    assert not engine.training and generator.network.training
    assert len(engine.kept) == strategy.updates_per_rollout(STEPS) and all(g.norm() > 0 for g in engine.kept)
    assert all(check_metric_name(name) and math.isfinite(value) for name, value in metrics.items())
    assert {"reward/total", "reward/semantic/raw", "policy/advantage_std", "policy/zero_std_groups"} <= set(metrics)
    assert all(p.grad is None for part in (generator.frozen, reference.network) for p in part.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_stochastic_samplers_are_stochastic_until_the_last_step(family: str) -> None:
    generator = FAMILIES[family][0]()
    table, own = generator.stochastic_solver(STEPS, 0.5), generator.solver(STEPS)
    assert len(table) == STEPS and (table.c[:-1] > 0).all() and table.c[-1] < 0.05
    for name in ("model_time", "p", "q", "noise_level"):
        torch.testing.assert_close(getattr(table, name), getattr(own, name))
    with pytest.raises(ConfigError, match="denoising steps"):
        generator.stochastic_solver(0, 0.5)


@pytest.mark.parametrize(
    ("family", "strategy", "lr", "seeds"),
    [
        ("acmdm", DDPO(), 1e-3, 1),
        ("acmdm", FlowGRPO(updates=1, kl_weight=1e-4), 1e-3, 3),
        ("motiondiffuse", DDPO(group=16), 2e-3, 3),
    ],
)
def test_expected_reward_follows_the_reward_either_way(
    family: str, strategy: PolicyGradient, lr: float, seeds: int
) -> None:
    """A reward without a gradient, and its negative, which must pull the other way: a drift would pass one of the two.

    Ten small updates are noisy: single runs of the last two rows may end on the wrong side, their mean does not.
    """
    make, make_batch = FAMILIES[family]
    start, ends = 0.0, []
    for sign in (1.0, -1.0):
        reward, batch, found = Lift(sign, digits=3), make_batch(2), []
        for seed in range(seeds):
            generator = make()
            engine, metrics = learn(strategy, generator, batch, reward, lr, 10, make(), seed=seed)
            assert engine.steps == 10 * strategy.updates_per_rollout(STEPS) and engine.skipped == 0
            _, (again,) = learn(strategy, generator, batch, reward, reference=make(), seed=seed)  # the first noise
            found.append(sign * again["reward/total"])
            start += sign * metrics[0]["reward/total"] / (2 * seeds)
        ends.append(sum(found) / seeds)
    assert ends[0] > start > ends[1] and ends[0] - ends[1] > 0.1


def test_a_restraint_holds_the_model_near_the_reference() -> None:
    distances = []
    for weight in (0.0, 1.0):
        generator, reference = acmdm.make(), acmdm.make()
        strategy = FlowGRPO(kl_weight=weight, clip_range=10.0)
        learn(strategy, generator, acmdm.make_batch(2), None, 1e-3, 4, reference)
        _, (metrics,) = learn(FlowGRPO(kl_weight=1.0), generator, acmdm.make_batch(2), reference=reference)
        distances.append(metrics["policy/kl_reference"])
    assert 0 < distances[1] < 0.5 * distances[0]
    with pytest.raises(ConfigError, match="kl_weight"):
        learn(FlowGRPO(), acmdm.make(), acmdm.make_batch(2))


def test_the_divergence_is_that_of_two_gaussians() -> None:
    """A reference whose output differs by a constant d moves every mean by b d."""
    generator, reference, batch = mdm.make(), mdm.make(), mdm.make_batch(2)
    real = reference.predict
    reference.predict = lambda *args: real(*args) + 0.2  # type: ignore[method-assign]
    strategy = DDPO(group=2, kl_weight=1.0)
    _, (metrics,) = learn(strategy, generator, batch, reference=reference)
    table = generator.stochastic_solver(STEPS, 1.0)
    normal = torch.distributions.Normal
    want = [
        float(torch.distributions.kl_divergence(normal(0.0, c), normal(0.2 * b, c)))
        for b, c in zip(table.b[:-1], table.c[:-1], strict=True)
    ]
    assert metrics["policy/kl_reference"] == pytest.approx(sum(want) / len(want), rel=1e-3)


def test_groups_that_tie_weigh_nothing_and_are_counted() -> None:
    generator, reference = mdm.make(), mdm.make(seed=3)
    engine, (metrics,) = learn(FlowGRPO(group=2), generator, mdm.make_batch(3), Lift(digits=-3), reference=reference)
    assert metrics["policy/zero_std_groups"] == 1.0 and metrics["policy/kl_reference"] > 0
    assert len(engine.kept) == 2 and all((g == 0).all() for g in engine.kept)


@pytest.mark.parametrize("strategy", [DDPO(group=4), FlowGRPO(group=4)], ids=["ddpo", "flow_grpo"])
@pytest.mark.parametrize("family", ["mdm", "acmdm"])
def test_fewer_copies_per_call_give_the_same_gradient(family: str, strategy: PolicyGradient) -> None:
    make, make_batch = FAMILIES[family]
    settings = {f.name: getattr(strategy, f.name) for f in fields(strategy)}
    one, two = (
        learn(type(strategy)(**{**settings, "copies_per_call": n}), make(), make_batch(3), reference=make())[0].kept
        for n in (0, 3)
    )
    for whole, parts in zip(one, two, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("settings", [{"updates": 3}, {"updates": 2, "inner_epochs": 2}], ids=str)
def test_updates_that_change_nothing_add_up_to_one(settings: dict) -> None:
    generator, batch = mdm.make(), mdm.make_batch(2)
    (whole,) = learn(DDPO(group=3), generator, batch, num_steps=7)[0].kept
    parts = learn(DDPO(group=3, **settings), generator, batch, num_steps=7)[0].kept
    torch.testing.assert_close(sum(parts) / len(parts), whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("family", ["mdm", "acmdm"])
def test_padding_and_batch_mates_change_nothing(family: str) -> None:
    make, make_batch = FAMILIES[family]
    batch = make_batch(3)
    whole = learn(DDPO(group=3), make(), batch)[0].kept[0]
    alone = [learn(DDPO(group=3), make(), batch.slice(i, i + 1))[0].kept[0] for i in range(3)]
    torch.testing.assert_close(sum(alone) / 3, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


class Rank(LocalRuntime):
    """One of two ranks that take turns: where the other one's value is not known yet, its own stands for it."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        self.other: list[Tensor] = []

    def mean(self, value: Tensor) -> Tensor:
        place = len(self.given)
        self.given.append(value.detach().clone())
        return (value.detach() + (self.other[place] if place < len(self.other) else value.detach())) / 2


@pytest.mark.parametrize("strategy", [DDPO(group=1, baseline="batch", scale="batch"), FlowGRPO(group=3)], ids=str)
@pytest.mark.parametrize("cut", [2, 1])
def test_two_ranks_are_one_rank_on_the_whole_batch(strategy: PolicyGradient, cut: int) -> None:
    batch = acmdm.make_batch(4)
    parts, ranks = [batch.slice(0, cut), batch.slice(cut, 4)], [Rank(), Rank()]
    generator, reference = acmdm.make(), acmdm.make()
    whole = learn(strategy, generator, batch, reference=reference)[0].kept
    exchanged: list[list[Tensor]] = [[], []]
    for _ in range(4):  # every turn, one more of the values they exchange is right
        for index, rank in enumerate(ranks):
            rank.given, rank.other = [], exchanged[1 - index]
        found = [learn(strategy, generator, p, reference=reference, collective=r)[0].kept for p, r in zip(parts, ranks)]
        before, exchanged = exchanged, [rank.given for rank in ranks]
    assert len(exchanged[0]) == len(exchanged[1]) == 3
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(before[i], exchanged[i], strict=True))
    assert len(found[0]) == len(found[1]) == len(whole) == strategy.updates_per_rollout(STEPS)
    for one, two, total in zip(*found, whole, strict=True):
        torch.testing.assert_close((one + two) / 2, total, rtol=1e-3, atol=1e-4 * float(total.abs().max()))


def test_rollouts_repeat_exactly_and_differ_by_step_and_seed() -> None:
    def gradient(**changes: object) -> Tensor:
        strategy = DDPO(group=2, step_fraction=0.5)
        return learn(strategy, acmdm.make(), acmdm.make_batch(1), **changes)[0].kept[0]

    assert torch.equal(gradient(), gradient()) and not torch.equal(gradient(), gradient(seed=1))
    engine, found = learn(DDPO(group=2), acmdm.make(), acmdm.make_batch(1), rollouts=2)
    assert found[0]["reward/total"] != found[1]["reward/total"] and not torch.equal(*engine.kept)


@pytest.mark.parametrize("num_steps", [2, 3, 6])
@pytest.mark.parametrize(
    ("settings", "trained", "updates"),
    [
        ({}, (1, 2, 5), (1, 1, 1)),
        ({"updates": 3, "inner_epochs": 2}, (1, 2, 5), (2, 4, 6)),
        ({"step_fraction": 0.4, "updates": 2}, (1, 1, 2), (1, 1, 2)),
    ],
)
def test_updates_are_counted_exactly(num_steps: int, settings: dict, trained: tuple, updates: tuple) -> None:
    strategy, place = DDPO(group=2, **settings), (2, 3, 6).index(num_steps)
    assert strategy.trained_steps(num_steps) == trained[place]
    assert strategy.updates_per_rollout(num_steps) == updates[place]
    engine, _ = learn(strategy, acmdm.make(), acmdm.make_batch(1), num_steps=num_steps)
    assert len(engine.kept) == updates[place]
    assert f"{trained[place]} of them learn in {updates[place]} updates" in strategy.sketch(num_steps, 0.0, None)


def test_what_cannot_learn_is_refused_with_the_way_out() -> None:
    for family in ("acmdm", "mdm", "motionlcm"):
        make, make_batch = FAMILIES[family]
        with pytest.raises(ConfigError, match="Raise num_steps"):
            learn(DDPO(), make(), make_batch(1), num_steps=1)
    with pytest.raises(ConfigError, match="kl_weight"):
        learn(DDPO(), mdm.make(), mdm.make_batch(1), objective=Objective(reference_pull=1.0))


@pytest.mark.parametrize("strategy", [DDPO, FlowGRPO])
def test_impossible_settings_are_named_all_at_once(strategy: type[PolicyGradient]) -> None:
    wrong = {
        "noise": 0.0, "baseline": "x", "advantage_clip": -1.0, "log_prob": "max", "clip_range": 0.0,
        "step_fraction": 0.0, "inner_epochs": 0, "updates": 0, "kl_weight": -1.0, "copies_per_call": -1,
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        strategy(**wrong, scale="y", group=0)
    assert all(name in str(caught.value) for name in [*wrong, "scale", "group"])
    with pytest.raises(ConfigError, match="group 1 has no deviation"):
        strategy(group=1)
    with pytest.raises(ConfigError, match="scale prompt needs baseline prompt"):
        strategy(baseline="batch", scale="prompt")


class Steps:
    name: ClassVar[str] = "steps_taken"
    differentiable: ClassVar[bool] = False

    def __call__(self, motion: terms_module.MotionView) -> Tensor:
        height_BT = motion.joints_BTJ3[..., 10, 1]
        return (((height_BT > height_BT[:, :1]) & motion.mask_BT).sum(1)).float()


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(terms_module.TERMS, "steps_taken", Steps)


def test_terms_without_a_gradient_are_for_methods_that_need_none(steps_taken: None) -> None:
    weights = {"semantic": 1.0, "steps_taken": 0.1}
    for strategy in (EasyTune(), DRaFT()):
        with pytest.raises(ConfigError, match=r"steps_taken.*no gradient.*DDPO or FlowGRPO.*batches must be"):
            FinetuneRecipe(strategy=strategy, weights=weights, batches=0)
        assert FinetuneRecipe(strategy=strategy, weights={**weights, "steps_taken": 0.0})
    for method in (DDPO(group=4), FlowGRPO(updates=3)):
        recipe = FinetuneRecipe(strategy=method, weights=weights, num_steps=10, batches=7)
        assert recipe.updates == 7 * method.updates
        assert from_plain(FinetuneRecipe, to_plain(recipe)) == recipe


def test_a_term_that_counts_is_scored_and_learned_from(steps_taken: None) -> None:
    class Counting(Lift):
        def score(self, motion_BTD: Tensor, lengths_B: Tensor, kind: object, *args: object, **kwargs: object):
            view = terms_module.MotionView(motion_BTD, lengths_B, kind, acmdm.statistics())
            return RewardTerms({"steps_taken": Steps()(view)})

    engine, (metrics,) = learn(
        DDPO(group=4), acmdm.make(), acmdm.make_batch(2), Counting(), objective=Objective({"steps_taken": 1.0})
    )
    assert metrics["reward/steps_taken/raw"] > 0 and engine.kept[0].norm() > 0


def test_the_reference_it_is_compared_with_makes_the_same_noise() -> None:
    class Same(Lift):
        def embed(self, motion_BTD: Tensor, *args: object) -> Tensor:
            return motion_BTD.flatten(1)

        def score(self, motion_BTD: Tensor, *args: object, target_BE: Tensor, **kwargs: object) -> RewardTerms:
            return RewardTerms({"similarity": -(motion_BTD.flatten(1) - target_BE).square().sum(1)})

    _, (metrics,) = learn(
        DDPO(group=2), mdm.make(), mdm.make_batch(2), Same(), reference=mdm.make(),
        objective=Objective({"similarity": 1.0}),
    )  # fmt: skip
    assert metrics["reward/total"] == 0.0 and metrics["policy/zero_std_groups"] == 1.0
