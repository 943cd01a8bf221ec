"""ACMDM against recorded outputs of the published network, auto-encoder and samplers (tiny weights)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from motionrft.core.protocols import GeneratorSpec
from motionrft.core.types import Condition, MotionBatch, Representation, valid_mask
from motionrft.diffusion.denoise import sample
from motionrft.generators.acmdm import ACMDM, ACMDMConfig, ACMDMGenerator, ACMDMLatentConfig, released, released_latent
from motionrft.generators.acmdm_autoencoder import CausalAutoencoder, LatentSpace
from motionrft.generators.acmdm_released import ACMDMReleased
from motionrft.generators.base import Build
from motionrft.representations.normalize import Normalizer
from tests.paths import shared_path

pytestmark = pytest.mark.parity
JOINT = Representation.JOINT
VARIANTS = {
    "raw": ACMDMConfig(layers=2, heads=2, patch=22, text_dim=512),
    "latent": ACMDMLatentConfig(layers=2, heads=1, patch=11, text_dim=512, ae_width=32, ae_depth=3),
}
DOUBLE, SINGLE = (torch.float64, "out64", 1e-9), (torch.float32, "out32", 2e-5)
PRECISIONS = pytest.mark.parametrize(("dtype", "group", "limit"), [DOUBLE, SINGLE], ids=["float64", "float32"])


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(shared_path("golden/acmdm_tiny.npz"), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def tensor(golden: dict, name: str) -> Tensor:
    return torch.from_numpy(golden[name])


def state(golden: dict, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a recorded (B, C, L, J) array in our layout (B, L, J, C)."""
    return tensor(golden, name).permute(0, 2, 3, 1).to(dtype)


def weights(golden: dict, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(a) for k, a in golden.items() if k.startswith(prefix)}


def build(golden: dict, variant: str, dtype: torch.dtype, guidance: float = 3.0) -> ACMDMGenerator:
    spec = GeneratorSpec("acmdm", JOINT, 20.0, 196, "clip", "velocity", 1000, 3.0)
    statistics = Normalizer(torch.zeros(66), torch.ones(66), JOINT)
    if variant == "latent":
        mean, std = tensor(golden, "ae/in/joint_mean"), tensor(golden, "ae/in/joint_std")
        statistics = Normalizer.from_pooled(mean, std, JOINT)
    generator = ACMDMGenerator(Build(spec, statistics, 0, 512), VARIANTS[variant], guidance)
    generator.network.load_state_dict(weights(golden, f"{variant}/sd/"), strict=True)
    if variant == "latent":
        statistics_of_latents = {"mean": tensor(golden, "ae/in/post_mean"), "std": tensor(golden, "ae/in/post_std")}
        own = {f"autoencoder.{k}": t for k, t in weights(golden, "ae/sd/").items()}
        generator.frozen.load_state_dict(own | statistics_of_latents, strict=True)
    generator.network.to(dtype).eval()
    generator.frozen.to(dtype)
    return generator


def text(golden: dict, variant: str) -> Condition:
    pooled = tensor(golden, f"{variant}/in/text")
    return Condition(torch.zeros(3, 1, 0), torch.ones(3, 1, dtype=torch.bool), pooled)


def frames(golden: dict, variant: str) -> Tensor:
    """Return the lengths in motion frames."""
    return tensor(golden, f"{variant}/in/lengths") * (4 if variant == "latent" else 1)


def close(got: Tensor, want: Tensor, limit: float) -> None:
    assert got.shape == want.shape
    error = float((got.double() - want.double()).abs().max())
    assert error < limit, error


@pytest.mark.parametrize("variant", VARIANTS)
@PRECISIONS
@torch.no_grad()
def test_velocities_agree(golden: dict, variant: str, dtype: torch.dtype, group: str, limit: float) -> None:
    generator = build(golden, variant, dtype, guidance=1.0)
    x, t = state(golden, f"{variant}/in/x", dtype), tensor(golden, f"{variant}/in/t")
    lengths, caption = frames(golden, variant), text(golden, variant)

    def velocity(guidance: float, valid: Tensor) -> Tensor:
        generator.guidance = guidance
        return generator.predict(generator.network, x, t, caption, valid)

    everything = torch.full((3,), x.shape[1] * generator.frames_per_state)
    for name, guidance, valid in (
        ("v_cond", 1.0, lengths),
        ("v_uncond", 0.0, lengths),
        ("v_cfg3", 3.0, lengths),
        ("v_nomask", 1.0, everything),
    ):
        close(velocity(guidance, valid), state(golden, f"{variant}/{group}/{name}"), limit)
        if dtype == torch.float32:
            close(velocity(guidance, valid), state(golden, f"{variant}/out64/{name}"), 5e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@PRECISIONS
@torch.no_grad()
def test_embeddings_agree(golden: dict, variant: str, dtype: torch.dtype, group: str, limit: float) -> None:
    network = build(golden, variant, dtype).network
    close(network.embed_time(tensor(golden, f"{variant}/in/t")), tensor(golden, f"{variant}/{group}/t_emb"), limit)
    tokens = network.embed(state(golden, f"{variant}/in/x", dtype))
    if variant == "latent":
        close(tokens, tensor(golden, f"latent/{group}/x_emb"), limit)
    else:
        close(tokens, tensor(golden, "raw/out/x_emb"), 1e-6 if dtype == torch.float64 else 5e-5)
    assert network.base == int(golden[f"{variant}/out/rope_base"][0])


@pytest.mark.parametrize("variant", VARIANTS)
@PRECISIONS
def test_one_step_estimates_and_their_gradients_agree(
    golden: dict, variant: str, dtype: torch.dtype, group: str, limit: float
) -> None:
    generator = build(golden, variant, dtype, guidance=1.0)
    x, t = state(golden, f"{variant}/in/x", dtype).requires_grad_(), tensor(golden, f"{variant}/in/t")
    v = generator.predict(generator.network, x, t, text(golden, variant), frames(golden, variant))
    x1 = x + (1 - t.to(dtype))[:, None, None, None] * v
    close(x1.detach(), state(golden, f"{variant}/{group}/x1hat"), limit)
    (x1 * state(golden, f"{variant}/in/w", dtype)).sum().backward()
    close(x.grad, state(golden, f"{variant}/{group}/grad_x1hat_x"), limit)
    names = [str(n) for n in golden[f"{variant}/names/gradnorm_keys"]]
    own = dict(generator.network.named_parameters())
    assert sorted(names) == sorted(own)
    got, want = torch.stack([own[n].grad.norm() for n in names]), tensor(golden, f"{variant}/{group}/gradnorm_x1hat")
    assert (want > 0).all()
    close((got / want), torch.ones_like(want), 1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@PRECISIONS
@torch.no_grad()
def test_the_training_loss_agrees(
    golden: dict, variant: str, dtype: torch.dtype, group: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = build(golden, variant, dtype)
    valid = tensor(golden, f"{variant}/in/lengths")
    clean = state(golden, f"{variant}/in/x", dtype)
    clean = torch.where(valid_mask(valid, clean.shape[1])[..., None, None], clean, 0.0)
    noise = state(golden, f"{variant}/in/noise", dtype)
    drawn = (tensor(golden, f"{variant}/in/t"), torch.ones(3, dtype=torch.bool), noise)
    monkeypatch.setattr(generator, "draws", lambda *_: drawn)
    seen = []

    def network(*args: Tensor) -> Tensor:
        seen.append(generator.network(*args))
        return seen[-1]

    if variant == "latent":
        monkeypatch.setattr(generator, "encode", lambda *_: clean)
    ids = ("a", "b", "c")
    batch = MotionBatch(
        ids,
        {JOINT: clean.flatten(2)},
        frames(golden, variant),
        20.0,
        ids,
        text(golden, variant),
        torch.full((3,), -1),
        torch.arange(3),
    )
    loss_B, _ = generator.pretrain_loss(network, batch, 0, 0)
    # The published loss is a mean over all valid frames of the batch; ours is one number per clip.
    total = (loss_B * valid).sum() / valid.sum()
    close(total, tensor(golden, f"{variant}/{group}/train_loss"), limit)
    noise = state(golden, f"{variant}/in/noise", dtype)
    per_frame = (seen[0] - (clean - noise)).square().mean((2, 3))
    close(per_frame, tensor(golden, f"{variant}/{group}/train_loss_per_frame"), limit)


def zeroed(golden: dict, variant: str, x: Tensor) -> Tensor:
    mask = valid_mask(tensor(golden, f"{variant}/in/lengths"), x.shape[1])
    return torch.where(mask[..., None, None], x, 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [3, 1])
@PRECISIONS
@torch.no_grad()
def test_euler_samples_agree(
    golden: dict, variant: str, scale: int, dtype: torch.dtype, group: str, limit: float
) -> None:
    generator = build(golden, variant, dtype, float(scale))
    lengths, caption = frames(golden, variant), text(golden, variant)
    final = sample(
        generator.solver(10),
        lambda x, t: generator.predict(generator.network, x, t, caption, lengths),
        state(golden, f"{variant}/in/noise", dtype),
    )
    close(zeroed(golden, variant, final), state(golden, f"{variant}/{group}/euler10_cfg{scale}"), limit)


@pytest.mark.parametrize("variant", VARIANTS)
@PRECISIONS
@torch.no_grad()
def test_samples_of_other_integrators_agree(
    golden: dict, variant: str, dtype: torch.dtype, group: str, limit: float
) -> None:
    # Midpoint and the adaptive sampler are not ours (several network calls per step, and the adaptive one's steps
    # depend on all samples of a batch): they test guided velocities along whole paths.
    generator = build(golden, variant, dtype)
    lengths, caption = frames(golden, variant), text(golden, variant)

    def velocity(t: float, x: Tensor) -> Tensor:
        return generator.predict(generator.network, x, torch.tensor(t, dtype=torch.float64), caption, lengths)

    start = state(golden, f"{variant}/in/noise", dtype)
    x, h = start, 1 / 5
    for i in range(5):
        x = x + h * velocity(i * h + h / 2, x + h / 2 * velocity(i * h, x))
    close(zeroed(golden, variant, x), state(golden, f"{variant}/{group}/midpoint5_cfg3"), limit)

    integrate = pytest.importorskip("scipy.integrate")
    flat = integrate.solve_ivp(
        lambda t, y: velocity(t, torch.from_numpy(y).to(dtype).reshape(start.shape)).flatten().double().numpy(),
        (0.0, 1.0),
        start.flatten().double().numpy(),
        method="RK45",  # Dormand-Prince, error norm over the whole batch
        rtol=1e-3,
        atol=1e-6,
    )
    x = torch.from_numpy(flat.y[:, -1]).reshape(start.shape)
    close(zeroed(golden, variant, x), state(golden, f"{variant}/{group}/dopri5_cfg3"), 5e-3)
    assert abs(flat.nfev - int(golden[f"{variant}/out/dopri5_cfg3_nfe"])) <= 6  # one step: ours ends at t = 1


def autoencoder(golden: dict, dtype: torch.dtype) -> CausalAutoencoder:
    model = CausalAutoencoder(ACMDMLatentConfig(ae_width=32, ae_depth=3)).eval()
    model.load_state_dict(weights(golden, "ae/sd/"), strict=True)
    return model.to(dtype)


@PRECISIONS
def test_autoencoder_agrees(golden: dict, dtype: torch.dtype, group: str, limit: float) -> None:
    model, motion = autoencoder(golden, dtype), tensor(golden, "ae/in/motion").to(dtype)
    loose = 1e-6 if dtype == torch.float64 else 5e-5
    with torch.no_grad():
        z = model.encode(motion)
        close(z, state(golden, f"ae/{group}/z"), limit)
        close(model.encode(motion[:, :35]), state(golden, f"ae/{group}/z_T35"), limit)
        close(model(motion), tensor(golden, "ae/out/recon"), loose)
        close(build(golden, "latent", dtype).space.encode(motion), state(golden, f"ae/{group}/latent_target"), limit)
    query = state(golden, "ae/in/z_query", dtype).requires_grad_()
    decoded = model.decode(query)
    close(decoded.detach(), tensor(golden, f"ae/{group}/decode_query"), limit)
    (decoded * tensor(golden, "ae/in/w").to(dtype)).sum().backward()
    close(query.grad, state(golden, f"ae/{group}/grad_decode_query"), limit)


@torch.no_grad()
def test_decoding_a_sample_to_metres_agrees(golden: dict) -> None:
    generator, lengths = build(golden, "latent", torch.float64), frames(golden, "latent")
    z = state(golden, "latent/out64/euler10_cfg3")
    close(generator.space.decode(z), tensor(golden, "ae/out/decode_sample"), 1e-6)
    joints = generator.decode(z, lengths)
    mask = valid_mask(lengths, 36)
    close(joints[mask], tensor(golden, "ae/out/decode_sample_joints").flatten(2)[mask], 1e-6)
    assert (joints[~mask] == 0).all() and (~mask).any()


def card(name: str) -> dict:
    return json.loads(shared_path(f"golden/keys/acmdm__{name}.json").read_text())


def on_meta(found: dict) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape, _ in found["tensors"]}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize("scale", ["s", "b", "l", "xl"])
@pytest.mark.parametrize("kind", ["raw_22", "latent_22", "latent_11", "latent_2"])
def test_released_key_tables_are_read_without_remainder(scale: str, kind: str) -> None:
    space, patch = kind.split("_")
    listed = card(f"{space}_{scale}_ps{patch}")
    content = {"ema_acmdm": on_meta(listed) | {"clip_model.visual.proj": torch.empty(1)}, "acmdm": {}, "ep": 3}
    files = {"weights": content}
    if space == "latent":
        statistics = {f"latent_{part}": torch.empty(4, device="meta") for part in ("mean", "std")}
        files |= {"autoencoder": {"ae": on_meta(card("ae_2d_causal"))}, **statistics}
    found = ACMDMReleased().read(files, {})
    expected = released(scale.upper(), int(patch)) if space == "raw" else released_latent(scale.upper(), int(patch))
    assert found.model == expected and found.max_frames == 196 and found.guidance == 3.0
    assert set(found.dropped) == {"ema_acmdm.clip_model.visual.proj", "acmdm", "ep"}
    if listed["zoo_name"]:
        assert found.variant == listed["zoo_name"]
    with torch.device("meta"):
        network = ACMDM(22, listed["channels"], listed["max_length"], found.model)
    assert shapes(network.state_dict()) == shapes(dict(found.network)) and len(found.network) == listed["n_tensors"]
    assert sum(p.numel() for p in network.parameters()) == listed["n_values"]
    assert network.base == listed["rope_base"]
    if space == "latent":
        with torch.device("meta"):
            frozen = LatentSpace(found.model)
        assert shapes(frozen.state_dict()) == shapes(dict(found.frozen)) and len(found.frozen) == 66 + 2


@pytest.mark.parametrize(("name", "variational"), [("ae_2d_causal", False), ("vae_2d_causal", True)])
def test_autoencoder_key_tables_agree(name: str, variational: bool) -> None:
    listed = card(name)
    with torch.device("meta"):
        model = CausalAutoencoder(replace(released_latent("S"), variational=variational))
    assert shapes(model.state_dict()) == shapes(on_meta(listed)) and len(model.state_dict()) == listed["n_tensors"]
    assert sum(p.numel() for p in model.parameters()) == listed["n_values"]
