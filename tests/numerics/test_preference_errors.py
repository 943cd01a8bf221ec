"""The denoising error of preference methods: the families' own pre-training error, and closed forms of its loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from motionrft.core.errors import ConfigError
from motionrft.core.protocols import MotionGenerator, SolverTable
from motionrft.core.rng import keyed_normal
from motionrft.core.types import Condition, MotionBatch, Representation
from motionrft.diffusion.prediction import output_for
from motionrft.diffusion.schedules import alpha_bars
from motionrft.diffusion.solvers import ddim_table, flow_euler_table
from motionrft.finetune.objective import Objective
from motionrft.finetune.preference import Pairs, PreferenceStrategy, denoising_error, levels_at, preference_loss
from motionrft.finetune.rollout import Rollout
from motionrft.finetune.strategies import DiffusionDPO, SoPo
from motionrft.generators import base as base_module
from motionrft.generators.mdm import MDMConfig, MDMGenerator
from motionrft.generators.mld import MLDConfig, MLDGenerator
from motionrft.generators.motiondiffuse import MotionDiffuseConfig, MotionDiffuseGenerator
from motionrft.generators.motionlcm import MotionLCMConfig, MotionLCMGenerator
from motionrft.training.optim import OptimConfig
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.single import SingleEngine
from tests import acmdm_fixtures, hymotion_fixtures, latent_fixtures

N = 1000
RUNTIME = LocalRuntime()
KIND = Representation.KINEMATIC
ALPHA_BAR = alpha_bars("cosine", N)


# ---------------------------------------------------------------------------------------------- levels and targets
@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_a_levels_target_is_what_a_perfect_network_outputs(prediction: str) -> None:
    times = torch.arange(N - 1, -1, -1)
    rows = torch.tensor([0, 10, 500, 998, 999])
    levels = levels_at(ddim_table(ALPHA_BAR, times, prediction), rows)
    ab = ALPHA_BAR[times[rows]]
    x0, noise = torch.full_like(ab, 0.7), torch.full_like(ab, -1.3)
    assert torch.equal(levels.time, times[rows])
    torch.testing.assert_close(levels.clean_B * x0 + levels.noise_B * noise, ab.sqrt() * x0 + (1 - ab).sqrt() * noise)
    wanted = output_for(x0, noise, ab, prediction)
    got = levels.target_clean_B * x0 + levels.target_noise_B * noise
    # At the noisiest step 1 / sqrt(ab) is 20000: what cancels in p leaves that many roundings.
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_the_target_of_a_flow_is_its_velocity_and_its_gain_the_time_left() -> None:
    levels = levels_at(flow_euler_table(8), torch.tensor([0, 3, 7]))
    t = torch.tensor([0, 3, 7], dtype=torch.float64) / 8
    one = torch.ones(3, dtype=torch.float64)
    for got, want in (
        (levels.time, t), (levels.clean_B, t), (levels.noise_B, 1 - t), (levels.target_clean_B, one),
        (levels.target_noise_B, -one), (levels.gain_B, 1 - t),
    ):  # fmt: skip
        torch.testing.assert_close(got, want)


def test_a_level_without_influence_of_the_output_is_refused() -> None:
    table = flow_euler_table(4)
    with pytest.raises(ValueError, match="q != 0"):
        levels_at(replace(table, q=0 * table.q), torch.tensor([1]))


# ------------------------------------------------------------------------------------- the pre-training error
def kinematic_batch() -> MotionBatch:
    draw = torch.Generator().manual_seed(1)
    pooled = torch.randn(4, 12, generator=draw)
    text = Condition(pooled[:, None], torch.ones(4, 1, dtype=torch.bool), pooled)
    ids = tuple("abcd")
    motions = {KIND: torch.randn(4, 16, 263, generator=draw)}
    keys = torch.arange(4) * 3 + 1
    return MotionBatch(ids, motions, torch.tensor([16, 11, 7, 4]), 20.0, ids, text, torch.full((4,), -1), keys)


def opened(generator: MotionGenerator) -> MotionGenerator:
    draw = torch.Generator().manual_seed(9)
    for parameter in generator.network.parameters():
        if not parameter.any():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    generator.network.eval()
    return generator


def mdm(mask_frames: bool = True) -> MDMGenerator:
    sizes = dict(latent_dim=16, layers=1, heads=2, ff=24, text_dim=12, dropout=0.0, velocity_weight=0.0, text_dropout=0)
    sizes["frames_per_token"] = 2 if mask_frames else 1
    build = latent_fixtures.build_of("mdm", 12)
    build = replace(build, spec=replace(build.spec, prediction="x0", max_frames=24))
    return opened(MDMGenerator(build, MDMConfig(**sizes, mask_frames=mask_frames), 2.5))


def motiondiffuse() -> MotionDiffuseGenerator:
    config = MotionDiffuseConfig(
        latent_dim=16, layers=1, heads=2, ff=24, text_dim=12, text_width=8, text_heads=2, text_ff=16, positions=60,
        target="noise", text_dropout=0.1,
    )  # fmt: skip
    return opened(MotionDiffuseGenerator(latent_fixtures.build_of("motiondiffuse", 12), config, 2.5))


def mld() -> MLDGenerator:
    return opened(MLDGenerator(latent_fixtures.build_of("mld", 12), MLDConfig(text_dropout=0.0)))


def pretraining(
    generator: MotionGenerator, batch: MotionBatch, monkeypatch
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return (own losses, times, states, noise of flows) with every caption kept and flow times on the fine grid."""
    seen: list[tuple[Tensor, ...]] = []

    def network(*args: Tensor) -> Tensor:
        seen.append(args)
        return generator.network(*args)

    def on_grid(keys_B: Tensor, what: str, *key: int) -> Tensor:
        return torch.arange(len(keys_B)).mul(190).add(17) / N if what == "t" else torch.ones(len(keys_B))

    noise: list[Tensor] = []
    if generator.spec.prediction == "velocity":
        real = base_module.keyed_normal
        monkeypatch.setattr(base_module, "keyed_uniform", on_grid)
        monkeypatch.setattr(base_module, "keyed_normal", lambda *a: noise.append(real(*a)) or noise[-1])
    loss_B, _ = generator.pretrain_loss(network, batch, step=3, seed=2)
    return loss_B, seen[0][1], seen[0][0], noise


def grid_row(table: SolverTable, t_B: Tensor) -> Tensor:
    return (table.model_time[None] - t_B[:, None].double()).abs().argmin(1)


@pytest.mark.parametrize("make", [mdm, lambda: mdm(False), motiondiffuse, mld], ids=["mdm", "mdm-full", "eps", "mld"])
def test_it_is_the_pretraining_error_of_diffusion_families(make: Callable[[], MotionGenerator], monkeypatch) -> None:
    generator, batch = make(), kinematic_batch()
    if isinstance(generator, MotionDiffuseGenerator):
        generator.config = replace(generator.config, text_dropout=0.0)
    own_B, t_B, x_t, _ = pretraining(generator, batch, monkeypatch)
    if isinstance(generator, MLDGenerator):
        x0 = generator.sampled_states(batch, 2, "pretrain", 3)
    else:
        x0 = generator.noisy(batch, 3, 2).x0
    ab = generator.alpha_bar[t_B].reshape(-1, 1, 1)
    noise = ((x_t - ab.sqrt() * x0) / (1 - ab).sqrt()).float()
    grid = DiffusionDPO().grid(generator, 4)
    assert len(grid) == N
    levels = levels_at(grid, grid_row(grid, t_B))
    assert torch.equal(levels.time, t_B)
    got_B = denoising_error(generator, generator.network, batch.prompt, batch.lengths_B, x0, noise, levels)
    torch.testing.assert_close(got_B, own_B, rtol=1e-4, atol=1e-6)
    clean_B = denoising_error(generator, generator.network, batch.prompt, batch.lengths_B, x0, noise, levels, "clean")
    torch.testing.assert_close(clean_B, (levels.gain_B**2 * got_B).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("error", ["output", "clean"])
@pytest.mark.parametrize("family", ["raw", "latent", "hymotion"])
def test_it_is_the_pretraining_error_of_flows(family: str, error: str, monkeypatch) -> None:
    if family == "hymotion":
        start = hymotion_fixtures.SMALL if error == "output" else hymotion_fixtures.CLEAN
        config = replace(start, text_dropout=0.0, frame_weight=0.0)
        generator, batch = hymotion_fixtures.make(config), hymotion_fixtures.make_batch()
    else:
        given = "velocity" if error == "output" else "clean"
        config = replace(acmdm_fixtures.MODELS[family], text_dropout=0.0, frame_weight=0.0, output=given)
        generator, batch = acmdm_fixtures.make(config), acmdm_fixtures.make_batch()
    generator.network.eval()
    own_B, t_B, _, noise = pretraining(generator, batch, monkeypatch)
    grid = SoPo().grid(generator, 4)
    levels = levels_at(grid, grid_row(grid, t_B))
    x0 = generator.encode(batch.motions[generator.spec.representation], batch.lengths_B)
    got_B = denoising_error(generator, generator.network, batch.prompt, batch.lengths_B, x0, noise[0], levels, error)
    torch.testing.assert_close(got_B, own_B, rtol=1e-3, atol=1e-6)


def test_it_is_unguided_and_reads_the_guidance_of_models_that_have_it_as_an_input() -> None:
    batch = kinematic_batch()
    for generator in (mdm(), mld()):
        x = torch.randn(4, *generator.state_shape(16))
        args = (generator.network, x, torch.tensor(500), batch.prompt, batch.lengths_B)
        plain, guided = generator.conditional(*args), generator.predict(*args)
        assert (plain - guided).abs().max() > 1e-3
        generator.guidance = 1.0
        torch.testing.assert_close(generator.predict(*args), plain, rtol=0, atol=0)
    lcm = MotionLCMGenerator(latent_fixtures.build_of("motionlcm", 12), MotionLCMConfig())
    grid = DiffusionDPO(times="sampler").grid(lcm, 4)
    levels = levels_at(grid, torch.tensor([0, 3, 1, 0]))
    assert levels.time.shape == (4, 2)
    x0 = torch.randn(4, *lcm.state_shape(16))
    error_B = denoising_error(lcm, lcm.network, batch.prompt, batch.lengths_B, x0, torch.randn_like(x0), levels)
    assert bool(error_B.isfinite().all())
    with pytest.raises(ConfigError, match="times=sampler"):
        DiffusionDPO().grid(lcm, 4)


def test_padding_and_batch_mates_change_no_error() -> None:
    generator, batch = mdm(), kinematic_batch()
    x0, noise = generator.encode(batch.motions[KIND], batch.lengths_B), torch.randn(4, 16, 263)
    levels = levels_at(DiffusionDPO().grid(generator, 4), torch.tensor([3, 300, 700, 990]))
    whole_B = denoising_error(generator, generator.network, batch.prompt, batch.lengths_B, x0, noise, levels)
    part = batch.slice(2, 3)
    alone = levels_at(DiffusionDPO().grid(generator, 4), torch.tensor([700]))
    one_B = denoising_error(
        generator, generator.network, part.prompt, part.lengths_B, x0[2:3, :7], noise[2:3, :7], alone
    )
    torch.testing.assert_close(one_B, whole_B[2:3], rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------- the loss on a linear denoiser
class Scale(nn.Module):
    """out = theta x."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta * x


class Linear:
    """A generator of scalars with noise prediction, double precision."""

    def __init__(self, theta: float) -> None:
        self.network, self.spec = Scale(theta), SimpleNamespace(train_steps=N, family="linear")

    def state_shape(self, num_frames: int) -> tuple[int, ...]:
        return (1,)

    def solver(self, num_steps: int) -> SolverTable:
        return ddim_table(ALPHA_BAR, torch.linspace(N - 2, 0, num_steps).long(), "eps")

    def conditional(self, network: Callable, x: Tensor, t: Tensor, condition: Condition, lengths_B: Tensor) -> Tensor:
        return network(x)

    def state_mask(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        return torch.ones(len(state), 1, dtype=torch.bool)


@dataclass(frozen=True)
class Given(PreferenceStrategy):
    """Two pairs given by hand."""

    name = "given"

    def pairs(self, rollout: Rollout) -> Pairs:
        column = [torch.tensor(v, dtype=torch.float64) for v in WEIGHTS]
        return Pairs(*[torch.tensor(v, dtype=torch.float64)[:, None] for v in STATES], *column)


STATES = ([0.9, -0.4], [-1.1, 0.3])
WEIGHTS = ([0.5, 1.7], [0.5, 1.0], [1.0, 1.0])


class Kept(SingleEngine):
    """Keeps the gradient of every update and does not move."""

    kept: list[float]

    def step(self):
        self.kept = [*getattr(self, "kept", []), float(self._params[0].grad)]
        self._params[0].grad = None
        return SimpleNamespace(applied=True, grad_norm=0.0, lr=0.0)


@pytest.mark.parametrize("error", ["output", "clean"])
@pytest.mark.parametrize("times", ["uniform", "logit_normal", "sampler"])
def test_gradient_on_a_linear_denoiser(times: str, error: str) -> None:
    theta, anchor, beta = 0.3, 0.45, 0.8
    generator, reference = Linear(theta), Linear(anchor)
    engine = Kept(generator.network, OptimConfig(schedule="constant"))
    batch = kinematic_batch().slice(0, 2)
    rollout = Rollout(
        engine, generator, reference, None, batch,
        objective=Objective(), num_steps=5, progress=0.0, step=7, seed=1, collective=RUNTIME,
    )  # fmt: skip
    strategy = Given(beta=beta, draws=3, times=times, error=error)
    strategy.learn(rollout)
    grid = strategy.grid(generator, 5)
    for draw, got in enumerate(engine.kept):
        key = ("preference", 1, 7, draw)
        rows, eps = strategy.rows(batch.keys_B, len(grid), *key), keyed_normal(batch.keys_B, (1,), "noise", *key)
        want = 0.0
        for b in range(2):
            ab, noise = float(ALPHA_BAR[grid.model_time[rows[b]]]), float(eps[b])
            factor = (1 - ab) / ab if error == "clean" else 1.0
            margin, slope = 0.0, 0.0
            for x0, weight in ((STATES[0][b], -WEIGHTS[0][b]), (STATES[1][b], WEIGHTS[1][b])):
                x = math.sqrt(ab) * x0 + math.sqrt(1 - ab) * noise
                margin += beta * weight * factor * ((theta * x - noise) ** 2 - (anchor * x - noise) ** 2)
                slope += beta * weight * factor * 2 * (theta * x - noise) * x
            want -= slope / (1 + math.exp(margin)) / 2
        assert got == pytest.approx(want, rel=1e-6)
    assert len(engine.kept) == 3


def test_loss_at_no_margin_is_log_two_and_dropped_pairs_count_nothing() -> None:
    loss_B = preference_loss(torch.tensor([0.0, 0.0, 800.0, -800.0]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(loss_B, torch.tensor([math.log(2), 0.0, 0.0, 800.0]))


def test_times_are_spread_as_they_say_and_keyed() -> None:
    keys = torch.arange(20000)
    uniform = DiffusionDPO().rows(keys, 1000, "k").double()
    middle = DiffusionDPO(times="logit_normal").rows(keys, 1000, "k").double()
    assert uniform.mean() == pytest.approx(499.5, abs=8) and uniform.std() == pytest.approx(288.7, abs=5)
    inside = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(math.log(3.0))) * 2 - 1
    assert float(((middle >= 250) & (middle < 750)).double().mean()) == pytest.approx(float(inside), abs=0.015)
    assert torch.equal(DiffusionDPO().rows(keys[5:9], 1000, "k").double(), uniform[5:9])
    assert not torch.equal(DiffusionDPO().rows(keys, 1000, "other").double(), uniform)
