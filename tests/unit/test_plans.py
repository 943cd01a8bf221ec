"""Plans: what each strategy asks of the loop, compared as lists."""

from __future__ import annotations

import doctest
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

import motionrft.diffusion.schedules
import motionrft.finetune.curriculum
from motionrft.core.errors import ConfigError
from motionrft.finetune.curriculum import curriculum_window
from motionrft.finetune.plan import SAMPLE, StepAction, StepPlan
from motionrft.finetune.strategies import STRATEGIES, AlignProp, DRaFT, DRaFTLV, DRTune, EasyTune, ReFL, Strategy

ALL = [
    EasyTune(),
    EasyTune(window=3, score="x_prev", timesteps="uniform"),
    EasyTune(window=3, variant="accumulate"),
    EasyTune(window=3, variant="chain", timesteps="last"),
    EasyTune(timesteps="all"),
    ReFL(),
    DRaFT(),
    DRaFT(last_steps=0),
    DRaFT(last_steps=3),
    DRaFTLV(),
    AlignProp(),
    AlignProp(mode="uniform"),
    AlignProp(mode="bernoulli", keep_prob=0.2),
    DRTune(),
    DRTune(grad_steps=2, last_steps=3),
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def grads(plan: StepPlan) -> list[int]:
    return [i for i, a in enumerate(plan.actions) if a.grad]


def scored(plan: StepPlan) -> list[int]:
    return [i for i, a in enumerate(plan.actions) if a.score != "none"]


@pytest.mark.parametrize("module", [motionrft.finetune.curriculum, motionrft.diffusion.schedules])
def test_examples_in_docstrings_hold(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 50])
@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_every_plan_scores_updates_and_stops_at_its_last_action(strategy: Strategy, num_steps: int) -> None:
    for seed in range(20):
        plan = strategy.plan(num_steps, seed / 19, rng(seed))
        assert plan.num_steps == num_steps and len(plan.actions) <= num_steps
        assert plan.actions[-1].update and plan.actions[-1].stop and plan.actions[-1].score != "none"
        assert plan.window_start == grads(plan)[0]
        assert not any(a.stop for a in plan.actions[:-1])
        # A gradient reaches every scored step: from its own network call, or through an uncut chain.
        for i in scored(plan):
            reaches = plan.actions[i].grad or any(
                plan.actions[j].grad and not any(a.cut_after for a in plan.actions[j : i + 1]) for j in range(i)
            )
            assert reaches
        # An update is preceded by a score since the last one, and nothing scored is lost.
        assert sum(a.update for a in plan.actions) <= len(scored(plan))


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_plans_are_pure(strategy: Strategy) -> None:
    assert strategy.plan(20, 0.3, rng(5)) == strategy.plan(20, 0.3, rng(5))


def test_easytune_plan_is_a_sliding_window_of_cut_scored_updates() -> None:
    hit = StepAction(grad=True, score="x0_hat", update=True)
    last = StepAction(grad=True, score="x0_hat", update=True, stop=True)
    assert EasyTune(window=2).plan(5, 0.0, rng()).actions == (hit, last)
    assert EasyTune(window=2).plan(5, 0.2, rng()).actions == (SAMPLE, SAMPLE, hit, last)
    assert EasyTune(window=2).plan(5, 1.0, rng()).actions == (SAMPLE, SAMPLE, SAMPLE, hit, last)
    assert all(a.cut_input and a.cut_after for a in EasyTune().plan(50, 0.1, rng()).actions)
    assert len(grads(EasyTune(timesteps="all").plan(7, 0.0, rng()))) == 7
    assert EasyTune(window=99).plan(5, 0.0, rng()).window_start == 0
    assert EasyTune(window=3).updates_per_rollout(10) == 3


def test_easytune_variants_differ_in_updates_and_snapshot_only() -> None:
    step, chain, mean = (EasyTune(window=4, variant=v).plan(9, 1.0, rng()) for v in ("step", "chain", "accumulate"))
    assert chain.actions == step.actions and chain.snapshot and not step.snapshot
    assert [a.update for a in mean.actions] == [False] * 8 + [True]
    assert sum(a.weight for a in mean.actions if a.grad) == pytest.approx(1.0)
    assert EasyTune(window=4, variant="accumulate").updates_per_rollout(9) == 1


def test_uniform_easytune_reaches_every_step() -> None:
    strategy = EasyTune(window=2, timesteps="uniform")
    seen = {i for seed in range(60) for i in grads(strategy.plan(6, 0.0, rng(seed)))}
    assert seen == set(range(6))


def test_refl_stops_uniformly_within_the_last_steps() -> None:
    stops = [len(ReFL(last_steps=3).plan(10, 0.0, rng(s)).actions) - 1 for s in range(200)]
    assert set(stops) == {7, 8, 9}
    plan = ReFL(last_steps=3).plan(10, 0.0, rng())
    assert plan.actions[:-1] == (SAMPLE,) * (len(plan.actions) - 1)
    assert plan.actions[-1] == StepAction(grad=True, score="x0_hat", update=True, stop=True)


def test_draft_keeps_the_chain_over_the_last_steps_and_reads_the_final_sample() -> None:
    plan = DRaFT(last_steps=2).plan(4, 0.0, rng())
    live = StepAction(grad=True, cut_input=False, cut_after=False)
    end = StepAction(grad=True, cut_input=False, cut_after=False, score="x_prev", update=True, stop=True)
    assert plan.actions == (SAMPLE, SAMPLE, live, end)
    assert grads(DRaFT(last_steps=0).plan(4, 0.0, rng())) == [0, 1, 2, 3]


def test_alignprop_boundary_is_near_its_mean_and_inside() -> None:
    starts = [AlignProp().plan(50, 0.0, rng(s)).window_start for s in range(300)]
    assert min(starts) >= 1 and max(starts) <= 49
    assert np.mean(starts) == pytest.approx(41.3, abs=1.0)
    uniform = {AlignProp(mode="uniform").plan(5, 0.0, rng(s)).window_start for s in range(100)}
    assert uniform == {0, 1, 2, 3, 4}


def test_bernoulli_alignprop_keeps_the_wanted_share_and_never_none() -> None:
    counts = [len(grads(AlignProp(mode="bernoulli").plan(50, 0.0, rng(s)))) for s in range(200)]
    assert np.mean(counts) == pytest.approx(25, abs=1)
    rare = [len(grads(AlignProp(mode="bernoulli", keep_prob=0.001).plan(5, 0.0, rng(s)))) for s in range(50)]
    assert min(rare) >= 1


def test_drtune_spaces_its_steps_and_cuts_every_input() -> None:
    for seed in range(50):
        plan = DRTune(grad_steps=5, last_steps=10).plan(50, 0.0, rng(seed))
        steps = grads(plan)
        assert len(steps) == 5 and len(set(np.diff(steps))) == 1
        assert 41 <= len(plan.actions) <= 50 and steps[-1] < len(plan.actions)
        assert all(a.cut_input for a in plan.actions) and plan.through_solver
        assert not any(a.cut_after for a in plan.actions[steps[0] :])


@pytest.mark.parametrize(("num_steps", "window"), [(50, 10), (50, 50), (10, 3), (7, 1), (1, 1)])
@pytest.mark.parametrize("sweep", [0.0, 0.03, 0.4, 1.0])
def test_curriculum_equals_the_papers_steps_to_go(num_steps: int, window: int, sweep: float) -> None:
    starts = []
    for n in range(401):
        progress = n / 400
        span = num_steps - window
        to_go = span - round(progress / sweep * span) if 0 < sweep and progress <= sweep else 0
        paper = {num_steps - 1 - j for j in range(to_go, to_go + window)}
        ours = curriculum_window(num_steps, window, progress, sweep)
        assert set(ours) == paper
        starts.append(ours.start)
    assert starts == sorted(starts) and starts[-1] == num_steps - window


def test_curriculum_refuses_impossible_arguments() -> None:
    for args in ((5, 6, 0.0, 0.4), (5, 0, 0.0, 0.4), (5, 2, 1.5, 0.4), (5, 2, 0.0, -0.1)):
        with pytest.raises(ValueError):
            curriculum_window(*args)


def test_strip_draws_one_character_per_step() -> None:
    text = EasyTune(window=2).plan(6, 0.2, rng()).strip()
    assert text.splitlines() == [
        "network [..##  ]",
        "chain   [||||  ]",
        "reward  [  00  ]",
        "update  [  ^^  ]",
    ]
    assert DRaFT(2).plan(4, 0.0, rng()).strip().splitlines()[1:3] == ["chain   [||--]", "reward  [   <]"]


def test_plans_that_train_nothing_are_refused() -> None:
    end = StepAction(grad=True, score="x0_hat", update=True)
    for actions in ((SAMPLE,), (StepAction(score="x0_hat", update=True),), (end, SAMPLE), (StepAction(grad=True),)):
        with pytest.raises(ValueError):
            StepPlan(3, actions, 0)
    with pytest.raises(ValueError, match="window_start"):
        StepPlan(3, (SAMPLE, end), 0)
    with pytest.raises(ValueError, match="actions"):
        StepPlan(1, (SAMPLE, end), 1)


def test_strategies_are_documented_frozen_dataclasses_of_plain_fields() -> None:
    for strategy in STRATEGIES.values():
        assert is_dataclass(strategy) and strategy.__dataclass_params__.frozen and strategy.__doc__
        assert all(isinstance(f.default, int | float | str) for f in fields(strategy))
        assert issubclass(strategy, Strategy)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        (EasyTune, {"window": 0, "score": "x9"}),
        (EasyTune, {"sweep_ratio": 2.0}),
        (ReFL, {"last_steps": 0}),
        (EasyTune, {"replay_steps": 0, "variant": "y"}),
        (DRaFT, {"last_steps": -1}),
        (DRaFTLV, {"samples": 0, "reduction": "max"}),
        (AlignProp, {"keep_prob": 0.0, "mode": "x"}),
        (DRTune, {"grad_steps": 0}),
    ],
)
def test_impossible_settings_are_named_all_at_once(strategy: type, settings: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        strategy(**settings)
    assert all(name in str(caught.value) for name in settings)
