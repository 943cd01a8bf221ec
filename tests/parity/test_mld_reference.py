"""MLD and MLD++ against recorded outputs of the published networks and sampler (tiny weights)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from motionrft.core.types import valid_mask
from motionrft.diffusion.denoise import SAMPLE, StepAction, denoise, sample
from motionrft.diffusion.prediction import add_noise, x0_coefficients
from motionrft.diffusion.schedules import alpha_bars, spaced_timesteps
from motionrft.generators.mld import MLDPP, OFFICIAL, ORIGINAL, MLDConfig, MLDGenerator
from motionrft.generators.mld_network import MLDDenoiser, guidance_embedding
from motionrft.generators.mld_vae import MotionVAE, sample_posterior
from motionrft.generators.motionlcm import LCM_V1, LCM_V2, MotionLCMConfig
from motionrft.generators.registry import FAMILIES, FORMATS
from motionrft.nn.embeddings import time_sinusoid
from tests.latent_fixtures import KIND, Recorded, batch_of, build_of, close, condition, frame_objective, gradient_norms
from tests.paths import shared_path

pytestmark = pytest.mark.parity
FILES = {"mld": "mld_tiny.npz", "mldpp": "mldpp_motionlcm_tiny.npz"}


class Model:
    """One generator with its arrays by short name."""

    def __init__(self, name: str) -> None:
        self.recorded = Recorded(FILES[name])
        self.at = "" if name == "mld" else f"{name}/"
        found = self.recorded.generator("" if name == "mld" else name)
        assert isinstance(found, MLDGenerator)
        self.generator = found
        self.lengths, self.mask = self("in/lengths"), self("in/mask")

    def __call__(self, name: str) -> Tensor:
        return self.recorded(self.at + name)

    @property
    def network(self) -> MLDDenoiser:
        return self.generator.network

    @property
    def vae(self) -> MotionVAE:
        return self.generator.latents.vae

    def guided(self, x: Tensor, t: Tensor) -> Tensor:
        return self.generator.predict(self.network, x, t, condition(self("in/text")[:, 0]), self.lengths)

    def chain(self, num_steps: int, x_T: Tensor, action: StepAction = SAMPLE) -> list:
        return list(denoise(self.generator.solver(num_steps), [action] * num_steps, self.guided, x_T))


@pytest.fixture(params=FILES)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param)


@torch.no_grad()
def test_autoencoder_and_its_losses_agree(model: Model) -> None:
    feats, noise, mask = model("in/feats"), model("in/vae_eps"), model.mask
    assert torch.equal(valid_mask(model.lengths, 40), mask)
    decoded, mean, logvar = model.vae(feats, model.lengths, noise)
    close(mean, model("out/vae_mu"), 5e-6)
    close(logvar, model("out/vae_logvar"), 5e-6)
    close((0.5 * logvar).exp(), model("out/vae_std"), 5e-6)
    close(sample_posterior(mean, logvar, noise), model("out/vae_z"), 5e-6)
    close(model.generator.encode(feats, model.lengths, noise), model("out/vae_z"), 5e-6)
    got = model.generator.decode(model("in/z"), model.lengths)
    close(got, model("out/decode_z"), 5e-6)
    assert (got[~mask] == 0).all()
    close(smooth_l1_loss(decoded, feats), model("out/loss_recfeats_plain"), 5e-6)
    batch = replace(batch_of(3), motions={KIND: feats}, lengths_B=model.lengths)
    _, parts = model.generator.autoencoder_loss(lambda *_: (decoded, mean, logvar), batch, 0, 0)
    close(parts["loss/features"], model("out/loss_recfeats_masked"), 5e-6)
    close(parts["loss/kl"], model("out/loss_kl"), 5e-6)


def test_gradient_through_the_decoder_agrees(model: Model) -> None:
    z = model("in/z").clone().requires_grad_()
    loss = frame_objective(model.generator.decode(z, model.lengths), model("in/feats"), model.mask)
    loss.backward()
    close(loss.detach(), model("out/grad_decode_loss"), 1e-4)
    close(z.grad, model("out/grad_decode_z"), 1e-4)
    assert all(p.grad is None for p in model.vae.parameters())


@torch.no_grad()
def test_denoiser_agrees_token_by_token(model: Model) -> None:
    network, x, t, text = model.network, model("in/x"), model("in/t"), model("in/text")[:, 0]
    waves = time_sinusoid(t, network.time_embedding.sinusoid_size, dtype=torch.float32)
    close(waves, model("out/time_sinusoid"), 1e-4)
    close(network.time_embedding(t), model("out/time_token"), 5e-6)
    close(network.emb_proj(text)[:, None], model("out/text_token"), 5e-6)
    close(network(x, t, text), model("out/eps_cond"), 5e-6)
    close(network(x, torch.full((3,), 501), text), model("out/eps_cond_t501"), 5e-6)
    assert (model("in/text_uncond")[0, 0] == model.generator.latents.null).all()
    plain, keep = condition(text), torch.zeros(3, dtype=torch.bool)
    close(model.generator.call(network, x, t, plain, keep, model.lengths), model("out/eps_uncond"), 5e-6)
    guided = model.guided(x, t)
    close(guided, model("out/eps_cfg"), 5e-6)
    p, q = (c.float()[:, None, None] for c in x0_coefficients(model.generator.alpha_bar[t], "eps"))
    close(p * x + q * model("out/eps_cond"), model("out/x0_cond"), 5e-6)
    close(p * x + q * guided, model("out/x0_cfg"), 5e-6)


@torch.no_grad()
def test_double_precision_agrees(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    network, vae = model.network.double(), model.vae.double()
    x, t, text = model("in/x").double(), model("in/t"), model("in/text")[:, 0].double()
    null = model("in/text_uncond")[:, 0].double().expand_as(text)
    # The published sinusoid is float32 in either precision; take its values where another exp rounds differently.
    waves = model("out/time_sinusoid")
    monkeypatch.setattr("motionrft.generators.mld_network.time_sinusoid", lambda *_, **__: waves)
    close(network(x, t, text), model("out64/eps_cond"), 1e-9)
    close(network(x, t, null), model("out64/eps_uncond"), 1e-9)
    mean, logvar = vae.encode(model("in/feats").double(), model.lengths)
    close(mean, model("out64/vae_mu"), 1e-9)
    close(logvar, model("out64/vae_logvar"), 1e-9)
    close(vae.decode(model("in/z").double(), model.lengths, 40)[1], model("out64/decode_z_sample1"), 1e-9)


@torch.no_grad()
def test_training_example_agrees(model: Model) -> None:
    t, noise = model("in/t"), model("in/train_noise")
    x_t = add_noise(model("out/vae_z"), noise, model.generator.alpha_bar[t])
    close(x_t, model("out/train_x_t"), 1e-6)
    error = model.network(x_t, t, model("in/text")[:, 0]) - noise
    close(error.square().mean((1, 2)).mean(), model("out/train_loss"), 5e-6)


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [5, 50])
def test_whole_sampling_chains_agree(model: Model, num_steps: int) -> None:
    table = model.generator.solver(num_steps)
    close(model.generator.alpha_bar, model.recorded("sched/alphas_cumprod"), 1e-7)
    assert table.model_time.tolist() == model(f"out/ddim{num_steps}_timesteps").tolist()
    states = model(f"out/ddim{num_steps}_x")
    steps = model.chain(num_steps, model("in/x_T"))
    for i, step in enumerate(steps):
        close(step.x_in, states[i], 3e-5)
        # At the recorded state: mid-chain, guided noise of these weights changes fifty times as much as the state.
        close(model.guided(states[i], table.model_time[i]), model(f"out/ddim{num_steps}_eps")[i], 3e-5)
        close(step.x0_hat, model(f"out/ddim{num_steps}_x0")[i], 3e-5)
    close(steps[-1].x_prev, states[-1], 3e-5)
    if num_steps == 5:
        close(model.generator.decode(steps[-1].x_prev, model.lengths), model("out/ddim5_decode"), 3e-5)


def test_gradients_of_the_one_step_estimate_agree(model: Model) -> None:
    x, t = model("in/x").clone().requires_grad_(), model("in/t_grad")
    p, q = (c.float()[:, None, None] for c in x0_coefficients(model.generator.alpha_bar[t], "eps"))
    x0 = p * x + q * model.guided(x, t)
    loss = frame_objective(model.generator.decode(x0, model.lengths), model("in/feats"), model.mask)
    loss.backward()
    close(x0.detach(), model("out/grad_x0_x0"), 5e-6)
    close(loss.detach(), model("out/grad_x0_loss"), 1e-4)
    close(x.grad, model("out/grad_x0_x"), 1e-4)
    names = model.recorded.arrays[f"{model.at}names/grad_params"]
    close(gradient_norms(model.network, names), model("out/grad_x0_norms"), 1e-4)
    if model.at:
        close(model.network.latent_post.weight.grad, model("out/grad_x0_latent_post_weight"), 1e-4)
    else:
        close(model.network.emb_proj[1].bias.grad, model("out/grad_x0_emb_proj_1_bias"), 1e-4)


def test_gradients_through_the_whole_chain_agree(model: Model) -> None:
    x_T = model("in/x_T").clone().requires_grad_()
    last = model.chain(5, x_T, StepAction(grad=True, cut_input=False, cut_after=False))[-1]
    loss = frame_objective(model.generator.decode(last.x_prev, model.lengths), model("in/feats"), model.mask)
    loss.backward()
    limit = 1e-3 if model.at else 1e-4
    close(loss.detach(), model("out/grad_ddim5_loss"), limit)
    close(x_T.grad, model("out/grad_ddim5_xT"), limit)
    names = model.recorded.arrays[f"{model.at}names/grad_params"]
    close(gradient_norms(model.network, names), model("out/grad_ddim5_norms"), limit)


@pytest.mark.parametrize("file", FILES.values())
def test_schedule_agrees(file: str) -> None:
    recorded = Recorded(file)
    published = recorded("sched/alphas_cumprod")
    close(alpha_bars("scaled_linear", 1000, dtype=torch.float32), published, 1e-7)
    close(alpha_bars("scaled_linear", 1000), published, 1e-6)  # float64: what float32 products lose
    for steps in (5, 10, 20, 25, 50):
        assert spaced_timesteps(1000, steps, "leading").tolist() == recorded(f"sched/ddim_timesteps_{steps}").tolist()


def test_the_original_files_extra_table_is_recognised_and_left_out() -> None:
    recorded = Recorded(FILES["mld"])
    tensors = {**recorded.weights("sd/"), **recorded.weights("original_only/")}
    found = FORMATS["mld"].read({"weights": {"state_dict": tensors}}, {})
    generator = recorded.generator()
    assert found.variant == "mld original" and found.model == replace(
        generator.config, dropout=0.1, spare_positions=True
    )
    assert found.dropped == ("denoiser.mem_pos.pe",)
    own = generator.network.state_dict()
    assert set(own) == set(found.network) and all(torch.equal(t, own[n]) for n, t in found.network.items())


@pytest.mark.parametrize(
    ("name", "config", "millions"),
    [
        ("mld__original_humanml", ORIGINAL, 8.221),  # without the table of positions that is never read
        ("mld__v1_humanml", OFFICIAL, 8.221),
        ("mld__v2_humanml_mldpp", MLDPP, 8.238),
        ("motionlcm__v1_humanml", LCM_V1, 8.418),
        ("motionlcm__v2_humanml", LCM_V2, 8.434),
    ],
)
def test_published_files_are_read_and_written_back(
    name: str, config: MLDConfig | MotionLCMConfig, millions: float
) -> None:
    card = json.loads(shared_path(f"golden/keys/{name}.json").read_text())
    form = FORMATS[config.family]
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape, _ in card["tensors"]}
        vae = MotionVAE(263, config).state_dict()
    found = form.read({"weights": {"state_dict": tensors, "epoch": 0}}, {})
    published = {"scale_latents": False} if config.family == "mld" else {}
    assert found.model == replace(config, **published)
    assert found.pooled_dim == 768 and found.text_encoder.startswith("clip:") == ("original" in name)

    build = replace(build_of(config.family, 768), pooled_dim=768)
    generator = FAMILIES[config.family][1](build, found.model)
    own = {n: tuple(t.shape) for n, t in generator.network.state_dict().items()}
    assert own == {n: tuple(t.shape) for n, t in found.network.items()}
    assert {f"vae.{n}" for n in vae} | {"scale"} == set(found.frozen)
    assert round(sum(p.numel() for p in generator.network.parameters()) / 1e6, 3) == millions
    (written,) = form.write(generator).values()
    evaluators = {n for n in tensors if n.startswith("t2m_")}
    expected = {n: (tuple(t.shape), torch.float32) for n, t in tensors.items() if n not in evaluators}
    assert {n: (tuple(t.shape), t.dtype) for n, t in written["state_dict"].items()} == expected
    assert set(found.dropped) == evaluators | {"epoch"} | (set(tensors) & {"denoiser.mem_pos.pe"})


def test_published_autoencoder_files_are_read_beside_a_denoiser() -> None:
    cards = [
        json.loads(shared_path(f"golden/keys/mld__{n}.json").read_text())
        for n in ("v2_humanml_mldpp", "vae_v2_humanml")
    ]
    with torch.device("meta"):
        whole, vae = ({key: torch.empty(shape) for key, shape, _ in card["tensors"]} for card in cards)
    denoiser = {n: t for n, t in whole.items() if not n.startswith("vae.")}
    found = FORMATS["mld"].read({"weights": {"state_dict": denoiser}, "vae": {"state_dict": vae}}, {})
    assert len(found.frozen) == 302 and found.model == MLDPP
    first = json.loads(shared_path("golden/keys/mld__vae_original_stage1.json").read_text())
    own = {n: tuple(t.shape) for n, t in MotionVAE(263, OFFICIAL).state_dict().items()}
    assert own == {key[4:]: tuple(shape) for key, shape, _ in first["tensors"] if key.startswith("vae.")}


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@torch.no_grad()
def _fill(module: torch.nn.Module) -> None:
    """Give every tensor numbers that depend on its rank among the sorted names only."""
    for i, (name, tensor) in enumerate(sorted(module.state_dict().items())):
        drawn = np.random.RandomState(1000 + i).standard_normal(tensor.shape)
        norm = ".norm" in name and name.endswith("weight")
        values = 1 + 0.02 * drawn if norm else (0.05 if tensor.ndim >= 2 else 0.02) * drawn
        tensor.copy_(torch.from_numpy(values.astype(np.float32)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "lcm", "eps", "sampled", "mean", "decoded", "consistency"),
    [
        (
            OFFICIAL,
            LCM_V1,
            [0.07588, 0.37205, 1.65673, -0.21073],
            [58.63197, 14.91852, -22.29930, -28.65514],
            [0.26939, -0.07999, -2.10882, -1.62206],
            [-1.90593, 0.55248, -0.76749, 1.26830],
            [-0.59739, 0.17514, 1.61704, 0.09953],
        ),
        (
            MLDPP,
            LCM_V2,
            [0.48986, 0.60544, 0.33633, -0.37409],
            [15.74679, -0.45444, -6.95263, -3.32875],
            [0.58271, 1.81526, -0.74359, 0.79544],
            [-0.23569, 0.54055, -0.22777, -0.03228],
            [0.41594, 0.62038, 0.46052, -0.48296],
        ),
    ],
    ids=["OFFICIAL", "MLDPP"],
)
def test_published_sizes_compute_what_the_published_code_does(
    config: MLDConfig, lcm: MotionLCMConfig, eps: list, sampled: list, mean: list, decoded: list, consistency: list
) -> None:
    shape, lengths = (2, config.latent_tokens, config.latent_dim), torch.tensor([60, 41])
    generator = MLDGenerator(build_of("mld", 768, _drawn(11, 1, 1, 768)[:, 0]), config)
    network, vae = generator.network.eval(), generator.latents.vae
    _fill(network)
    _fill(vae)
    x, text = _drawn(7, *shape), _drawn(8, 2, 1, 768)[:, 0]

    def first(found: Tensor) -> Tensor:
        return found.flatten()[:4]

    close(first(network(x, torch.full((2,), 501), text)[0]), torch.tensor(eps), 2e-5)
    last = sample(
        generator.solver(50),
        lambda state, t: generator.predict(network, state, t, condition(text), lengths),
        _drawn(12, *shape),
    )
    close(first(last[0]), torch.tensor(sampled), 1e-4)
    close(first(vae.encode(_drawn(9, 2, 60, 263), lengths)[0][0]), torch.tensor(mean), 2e-5)
    motion = vae.decode(_drawn(10, *shape), lengths, 60)
    close(first(motion[1, 40]), torch.tensor(decoded), 2e-5)
    assert not motion[1, 41:].any()
    student = MLDDenoiser(lcm, lcm.guidance_dim).eval()
    _fill(student)
    guided = student(x, torch.full((2,), 999), text, guidance_embedding(torch.tensor([6.5, 7.0]), 256))
    close(first(guided[0]), torch.tensor(consistency), 2e-5)
