"""MotionDiffuse against recorded outputs of the published network and sampler (tiny weights)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from motionrft.core.protocols import GeneratorSpec, SolverTable
from motionrft.core.types import Condition, Representation
from motionrft.diffusion.denoise import SAMPLE, denoise
from motionrft.diffusion.prediction import add_noise, x0_coefficients
from motionrft.diffusion.schedules import alpha_bars, betas, spaced_timesteps
from motionrft.diffusion.solvers import ddpm_table
from motionrft.generators import motiondiffuse_network
from motionrft.generators.base import Build
from motionrft.generators.motiondiffuse import OFFICIAL, MotionDiffuse, MotionDiffuseConfig, MotionDiffuseGenerator
from motionrft.generators.motiondiffuse_network import TEXT_TOWER
from motionrft.generators.motiondiffuse_released import MotionDiffuseReleased, clip_names
from motionrft.nn.embeddings import time_sinusoid
from motionrft.representations.normalize import Normalizer
from tests.paths import shared_path

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(shared_path("golden/motiondiffuse_tiny.npz"), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def tensor(golden: dict[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(golden[name])


def build(golden: dict[str, np.ndarray], part: str = "main") -> MotionDiffuse:
    sizes = json.loads(str(golden["config_json"]))[part]
    head = "sd/" if part == "main" else f"{part}/sd/"
    config = MotionDiffuseConfig(
        latent_dim=sizes["latent_dim"],
        layers=sizes["num_layers"],
        heads=sizes["num_heads"],
        ff=sizes["ff_size"],
        text_dim=512,
        text_width=sizes["text_latent_dim"],
        text_layers=sizes["num_text_layers"],
        text_heads=sizes["text_num_heads"],
        text_ff=sizes["text_ff_size"],
        positions=sizes["num_frames"],
        target="noise",
    )
    assert sizes["time_embed_dim"] == 4 * config.latent_dim
    network = MotionDiffuse(sizes["input_feats"], config).eval()
    state = {name[len(head) :]: torch.from_numpy(a) for name, a in golden.items() if name.startswith(head)}
    network.load_state_dict(state, strict=True)
    return network


def end_of_text(golden: dict[str, np.ndarray]) -> list[int]:
    return golden["in/token_ids"].argmax(1).tolist()


def condition(golden: dict[str, np.ndarray]) -> Condition:
    """Return the tokens rolled so that the end-of-text token, which the published code looks up, is the last one."""
    tokens = tensor(golden, "in/clip_tokens")
    rolled = torch.stack([row.roll(76 - end, 0) for row, end in zip(tokens, end_of_text(golden), strict=True)])
    return Condition(rolled, torch.ones(2, 77, dtype=torch.bool), torch.zeros(2, 0))


def forward(network: MotionDiffuse, text: Condition, x: Tensor, t: Tensor, lengths: Tensor) -> Tensor:
    keep_B = torch.ones(len(x), dtype=torch.bool)
    return network(x, t, text.tokens_BLD, text.mask_BL, text.pooled_BD, keep_B, lengths)


def close(got: Tensor, want: Tensor, mask: Tensor | None, limit: float) -> None:
    if mask is not None:
        got, want = got[mask], want[mask]
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1)
    assert float(error) < limit


def unrolled(golden: dict[str, np.ndarray], text_BLU: Tensor) -> Tensor:
    return torch.stack([row.roll(end - 76, 0) for row, end in zip(text_BLU, end_of_text(golden), strict=True)])


@torch.no_grad()
def test_text_tower_and_time_agree(golden: dict) -> None:
    network, text = build(golden), condition(golden)
    assert end_of_text(golden) == [8, 11]
    summary, tokens = network.encode_text(text.tokens_BLD, text.mask_BL)
    close(summary, tensor(golden, "out/xf_proj"), None, 5e-6)
    close(unrolled(golden, tokens), tensor(golden, "out/xf_out"), None, 5e-6)
    t = tensor(golden, "in/t")
    close(time_sinusoid(t, 32).float(), tensor(golden, "out/time_sinusoid"), None, 1e-4)
    close(network.embed_time(t) + summary, tensor(golden, "out/emb"), None, 5e-6)


@torch.no_grad()
def test_predicted_noise_and_clean_estimate_agree(golden: dict) -> None:
    network, text, mask = build(golden), condition(golden), tensor(golden, "in/mask")
    x, t, lengths = (tensor(golden, f"in/{n}") for n in ("x", "t", "lengths"))
    eps = forward(network, text, x, t, lengths)
    close(eps, tensor(golden, "out/eps"), mask, 5e-6)
    p, q = x0_coefficients(alpha_bars("linear", 1000)[t], "eps")
    x0 = p[:, None, None] * x + q[:, None, None] * eps
    close(x0, tensor(golden, "out/x0"), mask, 5e-6)


@pytest.mark.parametrize(("own_waves", "limit"), [(True, 2e-5), (False, 1e-9)])
@torch.no_grad()
def test_double_precision_agrees(golden: dict, own_waves: bool, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network, text = build(golden).double(), condition(golden)
    if not own_waves:  # the published sinusoid is single precision; with it everything else is exact
        waves = tensor(golden, "out/time_sinusoid")
        monkeypatch.setattr(motiondiffuse_network, "time_sinusoid", lambda t, size: waves)
    summary, tokens = network.encode_text(text.tokens_BLD.double(), text.mask_BL)
    close(summary, tensor(golden, "out64/xf_proj"), None, 1e-9)
    close(unrolled(golden, tokens)[1, :12], tensor(golden, "out64/xf_out_sample1_first12"), None, 1e-9)
    x, t, lengths = (tensor(golden, f"in/{n}") for n in ("x", "t", "lengths"))
    eps = forward(network, text, x.double(), t, lengths)[1]
    close(eps, tensor(golden, "out64/eps_sample1"), tensor(golden, "in/mask")[1], limit)


@torch.no_grad()
def test_order_of_the_other_tokens_does_not_matter(golden: dict) -> None:
    network, text, mask = build(golden), condition(golden), tensor(golden, "in/mask")
    x, t, lengths = (tensor(golden, f"in/{n}") for n in ("x", "t", "lengths"))
    tokens = torch.cat([text.tokens_BLD[:, :-1].flip(1), text.tokens_BLD[:, -1:]], dim=1)
    flipped = forward(network, replace(text, tokens_BLD=tokens), x, t, lengths)
    close(flipped, tensor(golden, "out/eps"), mask, 5e-6)
    unmoved = forward(network, replace(text, tokens_BLD=tensor(golden, "in/clip_tokens")), x, t, lengths)
    assert (unmoved - flipped)[mask].abs().max() > 0.1  # the last one does


def rows(table: SolverTable, start: int, stop: int) -> SolverTable:
    columns = {name: getattr(table, name)[start:stop] for name in ("model_time", "a", "b", "c", "p", "q")}
    return SolverTable(**columns, noise_level=table.noise_level[start : stop + 1])


def chain(
    table: SolverTable, predict: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, noise: Tensor
) -> list[tuple[Tensor, Tensor]]:
    steps = denoise(table, [SAMPLE] * len(table), predict, x_T, lambda i: noise[i])
    return [(step.x_prev, step.x0_hat) for step in steps]


@torch.no_grad()
def test_chains_agree(golden: dict) -> None:
    network, text, mask = build(golden), condition(golden), tensor(golden, "in/mask")
    lengths, x_T = tensor(golden, "in/lengths"), tensor(golden, "in/x_T")
    noise = torch.cat([tensor(golden, "in/noise"), tensor(golden, "in/noise_extra")])
    statistics = Normalizer(torch.zeros(263), torch.ones(263), Representation.KINEMATIC)
    spec = GeneratorSpec("motiondiffuse", Representation.KINEMATIC, 20.0, 196, "clip", "eps", 1000, 1.0)
    generator = MotionDiffuseGenerator(Build(spec, statistics, 512, 0), network.config, network=network)

    def run(table: SolverTable) -> list[tuple[Tensor, Tensor]]:
        return chain(table, lambda x, t: generator.predict(network, x, t, text, lengths), x_T, noise)

    whole = generator.solver(1000)
    first = run(rows(whole, 0, 5))
    close(first[0][0], tensor(golden, "out/first5_x1"), mask, 3e-5)
    close(first[4][0], tensor(golden, "out/first5_x5"), mask, 3e-5)
    close(run(rows(whole, 995, 1000))[4][0], tensor(golden, "out/last5_final"), mask, 3e-5)
    table = generator.solver(5)
    assert table.model_time.tolist() == golden["out/respaced5_timesteps"].tolist()
    steps = run(table)
    close(steps[0][0], tensor(golden, "out/respaced5_x1"), mask, 3e-5)
    close(steps[4][0], tensor(golden, "out/respaced5_final"), mask, 3e-5)


@torch.no_grad()
def test_the_whole_fifty_step_chain_agrees(golden: dict) -> None:
    network = build(golden, "mini50")
    lengths, x_T, noise, summary, tokens = (
        tensor(golden, f"mini50/in/{n}") for n in ("lengths", "x_T", "noise", "xf_proj", "xf_out")
    )
    mask, text_mask = torch.arange(12)[None] < lengths[:, None], torch.ones(2, 77, dtype=torch.bool)
    timesteps = spaced_timesteps(1000, 50)
    assert timesteps.tolist() == golden["mini50/out/timesteps"].tolist()
    table = ddpm_table(alpha_bars("linear", 1000), timesteps, "eps")
    steps = chain(table, lambda x, t: network.denoise(x, t.expand(2), summary, tokens, text_mask, lengths), x_T, noise)
    assert torch.equal(tensor(golden, "mini50/out/x")[0], x_T)
    for i, (x, x0) in enumerate(steps):
        close(x, tensor(golden, "mini50/out/x")[i + 1], mask, 3e-5)
        close(x0, tensor(golden, "mini50/out/x0")[i], mask, 3e-5)


@torch.no_grad()
def test_training_error_agrees(golden: dict) -> None:
    network, mask = build(golden), tensor(golden, "in/mask")
    clean, noise, t = tensor(golden, "in/x_T"), tensor(golden, "in/noise")[0], tensor(golden, "in/t")
    x_t = add_noise(clean, noise, alpha_bars("linear", 1000)[t])
    error_BT = (forward(network, condition(golden), x_t, t, tensor(golden, "in/lengths")) - noise).square().mean(-1)
    close(error_BT, tensor(golden, "out/train_mse_per_frame"), mask, 5e-6)
    close(error_BT[mask].mean(), tensor(golden, "out/train_loss"), None, 5e-6)


def test_gradients_agree(golden: dict) -> None:
    network, mask = build(golden), tensor(golden, "in/mask")
    x = tensor(golden, "in/x").clone().requires_grad_()
    eps = forward(network, condition(golden), x, tensor(golden, "in/t"), tensor(golden, "in/lengths"))
    loss = (eps * tensor(golden, "in/x_T"))[mask].sum() / mask.sum()
    loss.backward()
    close(loss.detach(), tensor(golden, "out/grad_loss"), None, 1e-4)
    close(x.grad, tensor(golden, "out/grad_x"), None, 1e-4)
    names = [str(n) for n in golden["names/grad_params"]]
    params = dict(network.named_parameters())
    assert sorted(names) == sorted(n for n in params if not n.startswith(TEXT_TOWER))
    norms = torch.stack([params[n].grad.norm() for n in names])
    close(norms, tensor(golden, "out/grad_norms"), None, 1e-4)
    assert all(p.grad.norm() > 0 for p in params.values())  # the tower's too


@pytest.mark.parametrize("count", [5, 50, 1000])
def test_schedules_agree(golden: dict, count: int) -> None:
    def want(part: str) -> Tensor:
        return tensor(golden, f"{name}/{part}")

    name = "sched/linear1000" + (f"_to_{count}" if count != 1000 else "")
    ab = alpha_bars("linear", 1000)
    timesteps = spaced_timesteps(1000, count)
    visited = ab[timesteps].flip(0)
    before = torch.cat([torch.ones(1).double(), visited[:-1]])
    table = ddpm_table(ab, timesteps, "x0")
    close(visited, want("alphas_cumprod"), None, 1e-11)
    close(1 - visited / before, want("betas"), None, 1e-11)
    close(table.b.flip(0), want("posterior_mean_coef1"), None, 1e-11)
    close(table.a.flip(0), want("posterior_mean_coef2"), None, 1e-11)
    variance = table.c.square().flip(0)
    close(variance, want("posterior_variance"), None, 1e-11)
    clipped = torch.cat([variance[1:2], variance[1:]]).log()  # the first is 0: published code repeats the second
    close(clipped, want("posterior_log_variance_clipped"), None, 1e-11)
    if count != 1000:
        assert timesteps.flip(0).tolist() == golden[f"{name}/timestep_map"].tolist()
        return
    close(betas("linear", 1000), want("betas"), None, 1e-11)
    close(before, want("alphas_cumprod_prev"), None, 1e-11)
    p, q = x0_coefficients(ab, "eps")
    close(p, want("sqrt_recip_alphas_cumprod"), None, 1e-11)
    close(-q, want("sqrt_recipm1_alphas_cumprod"), None, 1e-11)


@pytest.mark.parametrize("name", ["t2m", "kit"])
def test_released_files_become_the_published_model_and_are_written_back(name: str) -> None:
    card = json.loads(shared_path(f"golden/keys/motiondiffuse__{name}.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, shape, _ in card["tensors"]}
    features = card["config"]["input_feats"]
    mean, std = torch.randn(features), torch.rand(features) + 0.5
    weights = {"encoder": tensors, "opt_encoder": {}, "ep": 50, "total_it": 1}
    found = MotionDiffuseReleased().read({"weights": weights, "mean": mean, "std": std}, {})
    assert found.model == OFFICIAL
    assert (found.text_encoder, found.token_dim) == ("clip-tokens:openai/clip-vit-base-patch32", 512)
    assert (found.max_frames, found.train_steps, found.sampling_steps) == (196, 1000, 1000)
    assert found.fps == (20.0 if name == "t2m" else 12.5)
    clip = {key for key in tensors if key.startswith("clip.")}
    assert set(found.dropped) == clip | {"opt_encoder", "ep", "total_it"} and len(clip) == 302
    assert set(clip_names()) == clip

    with torch.device("meta"):
        network = MotionDiffuse(features, found.model)
    own = {key: tuple(t.shape) for key, t in tensors.items() if key not in clip}
    assert {key: tuple(t.shape) for key, t in found.network.items()} == own
    assert {key: tuple(t.shape) for key, t in network.state_dict().items()} == own and len(own) == 383
    count = sum(t.numel() for t in network.state_dict().values())
    assert count == card["n_values"] - sum(tensors[key].numel() for key in clip)
    assert round(count / 1e6, 2) == (87.15 if name == "t2m" else 87.14)

    spec = GeneratorSpec("motiondiffuse", Representation.KINEMATIC, found.fps, 196, "text", "eps", 1000, 1.0)
    statistics = Normalizer(mean, std, Representation.KINEMATIC)
    generator = MotionDiffuseGenerator(Build(spec, statistics, 512, 0), found.model, network=network)
    network.to_empty(device="cpu")
    files = MotionDiffuseReleased().write(generator)
    assert set(files["model/latest.tar"]) == set(card["top_level"])
    written = files["model/latest.tar"]["encoder"]
    assert {key: tuple(t.shape) for key, t in written.items()} == own
    assert torch.equal(files["meta/mean.npy"], mean) and torch.equal(files["meta/std.npy"], std)
    listed = files["model/not_included.txt"]
    assert all(f"{key}\n" in listed for key in clip)
