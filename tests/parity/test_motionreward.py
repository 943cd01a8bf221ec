"""MotionReward against recorded outputs of the reference code (scaled-down network, random weights)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from motionrft.core.types import Condition, valid_mask
from motionrft.reward import losses
from motionrft.reward.adapters import AdaptedTower
from motionrft.reward.backbone import build_backbone
from motionrft.reward.checkpoint_keys import adapter_rules, backbone_rules, from_released, to_released
from motionrft.reward.config import AdapterConfig, MotionRewardConfig
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.noise import add_noise, alpha_bar, mix
from motionrft.reward.objectives import alignment_terms, reconstruction
from tests.paths import shared_path

pytestmark = pytest.mark.parity

REPRESENTATIONS = {"kinematic": "263", "joint": "22x3", "rotation": "135"}
ADAPTERS = {"preference": "critic", "authenticity": "authenticity"}
CONFIG = MotionRewardConfig(
    unified_dim=32,
    latent_dim=16,
    num_layers=3,
    decoder_layers=3,
    num_heads=4,
    text_heads=4,
    ff_dim=64,
    proj_hidden=32,
    proj_layers=2,
    text_time=True,
    time_token="none_when_clean",
)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
DTYPES = [pytest.param(torch.float64, id="fp64"), pytest.param(torch.float32, id="fp32")]


class Identity:
    """The recorded motions are normalised already."""

    def normalise(self, x: Tensor) -> Tensor:
        return x


class Golden:
    """Recorded arrays and the two networks holding the recorded weights, in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.arrays = np.load(shared_path("golden/motionreward_tiny.npz"), allow_pickle=False)
        self.backbone = build_backbone(CONFIG, seed=0)
        self.backbone.load_state_dict(from_released(self.group("sd/"), backbone_rules(CONFIG), "golden"))
        self.backbone.to(dtype).eval()
        self.adapted = AdaptedTower(self.backbone.motion, AdapterConfig(rank=4, alpha=10.0), seed=0)
        for name, theirs in ADAPTERS.items():
            state = from_released(self.group(f"lora/{theirs}/"), adapter_rules(CONFIG, name), "golden")
            state |= {f"head/{k}": v for k, v in self.group(f"head/{theirs}/").items()}
            self.adapted.load_adapter(name, state, self.adapted.backbone_fingerprint)
        self.adapted.to(dtype)
        self.lengths = torch.from_numpy(self.arrays["in/lengths"])
        self.t = torch.from_numpy(self.arrays["in/t"])
        self.tokens = torch.from_numpy(self.arrays["in/text_tokens"]).to(dtype)
        self.text_mask = valid_mask(torch.from_numpy(self.arrays["in/text_lengths"]), self.tokens.shape[1])

    def group(self, prefix: str) -> dict[str, Tensor]:
        names = [n for n in self.arrays.files if n.startswith(prefix)]
        return {n.removeprefix(prefix): torch.from_numpy(self.arrays[n]) for n in names}

    def motion(self, name: str) -> Tensor:
        motion = torch.from_numpy(self.arrays[f"in/motion_{REPRESENTATIONS[name]}"]).to(self.dtype)
        return motion.flatten(2) if name == "joint" else motion

    def expect(self, name: str, got: Tensor, tolerance: float | None = None) -> None:
        key = f"out64/{name}" if f"out64/{name}" in self.arrays.files else f"out/{name}"
        want = torch.from_numpy(np.asarray(self.arrays[key], dtype=np.float64)).reshape(got.shape)
        gap = float((got.detach().double() - want).abs().max())
        limit = TOLERANCE[self.dtype] if tolerance is None else tolerance
        assert gap <= limit, f"{key}: difference {gap:.3g} > {limit:.3g}"

    def text(self, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.backbone.text(self.tokens, self.text_mask, t)


@pytest.fixture(scope="module", params=DTYPES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def golden64() -> Golden:
    return Golden(torch.float64)


@pytest.fixture(scope="module")
def golden32() -> Golden:
    return Golden(torch.float32)


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_posteriors_equal_the_recorded_ones_with_and_without_time_and_adapters(golden: Golden, name: str) -> None:
    r, x = REPRESENTATIONS[name], golden.motion(name)
    for suffix, t in (("", None), ("_t", golden.t)):
        for adapter, group in ((None, "enc"), ("preference", "enc_critic"), ("authenticity", "enc_auth")):
            with golden.adapted.using(adapter) as tower:
                mu, logvar = tower(x, golden.lengths, name, t)
            golden.expect(f"{group}{suffix}/{r}_mu", mu)
            golden.expect(f"{group}{suffix}/{r}_logvar", logvar)
            mu, logvar = golden.adapted.merged(adapter)(x, golden.lengths, name, t)
            golden.expect(f"{group}{suffix}/{r}_mu", mu)
            golden.expect(f"{group}{suffix}/{r}_logvar", logvar)


def test_scalar_time_is_expanded_to_the_batch(golden: Golden) -> None:
    mu, logvar = golden.backbone.motion(golden.motion("kinematic"), golden.lengths, "kinematic", torch.tensor(7))
    golden.expect("enc_tscalar7/263_mu", mu)
    golden.expect("enc_tscalar7/263_logvar", logvar)


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_projection_and_full_sequence_equal_the_recorded_ones_on_valid_frames(golden: Golden, name: str) -> None:
    r, x = REPRESENTATIONS[name], golden.motion(name)
    tower = golden.backbone.motion
    tokens, mask = tower.project(x, golden.lengths, name)
    states = tower.hidden(tokens, mask)
    full = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
    limit = 5e-7 if golden.dtype == torch.float64 else 2e-5
    for key, got, valid in (("proj", tokens, mask), ("seq", states, full)):
        want = torch.from_numpy(golden.arrays[f"out/enc/{r}_{key}"]).to(got.dtype)
        gap = float(((got - want) * valid[..., None]).abs().max())
        assert gap <= limit, f"{key}: {gap:.3g}"


def test_text_posterior_equals_the_recorded_one(golden: Golden) -> None:
    for suffix, t in (("", None), ("_t", golden.t)):
        mu, logvar = golden.text(t)
        golden.expect(f"text{suffix}/mu", mu)
        golden.expect(f"text{suffix}/logvar", logvar)


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_decoder_equals_the_recorded_one_and_is_zero_beyond_the_length(golden: Golden, name: str) -> None:
    r, x = REPRESENTATIONS[name], golden.motion(name)
    limit = 5e-7 if golden.dtype == torch.float64 else 5e-5
    latents = {"motion": golden.backbone.motion(x, golden.lengths, name)[0], "text": golden.text()[0]}
    for source, z in latents.items():
        motion = golden.backbone.decoder(z, golden.lengths, x.shape[1], name)
        golden.expect(f"dec/{r}_from_{source}", motion, limit)
        assert (motion[~valid_mask(golden.lengths, x.shape[1])] == 0).all()


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_scores_under_noise_equal_the_recorded_ones(golden: Golden, name: str) -> None:
    r, x = REPRESENTATIONS[name], golden.motion(name)
    reference, _ = golden.backbone.motion(x.flip(0), golden.lengths.flip(0), name)
    for group, t in (("reward", None), ("reward_t", golden.t)):
        mu, _ = golden.backbone.motion(x, golden.lengths, name, t)
        semantic, similarity = losses.cosine(mu, golden.text()[0]), losses.cosine(mu, reference)
        critic = golden.adapted("preference", x, golden.lengths, name, t)[:, 0]
        logits = golden.adapted("authenticity", x, golden.lengths, name, t)
        real = torch.sigmoid(logits[:, 0] - logits[:, 1])
        golden.expect(f"{group}/semantic_{r}", semantic)
        golden.expect(f"{group}/m2m_{r}", similarity)
        golden.expect(f"{group}/critic_{r}", critic)
        golden.expect(f"{group}/logits_{r}", logits)
        golden.expect(f"{group}/preal_{r}", real)
        golden.expect(f"{group}/combined_paper_{r}", semantic + 0.002 * critic + 0.002 * real + similarity)
    padded = golden.adapted("preference", x, torch.full((3,), 40), name)[:, 0]
    golden.expect(f"reward/critic_padded_{r}", padded)


@pytest.mark.parametrize("frozen", [False, True], ids=["adapters", "folded"])
def test_motion_reward_terms_equal_the_recorded_ones(golden32: Golden, frozen: bool) -> None:
    reward = MotionReward(golden32.backbone, dict.fromkeys(REPRESENTATIONS, Identity()), golden32.adapted)
    if frozen:
        reward.freeze_for_scoring()
    text = reward.encode_text(Condition(golden32.tokens, golden32.text_mask, golden32.tokens[:, 0]))
    weights = {"semantic": 1.0, "preference": 0.002, "authenticity": 0.002, "similarity": 1.0}
    for name, r in REPRESENTATIONS.items():
        x = golden32.motion(name)
        target = reward.embed(x.flip(0), golden32.lengths.flip(0), name)
        terms = reward.score(x, golden32.lengths, name, text_BE=text, target_BE=target, terms=list(weights))
        for term, key in (
            ("semantic",) * 2,
            ("preference", "critic"),
            ("authenticity", "preal"),
            ("similarity", "m2m"),
        ):
            golden32.expect(f"reward/{key}_{r}", terms.values[term])
        golden32.expect(f"reward/combined_paper_{r}", terms.total(weights))


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_gradients_of_the_scores_equal_the_recorded_ones(golden: Golden, name: str) -> None:
    r, text = REPRESENTATIONS[name], golden.text()[0].detach()
    for group, t in (("grad", None), ("grad_t", golden.t)):
        if group == "grad_t" and name != "kinematic":
            continue
        for term in ("semantic", "critic", "preal"):
            x = golden.motion(name).requires_grad_()
            if term == "semantic":
                score = losses.cosine(golden.backbone.motion(x, golden.lengths, name, t)[0], text)
            elif term == "critic":
                score = golden.adapted("preference", x, golden.lengths, name, t)
            else:
                score = golden.adapted("authenticity", x, golden.lengths, name, t).softmax(-1)[:, 0]
            (grad,) = torch.autograd.grad(score.sum(), x)
            scale = float(np.abs(golden.arrays[f"out/{group}/{term}_{r}"]).max())
            golden.expect(f"{group}/{term}_{r}", grad, 5e-7 if golden.dtype == torch.float64 else 1e-5 * scale)
            assert (grad[~valid_mask(golden.lengths, x.shape[1])] == 0).all()


def stage1_terms(golden: Golden, name: str, t: Tensor | None, sampled: bool) -> dict[str, Tensor]:
    """Return the reference's stage-1 terms from this project's pieces."""
    r, x, num_frames = REPRESENTATIONS[name], golden.motion(name), 40
    motion, text = golden.backbone.motion(x, golden.lengths, name, t), golden.text()
    z, z_text = motion[0], text[0]
    if sampled:
        z = z + torch.exp(0.5 * motion[1]) * torch.from_numpy(golden.arrays[f"in/eps_motion_{r}"])
        z_text = z_text + torch.exp(0.5 * text[1]) * torch.from_numpy(golden.arrays["in/eps_text"])
    from_motion, from_text = (golden.backbone.decoder(v, golden.lengths, num_frames, name) for v in (z, z_text))
    sentence = torch.from_numpy(golden.arrays["in/sentence_emb"]).to(golden.dtype)
    blocked = losses.blocked_negatives(3, sentence, 0.9)
    terms = {
        "rec_text": losses.smooth_l1(from_text, x),
        "rec_motion": losses.smooth_l1(from_motion, x),
        "rec_cross": losses.smooth_l1(from_motion, from_text),
        "rec": reconstruction(x, from_motion, from_text, None),
        "kl_text_motion": losses.gaussian_kl(*text, *motion),
        "kl_motion_text": losses.gaussian_kl(*motion, *text),
        "kl_motion_prior": losses.kl_to_prior(*motion),
        "kl_text_prior": losses.kl_to_prior(*text),
        "lat": losses.smooth_l1(z, z_text),
        "cl": losses.info_nce(z_text, z, 0.1, blocked),
        "cl_nofilter": losses.info_nce(z_text, z, 0.1),
    }
    terms = {k: v.mean() for k, v in terms.items()}
    terms["kl"] = sum(terms[k] for k in ("kl_text_motion", "kl_motion_text", "kl_motion_prior", "kl_text_prior"))
    terms["total"] = terms["rec"] + 1e-5 * terms["kl"] + 1e-5 * terms["lat"] + 0.1 * terms["cl"]
    return terms


@pytest.mark.parametrize("sampled", [False, True], ids=["means", "samples"])
@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_stage1_losses_equal_the_recorded_ones(golden: Golden, name: str, sampled: bool) -> None:
    for suffix, t in (("", None), ("_t", golden.t)):
        for key, value in stage1_terms(golden, name, t, sampled).items():
            golden.expect(f"{'loss_eps' if sampled else 'loss'}/{REPRESENTATIONS[name]}{suffix}/{key}", value)


def test_cross_representation_alignment_equals_the_recorded_pairs(golden: Golden) -> None:
    posteriors = {n: golden.backbone.motion(golden.motion(n), golden.lengths, n) for n in REPRESENTATIONS}
    totals = {}
    for a, b in itertools.combinations(REPRESENTATIONS, 2):
        z_a, z_b = posteriors[a][0], posteriors[b][0]
        lat, kl = alignment_terms(posteriors[a], posteriors[b], z_a, z_b, "jeffreys")
        cl = losses.info_nce(z_a, z_b, 0.1).mean()
        pair = f"cra/{REPRESENTATIONS[a]}_{REPRESENTATIONS[b]}"
        totals[a, b] = 0.1 * lat + 1e-5 * kl + 0.1 * cl
        for key, value in (("lat", lat), ("kl", kl), ("cl", cl), ("total", totals[a, b])):
            golden.expect(f"{pair}/{key}", value)
    golden.expect("cra/upstream_two_repr", totals["kinematic", "joint"])
    golden.expect("cra/upstream_three_repr", totals["kinematic", "joint"] + totals["kinematic", "rotation"])


def adapter_step(golden: Golden, adapter: str, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the training loss of an adapter stage and what else was recorded of it."""
    x, decoder = golden.motion(name), golden.backbone.decoder
    if adapter == "preference":
        motions, lengths = [x, 0.5 * x.flip(0)], torch.full((3,), 40)
    else:
        motions, lengths = [x], golden.lengths
    outputs, aux = [], x.new_zeros(())
    for motion in motions:
        with golden.adapted.using(adapter) as tower:
            mu, logvar = tower(motion, lengths, name)
        outputs.append(golden.adapted.heads[adapter](mu))
        aux = aux + losses.smooth_l1(decoder(mu, lengths, 40, name), motion).mean()
        aux = aux + 1e-5 * losses.kl_to_prior(mu, logvar).mean()
    if adapter == "preference":
        scores = torch.cat(outputs, dim=1)
        per_pair = losses.preference_loss(scores[:, 0], scores[:, 1])
        accuracy = losses.preference_accuracy(scores[:, 0], scores[:, 1])
        recorded = {"scores": scores, "loss_per_pair": per_pair, "loss": per_pair.mean(), "acc": accuracy}
        return per_pair.mean(), recorded | {"aux_loss": aux}
    labels = torch.from_numpy(golden.arrays["in/auth_labels"])
    loss = losses.authenticity_loss(outputs[0], labels).mean()
    return loss, {"logits": outputs[0], "ce": loss, "aux_loss": aux}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_adapter_training_losses_equal_the_recorded_ones(golden: Golden, name: str, adapter: str) -> None:
    group = "pair" if adapter == "preference" else "auth"
    _, recorded = adapter_step(golden, adapter, name)
    for key, value in recorded.items():
        golden.expect(f"{group}_{REPRESENTATIONS[name]}/{key}", value)


def assert_gradient_norms(golden: Golden, key: str, names: list[str], grads: dict[str, Tensor]) -> None:
    got = np.array([float(grads[n].norm()) for n in names])
    want = golden.arrays[f"out64/gradnorm/{key}"]
    gap = np.abs(got - want) - 1e-9 * np.abs(want)
    assert gap.max() <= 1e-12, f"{key}: {names[int(gap.argmax())]} off by {gap.max():.3g}"


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_stage1_gradient_norms_equal_the_recorded_ones(name: str) -> None:
    golden = Golden(torch.float64)
    golden.backbone.requires_grad_(True)  # the adapted tower froze what it shares
    stage1_terms(golden, name, golden.t, sampled=False)["total"].backward()
    parameters = dict(golden.backbone.named_parameters())
    state = golden.backbone.state_dict()
    ours = {n: parameters[n].grad if n in parameters else None for n in state}
    filled = {n: torch.zeros_like(state[n]) if g is None else g for n, g in ours.items()}
    grads = to_released(filled, backbone_rules(CONFIG))
    names = golden.arrays["names/gradnorm_keys/stage1"].tolist()
    assert_gradient_norms(golden, f"stage1_{REPRESENTATIONS[name]}_t", names, grads)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_adapter_gradient_norms_equal_the_recorded_ones(name: str, adapter: str) -> None:
    golden, theirs, r = Golden(torch.float64), ADAPTERS[adapter], REPRESENTATIONS[name]
    golden.adapted.trainable(adapter, tuple(REPRESENTATIONS))
    adapter_step(golden, adapter, name)[0].backward()
    state = {}
    for path, parameter in golden.adapted.tower.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if path.endswith(f".{adapter}.weight"):
            state["adapter/" + path.replace(f".{adapter}.weight", ".weight")] = grad
        else:
            assert parameter.grad is None, f"{path} is frozen but got a gradient"
    lora = to_released(state, adapter_rules(CONFIG, adapter))
    head = {n: p.grad for n, p in golden.adapted.heads[adapter].named_parameters()}
    names = golden.arrays[f"names/gradnorm_keys/{theirs}_lora"].tolist()
    assert_gradient_norms(golden, f"{theirs}_lora_{r}", names, lora)
    assert_gradient_norms(golden, f"{theirs}_head_{r}", golden.arrays["names/gradnorm_keys/head"].tolist(), head)


def test_noising_with_the_recorded_schedule_equals_the_recorded_example(golden64: Golden) -> None:
    x0, eps, t, want, shares = (golden64.group("noise/")[k] for k in ("x0", "eps", "t", "xt", "alphas_cumprod"))
    assert float((mix(x0, eps, shares[t]) - want).abs().max()) < 1e-6


def test_schedule_equals_the_recorded_one_up_to_its_single_precision(golden64: Golden) -> None:
    # The recording accumulated its schedule in float32 (off by up to 4.7e-7); here it is float64. Through the square
    # roots that is 1.4e-6 in the noisy example.
    x0, eps, t, want, shares = (golden64.group("noise/")[k] for k in ("x0", "eps", "t", "xt", "alphas_cumprod"))
    assert float((alpha_bar() - shares).abs().max()) < 1e-6
    assert float((add_noise(x0, eps, t) - want).abs().max()) < 2e-6


def test_export_gives_back_the_recorded_tensors_bit_for_bit(golden32: Golden) -> None:
    back = to_released(golden32.backbone.state_dict(), backbone_rules(CONFIG))
    want = golden32.group("sd/")
    assert back.keys() == want.keys()
    assert all(torch.equal(back[n], want[n]) for n in want)
