"""Diffusion-DPO and SoPo on a small generator: pairs, ties, masks, layouts, and that the reward of samples rises."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid

from motionrft.core.errors import ConfigError
from motionrft.core.rng import keyed_normal
from motionrft.core.types import MotionBatch, RewardTerms
from motionrft.diffusion.denoise import sample
from motionrft.finetune.preference import PreferenceStrategy, denoising_error, levels_at, sample_group
from motionrft.finetune.rollout import Rollout
from motionrft.finetune.step import Objective
from motionrft.finetune.strategies import DiffusionDPO, SoPo
from motionrft.generators.lora import adapter_for, add_adapter
from motionrft.generators.mdm import MDMGenerator
from motionrft.generators.sampling import generate
from motionrft.training.metrics import check_metric_name
from motionrft.training.optim import OptimConfig
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.single import SingleEngine
from tests import hymotion_fixtures
from tests.unit.test_finetune_step import KIND, RUNTIME, Toy, make, make_batch, make_engine, run

DPO, SOPO = DiffusionDPO(samples=3, draws=2), SoPo(draws=2, threshold=0.0)
BOTH = pytest.mark.parametrize("strategy", [DPO, SOPO], ids=["dpo", "sopo"])


class Ranked(Toy):
    """Motions as their last frame of the first feature says, read on 4 frames: ties where they are equal."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def score(self, motion_BTD: Tensor, *args, **kwargs) -> RewardTerms:
        assert not motion_BTD.requires_grad
        return RewardTerms({"semantic": self.scale * motion_BTD[:, 0, 0]})


class Mean(Toy):
    """The mean feature, of captions of any size."""

    def score(self, motion_BTD: Tensor, *args, **kwargs) -> RewardTerms:
        return RewardTerms({"semantic": motion_BTD.mean((1, 2))})


class Still(SingleEngine):
    """Keeps the gradients of its updates, and takes none."""

    def __init__(self, generator: MDMGenerator) -> None:
        super().__init__(generator.network, OptimConfig(schedule="constant"))
        self.kept: list[Tensor] = []

    def step(self):
        self.kept.append(torch.cat([p.grad.flatten() for p in self._params if p.grad is not None]))
        lr, self._config = self._config, replace(self._config, lr=1e-45)
        try:
            return super().step()
        finally:
            self._config = lr


def rollout_of(generator: MDMGenerator, batch: MotionBatch, reward: Toy, reference: MDMGenerator) -> Rollout:
    return Rollout(
        Still(generator), generator, reference, reward, batch,
        objective=Objective(), num_steps=4, progress=0.0, step=0, seed=0, collective=RUNTIME,
    )  # fmt: skip


def gradients(strategy: PreferenceStrategy, batch: MotionBatch | None = None, **changes: object) -> list[Tensor]:
    generator = make()
    engine = Still(generator)
    settings = {"reference": make(seed=3), "num_steps": 4, "batch": make_batch() if batch is None else batch}
    run(engine, generator, strategy, **{**settings, **changes})
    return engine.kept


# ------------------------------------------------------------------------------------------------------- pairs
def test_dpo_prefers_the_best_of_a_group_to_its_worst() -> None:
    generator, batch = make(), make_batch()
    rollout = rollout_of(generator, batch, Ranked(), make())
    pairs, group = DPO.pairs(rollout), sample_group(rollout, 3, guided=True)
    mark_BK = generator.decode(group.states.flatten(0, 1), group.rollout.batch.lengths_B)[:, 0, 0].unflatten(0, (4, 3))
    torch.testing.assert_close(generator.decode(pairs.preferred, batch.lengths_B)[:, 0, 0], mark_BK.amax(1))
    torch.testing.assert_close(generator.decode(pairs.rejected, batch.lengths_B)[:, 0, 0], mark_BK.amin(1))
    assert pairs.weight_B.tolist() == [1.0] * 4 and pairs.preferred_weight_B.tolist() == [0.5] * 4
    assert not pairs.preferred.requires_grad and rollout.metrics.values()["dpo/ties"] == 0.0


def test_groups_are_what_the_generator_makes_of_each_noise_guided_or_not() -> None:
    generator, batch = make(), make_batch()
    rollout = rollout_of(generator, batch, Ranked(), make())
    for guided in (True, False):
        group = sample_group(rollout, 2, guided)
        several = rollout.repeated(2)
        ask = generator.predict if guided else generator.conditional
        state = sample(
            several.table,
            lambda x, t, ask=ask, of=several.batch: ask(generator.network, x, t, of.prompt, of.lengths_B),
            several.x_T,
        )
        torch.testing.assert_close(group.states.flatten(0, 1), state, rtol=0, atol=0)
        assert group.states.shape[:2] == (4, 2) == group.reward_BK.shape


def test_sopo_prefers_the_clip_and_pushes_only_bad_samples() -> None:
    generator, batch = make(), make_batch()
    reward = Ranked()
    worst_B = sample_group(rollout_of(generator, batch, reward, make()), 2, guided=False).reward_BK.amin(1)
    between = float(worst_B.sort().values[1:3].mean())
    pairs = SoPo(threshold=between).pairs(rollout_of(generator, batch, reward, make()))
    torch.testing.assert_close(pairs.preferred, generator.encode(batch.motions[KIND], batch.lengths_B))
    assert pairs.rejected_weight_B.tolist() == (worst_B < between).float().tolist()
    assert sorted(pairs.rejected_weight_B.tolist()) == [0.0, 0.0, 1.0, 1.0]
    several = rollout_of(generator, batch, reward, make()).repeated(2).batch
    states = sample_group(rollout_of(generator, batch, reward, make()), 2, guided=False).states
    found = reward.embed(generator.decode(states.flatten(0, 1), several.lengths_B), several.lengths_B, KIND)
    clips = reward.embed(batch.motions[KIND], batch.lengths_B, KIND).repeat_interleave(2, 0)
    least = (0.5 + 0.5 * cosine_similarity(found, clips)).unflatten(0, (4, 2)).amin(1)
    torch.testing.assert_close(pairs.preferred_weight_B, 2 - least)
    assert bool(((pairs.preferred_weight_B >= 1) & (pairs.preferred_weight_B <= 2)).all())


def test_clips_fill_the_state_of_a_model_that_always_runs_whole() -> None:
    generator, batch = make(), make_batch()
    generator.config = replace(generator.config, mask_frames=False, frames_per_token=1)
    rollout = rollout_of(generator, batch, Ranked(), make())
    assert SOPO.pairs(rollout).preferred.shape == (4, 24, 263)


def test_clips_reach_a_model_of_another_frame_rate() -> None:
    generator, batch = hymotion_fixtures.make(hymotion_fixtures.RELEASED), hymotion_fixtures.make_batch()
    reference = hymotion_fixtures.make(hymotion_fixtures.RELEASED, seed=1)
    metrics = run(make_engine(generator), generator, SOPO, Mean(), reference, batch, num_steps=2)
    assert metrics["optim/skipped"] == 0.0 and math.isfinite(metrics["loss/sopo"])


# ---------------------------------------------------------------------------------------------------- the loss
@BOTH
def test_the_gradient_is_that_of_the_written_out_loss(strategy: PreferenceStrategy) -> None:
    reference, batch = make(seed=3), make_batch()
    if isinstance(strategy, DiffusionDPO):
        strategy = replace(strategy, beta=3.0)
    got = gradients(strategy, reward=Ranked())
    assert len(got) == 2 == strategy.updates_per_rollout(4)
    generator = make()
    rollout = rollout_of(generator, batch, Ranked(), reference)
    generator.network.eval()
    pairs, grid = strategy.pairs(rollout), strategy.grid(generator, 4)
    for draw, gradient in enumerate(got):
        key = ("preference", 0, 0, draw)
        noise = keyed_normal(batch.keys_B, (16, 263), "noise", *key)
        levels = levels_at(grid, strategy.rows(batch.keys_B, len(grid), *key))
        change = {}
        for name, x0 in (("w", pairs.preferred), ("l", pairs.rejected)):
            own, old = (
                denoising_error(
                    g, g.network, batch.prompt, batch.lengths_B, x0 * batch.mask_BT[..., None], noise, levels
                )
                for g in (generator, reference)
            )
            change[name] = own - old.detach()
        if strategy is SOPO:
            worth = pairs.preferred_weight_B * change["w"] - pairs.rejected_weight_B * change["l"]
        else:
            worth = 0.5 * (change["w"] - change["l"])
        loss = -logsigmoid(-strategy.beta * worth).mean()
        want = torch.autograd.grad(loss, list(generator.network.parameters()), allow_unused=True)
        want = torch.cat([g.flatten() for g in want if g is not None])
        torch.testing.assert_close(gradient, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


@BOTH
def test_at_the_reference_there_is_no_margin_and_the_loss_is_log_two(strategy: PreferenceStrategy) -> None:
    generator = make()
    name = strategy.name
    metrics = run(Still(generator), generator, strategy, reference=make(), num_steps=4)
    assert metrics[f"{name}/margin"] == 0.0 and metrics[f"{name}/implicit_accuracy"] == 0.0
    assert metrics[f"loss/{name}"] == pytest.approx(math.log(2))
    assert all(check_metric_name(n) and math.isfinite(v) for n, v in metrics.items())
    assert {"reward/total", "reward/semantic/raw", "optim/grad_norm", "optim/lr"} <= set(metrics)


def test_learning_raises_the_margin_and_the_implicit_accuracy() -> None:
    generator, batch = make(), make_batch()
    engine, reference = make_engine(generator, lr=1e-3), make()
    strategy = DiffusionDPO(samples=3, draws=8)
    pairs = strategy.pairs(rollout_of(generator, batch, Toy(), reference))
    fixed = type("Fixed", (DiffusionDPO,), {"pairs": lambda self, rollout: pairs})(draws=8)
    for step in range(5):
        metrics = run(engine, generator, fixed, reference=reference, num_steps=4, step=step)
    assert metrics["dpo/margin"] > 0.5 and metrics["dpo/implicit_accuracy"] >= 0.75
    assert metrics["dpo/error_change_preferred"] < metrics["dpo/error_change_rejected"]


def test_accumulated_draws_are_the_mean_of_single_ones() -> None:
    single, whole = gradients(DPO), gradients(replace(DPO, accumulate=True))
    assert len(single) == 2 and len(whole) == 1 == replace(DPO, accumulate=True).updates_per_rollout(4)
    torch.testing.assert_close(whole[0], (single[0] + single[1]) / 2, rtol=1e-4, atol=1e-6)


def test_prompts_whose_samples_earn_the_same_drop_out() -> None:
    class OneTie(Ranked):
        def score(self, motion_BTD: Tensor, lengths_B: Tensor, *args, **kwargs) -> RewardTerms:
            marks = super().score(motion_BTD).values["semantic"]
            return RewardTerms({"semantic": torch.where(lengths_B == 11, 0.7, marks)})

    batch, rows = make_batch(), torch.tensor([0, 2, 3])
    with_tie, without = gradients(DPO, batch, reward=OneTie()), gradients(DPO, batch.index(rows), reward=Ranked())
    for one, other in zip(with_tie, without, strict=True):
        torch.testing.assert_close(one, 0.75 * other, rtol=1e-3, atol=1e-6)
    generator = make()
    assert run(Still(generator), generator, DPO, OneTie(), make(), num_steps=4)["dpo/ties"] == 0.25
    all_tied = gradients(DPO, reward=Ranked(scale=0.0))
    assert len(all_tied) == 2 and all(float(g.abs().max()) == 0.0 for g in all_tied)


def test_a_dropped_rejected_term_leaves_that_of_the_clip() -> None:
    pushed, alone = gradients(replace(SOPO, threshold=1e9)), gradients(replace(SOPO, threshold=-1e9))
    assert not torch.allclose(pushed[0], alone[0], rtol=1e-2)
    generator, batch = make(), make_batch()
    metrics = run(Still(generator), generator, replace(SOPO, threshold=-1e9), reference=make(), num_steps=4)
    assert metrics["sopo/pushed"] == 0.0
    # Nothing of the samples is left but their weight: guided ones give the direction of unguided ones, row by row.
    one = batch.slice(1, 2)
    first, second = (gradients(replace(SOPO, threshold=-1e9, guided=g), one)[0] for g in (False, True))
    assert float(cosine_similarity(first, second, dim=0)) > 0.9999


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_refuses_the_updates(strategy: PreferenceStrategy, value: float) -> None:
    generator = make()
    engine = make_engine(generator)
    metrics = run(engine, generator, strategy, Ranked(scale=value), reference=make(), num_steps=4)
    assert metrics["optim/skipped"] == 2.0 and engine.steps == 0


# ---------------------------------------------------------------------------------------- layouts and frozen things
class Ranks(LocalRuntime):
    """Two ranks whose mean rows are known."""

    def __init__(self, rows: float) -> None:
        super().__init__()
        self.rows = rows

    def mean(self, value: Tensor) -> Tensor:
        return torch.tensor(self.rows)


@BOTH
def test_two_uneven_ranks_are_one_on_the_whole_batch(strategy: PreferenceStrategy) -> None:
    batch = make_batch()
    whole = gradients(strategy, batch)
    one = gradients(strategy, batch.slice(0, 1), collective=Ranks(2.0))
    two = gradients(strategy, batch.slice(1, 4), collective=Ranks(2.0))
    for total, a, b in zip(whole, one, two, strict=True):
        torch.testing.assert_close((a + b) / 2, total, rtol=1e-3, atol=1e-5 * float(total.abs().max()))


@BOTH
def test_what_a_sampler_leaves_in_the_padding_is_not_seen(strategy: PreferenceStrategy) -> None:
    batch = make_batch()
    junk = torch.where(batch.mask_BT[..., None], batch.motions[KIND], 1e3)
    for plain, dirty in zip(
        gradients(strategy), gradients(strategy, replace(batch, motions={KIND: junk})), strict=True
    ):
        torch.testing.assert_close(plain, dirty, rtol=0, atol=0)
    generator = make()
    rollout = rollout_of(generator, batch, Toy(), make())
    pairs, seen = strategy.pairs(rollout), []
    conditional = generator.conditional
    generator.conditional = lambda net, x, *rest: seen.append(x) or conditional(net, x, *rest)  # type: ignore
    strategy._loss(rollout, make(), pairs, strategy.grid(generator, 4), 0)
    noise_only = seen[0][:4] - seen[0][4:]
    assert float(noise_only[~batch.mask_BT].abs().max()) == 0.0  # winner and loser share noise and differ in x0 only
    assert float(noise_only[batch.mask_BT].abs().max()) > 0.0


@BOTH
def test_frozen_things_get_no_gradient_and_adapters_learn(strategy: PreferenceStrategy) -> None:
    generator, reference = make(), make()
    reference.network.requires_grad_(False)
    add_adapter(generator.network, adapter_for(generator.config, 2, 4.0, ""))
    before = copy.deepcopy(generator.network.state_dict())
    engine = make_engine(generator, lr=1e-2)
    metrics = run(engine, generator, strategy, reference=reference, num_steps=4)
    assert engine.steps == 2 and metrics["optim/skipped"] == 0.0
    assert all(p.grad is None for p in reference.network.parameters())
    moved = [n for n, value in generator.network.state_dict().items() if not torch.equal(value, before[n])]
    assert moved and all("lora" in name for name in moved)


@BOTH
def test_what_is_needed_is_said(strategy: PreferenceStrategy) -> None:
    generator = make()
    with pytest.raises(ConfigError, match=type(strategy).__name__):
        run(make_engine(generator), generator, strategy)
    pulled = Objective(reference_pull=1.0)
    with pytest.raises(ConfigError, match="reference_pull"):
        run(make_engine(generator), generator, strategy, reference=make(), objective=pulled)
    assert strategy.needs_reference and not strategy.differentiates_reward
    assert strategy.needs_motions == isinstance(strategy, SoPo)
    empty = replace(make_batch(), motions={})
    if strategy.needs_motions:
        with pytest.raises(ConfigError, match="kinematic"):
            run(make_engine(generator), generator, strategy, reference=make(), batch=empty)
    else:
        run(make_engine(generator), generator, strategy, reference=make(), batch=empty, num_steps=4)


def test_impossible_settings_are_named_all_at_once() -> None:
    for strategy in (DiffusionDPO, SoPo):
        bad = {"beta": 0.0, "draws": 0, "times": "x", "error": "y", "samples": 0}
        with pytest.raises(ConfigError) as caught:
            strategy(**bad)
        assert all(name in str(caught.value) for name in bad)
    with pytest.raises(ConfigError, match="samples"):
        DiffusionDPO(samples=1)


# -------------------------------------------------------------------------------------------------- does it work
class Judge(Toy):
    """Cosine with the caption's vector: a reward between -1 and 1."""

    def score(self, motion_BTD: Tensor, lengths_B: Tensor, representation, *, text_BE, terms, **kwargs) -> RewardTerms:
        z_BE = self.embed(motion_BTD, lengths_B, representation)
        return RewardTerms({"semantic": cosine_similarity(z_BE, text_BE)})


def tuned_reward(strategy: PreferenceStrategy, sign: float) -> tuple[float, float]:
    """Return the mean reward of fresh samples before and after learning from `sign` times it."""
    generator, batch, judge = make(), make_batch(), Judge()
    lengths_B, text_BE = batch.lengths_B, batch.text.pooled_BD
    wanted = torch.zeros(4, 16, 263)
    wanted[..., :12] = sign * text_BE[:, None]  # clips that earn 1
    batch = replace(batch, motions={KIND: wanted * batch.mask_BT[..., None]})
    engine, reference = make_engine(generator, lr=5e-4), make()

    def final_reward() -> float:
        motion = generate(generator, None, batch.text, lengths_B, batch.keys_B, 4, seed=77)
        return float(judge.score(motion, lengths_B, KIND, text_BE=text_BE, terms=()).values["semantic"].mean())

    before = final_reward()
    for step in range(12):
        objective = Objective({"semantic": sign})
        run(engine, generator, strategy, judge, reference, batch, objective=objective, num_steps=4, step=step)
    assert engine.steps == 12 * strategy.updates_per_rollout(4)
    return before, final_reward()


@pytest.mark.parametrize(
    "strategy", [DiffusionDPO(samples=6, draws=3), SoPo(draws=3, threshold=0.2)], ids=["dpo", "sopo"]
)
def test_the_reward_of_samples_rises_and_falls_with_its_sign(strategy: PreferenceStrategy) -> None:
    (before, risen), (same, fallen) = tuned_reward(strategy, 1.0), tuned_reward(strategy, -1.0)
    assert before == same
    assert risen > before + 0.1 and fallen < before - 0.1
