"""Policy gradients against closed forms: densities, the flow's SDE, advantages, a Gaussian chain's gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from motionrft.core.protocols import SolverTable, StepInfo
from motionrft.core.types import Condition, MotionBatch, Representation, RewardTerms, valid_mask
from motionrft.diffusion.schedules import alpha_bars, spaced_timesteps
from motionrft.diffusion.solvers import ddim_table, flow_euler_table, flow_sde_table
from motionrft.finetune.policy_gradient import log_prob, surrogate
from motionrft.finetune.step import Objective, rollout_step
from motionrft.finetune.strategies import DDPO, FlowGRPO, Strategy
from motionrft.training.optim import OptimConfig
from motionrft.training.runtime_local import LocalRuntime

KIND = Representation.JOINT
RUNTIME = LocalRuntime()
MLD_BARS = alpha_bars("scaled_linear", 1000)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_log_probability_is_that_of_a_normal_over_valid_entries() -> None:
    x, mean, std = draw(3, 5, 4), draw(3, 5, 4, seed=1), 0.3
    mask = valid_mask(torch.tensor([5, 2, 1]), 5)[..., None]
    density = torch.distributions.Normal(mean.double(), std).log_prob(x.double())
    for row, frames in enumerate([5, 2, 1]):
        want = density[row, :frames]
        assert float(log_prob(x, mean, std, mask, "sum")[row]) == pytest.approx(float(want.sum()), rel=1e-6)
        assert float(log_prob(x, mean, std, mask, "mean")[row]) == pytest.approx(float(want.mean()), rel=1e-6)


def test_a_long_sum_keeps_small_ratios() -> None:
    """50,000 entries add up to a density whose own float32 spacing is 4e-3."""
    x, mean = draw(1, 50000), torch.zeros(1, 50000)
    mask = torch.ones(1, 1, dtype=torch.bool)
    shift = 1e-6
    got = log_prob(x, mean + shift, 1.0, mask, "sum") - log_prob(x, mean, 1.0, mask, "sum")
    want = shift * x.double().sum() - 50000 * shift**2 / 2
    assert float(got) == pytest.approx(float(want), abs=2e-5) and abs(float(want)) > 1e-4


def test_the_surrogate_stops_where_a_ratio_has_gone_far_enough() -> None:
    log_ratio = torch.tensor([0.0, 0.3, -0.3, 0.3, -0.3], requires_grad=True)
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0])
    loss = surrogate(log_ratio, advantage, 0.1)
    ratio = log_ratio.detach().exp()
    want = torch.stack([-2 * ratio[0], torch.tensor(-2.2), -2 * ratio[2], 2 * ratio[3], torch.tensor(1.8)])
    torch.testing.assert_close(loss.detach(), want)
    (grad,) = torch.autograd.grad(loss.sum(), log_ratio)
    torch.testing.assert_close(grad, torch.stack([want[0], 0 * ratio[0], want[2], want[3], 0 * ratio[0]]))


@pytest.mark.parametrize(("num_steps", "a"), [(2, 0.7), (10, 0.7), (50, 0.3)])
def test_the_flows_sde_is_flow_grpos(num_steps: int, a: float) -> None:
    """Written with sigma = 1 - t from noise to data and v = noise - data, as published."""
    table, h = flow_sde_table(num_steps, a), 1.0 / num_steps
    sigmas = [1 - i * h for i in range(num_steps + 1)]
    x, out = draw(7).double(), draw(7, seed=1).double()
    for i in range(num_steps - 1):
        sigma, v = sigmas[i], -out
        s = a * (sigma / (1 - (sigmas[1] if i == 0 else sigma))) ** 0.5
        mean = x * (1 - s**2 * h / (2 * sigma)) - v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * h
        torch.testing.assert_close(table.a[i] * x + table.b[i] * out, mean, rtol=1e-12, atol=1e-12)
        assert float(table.c[i]) == pytest.approx(s * h**0.5, rel=1e-12)
    euler = flow_euler_table(num_steps)
    for name in ("model_time", "a", "b", "c", "p", "q", "noise_level", "scale"):
        assert getattr(table, name)[-1] == getattr(euler, name)[-1]
        torch.testing.assert_close(getattr(flow_sde_table(num_steps, 0.0), name), getattr(euler, name))


def gaussian_drift(table: SolverTable, start: int, m: float = 0.8, d: float = 0.5) -> float:
    """How far mean or variance leave the flow's marginals after step `start`, for data N(m, d^2), exact velocity."""

    def marginal(t: float) -> tuple[float, float]:
        return t * m, t**2 * d**2 + (1 - t) ** 2

    mean, variance = marginal(start / len(table))
    worst = 0.0
    for i in range(start, len(table)):
        t = float(table.model_time[i])
        a, b, c = (float(column[i]) for column in (table.a, table.b, table.c))
        k = (t * d**2 - (1 - t)) / marginal(t)[1]  # v(x) = m + k (x - t m)
        mean, variance = a * mean + b * (m + k * (mean - t * m)), (a + b * k) ** 2 * variance + c**2
        want = marginal((i + 1) / len(table))
        worst = max(worst, abs(mean - want[0]), abs(variance - want[1]))
    return worst


@pytest.mark.parametrize("noise", [0.3, 0.7, 1.0])
def test_the_sdes_marginals_become_the_flows_as_steps_shrink(noise: float) -> None:
    coarse, fine = (gaussian_drift(flow_sde_table(n, noise), n // 10) for n in (100, 1000))
    assert fine < 0.01 and fine == pytest.approx(coarse / 10, rel=0.2)  # an error of first order


class Chain(nn.Module):
    """out_i = theta_i x + phi_i, near what is right for N(0, 1) data."""

    def __init__(self, ideal: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(ideal.float() + 0.1 * draw(len(ideal), seed=3))
        self.phi = nn.Parameter(0.3 * draw(len(ideal), seed=4))

    def forward(self, x: Tensor, i: int) -> Tensor:
        return self.theta[i] * x + self.phi[i]


class ChainGenerator:
    """A Gaussian chain per entry: state (frames,), reward the mean over valid entries of -(x - 0.7)^2 / 2."""

    spec = SimpleNamespace(representation=KIND, prediction="eps")

    def __init__(self, table: SolverTable) -> None:
        level = table.noise_level[:-1]
        signal = (1 - level**2).sqrt()
        self.table = table
        self.network = Chain(level if table.scale is None else (signal - level) * table.scale[:-1])
        self.step_of = {float(t): i for i, t in enumerate(table.model_time)}

    def state_shape(self, num_frames: int) -> tuple[int, ...]:
        return (num_frames,)

    def solver(self, num_steps: int) -> SolverTable:
        return self.table

    def stochastic_solver(self, num_steps: int, noise: float) -> SolverTable:
        return self.table

    def predict(self, network: object, x: Tensor, t: Tensor, condition: Condition, lengths_B: Tensor) -> Tensor:
        return network(x, self.step_of[float(t)])

    def decode(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        return state

    def state_mask(self, state: Tensor, lengths_B: Tensor) -> Tensor:
        return valid_mask(lengths_B, state.shape[1])

    def expected_reward(self) -> Tensor:
        network, table = self.network.double(), self.table
        mean, variance = torch.zeros(()).double(), torch.ones(()).double()
        for i in range(len(table)):
            gain = table.a[i] + table.b[i] * network.theta[i]
            mean, variance = gain * mean + table.b[i] * network.phi[i], gain**2 * variance + table.c[i] ** 2
        return -((mean - 0.7) ** 2 + variance) / 2


class Near:
    """The chain's reward."""

    def encode_text(self, condition: Condition) -> Tensor:
        return condition.pooled_BD

    def score(self, x: Tensor, lengths_B: Tensor, *args: object, **kwargs: object) -> RewardTerms:
        value = torch.where(valid_mask(lengths_B, x.shape[1]), -((x - 0.7) ** 2) / 2, 0.0)
        return RewardTerms({"semantic": value.sum(1) / lengths_B})


def make_batch(lengths: list[int]) -> MotionBatch:
    rows = len(lengths)
    text = Condition(torch.zeros(rows, 1, 2), torch.ones(rows, 1, dtype=torch.bool), torch.zeros(rows, 2))
    ids = tuple(f"clip{i}" for i in range(rows))
    keys = torch.arange(rows) + 5
    return MotionBatch(ids, {}, torch.tensor(lengths), 20.0, ids, text, torch.full((rows,), -1), keys)


def chain_gradient(generator: ChainGenerator, strategy: Strategy, step: int, lengths: list[int]) -> Tensor:
    """Minus the gradient one rollout leaves: (2, S), of theta and phi."""
    network = generator.network.float()
    network.zero_grad()
    engine = RUNTIME.build_engine(network, OptimConfig())
    engine.step = lambda: StepInfo(True, 0.0, 0.0)  # type: ignore[method-assign]
    rollout_step(
        engine, generator, None, Near(), make_batch(lengths), strategy=strategy, objective=Objective(),
        num_steps=len(generator.table), progress=0.0, step=step, seed=0, collective=RUNTIME,
    )  # fmt: skip
    return -torch.stack([network.theta.grad, network.phi.grad]).double()


TABLES = {
    "flow": flow_sde_table(5, 0.7),
    "ddim": ddim_table(MLD_BARS, spaced_timesteps(1000, 5, "leading"), "eps", eta=1.0),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_estimate_is_the_gradient_of_the_expected_reward(table: SolverTable) -> None:
    generator = ChainGenerator(table)
    # Plain advantages and one update: what is left is REINFORCE with a baseline. The last step is not trained.
    plain = FlowGRPO(
        group=3000, scale="none", advantage_clip=0.0, log_prob="sum", updates=1, kl_weight=0.0, equal_gain=False
    )
    found = torch.stack([chain_gradient(generator, plain, step, [2]) for step in range(24)])
    estimate = (found * (len(table) - 1)).mean(0)  # the update takes the mean over steps
    error = (found * (len(table) - 1)).std(0) / 24**0.5
    value = generator.expected_reward()
    exact = torch.stack(torch.autograd.grad(value, [generator.network.theta, generator.network.phi]))
    exact[:, -1] = 0.0
    assert (estimate[:, -1] == 0).all() and exact.norm() > 0.1
    assert ((estimate - exact).abs() <= 5 * error).all()
    assert float((estimate - exact).norm() / exact.norm()) < 0.1


def test_weights_save_the_signal_of_networks_that_output_the_clean_state() -> None:
    """Ideal network for N(0, 1) data with one bias for all steps: the signal per sample of its gradient."""
    bars = alpha_bars("cosine", 1000)
    times = spaced_timesteps(1000, 10)
    table, x, score = ddim_table(bars, times, "x0", 1.0), draw(20000).double(), []
    for i in range(9):
        noise = draw(20000, seed=i + 1).double()
        x = (table.a[i] + table.b[i] * bars[times[i]].sqrt()) * x + table.c[i] * noise
        score.append(noise * table.b[i] / table.c[i])
    x = table.b[9] * bars[times[9]].sqrt() * x
    weights = torch.tensor(DDPO().step_weights(table, list(range(9))))
    assert DDPO(equal_gain=False).step_weights(table, [0, 3]) == [1.0, 1.0] and weights.mean() == pytest.approx(1)

    def signal(weight: Tensor) -> float:
        sample = (weight[:, None] * torch.stack(score)).sum(0) * (x - x.mean())
        return float(sample.mean() / sample.std())

    assert signal(weights) > 0.6 and abs(signal(torch.ones(9))) < 0.1


def advantages(strategy: DDPO | FlowGRPO, rewards: list[float], world: list[list[float]] | None = None) -> Tensor:
    """Rewards of one rank; `world` are those of every rank."""
    rows = torch.tensor(rewards, dtype=torch.float32)
    everyone = [torch.tensor(r).double() for r in (world or [rewards])]
    mean = torch.cat(everyone).mean()
    answers = iter([torch.stack([r.sum() for r in everyone]).mean()])
    squares = torch.stack([(r - mean).square().sum() for r in everyone]).mean()

    class Metrics(dict):
        def add(self, name: str, value: Tensor) -> None:
            self[name] = float(value)

    share = 1.0 / (sum(len(r) for r in everyone) / len(everyone))
    samples = SimpleNamespace(
        collective=SimpleNamespace(mean=lambda value: next(answers, squares)), share=share, metrics=Metrics()
    )
    found = strategy.advantages(rows, samples)  # type: ignore[arg-type]
    return torch.cat([found, torch.tensor([samples.metrics["policy/zero_std_groups"]])])


def test_advantages_are_what_each_method_says() -> None:
    rewards = [1.0, 3.0, 10.0, 14.0, 5.0, 5.0]
    got = advantages(DDPO(group=2), rewards)
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 1 / 3]), rtol=1e-3, atol=1e-6)
    assert (got[4:6] == 0).all()
    std = torch.tensor(rewards).std(correction=0)
    got = advantages(FlowGRPO(group=2), rewards)[:6]
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, -2.0, 2.0, 0.0, 0.0]) / (std + 1e-4))
    whole = DDPO(group=1, baseline="batch", scale="batch")
    want = (torch.tensor(rewards) - torch.tensor(rewards).mean()) / (std + 1e-4)
    torch.testing.assert_close(advantages(whole, rewards)[:6], want)
    assert advantages(whole, [2.0, 2.0]).tolist() == [0.0, 0.0, 1.0]
    split = advantages(whole, rewards[:2], world=[rewards[:2], rewards[2:]])[:2]  # ranks of 2 and 4 rows
    torch.testing.assert_close(split, want[:2])
    clipped = DDPO(group=6, advantage_clip=0.5)
    assert advantages(clipped, rewards)[:6].abs().max() == 0.5


def test_entries_beyond_a_clip_and_other_clips_change_nothing() -> None:
    generator = ChainGenerator(TABLES["flow"])
    alone = chain_gradient(generator, DDPO(group=6), 0, [3])
    mates = chain_gradient(generator, DDPO(group=6), 0, [3, 7])
    other = chain_gradient(generator, DDPO(group=6, advantage_clip=1e-9), 0, [3, 7])
    assert alone.norm() > 0 and other.norm() < 1e-6
    batch = make_batch([3, 7]).slice(1, 2)
    assert batch.lengths_B.tolist() == [7]
    # The mean over two prompts minus half of the first one is half of the second one's.
    network = generator.network.float()
    network.zero_grad()
    engine = RUNTIME.build_engine(network, OptimConfig())
    engine.step = lambda: StepInfo(True, 0.0, 0.0)  # type: ignore[method-assign]
    rollout_step(
        engine, generator, None, Near(), batch, strategy=DDPO(group=6), objective=Objective(),
        num_steps=5, progress=0.0, step=0, seed=0, collective=RUNTIME,
    )  # fmt: skip
    second = -torch.stack([network.theta.grad, network.phi.grad]).double()
    torch.testing.assert_close(mates, (alone + second) / 2, rtol=1e-5, atol=1e-7)
