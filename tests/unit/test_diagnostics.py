"""Gradient flow through the sampler and likeness of noisy motion: closed forms, full Jacobians, every family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from motionrft.core.protocols import GeneratorSpec, MotionGenerator, SolverTable
from motionrft.core.rng import keyed_normal
from motionrft.core.types import Condition, MotionBatch, Representation, valid_mask
from motionrft.diffusion.denoise import denoise
from motionrft.diffusion.schedules import alpha_bars
from motionrft.diffusion.solvers import ddim_table, ddpm_table, flow_euler_table
from motionrft.finetune.diagnostics import (
    SamplingPath,
    jacobian_norms,
    noise_similarity,
    path_similarity,
    reward_gradients,
    sampling_path,
    spread_rows,
)
from motionrft.finetune.strategies import DRaFT, EasyTune
from motionrft.finetune.strategy import Strategy
from motionrft.generators.base import Build
from motionrft.generators.mdm import MDMConfig, MDMGenerator
from motionrft.generators.motiondiffuse import MotionDiffuseConfig, MotionDiffuseGenerator
from motionrft.generators.sampling import generate
from motionrft.representations.normalize import Normalizer
from tests import acmdm_fixtures, hymotion_fixtures
from tests.latent_fixtures import batch_of, small_lcm, small_mld

KIND = Representation.KINEMATIC
ALPHA_BAR = alpha_bars("scaled_linear", 1000)
TIMES = torch.tensor([831, 665, 499, 333, 167, 1])
TABLES = {
    "eps": ddim_table(ALPHA_BAR, TIMES, "eps", final_alpha_bar=float(ALPHA_BAR[0])),
    "x0": ddim_table(ALPHA_BAR, TIMES, "x0"),
    "ancestral": ddpm_table(ALPHA_BAR, TIMES, "x0"),
    "flow": flow_euler_table(6),
}
THETA = (0.3, -0.2, 0.15, 0.4, -0.1, 0.25)
GOAL = 0.7


class Toy:
    """A sampler around `network(x, step)`: state (T, D), decoded by cutting at each length."""

    def __init__(self, table: SolverTable, network: nn.Module, dim: int = 3) -> None:
        self.table, self.network, self.dim = table, network, dim
        self.spec = GeneratorSpec("toy", KIND, 20.0, 60, "stub", "eps", 1000, 1.0)
        self.step_of = {float(t): i for i, t in enumerate(table.model_time)}

    def state_shape(self, num_frames: int) -> tuple[int, ...]:
        return (num_frames, self.dim)

    def state_mask(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        return valid_mask(lengths_B, state.shape[1])[..., None]

    def solver(self, num_steps: int) -> SolverTable:
        assert num_steps == len(self.table)
        return self.table

    def predict(self, network: Callable[..., Tensor], x: Tensor, t: Tensor, text: Condition, lengths_B: Tensor):
        return network(x, self.step_of[float(t)], lengths_B)

    def decode(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        return torch.where(valid_mask(lengths_B, state.shape[1])[..., None], state, 0.0)


class Linear(nn.Module):
    """out_i = theta_i x."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(THETA))

    def forward(self, x: Tensor, step: int, lengths_B: Tensor) -> Tensor:
        return self.theta[step] * x


class Curved(nn.Module):
    """A network whose valid frames see each other, and padding sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, step: int, lengths_B: Tensor) -> Tensor:
        mask = valid_mask(lengths_B, x.shape[1])[..., None]
        mean = torch.where(mask, x, 0.0).sum(1, keepdim=True) / lengths_B[:, None, None]
        return torch.where(mask, self.out(torch.tanh(self.into(x + mean) + 0.2 * step)), 0.0)


def clips(rows: int = 3, text: int = 12, features: int = 263) -> MotionBatch:
    draw = torch.Generator().manual_seed(1)
    pooled = torch.randn(rows, text, generator=draw)
    condition = Condition(pooled[:, None], torch.ones(rows, 1, dtype=torch.bool), pooled)
    lengths = torch.tensor([6, 4, 2])[:rows]
    motion = torch.randn(rows, 6, features, generator=draw)
    motion = torch.where(valid_mask(lengths, 6)[..., None], motion, 0.0)
    ids = tuple(f"clip{i}" for i in range(rows))
    keys = torch.arange(rows) + 5
    return MotionBatch(ids, {KIND: motion}, lengths, 20.0, ids, condition, torch.full((rows,), -1), keys)


def reward(motion_BTD: Tensor, level: float) -> Tensor:
    return -0.5 * (1.0 + level) * (motion_BTD - GOAL).square().sum((1, 2))


def multipliers(table: SolverTable) -> Tensor:
    return table.a + table.b * torch.tensor(THETA, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("name", TABLES)
def test_a_linear_samplers_norms_are_its_multipliers_and_their_products(name: str) -> None:
    path = sampling_path(Toy(TABLES[name], Linear()), clips(), 6, seed=0)
    found, m = jacobian_norms(path, probes=1), multipliers(TABLES[name]).abs()
    chain = m.flip(0).cumprod(0).flip(0)
    torch.testing.assert_close(found.step_SB, m.float()[:, None].expand(6, 3), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.chain_SB, chain.float()[:, None].expand(6, 3), rtol=1e-5, atol=1e-7)
    assert found.dim_B.tolist() == [18, 12, 6]
    torch.testing.assert_close(found.step_per_dim_SB[:, 0], m.float() / math.sqrt(18), rtol=1e-5, atol=1e-7)


class Axes(SamplingPath):
    """Probes are the state's axes in turn, so that the mean over all of them is exact."""

    def probe(self, seed: int, *parts: int | str) -> Tensor:
        return torch.eye(self.states[0].numel())[int(parts[-1])].view_as(self.states[0])


@pytest.mark.parametrize("name", ["eps", "ancestral", "flow"])
def test_norms_are_those_of_the_full_jacobian(name: str) -> None:
    path = Axes(*vars(sampling_path(Toy(TABLES[name], Curved()), clips(1), 6, seed=0)).values())
    dim = path.states[0].numel()
    found, product = jacobian_norms(path, probes=dim), torch.eye(dim)
    for i in reversed(range(6)):
        own = torch.autograd.functional.jacobian(lambda x, i=i: path.step(i, x).x_prev, path.states[i]).view(dim, dim)
        product = product @ own
        assert float(found.step_SB[i, 0]) == pytest.approx(float(own.norm()) / dim**0.5, rel=1e-5)
        assert float(found.chain_SB[i, 0]) == pytest.approx(float(product.norm()) / dim**0.5, rel=1e-5)


def test_probes_are_unit_directions_in_valid_frames_drawn_anew_for_every_purpose() -> None:
    path = sampling_path(Toy(TABLES["flow"], Curved()), clips(), 6, seed=0)
    draws = [path.probe(*parts) for parts in ((0, "step", 1, 0), (0, "step", 2, 0), (0, "chain", 1), (1, "chain", 1))]
    for draw in draws:
        torch.testing.assert_close(draw.flatten(1).norm(dim=1), torch.ones(3))
        assert torch.equal(draw, path.decode(draw))
    assert all(not torch.equal(x, y) for k, x in enumerate(draws) for y in draws[:k])
    with pytest.raises(ValueError, match="probes"):
        jacobian_norms(path, probes=0)


def test_a_path_is_what_generate_walks_and_its_steps_are_the_loops() -> None:
    generator, batch = mdm("ddpm"), clips()
    path = sampling_path(generator, batch, 4, seed=3)
    want = generate(generator, None, batch.prompt, batch.lengths_B, batch.keys_B, 4, seed=3)
    torch.testing.assert_close(path.decode(path.states[-1]), want)
    for i in range(4):
        output = path.step(i, path.states[i])
        torch.testing.assert_close(output.x_prev, path.states[i + 1])
        torch.testing.assert_close(output.x0_hat, path.x0_hats[i])


@pytest.mark.parametrize("scored", ["x0_hat", "x_prev"])
@pytest.mark.parametrize("name", ["eps", "x0", "flow"])
def test_direct_and_chained_reward_gradients_have_their_closed_forms(name: str, scored: str) -> None:
    table, batch = TABLES[name], clips()
    path = sampling_path(Toy(table, Linear()), batch, 6, seed=0)
    found = reward_gradients(path, reward, scored)
    m, scale = multipliers(table), torch.ones(7).double() if table.scale is None else table.scale

    def pull(state: Tensor, index: int | None = None) -> Tensor:
        """The reward's gradient at x_index, which it reads as scale * state at its level; None = a clean estimate."""
        factor, level = (1.0, 0.0) if index is None else (float(scale[index]), float(table.noise_level[index]))
        valid = path.decode(torch.ones_like(state))
        return (1.0 + level) * factor * (GOAL - factor * state.double()) * valid

    end = pull(path.states[-1], 6)
    for i in range(6):
        at_state = end * m[i + 1 :].prod()
        if scored == "x0_hat":
            clean = (table.p[i] + table.q[i] * THETA[i]) * path.states[i].double()
            own = table.q[i] * pull(clean)
        else:
            own = table.b[i] * pull(path.states[i + 1], i + 1)
        chained = table.b[i] * at_state
        for got, want in (
            (found.direct_SB[i], own.flatten(1).norm(dim=1)),
            (found.chain_SB[i], chained.flatten(1).norm(dim=1)),
            (found.chain_at_state_SB[i], at_state.flatten(1).norm(dim=1)),
            (found.cosine_SB[i], torch.cosine_similarity(own.flatten(1), chained.flatten(1))),
        ):
            torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["eps", "ancestral", "flow"])
@pytest.mark.parametrize(
    "strategy,column,scored",
    [
        (DRaFT(last_steps=0), "chain_SB", "x0_hat"),
        (EasyTune(timesteps="all"), "direct_SB", "x0_hat"),
        (EasyTune(timesteps="all", score="x_prev"), "direct_SB", "x_prev"),
    ],
)
def test_the_gradients_are_those_that_strategies_give_the_networks_outputs(
    name: str, strategy: Strategy, column: str, scored: str
) -> None:
    generator = Toy(TABLES[name], Curved())
    path = sampling_path(generator, clips(), 6, seed=0)
    found = getattr(reward_gradients(path, reward, scored), column)
    shift = torch.zeros(6, *path.states[0].shape, requires_grad=True)  # added to each step's output

    def predict(x: Tensor, t: Tensor) -> Tensor:
        step = generator.step_of[float(t)]
        return generator.network(x, step, path.batch.lengths_B) + shift[step]

    plan = strategy.plan(6, 1.0, np.random.default_rng(0))
    for output in denoise(path.table, plan.actions, predict, path.states[0], path.noise):
        if output.scored != "none":
            state = output.x0_hat if output.scored == "x0_hat" else output.scale * output.x_prev
            reward(path.decode(state), output.noise_level).sum().backward()
    torch.testing.assert_close(found, shift.grad.flatten(2).norm(dim=2), rtol=1e-4, atol=1e-6)


def test_the_last_steps_direct_term_is_the_chains() -> None:
    found = reward_gradients(sampling_path(mdm(), clips(), 4, seed=0), reward, "x_prev")
    torch.testing.assert_close(found.direct_SB[-1], found.chain_SB[-1])
    torch.testing.assert_close(found.cosine_SB[-1], torch.ones(3))
    with pytest.raises(ValueError, match="scored"):
        reward_gradients(sampling_path(mdm(), clips(), 1, seed=0), reward, "final")


# ----------------------------------------------------------------------------------------------------------- likeness


def mean_frame(batch: MotionBatch, seen: list[float] | None = None) -> Callable[[Tensor, float], Tensor]:
    def embed(motion_BTD: Tensor, level: float) -> Tensor:
        if seen is not None:
            seen.append(level)
        return motion_BTD.sum(1)[:, :20] / batch.lengths_B[:, None] + level

    return embed


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_noised_states_have_the_cosine_of_their_level(name: str) -> None:
    table, batch = TABLES[name], replace(clips(2), lengths_B=torch.tensor([4000, 3000]))
    generator = Toy(table, Linear())
    x0 = torch.where(valid_mask(batch.lengths_B, 4000)[..., None], keyed_normal(batch.keys_B, (4000, 3), "x0"), 9.0)
    levels: list[float] = []
    found = noise_similarity(generator, batch, x0, 6, mean_frame(batch, levels))
    want = (1 - table.noise_level**2).sqrt()[:, None].expand(7, 2).float()
    torch.testing.assert_close(found["state"], want, rtol=0, atol=0.03)  # 9000 and more entries: 1 / sqrt(9000) = 0.011
    torch.testing.assert_close(found["features"], found["state"])
    assert levels == [0.0, *(v for level in table.noise_level.tolist() for v in (level, 0.0))]
    assert set(found) == {"labelled", "unlabelled", "features", "state"}
    if float(table.noise_level[-1]) == 0.0:
        torch.testing.assert_close(found["labelled"][-1], torch.ones(2))


def test_the_path_ends_at_its_own_sample_and_noisy_states_are_read_as_rewards_read_them() -> None:
    batch, levels = clips(), []
    path = sampling_path(Toy(TABLES["flow"], Curved()), batch, 6, seed=0)
    asked: list[Tensor] = []

    def embed(motion_BTD: Tensor, level: float) -> Tensor:
        asked.append(motion_BTD)
        return mean_frame(batch, levels)(motion_BTD, level)

    found = path_similarity(path, embed)
    for values in found.values():
        torch.testing.assert_close(values[-1], torch.ones(3))
    scale, level = TABLES["flow"].scale[2], TABLES["flow"].noise_level[2]
    torch.testing.assert_close(asked[4], path.decode(float(scale) * path.states[2]))
    assert levels[3:5] == [0.0, float(level)]


# ----------------------------------------------------------------------------------------------------------- families


def mdm(solver: str = "ddim") -> MDMGenerator:
    torch.manual_seed(0)
    config = MDMConfig(latent_dim=16, layers=2, heads=2, ff=24, text_dim=12)
    spec = GeneratorSpec("mdm", KIND, 20.0, 24, "stub", "x0", 1000, 2.5)
    return MDMGenerator(Build(spec, Normalizer(torch.zeros(263), torch.ones(263), KIND), 12, 12, solver), config)


def motiondiffuse() -> MotionDiffuseGenerator:
    torch.manual_seed(0)
    config = MotionDiffuseConfig(latent_dim=16, layers=1, heads=2, ff=16, text_width=8, text_heads=2, text_ff=8)
    spec = GeneratorSpec("motiondiffuse", KIND, 20.0, 24, "stub", config.prediction, 1000, 1.0)
    generator = MotionDiffuseGenerator(Build(spec, Normalizer(torch.zeros(263), torch.ones(263), KIND), 12, 12), config)
    for parameter in generator.network.parameters():
        if parameter.abs().max() < 0.02:
            nn.init.normal_(parameter, std=0.1)
    return generator


FAMILIES: dict[str, tuple[Callable[[], MotionGenerator], Callable[[], MotionBatch]]] = {
    "mld": (small_mld, batch_of),
    "motionlcm": (small_lcm, batch_of),
    "mdm": (mdm, clips),
    "mdm-ancestral": (lambda: mdm("ddpm"), clips),
    "motiondiffuse": (motiondiffuse, clips),
    "acmdm": (acmdm_fixtures.make, acmdm_fixtures.make_batch),
    "acmdm-latent": (lambda: acmdm_fixtures.make(acmdm_fixtures.LATENT), acmdm_fixtures.make_batch),
    "hymotion": (hymotion_fixtures.make, hymotion_fixtures.make_batch),
    "hymotion-released": (lambda: hymotion_fixtures.make(hymotion_fixtures.RELEASED), hymotion_fixtures.make_batch),
}


def everything(path: SamplingPath, x0: Tensor) -> dict[str, Tensor]:
    """Return all diagnostics of a path, (S or S + 1, B) each."""
    norms = jacobian_norms(path, probes=2)
    gradients = {scored: reward_gradients(path, reward, scored) for scored in ("x0_hat", "x_prev")}
    embed = mean_frame(path.batch)
    return {
        "step": norms.step_SB,
        "chain": norms.chain_SB,
        **{f"{scored}/{name}": v for scored, found in gradients.items() for name, v in vars(found).items()},
        **noise_similarity(path.generator, path.batch, x0, len(path), embed),
        **{f"path/{name}": v for name, v in path_similarity(path, embed).items()},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_and_batch_mates_and_padding_change_nothing(family: str) -> None:
    make, make_batch = FAMILIES[family]
    generator, batch = make(), make_batch().slice(0, 3)
    generator.network.train()
    path = sampling_path(generator, batch, 4, seed=0)
    found = everything(path, path.states[-1])
    assert generator.network.training and all(p.grad is None for p in generator.network.parameters())
    for name, values in found.items():
        assert values.isfinite().all() and values.shape[1] == 3, name
        if name in ("step", "chain") or name.endswith("direct_SB") or name.endswith("chain_SB"):
            assert (values > 0).all(), name
    # The shortest clip alone: another largest length, so no padding.
    last = int(batch.lengths_B.argmin())
    single = batch.slice(last, last + 1)
    frames = int(single.lengths_B)
    single = replace(single, motions={kind: m[:, :frames] for kind, m in single.motions.items()})
    alone = sampling_path(generator, single, 4, seed=0)
    rows = generator.state_shape(frames)[0]
    for name, values in everything(alone, path.states[-1][last : last + 1, :rows]).items():
        # Both readings of a clip differ in rounding only, which small gradients show more.
        torch.testing.assert_close(values[:, 0], found[name][:, last], rtol=5e-3, atol=5e-4, msg=name)


@pytest.mark.parametrize("family", ["mld", "mdm", "acmdm", "acmdm-latent", "hymotion"])
def test_real_motion_can_be_noised_through_the_generators_own_encoding(family: str) -> None:
    make, make_batch = FAMILIES[family]
    generator, batch = make(), make_batch()
    motion = batch.motions[generator.spec.representation][:, : int(batch.lengths_B.max())]
    x0 = generator.encode(motion, batch.lengths_B)
    found = noise_similarity(generator, batch, x0, 10, mean_frame(batch))
    assert all(v.isfinite().all() and v.shape == (11, len(batch)) for v in found.values())
    mean = found["state"].mean(1)
    assert mean[-1] > 0.95 and mean[0] < 0.6 and (mean.diff() > -1e-4).all()


def test_the_spread_of_norms_is_geometric_and_of_cosines_plain() -> None:
    values = torch.tensor([[1.0, 100.0], [0.0, 0.0]])
    log, plain = spread_rows("a", values, log=True), spread_rows("a", values)
    assert [log[0][k] for k in ("value", "low", "high")] == pytest.approx([10.0, 1.0, 100.0])
    assert [plain[0][k] for k in ("series", "x", "value", "low", "high")] == ["a", 0, 50.5, 1.0, 100.0]
    assert all(math.isfinite(v) and v >= 0 for v in (log[1]["value"], log[1]["low"], log[1]["high"]))
