"""Every strategy's gradient on a linear denoiser, where it has a closed form; and by finite differences on a real one.

Scalar state, out_i = theta_i x_i, reward r(z) = -(z - y)^2 / 2, g(z) = y - z, loss -r, m_i = a_i + b_i theta_i.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from motionrft.core.protocols import SolverTable
from motionrft.diffusion.denoise import StepAction, denoise
from motionrft.diffusion.schedules import alpha_bars
from motionrft.diffusion.solvers import ddim_table, skip_gains
from motionrft.finetune.plan import StepPlan
from motionrft.finetune.strategies import AlignProp, DRaFT, DRTune, EasyTune, ReFL

S, Y, Z0 = 6, 0.7, 1.3
TIMES = torch.tensor([831, 665, 499, 333, 167, 1])
ALPHA_BAR = alpha_bars("scaled_linear", 1000)
EPS = ddim_table(ALPHA_BAR, TIMES, "eps", final_alpha_bar=float(ALPHA_BAR[0]))
X0 = ddim_table(ALPHA_BAR, TIMES, "x0", final_alpha_bar=float(ALPHA_BAR[0]))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def thetas() -> Tensor:
    return torch.tensor([0.3, -0.2, 0.15, 0.4, -0.1, 0.25], dtype=torch.float64, requires_grad=True)


def reward_gradient(z: float) -> float:
    return Y - z


def run(plan: StepPlan, table: SolverTable = EPS, gains: tuple[Tensor, Tensor] | None = None) -> tuple:
    """Return (gradient per theta of the summed loss, states x_0.., clean estimates) without any update."""
    theta = thetas()
    step_of = {int(t): i for i, t in enumerate(TIMES)}
    x_T = torch.tensor([Z0], dtype=torch.float64)
    states, cleans = [Z0], []
    steps = denoise(table, plan.actions, lambda x, t: theta[step_of[int(t)]] * x, x_T, None, gains)
    for output in steps:
        states.append(float(output.x_prev.detach()))
        cleans.append(float(output.x0_hat.detach()))
        if output.scored != "none":
            z = output.x0_hat if output.scored == "x0_hat" else output.x_prev
            (0.5 * (z - Y).square().sum() * plan.actions[output.index].weight).backward()
    return theta.grad, states, cleans


def multipliers(table: SolverTable, theta: Tensor) -> list[float]:
    return (table.a + table.b * theta.detach()).tolist()


@pytest.mark.parametrize("table", [EPS, X0])
@pytest.mark.parametrize("score", ["x0_hat", "x_prev"])
def test_easytune_takes_each_steps_direct_term_only(table: SolverTable, score: str) -> None:
    plan = EasyTune(window=3, score=score, timesteps="last").plan(S, 0.0, rng())
    grad, z, clean = run(plan, table)
    for i in range(S):
        read, gain = (clean[i], table.q[i]) if score == "x0_hat" else (z[i + 1], table.b[i])
        want = -reward_gradient(read) * float(gain) * z[i] if i >= 3 else 0.0
        assert float(grad[i]) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("last", [1, 2, 4, 0])
def test_draft_gradient_is_the_product_of_the_chain(last: int) -> None:
    grad, z, _ = run(DRaFT(last).plan(S, 0.0, rng()))
    first = S - last if last else 0
    m = multipliers(EPS, thetas())
    for i in range(S):
        want = -reward_gradient(z[S]) * float(np.prod(m[i + 1 :])) * float(EPS.b[i]) * z[i] if i >= first else 0.0
        assert float(grad[i]) == pytest.approx(want, abs=1e-12)


def test_full_draft_equals_autograd_through_the_written_out_chain() -> None:
    theta = thetas()
    x = torch.tensor([Z0], dtype=torch.float64)
    for i in range(S):
        x = EPS.a[i] * x + EPS.b[i] * (theta[i] * x)
    (0.5 * (x - Y).square().sum()).backward()
    torch.testing.assert_close(run(DRaFT(0).plan(S, 0.0, rng()))[0], theta.grad, rtol=1e-13, atol=1e-15)


def test_draft_of_one_step_is_easytune_on_the_last_new_state() -> None:
    draft = run(DRaFT(1).plan(S, 0.0, rng()))[0]
    easy = run(EasyTune(window=1, score="x_prev", timesteps="last").plan(S, 0.0, rng()))[0]
    torch.testing.assert_close(draft, easy, rtol=0, atol=0)


def test_refl_is_easytune_on_the_clean_estimate_at_its_stop() -> None:
    for seed in range(6):
        plan = ReFL(last_steps=4).plan(S, 0.0, rng(seed))
        stop = len(plan.actions) - 1
        grad, z, clean = run(plan)
        want = torch.zeros(S, dtype=torch.float64)
        want[stop] = -reward_gradient(clean[stop]) * EPS.q[stop] * z[stop]
        torch.testing.assert_close(grad, want)


def test_truncated_alignprop_is_draft_from_its_boundary() -> None:
    for mode in ("truncated", "uniform"):
        plan = AlignProp(mode=mode, boundary_mean=0.5, boundary_std=0.2).plan(S, 0.0, rng(3))
        torch.testing.assert_close(run(plan)[0], run(DRaFT(S - plan.window_start).plan(S, 0.0, rng()))[0])


def test_bernoulli_alignprop_passes_skipped_steps_through_the_sampler() -> None:
    plan = AlignProp(mode="bernoulli", keep_prob=0.5).plan(S, 0.0, rng(1))
    kept = [a.grad for a in plan.actions]
    assert 0 < sum(kept) < S
    grad, z, _ = run(plan)
    a, b, theta = EPS.a.tolist(), EPS.b.tolist(), thetas().tolist()
    for i in range(S):
        path = np.prod([a[j] + (b[j] * theta[j] if kept[j] else 0.0) for j in range(i + 1, S)])
        want = -reward_gradient(z[S]) * path * b[i] * z[i] if kept[i] else 0.0
        assert float(grad[i]) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("table", [EPS, X0])
def test_drtune_gradient_telescopes_through_the_sampler(table: SolverTable) -> None:
    gains = skip_gains(table, "eps" if table is EPS else "x0")
    for seed in range(8):
        plan = DRTune(grad_steps=3, last_steps=3).plan(S, 0.0, rng(seed))
        stop = len(plan.actions) - 1
        grad, z, clean = run(plan, table, gains)
        g = reward_gradient(clean[stop])
        for i in range(S):
            want = 0.0
            if i <= stop and plan.actions[i].grad:
                # Whatever happens in between, noise fixed: d x0_hat / d x_{i+1} = 1 / sqrt(alpha_bar of x_{i+1}).
                level = ALPHA_BAR[TIMES[i + 1]] if i < stop else None
                gain = table.q[i] if level is None else table.b[i] / level.sqrt()
                want = -g * float(gain) * z[i]
            assert float(grad[i]) == pytest.approx(want, abs=1e-12)


def test_gains_change_derivatives_but_no_values() -> None:
    actions = [StepAction(grad=True, cut_after=False)] * S
    theta = thetas()
    step_of = {int(t): i for i, t in enumerate(TIMES)}
    runs = [
        [
            s.x_prev.detach()
            for s in denoise(X0, actions, lambda x, t: theta[step_of[int(t)]] * x, torch.ones(1), None, g)
        ]
        for g in (None, skip_gains(X0, "x0"))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_stepwise_and_accumulated_updates_reach_their_known_values() -> None:
    def train(plan: StepPlan, rate: float) -> float:
        theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

        def network(x: Tensor, _t: Tensor) -> Tensor:
            return theta * x

        for out in denoise(EPS, plan.actions, network, torch.tensor([Z0], dtype=torch.float64)):
            if out.scored != "none":
                weight = plan.actions[out.index].weight
                (0.5 * (out.x_prev - Y).square().sum() * weight).backward()
            if out.update:
                with torch.no_grad():
                    theta -= rate * theta.grad
                theta.grad = None
        return float(theta.detach())

    step = EasyTune(window=4, score="x_prev", timesteps="last")
    assert train(step.plan(S, 0.0, rng()), 0.1) == pytest.approx(1.3922693180580108, abs=1e-12)
    mean = EasyTune(window=4, score="x_prev", timesteps="last", variant="accumulate")
    assert train(mean.plan(S, 0.0, rng()), 0.4) == pytest.approx(1.940854112048455, abs=1e-12)  # 4 x mean = sum


def test_easytune_gradient_matches_finite_differences_on_a_network() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    plan = EasyTune(window=1, timesteps="uniform").plan(S, 0.0, rng(2))
    x_T = torch.randn(2, 3, dtype=torch.float64)

    def loss(frozen_until: int) -> Tensor:
        """The state before the scored step is that of the unchanged network: its direct term only."""
        states = []
        for out in denoise(EPS, plan.actions, lambda x, t: net(torch.cat([x, (t / 1e3).expand(len(x), 1)], 1)), x_T):
            states.append(out)
        return states[frozen_until].x0_hat.sin().sum()

    stop = len(plan.actions) - 1
    loss(stop).backward()
    before = [s.x_in for s in denoise(EPS, plan.actions, lambda x, t: net(_in(x, t)).detach(), x_T)][stop]
    weight = net[0].weight
    for index in ((0, 0), (3, 2), (5, 3)):
        values = []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                weight[index] += shift
                out = net(_in(before, TIMES[stop]))
                values.append(float((EPS.p[stop] * before + EPS.q[stop] * out).sin().sum()))
                weight[index] -= shift
        assert float(weight.grad[index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-9)


def _in(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([x, (t / 1e3).expand(len(x), 1)], 1)
