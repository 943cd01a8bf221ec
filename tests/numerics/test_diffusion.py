"""Schedules, solver tables, guidance and the loop against textbook formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from motionrft.diffusion.denoise import SAMPLE, StepAction, denoise, initial_noise, keyed_noise, sample
from motionrft.diffusion.guidance import double_rows, guide, guide_doubled
from motionrft.diffusion.prediction import PREDICTIONS, add_noise, flow_state, output_for, x0_coefficients
from motionrft.diffusion.schedules import alpha_bars, betas, spaced_timesteps
from motionrft.diffusion.solvers import ddim_table, ddpm_table, flow_euler_table, lcm_table, skip_gains

COSINE = alpha_bars("cosine", 1000)
LATENT = alpha_bars("scaled_linear", 1000)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosine_share_follows_its_formula_until_the_cap() -> None:
    want = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    # The cap on beta only touches the last step.
    torch.testing.assert_close(COSINE[:-1], torch.tensor(want[1:-1], dtype=torch.float64) / want[0])
    assert float(COSINE[0]) == pytest.approx(0.9999587, abs=1e-7)
    assert float(COSINE[-1]) == pytest.approx(2.429e-9, rel=1e-3)
    assert float(betas("cosine", 1000).max()) == 0.999


def test_linear_schedules_have_their_published_ends() -> None:
    linear, scaled = betas("linear", 1000), betas("scaled_linear", 1000)
    assert (float(linear[0]), float(linear[-1])) == pytest.approx((1e-4, 0.02))
    assert (float(scaled[0]), float(scaled[-1])) == pytest.approx((0.00085, 0.012))
    torch.testing.assert_close(scaled.sqrt().diff(), scaled.sqrt().diff()[:1].expand(999))
    with pytest.raises(ValueError, match="schedule"):
        betas("sigmoid", 10)


def test_spaced_timesteps_cover_their_grids() -> None:
    assert spaced_timesteps(1000, 50, "leading").tolist() == [981 - 20 * i for i in range(50)]
    assert spaced_timesteps(50, 50).tolist() == list(range(49, -1, -1))
    assert spaced_timesteps(50, 50, "leading").tolist() == list(range(49, -1, -1))
    assert spaced_timesteps(1000, 10)[0] == 999 and spaced_timesteps(1000, 10)[-1] == 0
    assert spaced_timesteps(1000, 1).tolist() == [999]
    assert spaced_timesteps(1000, 4, "trailing").tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="num_steps"):
        spaced_timesteps(10, 11)


@pytest.mark.parametrize(
    ("steps", "row", "want"),
    [
        (50, 0, (981, 1.122852, -0.123252, 13.158464, -13.120411)),
        (50, 24, (501, 1.048456, -0.057442, 1.906928, -1.623692)),
        (50, 49, (1, 1.000428, -0.012142, 1.000853, -0.041314)),
        (4, 1, (501, 1.563392, -0.758601, 1.906928, -1.623692)),
        (4, 3, (1, 1.000428, -0.012142, 1.000853, -0.041314)),
    ],
)
def test_latent_ddim_coefficients_have_their_known_values(steps: int, row: int, want: tuple) -> None:
    table = ddim_table(LATENT, spaced_timesteps(1000, steps, "leading"), "eps", final_alpha_bar=float(LATENT[0]))
    got = tuple(float(column[row]) for column in (table.model_time, table.a, table.b, table.p, table.q))
    assert got == pytest.approx(want, abs=6e-7)
    assert float(table.c.abs().max()) == 0.0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_the_true_output_follows_the_forward_process_to_x0(prediction: str) -> None:
    x0, eps = draw(1, 3, 5), draw(2, 3, 5)
    timesteps = spaced_timesteps(1000, 10, "leading")
    table = ddim_table(LATENT, timesteps, prediction)
    ab = LATENT[timesteps]
    x = ab[0].sqrt() * x0 + (1 - ab[0]).sqrt() * eps
    outs = iter([output_for(x0, eps, level, prediction) for level in ab])
    for i, step in enumerate(denoise(table, [SAMPLE] * 10, lambda _x, _t: next(outs), x)):
        level = ab[i + 1] if i < 9 else torch.tensor(1.0, dtype=torch.float64)
        torch.testing.assert_close(step.x0_hat, x0)
        torch.testing.assert_close(step.x_prev, level.sqrt() * x0 + (1 - level).sqrt() * eps)
    torch.testing.assert_close(step.x_prev, x0)


@pytest.mark.parametrize("table_of", [ddim_table, ddpm_table, lambda *a: ddim_table(*a, eta=0.7)])
def test_all_prediction_types_describe_one_sampler(table_of) -> None:
    x, x0 = draw(3, 4), draw(4, 4)
    timesteps = spaced_timesteps(1000, 7, "leading")
    for i, level in enumerate(LATENT[timesteps]):
        eps = (x - level.sqrt() * x0) / (1 - level).sqrt()
        results = []
        for prediction in PREDICTIONS:
            table, out = table_of(LATENT, timesteps, prediction), output_for(x0, eps, level, prediction)
            torch.testing.assert_close(table.p[i] * x + table.q[i] * out, x0)
            results.append(table.a[i] * x + table.b[i] * out)
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(results[2], results[0])


def test_ddpm_is_the_posterior_and_full_noise_ddim_is_ddpm() -> None:
    timesteps = spaced_timesteps(1000, 1000)
    table = ddpm_table(COSINE, timesteps, "x0")
    beta = betas("cosine", 1000).flip(0)
    ab = COSINE.flip(0)
    before = torch.cat([ab[1:], ab.new_ones(1)])
    torch.testing.assert_close(table.b, before.sqrt() * beta / (1 - ab))
    torch.testing.assert_close(table.a, (1 - beta).sqrt() * (1 - before) / (1 - ab))
    torch.testing.assert_close(table.c.square(), beta * (1 - before) / (1 - ab))
    assert float(table.c[-1]) == 0.0 and float(table.b[-1]) == pytest.approx(1.0)
    noisy = ddim_table(COSINE, timesteps, "x0", eta=1.0)
    for name in ("a", "b", "c"):
        torch.testing.assert_close(getattr(noisy, name), getattr(table, name), rtol=1e-6, atol=1e-9)


def test_the_last_ancestral_step_adds_no_noise_even_short_of_clean() -> None:
    table = ddpm_table(LATENT, spaced_timesteps(1000, 5, "leading"), "eps", final_alpha_bar=float(LATENT[0]))
    assert float(table.c[-1]) == 0.0 and (table.c[:-1] > 0).all()


def test_a_cut_after_a_step_hides_its_history_from_a_live_next_step() -> None:
    theta = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    table = ddim_table(LATENT, torch.tensor([501, 1]), "eps")
    cut, live = StepAction(grad=True), StepAction(grad=True, cut_input=False, cut_after=False, score="x_prev")
    for actions, reaches in (((cut, live), False), ((live, live), True)):
        theta.grad = None
        outs = list(denoise(table, actions, lambda x, t: theta[int(t == 1)] * x, draw(1, 2)))
        outs[-1].x_prev.sum().backward()
        assert bool(theta.grad[0] != 0) is reaches and bool(theta.grad[1] != 0)


def test_noise_levels_start_high_and_end_clean() -> None:
    table = ddim_table(COSINE, spaced_timesteps(1000, 10), "x0")
    assert len(table.noise_level) == 11
    assert (table.noise_level.diff() < 0).all()
    assert float(table.noise_level[0]) > 0.999 and float(table.noise_level[-1]) == 0.0
    latent = ddim_table(LATENT, spaced_timesteps(1000, 10, "leading"), "eps", final_alpha_bar=float(LATENT[0]))
    assert float(latent.noise_level[-1]) == pytest.approx(math.sqrt(0.00085))


def test_consistency_and_flow_tables_follow_their_definitions() -> None:
    x, out = draw(5, 3), draw(6, 3)
    timesteps = torch.tensor([799, 399])
    table = lcm_table(LATENT, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        s = 10 * t
        x0 = (x - (1 - LATENT[t]).sqrt() * out) / LATENT[t].sqrt()
        done = s / math.sqrt(s**2 + 0.25) * x0 + 0.25 / (s**2 + 0.25) * x
        want = done if i == 1 else LATENT[399].sqrt() * done
        torch.testing.assert_close(table.a[i] * x + table.b[i] * out, want)
    assert float(table.c[0]) == pytest.approx(float((1 - LATENT[399]).sqrt())) and float(table.c[1]) == 0
    x0, noise = draw(7, 4), draw(8, 4)
    final = sample(flow_euler_table(5), lambda _x, _t: x0 - noise, noise)
    torch.testing.assert_close(final, x0)
    flow = flow_euler_table(4)
    for i in range(4):
        state = (i / 4) * x0 + (1 - i / 4) * noise
        torch.testing.assert_close(flow.p[i] * state + flow.q[i] * (x0 - noise), x0)


def test_a_scaled_flow_state_is_a_variance_preserving_state_of_the_tables_noise_level() -> None:
    x0, noise = draw(7, 6), draw(8, 6)
    table = flow_euler_table(5)
    assert table.scale is not None
    for i, t in enumerate((0.0, 0.2, 0.4, 0.6, 0.8, 1.0)):
        level = float(table.noise_level[i])
        assert level / math.sqrt(1 - level**2) == pytest.approx((1 - t) / t) if 0 < t else level == 1.0
        state = flow_state(x0, noise, torch.full((6,), t, dtype=torch.float64))
        want = math.sqrt(1 - level**2) * x0 + level * noise
        torch.testing.assert_close(table.scale[i] * state, want)
    assert float(table.noise_level[-1]) == 0.0 and float(table.scale[-1]) == 1.0


def test_the_loop_tells_how_to_scale_what_is_scored_and_only_that() -> None:
    x0, noise = draw(7, 6), draw(8, 6)
    actions = [StepAction(score="x_prev"), StepAction(score="x0_hat"), StepAction(score="x_prev")]
    steps = list(denoise(flow_euler_table(4), actions, lambda _x, _t: x0 - noise, noise))
    norm = math.hypot(1 / 4, 3 / 4)
    assert (steps[0].noise_level, steps[0].scale) == pytest.approx((0.75 / norm, 1 / norm))
    torch.testing.assert_close(steps[0].scale * steps[0].x_prev, (0.25 * x0 + 0.75 * noise) / norm)
    assert (steps[1].noise_level, steps[1].scale) == (0.0, 1.0)
    assert steps[2].scale == pytest.approx(1 / norm)  # symmetric in t and 1 - t
    table = ddim_table(LATENT, spaced_timesteps(1000, 3, "leading"), "x0")
    assert table.scale is None
    assert [s.scale for s in denoise(table, actions, lambda x, _t: x, noise)] == [1.0] * 3


def test_skip_gains_are_those_of_the_same_sampler_in_noise_form() -> None:
    timesteps = spaced_timesteps(1000, 9)
    for table_of in (ddim_table, ddpm_table):
        a, p = skip_gains(table_of(COSINE, timesteps, "x0"), "x0")
        eps = table_of(COSINE, timesteps, "eps")
        torch.testing.assert_close(a, eps.a)
        torch.testing.assert_close(p, eps.p)
        assert skip_gains(eps, "eps")[0] is eps.a


def test_guidance_is_affine_and_commutes_with_the_clean_estimate() -> None:
    x, c, u = draw(9, 2, 3), draw(10, 2, 3), draw(11, 2, 3)
    torch.testing.assert_close(guide(c, u, 1.0), c)
    torch.testing.assert_close(guide(c, u, 0.0), u)
    p, q = (float(v) for v in x0_coefficients(torch.tensor(0.3, dtype=torch.float64), "eps"))
    torch.testing.assert_close(p * x + q * guide(c, u, 7.5), guide(p * x + q * c, p * x + q * u, 7.5))
    torch.testing.assert_close(guide_doubled(torch.cat([c, u]), 2.5), guide(c, u, 2.5))
    assert torch.equal(double_rows(x)[2:], x)


def test_forward_process_mixes_row_by_row() -> None:
    x, noise = draw(12, 2, 3, 4), draw(13, 2, 3, 4)
    mixed = add_noise(x, noise, torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(mixed[0], x[0])
    torch.testing.assert_close(mixed[1], 0.5 * x[1] + math.sqrt(0.75) * noise[1])


def test_the_loop_refuses_plans_it_cannot_run() -> None:
    table = ddpm_table(COSINE, spaced_timesteps(1000, 3), "x0")
    with pytest.raises(ValueError, match="actions"):
        next(denoise(table, [SAMPLE] * 4, lambda x, _t: x, draw(0, 1, 2)))
    with pytest.raises(ValueError, match="noise"):
        next(denoise(table, [SAMPLE] * 3, lambda x, _t: x, draw(0, 1, 2)))
    with pytest.raises(ValueError, match="score"):
        StepAction(score="x_T")


def test_steps_after_a_stop_are_not_run() -> None:
    calls = []
    table = ddim_table(COSINE, spaced_timesteps(1000, 5), "x0")
    actions = [SAMPLE, StepAction(stop=True), SAMPLE]
    steps = list(denoise(table, actions, lambda x, t: calls.append(int(t)) or x, draw(0, 1, 2)))
    assert [s.index for s in steps] == [0, 1] and calls == [999, 749]


def test_noise_depends_on_key_and_step_but_not_on_the_batch() -> None:
    keys = torch.tensor([7, 9, 11])
    whole, part = keyed_noise(keys, (6, 2), 3), keyed_noise(keys[1:2], (4, 2), 3)
    torch.testing.assert_close(part(5)[0], whole(5)[1, :4])
    assert not torch.equal(whole(5), whole(6))
    assert not torch.equal(initial_noise(keys, (6, 2), 3), whole(0))
