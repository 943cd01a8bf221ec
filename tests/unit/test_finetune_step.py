"""The rollout step: reward rises, memory does not grow with steps, noise and plans do not depend on layout."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError
from motionrft.core.memory import SavedTensorMeter
from motionrft.core.protocols import GeneratorSpec, RewardModel, StepInfo
from motionrft.core.rng import keyed_normal
from motionrft.core.types import Condition, MotionBatch, Representation, RewardTerms
from motionrft.diffusion.denoise import initial_noise, sample
from motionrft.diffusion.guidance import guide, guide_captioned
from motionrft.finetune.rollout import Rollout
from motionrft.finetune.step import Objective, rollout_step
from motionrft.finetune.strategies import AlignProp, DRaFT, DRaFTLV, DRTune, EasyTune, ReFL
from motionrft.finetune.strategy import Strategy, step_weights
from motionrft.generators.base import Build
from motionrft.generators.mdm import MDMConfig, MDMGenerator
from motionrft.generators.sampling import generate
from motionrft.representations.normalize import Normalizer
from motionrft.training.metrics import check_metric_name
from motionrft.training.optim import OptimConfig
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.single import SingleEngine
from tests.finetune_fixtures import Toy

KIND = Representation.KINEMATIC
RUNTIME = LocalRuntime()
ALL = [
    EasyTune(window=3),
    EasyTune(window=2, score="x_prev"),
    EasyTune(window=3, variant="chain"),
    EasyTune(window=3, variant="accumulate"),
    EasyTune(window=3, variant="replay", replay_steps=2),
    EasyTune(window=3, equal_gain=True),
    ReFL(last_steps=3),
    DRaFT(last_steps=2),
    DRaFT(last_steps=0),
    DRaFT(last_steps=3, recompute=True),
    DRaFTLV(samples=2),
    AlignProp(),
    AlignProp(mode="bernoulli"),
    DRTune(grad_steps=2, last_steps=3),
]


def make(dropout: float = 0.0, solver: str = "ddim", seed: int = 0) -> MDMGenerator:
    torch.manual_seed(seed)
    config = MDMConfig(latent_dim=16, layers=2, heads=2, ff=24, text_dim=12, dropout=dropout)
    spec = GeneratorSpec("mdm", KIND, 20.0, 24, "stub", "x0", 1000, 2.5)
    statistics = Normalizer(torch.zeros(263), torch.ones(263), KIND)
    return MDMGenerator(Build(spec, statistics, 12, 12, solver), config)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def make_batch(rows: int = 4) -> MotionBatch:
    draw = torch.Generator().manual_seed(1)
    pooled = torch.randn(rows, 12, generator=draw)
    text = Condition(pooled[:, None], torch.ones(rows, 1, dtype=torch.bool), pooled)
    lengths = torch.tensor([16, 11, 7, 4])[:rows]
    ids = tuple(f"clip{i}" for i in range(rows))
    motion = torch.randn(rows, 16, 263, generator=draw)
    return MotionBatch(ids, {KIND: motion}, lengths, 20.0, ids, text, torch.full((rows,), -1), torch.arange(rows) + 5)


def make_engine(generator: MDMGenerator, lr: float = 1e-3) -> SingleEngine:
    return RUNTIME.build_engine(generator.network, OptimConfig(lr=lr, schedule="constant"))


def run(
    engine: SingleEngine,
    generator: MDMGenerator,
    strategy: Strategy,
    reward: RewardModel | None = None,
    reference: MDMGenerator | None = None,
    batch: MotionBatch | None = None,
    **changes: object,
) -> dict[str, float]:
    settings = {"num_steps": 6, "progress": 1.0, "step": 0, "seed": 0, "objective": Objective(), "collective": RUNTIME}
    return rollout_step(
        engine,
        generator,
        reference,
        reward or Toy(),
        batch or make_batch(),
        strategy=strategy,
        **{**settings, **changes},
    )


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_the_final_samples_reward_rises_under_every_strategy(strategy: Strategy) -> None:
    generator, batch, reward = make(), make_batch(), Toy()
    engine = make_engine(generator, lr=3e-3)

    def final_reward() -> float:
        motion = generate(generator, None, batch.text, batch.lengths_B, batch.keys_B, 6, seed=77)
        text_BE = reward.encode_text(batch.text)
        return float(
            reward.score(motion, batch.lengths_B, KIND, text_BE=text_BE, terms=["semantic"]).values["semantic"].mean()
        )

    before = final_reward()
    for step in range(30):
        metrics = run(engine, generator, strategy, reward, batch=batch, step=step, progress=step / 30)
    assert final_reward() > before + 0.2 * abs(before)
    assert engine.steps == 30 * strategy.updates_per_rollout(6) and engine.skipped == 0
    assert all(math.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_without_learning_all_strategies_walk_the_same_path(strategy: Strategy, monkeypatch) -> None:
    from motionrft.finetune import rollout as module

    generator = make()
    engine = make_engine(generator, lr=1e-45)
    before = {k: v.clone() for k, v in generator.network.state_dict().items()}
    walked: dict[int, Tensor] = {}
    real = module.denoise

    def watched(*args, **kwargs):
        for out in real(*args, **kwargs):
            walked[out.index] = out.x_prev.detach()
            yield out

    monkeypatch.setattr(module, "denoise", watched)
    run(engine, generator, strategy)
    assert all(torch.equal(v, before[k]) for k, v in generator.network.state_dict().items())
    plain: dict[int, Tensor] = {}
    from motionrft.diffusion.denoise import SAMPLE, initial_noise

    batch = make_batch()
    x_T = initial_noise(batch.keys_B, (16, 263), 0, "rollout", 0)
    with torch.no_grad():
        for out in real(
            generator.solver(6),
            [SAMPLE] * 6,
            lambda x, t: generator.predict(generator.network, x, t, batch.text, batch.lengths_B),
            x_T,
        ):
            plain[out.index] = out.x_prev
    assert all(torch.equal(walked[i], plain[i]) for i in walked)


def saved_bytes(strategy: Strategy, num_steps: int) -> int:
    generator = make()
    engine = make_engine(generator)
    with SavedTensorMeter(ignore=generator.network.parameters()) as meter:
        run(engine, generator, strategy, num_steps=num_steps)
    assert meter.live_bytes == 0
    return meter.peak_bytes


def test_easytune_keeps_one_steps_graph_however_many_steps_there_are() -> None:
    for strategy in (EasyTune(window=3), EasyTune(timesteps="all"), EasyTune(window=4, variant="accumulate")):
        assert len({saved_bytes(strategy, steps) for steps in (5, 10, 20)}) == 1
    assert saved_bytes(EasyTune(window=1), 10) == saved_bytes(EasyTune(timesteps="all"), 10)
    assert saved_bytes(ReFL(last_steps=1), 5) == saved_bytes(EasyTune(window=1), 20)


def test_full_backpropagation_grows_linearly_and_truncated_with_its_window() -> None:
    five, ten, twenty = (saved_bytes(DRaFT(last_steps=0), steps) for steps in (5, 10, 20))
    assert ten / five == pytest.approx(2, rel=0.02) and twenty / ten == pytest.approx(2, rel=0.02)
    assert saved_bytes(DRaFT(last_steps=3), 6) == saved_bytes(DRaFT(last_steps=3), 20)
    assert five > 4 * saved_bytes(EasyTune(window=1), 5)


def test_steps_outside_the_plan_carry_no_graph_and_are_not_run_after_it() -> None:
    generator = make()
    engine, seen = make_engine(generator), []

    def network(*args: Tensor) -> Tensor:
        out = generator.network(*args)
        seen.append(out.requires_grad)
        return out

    engine_call = type(engine).__call__
    try:
        type(engine).__call__ = lambda self, *args: network(*args)
        run(engine, generator, EasyTune(window=2), num_steps=8, progress=0.2)
    finally:
        type(engine).__call__ = engine_call
    assert seen == [False, False, False, True, True]


def test_frozen_things_get_no_gradient_and_the_mode_is_restored() -> None:
    generator, reference = make(dropout=0.5), make(dropout=0.5)
    reference.network.load_state_dict(generator.network.state_dict())
    engine = make_engine(generator)
    generator.network.train()
    objective = Objective({"semantic": 1.0, "similarity": 1.0})
    first = run(engine, generator, EasyTune(window=1), reference=reference, objective=objective)
    assert generator.network.training  # and dropout was off meanwhile:
    assert first["reward/similarity/raw"] > -1.0
    assert all(p.grad is None for p in reference.network.parameters())


def test_dropout_is_off_during_rollouts() -> None:
    totals = []
    for dropout in (0.0, 0.5):
        generator = make(dropout=dropout)
        generator.network.train()
        totals.append(run(make_engine(generator), generator, EasyTune(window=2))["reward/total"])
    assert totals[0] == totals[1]


def test_an_unchanged_generator_equals_its_reference_at_the_final_sample() -> None:
    for solver in ("ddim", "ddpm"):
        generator, reference = make(solver=solver), make(solver=solver)
        objective = Objective({"semantic": 1.0}, terms=("similarity",))
        metrics = run(make_engine(generator), generator, DRaFT(1), reference=reference, objective=objective)
        assert metrics["reward/similarity/raw"] == 0.0
        assert metrics["reward/similarity/weighted"] == 0.0


def test_ground_truth_target_needs_motions_and_reference_target_a_reference() -> None:
    generator = make()
    engine = make_engine(generator)
    weights = {"similarity": 1.0}
    truth = Objective(weights, similarity_target="ground_truth")
    assert run(engine, generator, ReFL(), objective=truth)["reward/similarity/raw"] < 0
    with pytest.raises(ConfigError, match="kinematic"):
        run(engine, generator, ReFL(), objective=truth, batch=replace(make_batch(), motions={}))
    with pytest.raises(ConfigError, match="reference"):
        run(engine, generator, ReFL(), objective=Objective(weights))


def test_watched_terms_are_logged_without_gradient() -> None:
    generator, reward = make(), Toy()
    objective = Objective({"semantic": 2.0, "preference": 0.0})
    metrics = run(make_engine(generator), generator, EasyTune(window=1), reward, objective=objective)
    assert reward.calls == [(("semantic",), True), (("preference",), False)]
    assert metrics["reward/semantic/weighted"] == pytest.approx(2 * metrics["reward/semantic/raw"])
    assert metrics["reward/total"] == pytest.approx(metrics["reward/semantic/weighted"])
    assert metrics["reward/preference/weighted"] == 0.0 and metrics["reward/preference/raw"] != 0.0


def test_similarity_is_watched_in_the_pass_of_a_driving_semantic_and_steers_nothing() -> None:
    batch, moved = make_batch(), []
    for weights in ({"semantic": 1.0}, {"semantic": 1.0, "similarity": 0.0}):
        generator, reward = make(), Toy()
        objective = Objective(weights, similarity_target="ground_truth")
        metrics = run(make_engine(generator), generator, EasyTune(window=1), reward, objective=objective, batch=batch)
        moved.append([p.detach().clone() for p in generator.network.parameters()])
    assert reward.calls == [(("semantic", "similarity"), True)]
    assert metrics["reward/similarity/raw"] != 0.0 and metrics["reward/similarity/weighted"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))


def test_metrics_are_named_by_path_and_complete() -> None:
    generator = make()
    metrics = run(make_engine(generator), generator, EasyTune(window=2), num_steps=8, progress=0.2)
    assert all(check_metric_name(name) for name in metrics)
    assert {"reward/total", "reward/semantic/raw", "optim/grad_norm", "optim/lr", "time/rollout_s"} <= set(metrics)
    assert {"optim/grad_norm_by_step/03", "optim/grad_norm_by_step/04", "reward/by_step/03"} <= set(metrics)
    assert metrics["curriculum/window_start"] == 3.0 and metrics["optim/skipped"] == 0.0


def test_reward_is_asked_at_the_noise_level_of_what_it_reads() -> None:
    generator = make()
    clean, noisy = Toy(), Toy()
    run(make_engine(generator), generator, EasyTune(window=6), clean)
    run(make_engine(generator), generator, EasyTune(window=6, score="x_prev"), noisy)
    assert clean.noise_levels == [0.0] * 6
    assert noisy.noise_levels == generator.solver(6).noise_level[1:].tolist()
    assert noisy.noise_levels[-1] == 0.0


def test_gradient_does_not_depend_on_batch_split() -> None:
    generator, batch = make(), make_batch()

    class Keep(SingleEngine):
        """Keeps what it was given instead of stepping."""

        def step(self):
            self.kept = [p.grad.clone() for p in self._params]
            return super().step()

    def gradients(part: MotionBatch) -> list[Tensor]:
        network = copy.deepcopy(generator)
        engine = Keep(network.network, OptimConfig(schedule="constant"))
        run(engine, network, ReFL(last_steps=1), batch=part)
        return engine.kept

    whole = gradients(batch)
    halves = [gradients(batch.slice(0, 2)), gradients(batch.slice(2, 4))]
    for total, one, two in zip(whole, *halves, strict=True):
        torch.testing.assert_close((one + two) / 2, total, rtol=1e-4, atol=1e-6)


def test_padded_frames_receive_no_gradient() -> None:
    generator, batch = make(), make_batch()
    state = torch.randn(4, 16, 263, requires_grad=True)
    reward = Toy()
    motion = generator.decode(state, batch.lengths_B)
    reward.score(motion, batch.lengths_B, KIND, text_BE=batch.text.pooled_BD, terms=["preference"]).values[
        "preference"
    ].sum().backward()
    assert (state.grad[~batch.mask_BT] == 0).all()


def test_chain_variant_takes_all_gradients_at_the_starting_parameters() -> None:
    generator, batch = make(), make_batch()
    start = copy.deepcopy(generator)
    first = run(make_engine(generator, lr=1e-2), generator, EasyTune(window=3, variant="chain"), batch=batch)
    still = run(make_engine(start, lr=1e-45), start, EasyTune(window=3), batch=batch)
    for name, value in still.items():
        if name.startswith(("optim/grad_norm_by_step", "reward/")):
            assert first[name] == pytest.approx(value, rel=1e-5)
    moved = [
        not torch.equal(a, b) for a, b in zip(generator.network.parameters(), start.network.parameters(), strict=True)
    ]
    assert all(moved)


def test_chain_equals_accumulation_under_a_linear_update() -> None:
    class Descent(SingleEngine):
        """Plain gradient descent: k small steps along fixed gradients are one step along their sum."""

        def step(self):
            with torch.no_grad():
                for p in self._params:
                    p -= 0.1 * p.grad
                    p.grad = None
            self.steps += 1
            from motionrft.core.protocols import StepInfo

            return StepInfo(applied=True, grad_norm=1.0, lr=0.1)

    results = []
    for variant in ("chain", "accumulate"):
        generator = make()
        weights = {"semantic": 3.0 if variant == "accumulate" else 1.0}  # mean of three -> sum of three
        engine = Descent(generator.network, OptimConfig(schedule="constant"))
        run(engine, generator, EasyTune(window=3, variant=variant), objective=Objective(weights))
        results.append([p.detach() for p in generator.network.parameters()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def gradient_of(strategy: Strategy, **changes: object) -> Tensor:
    """The whole gradient that one rollout leaves, as one vector."""
    generator = make(solver=changes.pop("solver", "ddim"))
    generator.guidance_gradient = changes.pop("guidance_gradient", "both")
    engine = make_engine(generator)
    engine.step = lambda: StepInfo(True, 0.0, 0.0)  # type: ignore[method-assign]
    run(engine, generator, strategy, **changes)
    return torch.cat([p.grad.flatten() for p in generator.network.parameters() if p.grad is not None])


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("score", ["x0_hat", "x_prev"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_replay_is_accumulation(steps: int, score: str, solver: str) -> None:
    want = gradient_of(EasyTune(window=4, score=score, variant="accumulate"), solver=solver)
    got = gradient_of(EasyTune(window=4, score=score, variant="replay", replay_steps=steps), solver=solver)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_recomputed_activations_give_the_same_gradient_in_less_memory() -> None:
    kept, again = DRaFT(last_steps=5), DRaFT(last_steps=5, recompute=True)
    torch.testing.assert_close(gradient_of(again), gradient_of(kept), rtol=0, atol=0)
    assert saved_bytes(again, 6) < 0.5 * saved_bytes(kept, 6)
    states = saved_bytes(DRaFT(last_steps=0, recompute=True), 20) - saved_bytes(DRaFT(last_steps=0, recompute=True), 10)
    state_bytes = 4 * 16 * 263 * 4
    assert states == pytest.approx(10 * state_bytes, rel=0.01)


def test_draft_lv_averages_the_last_step_with_the_sample_noised_again() -> None:
    lv, total = gradient_of(DRaFTLV(samples=2)), gradient_of(DRaFTLV(samples=2, reduction="sum"))
    torch.testing.assert_close(3 * lv, total, rtol=1e-4, atol=1e-5)
    generator, batch, reward = make(), make_batch(), Toy()
    table, last = generator.solver(6), 5
    x_T = initial_noise(batch.keys_B, (16, 263), 0, "rollout", 0)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return generator.predict(generator.network.eval(), x, t, batch.text, batch.lengths_B)

    final = sample(table, predict, x_T)
    level = float(table.noise_level[last])
    for n in range(2):
        noise = keyed_normal(batch.keys_B, (16, 263), "draft-lv", 0, 0, n)
        z = (1 - level**2) ** 0.5 * final + level * noise
        x0 = float(table.p[last]) * z + float(table.q[last]) * predict(z, table.model_time[last])
        motion = generator.decode(x0, batch.lengths_B)
        terms = reward.score(motion, batch.lengths_B, KIND, text_BE=batch.text.pooled_BD, terms=("semantic",))
        (-terms.values["semantic"].mean()).backward()
    extra = torch.cat([p.grad.flatten() for p in generator.network.parameters() if p.grad is not None])
    torch.testing.assert_close(total, extra + gradient_of(DRaFT(last_steps=1)), rtol=1e-4, atol=1e-5)


def test_equal_gain_weighs_by_the_inverse_of_the_samplers_factor() -> None:
    table, plan = make().solver(6), EasyTune(window=3, equal_gain=True, score="x_prev").plan(6, 1.0, rng())
    weights = step_weights(plan, table)
    assert weights[:3] == [1.0] * 3 and sum(weights[3:]) == pytest.approx(3)
    assert len({round(w * float(b.abs()), 6) for w, b in zip(weights[3:], table.b[3:], strict=True)}) == 1
    assert step_weights(replace(plan, equal_gain=False), table) == [1.0] * 6


def test_guidance_gradients_weigh_the_branches_as_they_say() -> None:
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    theta, phi = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, -0.4))
    for kind, shared, own in (("both", 1.0, 7.5), ("caption", 7.5, 7.5), ("caption_unscaled", 1.0, 1.0)):
        c, u = theta * x + phi, theta * x
        out = guide(c, u, 7.5) if kind == "both" else guide_captioned(c, u, 7.5, kind == "caption_unscaled")
        torch.testing.assert_close(out, guide(c, u, 7.5))
        by_theta, by_phi = torch.autograd.grad(out.sum(), [theta, phi])
        torch.testing.assert_close(by_theta, shared * x.sum(), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(by_phi, torch.tensor(own * 5.0, dtype=torch.float64))


def test_cut_guidance_keeps_one_branchs_graph() -> None:
    both = gradient_of(DRaFT(last_steps=1))
    cut, unscaled = (gradient_of(DRaFT(last_steps=1), guidance_gradient=k) for k in ("caption", "caption_unscaled"))
    torch.testing.assert_close(cut, 2.5 * unscaled, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(cut, both, rtol=1e-2)


def test_a_reached_ceiling_leaves_nothing_to_learn() -> None:
    assert gradient_of(EasyTune(window=2), objective=Objective(ceiling=-1e9)).abs().max() == 0
    free = gradient_of(EasyTune(window=2))
    torch.testing.assert_close(gradient_of(EasyTune(window=2), objective=Objective(ceiling=1e9)), free)


def test_gradients_of_terms_are_measured_at_their_cadence_and_change_nothing() -> None:
    weights = {"semantic": 1.0, "preference": 0.3}
    objective = Objective(weights, gradients_every=2)
    logged = run(make_engine(make()), make(), EasyTune(window=2), objective=objective, step=4)
    # preference is the mean over all entries of the padded batch: its gradient is the same everywhere
    assert logged["reward/preference/gradient"] == pytest.approx(0.3 / (16 * 263), rel=1e-4)
    assert logged["reward/semantic/gradient"] > 0
    assert not any(
        n.endswith("/gradient") for n in run(make_engine(make()), make(), ReFL(), objective=objective, step=5)
    )
    plain, measured = (gradient_of(EasyTune(window=2), objective=o) for o in (Objective(weights), objective))
    assert torch.equal(plain, measured)


def test_under_autocast_only_the_network_is_bf16_and_small_updates_are_not_lost() -> None:
    class Witness(Toy):
        def score(self, motion_BTD: Tensor, *args: object, **named: object) -> RewardTerms:
            seen.append((motion_BTD.dtype, torch.is_autocast_enabled("cpu")))
            return super().score(motion_BTD, *args, **named)

    seen: list[tuple[torch.dtype, bool]] = []
    inside: list[torch.dtype] = []
    generator = make()
    before = {n: p.detach().clone() for n, p in generator.network.named_parameters()}
    layer = next(m for m in generator.network.modules() if isinstance(m, torch.nn.Linear))
    layer.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    engine = LocalRuntime(precision="autocast").build_engine(
        generator.network, OptimConfig(lr=1e-5, schedule="constant")
    )
    run(engine, generator, EasyTune(window=1), reward=Witness())
    assert set(inside) == {torch.bfloat16} and set(seen) == {(torch.float32, False)}
    moved = {n: p.detach() for n, p in generator.network.named_parameters() if not torch.equal(p.detach(), before[n])}
    large = max(moved, key=lambda n: float(before[n].abs().max()))
    rows = before[large].abs() > 0.01
    assert moved[large].dtype == torch.float32 and 0 < (moved[large] - before[large]).abs().max() < 2e-5
    # in bf16 these weights would have stayed where they were
    update = (moved[large] - before[large])[rows].bfloat16()
    assert torch.equal(before[large][rows].bfloat16() + update, before[large][rows].bfloat16())


def test_the_pull_is_the_distance_to_the_reference_and_zero_at_it() -> None:
    strategy, reference = EasyTune(window=1), make()
    free = gradient_of(strategy)
    held = gradient_of(strategy, objective=Objective(reference_pull=3.0), reference=reference)
    torch.testing.assert_close(held, free)
    other = make(seed=3)
    metrics = run(make_engine(make()), make(), strategy, reference=other, objective=Objective(reference_pull=3.0))
    assert metrics["loss/reference_pull"] > 0
    moved = gradient_of(strategy, objective=Objective(reference_pull=3.0), reference=other)
    assert not torch.allclose(moved, free)
    with pytest.raises(ConfigError, match="reference_pull"):
        gradient_of(strategy, objective=Objective(reference_pull=1.0))


def test_repeated_prompts_are_neighbours_with_noise_of_their_own() -> None:
    generator, batch = make(), make_batch()
    rollout = Rollout(
        make_engine(generator), generator, None, Toy(), batch,
        objective=Objective(), num_steps=4, progress=0.0, step=0, seed=0, collective=RUNTIME,
    )  # fmt: skip
    group = rollout.repeated(3)
    assert group.batch.captions == tuple(c for c in batch.captions for _ in range(3))
    assert len(set(group.batch.keys_B.tolist())) == 12 and group.metrics is rollout.metrics
    assert group.share == pytest.approx(rollout.share / 3)
    one = Rollout(
        make_engine(generator), generator, None, Toy(), batch.slice(1, 2),
        objective=Objective(), num_steps=4, progress=0.0, step=0, seed=0, collective=RUNTIME,
    )  # fmt: skip
    frames = one.shape[0]
    assert torch.equal(one.repeated(3).x_T, group.x_T[3:6, :frames])


def test_a_nonfinite_reward_refuses_its_update_and_is_counted() -> None:
    class Broken(Toy):
        def score(self, motion_BTD: Tensor, *args, **kwargs) -> RewardTerms:
            values = super().score(motion_BTD, *args, **kwargs).values
            return RewardTerms({name: v * math.inf for name, v in values.items()})

    generator = make()
    engine = make_engine(generator)
    before = [p.detach().clone() for p in generator.network.parameters()]
    metrics = run(engine, generator, EasyTune(window=3), Broken())
    assert metrics["optim/skipped"] == 3.0 and engine.skipped == 3 and "optim/grad_norm" not in metrics
    assert all(torch.equal(a, b) for a, b in zip(before, generator.network.parameters(), strict=True))


def test_rollouts_repeat_exactly_and_differ_by_step_and_seed() -> None:
    def rewards(**changes: object) -> float:
        generator = make()
        return run(make_engine(generator), generator, EasyTune(window=2), **changes)["reward/total"]

    assert rewards() == rewards()
    assert len({rewards(), rewards(step=1), rewards(seed=1)}) == 3


def test_contradictory_objectives_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight.*similarity_target"):
        Objective({"semantic": 0.0}, similarity_target="nothing")
