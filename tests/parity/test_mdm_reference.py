"""MDM against recorded outputs of the published network and samplers (tiny weights)."""

from __future__ import annotations

import json
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
from motionrft.diffusion.solvers import ddim_table, ddpm_table
from motionrft.generators import mdm_network
from motionrft.generators.base import Build
from motionrft.generators.mdm import MDM, MDMGenerator
from motionrft.generators.mdm_network import (
    OFFICIAL,
    OFFICIAL_DECODER,
    OFFICIAL_DECODER_TOKENS,
    MDMConfig,
    interleaved_sinusoid,
)
from motionrft.generators.mdm_released import FIXED, MDMReleased
from motionrft.representations.normalize import Normalizer
from tests.paths import shared_path

pytestmark = pytest.mark.parity
VARIANTS = ("enc", "enc_masked", "dec_bert")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(shared_path("golden/mdm_tiny.npz"), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def tensor(golden: dict[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(golden[name])


def build(golden: dict[str, np.ndarray], variant: str) -> MDM:
    holder = "enc" if variant == "enc_masked" else variant
    sizes = json.loads(str(golden["config_json"]))[holder]
    head = f"{holder}/sd/"
    state = {name[len(head) :]: torch.from_numpy(a) for name, a in golden.items() if name.startswith(head)}
    if variant == "mini50":  # of twelve features: no released file has them
        config = replace(OFFICIAL, latent_dim=16, layers=2, ff=32, mask_frames=True)
        state = {name: t for name, t in state.items() if name not in FIXED}
    else:
        args = {"arch": sizes["arch"], "text_encoder_type": sizes["text_encoder_type"], "layers": sizes["layers"]}
        args["mask_frames"] = sizes["mask_frames"] or variant == "enc_masked"
        found = MDMReleased().read({"weights": state, "args": args}, {})
        config, state = found.model, found.network
    assert (config.latent_dim, config.heads, config.ff) == (sizes["latent_dim"], sizes["heads"], sizes["ff_size"])
    network = MDM(sizes["njoints"], config).eval()
    network.load_state_dict(state, strict=True)
    return network


def condition(golden: dict[str, np.ndarray], variant: str, prefix: str = "in/") -> Condition:
    if variant == "dec_bert":
        tokens = tensor(golden, "in/bert_tokens")
        return Condition(tokens, ~tensor(golden, "in/bert_pad"), tokens[:, 0])
    pooled = tensor(golden, f"{prefix}clip")[:, 0]
    return Condition(pooled[:, None], torch.ones(len(pooled), 1, dtype=torch.bool), pooled)


def forward(network: MDM, text: Condition, x: Tensor, t: Tensor, lengths: Tensor, keep: bool = True) -> Tensor:
    keep_B = torch.full((len(x),), keep)
    dtype = network.embed_text.weight.dtype
    return network(x.to(dtype), t, text.tokens_BLD, text.mask_BL, text.pooled_BD, keep_B, lengths)


class Guided(MDMGenerator):
    """The generator's own guidance around any network width."""

    def __init__(self, network: MDM, guidance: float = 2.5) -> None:
        self.network, self.config, self.guidance = network, network.config, guidance
        self.guidance_gradient = "both"


def close(got: Tensor, want: Tensor, mask_BT: Tensor | None, limit: float) -> None:
    if mask_BT is not None:
        got, want = got[mask_BT], want[mask_BT]
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1)
    assert float(error) < limit


def mask_of(golden: dict[str, np.ndarray], network: MDM) -> Tensor | None:
    return tensor(golden, "in/mask") if network.config.mask_frames else None


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_forwards_with_and_without_caption_and_guidance_agree(golden: dict, variant: str) -> None:
    network = build(golden, variant)
    text, mask = condition(golden, variant), mask_of(golden, network)
    x, t, lengths = (tensor(golden, f"in/{n}") for n in ("x", "t", "lengths"))
    close(forward(network, text, x, t, lengths), tensor(golden, f"{variant}/out/x0_cond"), mask, 5e-6)
    close(forward(network, text, x, t, lengths, keep=False), tensor(golden, f"{variant}/out/x0_uncond"), mask, 5e-6)
    guided = Guided(network).predict(network, x, t, text, lengths)
    close(guided, tensor(golden, f"{variant}/out/x0_cfg"), mask, 5e-6)


@pytest.mark.parametrize("variant", ["enc", "dec_bert"])
@torch.no_grad()
def test_time_and_text_embeddings_agree(golden: dict, variant: str) -> None:
    network, text = build(golden, variant), condition(golden, variant)
    waves = interleaved_sinusoid(tensor(golden, "in/t"), 32)
    close(network.embed_timestep["time_embed"](waves), tensor(golden, f"{variant}/out/time_emb"), None, 5e-6)
    features = text.tokens_BLD if variant == "dec_bert" else text.pooled_BD[:, None]
    close(network.embed_text(features), tensor(golden, f"{variant}/out/text_emb"), None, 5e-6)
    assert torch.equal(network.embed_text.bias, tensor(golden, f"{variant}/out/text_emb_null"))


@pytest.mark.parametrize(("own_table", "limit"), [(True, 1e-6), (False, 1e-9)])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_double_precision_forwards_agree(
    golden: dict, variant: str, own_table: bool, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build(golden, variant).double()
    text = condition(golden, variant)
    if not own_table:  # the published sinusoid was rounded on the way; with it everything else is exact
        holder = "dec_bert" if variant == "dec_bert" else "enc"
        table = tensor(golden, f"{holder}/sd/sequence_pos_encoder.pe")[:, 0]
        monkeypatch.setattr(mdm_network, "interleaved_sinusoid", lambda places, width: table[places])
    x, t, lengths = (tensor(golden, f"in/{n}") for n in ("x", "t", "lengths"))
    valid = tensor(golden, "in/mask")[1] if network.config.mask_frames else slice(None)
    for keep, name in ((True, "cond"), (False, "uncond")):
        got = forward(network, text, x, t, lengths, keep)[1]
        close(got[valid], tensor(golden, f"{variant}/out64/x0_{name}_sample1")[valid], None, limit)


def chain(golden: dict, variant: str, network: MDM, table: SolverTable) -> list:
    text, lengths, noise = condition(golden, variant), tensor(golden, "in/lengths"), tensor(golden, "in/noise")
    guided = Guided(network)
    steps = denoise(
        table,
        [SAMPLE] * len(table),
        lambda x, t: guided.predict(network, x, t, text, lengths),
        tensor(golden, "in/x_T"),
        lambda i: noise[i],
    )
    return list(steps)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_respaced_ancestral_chains_agree(golden: dict, variant: str) -> None:
    network = build(golden, variant)
    mask = mask_of(golden, network)
    table = ddpm_table(alpha_bars("cosine", 50), spaced_timesteps(50, 5), "x0")
    steps = chain(golden, variant, network, table)
    close(steps[0].x_prev, tensor(golden, f"{variant}/out/respaced5_x1"), mask, 3e-5)
    close(steps[-1].x_prev, tensor(golden, f"{variant}/out/respaced5_final"), mask, 3e-5)
    if variant == "enc":
        for step, want in zip(steps, tensor(golden, "enc/out/respaced5_x0"), strict=True):
            close(step.x0_hat, want, mask, 3e-5)
        timesteps = spaced_timesteps(1000, 5)
        assert timesteps.tolist() == golden["enc/out/respaced5_of_1000_timesteps"].tolist()
        steps = chain(golden, variant, network, ddpm_table(alpha_bars("cosine", 1000), timesteps, "x0"))
        close(steps[-1].x_prev, tensor(golden, "enc/out/respaced5_of_1000_final"), mask, 3e-5)
    if variant == "enc_masked":
        steps = chain(golden, variant, network, ddim_table(alpha_bars("cosine", 50), spaced_timesteps(50, 5), "x0"))
        close(steps[-1].x_prev, tensor(golden, "enc_masked/out/ddim5_final"), mask, 3e-5)


@torch.no_grad()
def test_the_whole_fifty_step_chain_agrees(golden: dict) -> None:
    network = build(golden, "mini50")
    text, lengths = condition(golden, "mini50", "mini50/in/"), tensor(golden, "mini50/in/lengths")
    mask = torch.arange(12)[None] < lengths[:, None]
    noise, guided = tensor(golden, "mini50/in/noise"), Guided(network)
    ab = alpha_bars("cosine", 50)

    def run(count: int) -> list:
        table = ddpm_table(ab, spaced_timesteps(50, count), "x0")
        return list(
            denoise(
                table,
                [SAMPLE] * count,
                lambda x, t: guided.predict(network, x, t, text, lengths),
                tensor(golden, "mini50/in/x_T"),
                lambda i: noise[i],
            )
        )

    steps = run(50)
    for i, step in enumerate(steps):
        close(step.x_prev, tensor(golden, "mini50/out/x")[i + 1], mask, 3e-5)
        close(step.x0_hat, tensor(golden, "mini50/out/x0")[i], mask, 3e-5)
    for i, step in enumerate(run(10)):
        close(step.x_prev, tensor(golden, "mini50/out/respaced10_x")[i + 1], mask, 3e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_agree(golden: dict, variant: str) -> None:
    network = build(golden, variant)
    text, mask = condition(golden, variant), tensor(golden, "in/mask")
    x = tensor(golden, "in/x").clone().requires_grad_()
    guided = Guided(network).predict(network, x, tensor(golden, "in/t"), text, tensor(golden, "in/lengths"))
    loss = (guided * tensor(golden, "in/x_T"))[mask].sum() / mask.sum()
    loss.backward()
    close(loss.detach(), tensor(golden, f"{variant}/out/grad_loss"), None, 1e-4)
    close(x.grad, tensor(golden, f"{variant}/out/grad_x"), None, 1e-4)
    names = [str(n) for n in golden[f"{variant}/names/grad_params"]]
    params = dict(network.named_parameters())
    assert sorted(names) == sorted(params)
    norms = torch.stack([params[n].grad.norm() for n in names])
    close(norms, tensor(golden, f"{variant}/out/grad_norms"), None, 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_forward_process_and_training_error_agree(golden: dict, variant: str) -> None:
    network = build(golden, variant)
    clean, t, mask = tensor(golden, "in/x"), tensor(golden, "in/t"), tensor(golden, "in/mask")
    x_t = add_noise(clean, tensor(golden, "in/x_T"), alpha_bars("cosine", 50)[t])
    close(x_t, tensor(golden, "out/train_x_t"), None, 1e-6)
    out = forward(network, condition(golden, variant), x_t, t, tensor(golden, "in/lengths"))
    error = torch.where(mask, (out - clean).square().mean(-1), 0.0).sum(1) / mask.sum(1)
    close(error, tensor(golden, f"{variant}/out/train_loss"), None, 1e-5)


@pytest.mark.parametrize("count", [50, 1000])
def test_cosine_schedule_agrees(golden: dict, count: int) -> None:
    def want(name: str) -> Tensor:
        return tensor(golden, f"sched/cosine{count}/{name}")

    ab = alpha_bars("cosine", count)
    close(betas("cosine", count), want("betas"), None, 1e-11)
    close(ab, want("alphas_cumprod"), None, 1e-11)
    close(torch.cat([torch.ones(1).double(), ab[:-1]]), want("alphas_cumprod_prev"), None, 1e-11)
    p, q = x0_coefficients(ab, "eps")
    close(p, want("sqrt_recip_alphas_cumprod"), None, 1e-11)
    close(-q, want("sqrt_recipm1_alphas_cumprod"), None, 1e-11)


@pytest.mark.parametrize(
    ("train", "count"), [(50, 5), (50, 10), (50, 25), (50, 50), (1000, 5), (1000, 50), (1000, 1000)]
)
def test_posterior_tables_agree(golden: dict, train: int, count: int) -> None:
    timesteps, ab = spaced_timesteps(train, count), alpha_bars("cosine", train)
    table = ddpm_table(ab, timesteps, "x0")
    name = f"sched/cosine{train}" + (f"_to_{count}" if count != train else "")
    visited = ab[timesteps].flip(0)
    if count != train:
        assert timesteps.flip(0).tolist() == golden[f"{name}/timestep_map"].tolist()
        close(visited, tensor(golden, f"{name}/alphas_cumprod"), None, 1e-11)
        before = torch.cat([torch.ones(1).double(), visited[:-1]])
        close(1 - visited / before, tensor(golden, f"{name}/betas"), None, 1e-11)
    close(table.b.flip(0), tensor(golden, f"{name}/posterior_mean_coef1"), None, 1e-11)
    close(table.a.flip(0), tensor(golden, f"{name}/posterior_mean_coef2"), None, 1e-11)
    variance = table.c.square().flip(0)
    close(variance, tensor(golden, f"{name}/posterior_variance"), None, 1e-11)
    clipped = torch.cat([variance[1:2], variance[1:]]).log()  # the first is 0: published code repeats the second
    close(clipped, tensor(golden, f"{name}/posterior_log_variance_clipped"), None, 1e-11)


def test_position_table_agrees(golden: dict) -> None:
    got = interleaved_sinusoid(torch.from_numpy(golden["ref/pe_rows"]), 512)
    close(got, tensor(golden, "ref/pe_512"), None, 3e-4)  # float32 sines of up to 5000


RELEASES = {
    "humanml_enc_50steps": OFFICIAL,
    "humanml_enc_1000steps": OFFICIAL,
    "humanml_dec_1000steps": OFFICIAL_DECODER,
    "humanml_dec_bert_50steps": OFFICIAL_DECODER_TOKENS,
    "kit_enc_1000steps": OFFICIAL,
}


@pytest.mark.parametrize(("name", "config"), RELEASES.items())
def test_released_files_become_the_published_variants_and_are_written_back(name: str, config: MDMConfig) -> None:
    card = json.loads(shared_path(f"golden/keys/mdm__{name}.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, shape, _ in card["tensors"]}
    content: dict = tensors
    if card["tensor_root"]:
        content = {"model_avg": tensors, "model": {}}
    args = {key: value for key, value in card["config"].items() if key not in ("mask_frames", "use_ema", "njoints")}
    if "mask_frames" in card["config"]:  # as expected of the file
        args |= {"mask_frames": True, "use_ema": True}
    found = MDMReleased().read({"weights": content, "args": args}, {})
    assert found.model == config
    assert (found.train_steps, found.sampling_steps) == (args["diffusion_steps"],) * 2
    assert (found.max_frames, found.guidance, found.solver) == (196, 2.5, "ddpm")
    assert found.fps == (12.5 if "kit" in name else 20.0)
    bert = args["text_encoder_type"] == "bert"
    assert found.text_encoder.split(":")[0] == ("distilbert" if bert else "clip-mdm")
    assert (found.token_dim, found.pooled_dim) == ((768, 0) if bert else (0, 512))
    assert set(found.dropped) == {*FIXED, *({"model"} if card["tensor_root"] else ())}

    features = card["config"]["njoints"]
    statistics = Normalizer(torch.zeros(features), torch.ones(features), Representation.KINEMATIC)
    spec = GeneratorSpec("mdm", Representation.KINEMATIC, 20.0, 196, "text", "x0", found.train_steps, 2.5)
    with torch.device("meta"):
        network = MDM(features, found.model)
    assert {k: v.shape for k, v in found.network.items()} == {k: v.shape for k, v in network.state_dict().items()}
    build = Build(spec, statistics, found.token_dim, found.pooled_dim, "ddpm")
    made = MDMGenerator(build, found.model, network=network)
    network.to_empty(device="cpu")
    files = MDMReleased().write(made)
    written = files["model000000000.pt"]
    assert {k: list(v.shape) for k, v in written.items()} == {key: shape for key, shape, _ in card["tensors"]}
    assert len(written) == card["n_tensors"]
    assert sum(v.numel() for v in written.values()) == card["n_values"]
    asked = {key: value for key, value in args.items() if key in files["args.json"] and key != "use_ema"}
    assert asked and asked.items() <= files["args.json"].items()


def test_official_config_is_the_published_one(golden: dict) -> None:
    spec = GeneratorSpec("mdm", Representation.KINEMATIC, 20.0, 196, "clip", "x0", 50, 2.5)
    statistics = Normalizer(torch.zeros(263), torch.ones(263), Representation.KINEMATIC)
    with torch.device("meta"):
        network = MDM(263, OFFICIAL)
    generator = MDMGenerator(Build(spec, statistics, 512, 512, "ddpm"), OFFICIAL, network=network)
    assert generator.state_shape(60) == (196, 263)  # no frame mask: always the full length
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 17.88
    assert len(generator.solver(50)) == 50
