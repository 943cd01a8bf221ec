"""MotionLCM and its distillation against recorded outputs of the published code (tiny weights)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError
from motionrft.diffusion.denoise import SAMPLE, StepAction, denoise
from motionrft.diffusion.prediction import x0_coefficients
from motionrft.diffusion.solvers import consistency_coefficients
from motionrft.generators.mld import MLDGenerator
from motionrft.generators.mld_network import guidance_embedding
from motionrft.generators.motionlcm import MotionLCMConfig, MotionLCMGenerator
from motionrft.generators.motionlcm_distill import Distillation, grid_times
from motionrft.nn.embeddings import time_sinusoid
from tests.latent_fixtures import Recorded, build_of, close, condition, frame_objective, gradient_norms

pytestmark = pytest.mark.parity
STEPS = {"lcm_v1": (1, 2, 4, 8), "lcm_v2": (1, 2, 4)}
W = {"lcm_v1": dict.fromkeys((1, 2, 4, 8), 6.5), "lcm_v2": {1: 7.0, 2: 11.5, 4: 12.5}}


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded("mldpp_motionlcm_tiny.npz")


def build(recorded: Recorded, name: str) -> MotionLCMGenerator:
    generator = recorded.generator(name)
    assert isinstance(generator, MotionLCMGenerator)
    return generator


def chain(recorded: Recorded, name: str, generator: MotionLCMGenerator, steps: int, x_T: Tensor, action=SAMPLE):
    text, lengths = condition(recorded(f"{name}/in/text")[:, 0]), recorded("mldpp/in/lengths")
    outs: list[Tensor] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        outs.append(generator.predict(generator.network, x, t, text, lengths))
        return outs[-1]

    noise = recorded(f"{name}/in/noise")
    found = list(denoise(generator.solver(steps), [action] * steps, predict, x_T, lambda i: noise[i]))
    return found, outs


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_single_forwards_agree(recorded: Recorded, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = build(recorded, name)
    network = generator.network
    x, t, text, w = (recorded(f"{name}/in/{n}") for n in ("x", "t", "text", "w"))
    text = text[:, 0]
    embedded = guidance_embedding(w, 32)
    close(embedded, recorded(f"{name}/out/w_emb"), 1e-3)
    waves = time_sinusoid(t, network.time_embedding.sinusoid_size, dtype=torch.float32)
    close(waves, recorded(f"{name}/out/time_sinusoid"), 1e-4)
    close(network.time_embedding(t, embedded), recorded(f"{name}/out/time_token"), 5e-6)
    close(network.emb_proj(text)[:, None], recorded(f"{name}/out/text_token"), 5e-6)
    eps = network(x, t, text, embedded)
    close(eps, recorded(f"{name}/out/eps_cond"), 5e-6)
    close(network(x, torch.full((3,), 501), text, embedded), recorded(f"{name}/out/eps_cond_t501"), 5e-6)
    rows = torch.stack([t.double(), 1.0 + w.double()], dim=-1)
    guided = generator.predict(network, x, rows, condition(text), recorded("mldpp/in/lengths"))
    close(guided, recorded(f"{name}/out/eps_cond"), 5e-6)
    p, q = (c.float()[:, None, None] for c in x0_coefficients(generator.alpha_bar[t], "eps"))
    close(p * x + q * eps, recorded(f"{name}/out/x0_cond"), 5e-6)
    double, wide = network.double(), (x.double(), t, text.double())
    close(double(*wide, embedded.double()), recorded(f"{name}/out64/eps_cond"), 2e-5)
    waves = recorded(f"{name}/out/time_sinusoid")
    monkeypatch.setattr("motionrft.generators.mld_network.time_sinusoid", lambda *_, **__: waves)
    exact = recorded(f"{name}/out/w_emb").double()
    close(double(*wide, exact), recorded(f"{name}/out64/eps_cond"), 1e-9)


@pytest.mark.parametrize(("name", "steps"), [(n, s) for n, all_steps in STEPS.items() for s in all_steps])
@torch.no_grad()
def test_chains_agree(recorded: Recorded, name: str, steps: int) -> None:
    generator, at = build(recorded, name), f"{name}/out/S{steps}"
    table, states = generator.solver(steps), recorded(f"{at}_x")
    assert table.model_time[:, 0, 0].tolist() == recorded(f"{at}_timesteps").tolist()
    scale = table.model_time[:, 0, 1].float()
    assert (scale == 1 + W[name][steps]).all()
    close(guidance_embedding(scale[:1] - 1, 32).expand(3, 32), recorded(f"{at}_w_emb"), 1e-3)
    found, outs = chain(recorded, name, generator, steps, recorded(f"{name}/in/x_T"))
    noise = recorded(f"{name}/in/noise")
    for i, step in enumerate(found):
        close(outs[i], recorded(f"{at}_eps")[i], 3e-5)
        close(step.x_prev, states[i + 1], 3e-5)
        level = float(1 - table.noise_level[i + 1] ** 2) if i < steps - 1 else 1.0
        clean = step.x_prev - float(table.c[i]) * noise[i] if i < steps - 1 else step.x_prev
        close(clean / level**0.5, recorded(f"{at}_denoised")[i], 3e-5)
        close(step.x0_hat, recorded(f"{at}_denoised")[i], 3e-5)  # so late, the boundary terms are below rounding
    if f"{at}_decode" in recorded.arrays:
        got = generator.decode(found[-1].x_prev, recorded("mldpp/in/lengths"))
        close(got, recorded(f"{at}_decode"), 3e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_gradients_agree(recorded: Recorded, steps: int) -> None:
    generator = build(recorded, "lcm_v2")
    x_T = recorded("lcm_v2/in/x_T").clone().requires_grad_()
    keep = StepAction(grad=True, cut_input=False, cut_after=False)
    last = chain(recorded, "lcm_v2", generator, steps, x_T, keep)[0][-1]
    decoded = generator.decode(last.x_prev, recorded("mldpp/in/lengths"))
    loss = frame_objective(decoded, recorded("mldpp/in/feats"), recorded("mldpp/in/mask"))
    loss.backward()
    at = f"lcm_v2/out/grad_S{steps}"
    close(loss.detach(), recorded(f"{at}_loss"), 1e-4)
    close(x_T.grad, recorded(f"{at}_xT"), 1e-4)
    names = recorded.arrays["lcm_v2/names/grad_params"]
    close(gradient_norms(generator.network, names), recorded(f"{at}_norms"), 1e-4)


@pytest.mark.parametrize("name", STEPS)
def test_schedules_agree(recorded: Recorded, name: str) -> None:
    generator = build(recorded, name)
    for steps in STEPS[name]:
        times = recorded(f"sched/{name}_timesteps_{steps}")
        assert generator.solver(steps).model_time[:, 0, 0].tolist() == times.tolist()
        got = torch.stack(consistency_coefficients(times), dim=-1)
        close(got, recorded(f"sched/{name}_cskip_cout_{steps}"), 1e-11)
    if name == "lcm_v2":
        with pytest.raises(ConfigError, match=r"one of \(1, 2, 4\).*got 3"):
            generator.solver(3)
    generator.guidance = 3.0  # an explicit scale replaces the published ones
    assert (generator.solver(2).model_time[:, 0, 1] == 3.0).all()


def test_embeddings_of_the_released_sizes_agree(recorded: Recorded) -> None:
    close(guidance_embedding(recorded("ref/w"), 256), recorded("ref/w_emb_256"), 1e-3)
    close(time_sinusoid(recorded("ref/t"), 768, dtype=torch.float32), recorded("ref/t_sinusoid_768"), 1e-4)


def distillation(recorded: Recorded, points: int, huber: float) -> tuple[Distillation, MotionLCMGenerator]:
    teacher, student = recorded.generator("mldpp"), build(recorded, "lcm_v2")
    assert isinstance(teacher, MLDGenerator)
    teacher.latents.null.copy_(recorded("distill/in/text_uncond")[0, 0])
    fresh = MotionLCMGenerator(build_of("motionlcm", 768), replace(student.config, grid_points=points, huber=huber))
    training = fresh.training("distill", teacher)
    found = training.extras["target"]
    # The target starts as the teacher with a zero projection; one move towards the recorded student.
    assert not fresh.network.time_embedding.cond_proj.weight.any()
    training.after_step(dict(student.network.named_parameters()), 1)
    return found, student


@pytest.mark.parametrize(("points", "huber"), [(10, 0.5), (50, 0.001)])
@torch.no_grad()
def test_distillation_agrees(recorded: Recorded, points: int, huber: float) -> None:
    found, student = distillation(recorded, points, huber)
    at = f"distill/K{points}"
    close(found.target.latent_pre.weight, recorded("distill/out/ema_latent_pre_weight"), 1e-6)
    close(found.target.time_embedding.cond_proj.weight, recorded("distill/out/ema_cond_proj_weight"), 1e-6)
    z, noise, text, w = (recorded(f"distill/in/{n}") for n in ("z", "noise", "text", "w"))
    text, index = text[:, 0], recorded(f"{at}/in/index")
    start, end = found.times(index)
    assert start.tolist() == recorded(f"{at}/out/t_start").tolist()
    assert end.tolist() == recorded(f"{at}/out/t_end").tolist()
    close(guidance_embedding(w, 32), recorded(f"{at}/out/w_emb"), 1e-3)
    calls: list[tuple[Tensor, Tensor]] = []

    def watched(network):
        def run(*args: Tensor) -> Tensor:
            calls.append((args[0], network(*args)))
            return calls[-1][1]

        return run

    teacher = found.teacher.network
    found.teacher.network = watched(teacher)
    loss = found.distance(watched(student.network), z, noise, index, w, text)
    (x_t, student_eps), (_, teacher_eps) = calls
    close(x_t, recorded(f"{at}/out/x_t"), 1e-6)
    close(student_eps, recorded(f"{at}/out/student_eps"), 5e-6)
    cond, uncond = teacher_eps.chunk(2)
    close(cond, recorded(f"{at}/out/teacher_eps_cond"), 5e-6)
    close(uncond, recorded(f"{at}/out/teacher_eps_uncond"), 5e-6)
    guided = cond + w[:, None, None] * (cond - uncond)
    close(guided, recorded(f"{at}/out/teacher_eps"), 5e-6)
    close(found._x0(x_t, guided, start), recorded(f"{at}/out/teacher_x0"), 5e-6)
    close(found.consistency(student.network, x_t, start, w, text), recorded(f"{at}/out/student_f"), 5e-6)
    x_prev = found.solve(x_t, start, end, w, text)
    close(x_prev, recorded(f"{at}/out/x_prev"), 5e-6)
    close(found.consistency(found.target, x_prev, end, w, text), recorded(f"{at}/out/target"), 5e-6)
    close(loss.mean(), recorded(f"{at}/out/loss"), 5e-6)


def test_published_grids_are_those_of_the_versions() -> None:
    assert grid_times(1000, 50)[[0, 1, -1]].tolist() == [19, 39, 999]
    assert grid_times(1000, 10)[[0, 1, -1]].tolist() == [99, 199, 999]
    assert MotionLCMConfig().grid_points == 50
