"""MLD and MotionLCM without reference data: what padding, batch, noise, guidance and time may and may not change."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError
from motionrft.core.protocols import MotionGenerator
from motionrft.core.types import MotionBatch, Representation, valid_mask
from motionrft.generators.mld import OFFICIAL, LatentGenerator, MLDConfig
from motionrft.generators.mld_network import MLDDenoiser
from motionrft.generators.motionlcm import LCM_V2, MotionLCMConfig
from motionrft.generators.registry import (
    GeneratorConfig,
    TextSide,
    build_generator,
    generator_card,
    generator_from_card,
)
from motionrft.generators.sampling import generate
from motionrft.representations.kinematic import kinematic_to_joints
from motionrft.representations.normalize import Normalizer
from tests.latent_fixtures import KIND, SMALL, SMALL_LCM, batch_of, build_of, condition, small_lcm, small_mld

MAKERS = {"mld": small_mld, "mld in groups": partial(small_mld, frames_per_token=3), "motionlcm": small_lcm}


@pytest.fixture(params=MAKERS)
def generator(request: pytest.FixtureRequest) -> LatentGenerator:
    found = MAKERS[request.param]()
    found.latents.scale.fill_(0.7)
    return found


def motions(generator: LatentGenerator, batch: MotionBatch, seed: int = 3, **settings: int) -> Tensor:
    return generate(generator, None, batch.text, batch.lengths_B, batch.keys_B, 4, seed, **settings)


def test_a_state_is_the_same_for_every_length(generator: LatentGenerator) -> None:
    assert isinstance(generator, MotionGenerator)
    assert generator.state_shape(1) == generator.state_shape(60) == (2, 8)
    with pytest.raises(ConfigError, match="1 to 60 frames"):
        generator.state_shape(61)
    batch, x = batch_of(), torch.randn(4, 2, 8)
    outs = [
        generator.predict(generator.network, x, torch.tensor(321), batch.text, lengths)
        for lengths in (batch.lengths_B, batch.lengths_B + 20)
    ]
    assert torch.equal(*outs)


def test_sampling_does_not_depend_on_batch_split_order_or_padding(generator: LatentGenerator) -> None:
    batch = batch_of()
    whole = motions(generator, batch)
    assert whole.shape == (4, 16, 263)
    torch.testing.assert_close(motions(generator, batch, batch_size=2), whole, rtol=1e-4, atol=1e-4)
    alone = motions(generator, batch.slice(2, 3))
    torch.testing.assert_close(alone, whole[2:3, :7], rtol=1e-4, atol=1e-4)
    for row, length in enumerate(batch.lengths_B.tolist()):
        assert (whole[row, length:] == 0).all() and (whole[row, :length] != 0).any()
    assert (motions(generator, batch, seed=4) - whole).abs().max() > 1e-2
    other = replace(batch, text=condition(batch.text.pooled_BD.flip(0)))
    assert (motions(generator, other) - whole).abs().max() > 1e-2


@torch.no_grad()
def test_autoencoder_ignores_what_lies_beyond_a_clip(generator: LatentGenerator) -> None:
    batch, vae = batch_of(), generator.latents.vae
    x, lengths = batch.motions[KIND], batch.lengths_B
    mean, logvar = vae.encode(x, lengths)
    padded = torch.cat([x, torch.zeros(4, 5, 263)], dim=1)
    padded = torch.where(valid_mask(lengths, 21)[..., None], padded, 1e3)
    for got, want in zip(vae.encode(padded, lengths), (mean, logvar), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    longer = vae.decode(mean, lengths, 21)
    assert (longer[~valid_mask(lengths, 21)] == 0).all()
    torch.testing.assert_close(longer[:, :16], vae.decode(mean, lengths, 16), rtol=1e-5, atol=1e-5)
    single = vae.decode(mean[2:3], lengths[2:3], 7)
    torch.testing.assert_close(single, longer[2:3, :7], rtol=1e-5, atol=1e-5)


def test_decoding_is_differentiable_and_leaves_the_autoencoder_alone(generator: LatentGenerator) -> None:
    batch = batch_of()
    state = torch.randn(4, 2, 8, requires_grad=True)
    motion = generator.decode(state, batch.lengths_B)
    assert motion.shape == (4, 16, 263) and motion.dtype == torch.float32
    motion.square().sum().backward()
    assert (state.grad.abs().amax((1, 2)) > 1e-6).all()
    assert all(p.grad is None and not p.requires_grad for p in generator.frozen.parameters())
    assert not generator.latents.vae.training


def test_scale_cancels_between_encoding_and_decoding() -> None:
    generator, batch = small_mld(), batch_of()
    motion, lengths = batch.motions[KIND], batch.lengths_B
    plain = generator.encode(motion, lengths)
    decoded = generator.decode(plain, lengths)
    generator.latents.scale.fill_(3.0)
    scaled = generator.encode(motion, lengths)
    torch.testing.assert_close(scaled, 3 * plain)
    torch.testing.assert_close(generator.decode(scaled, lengths), decoded, rtol=1e-4, atol=1e-5)
    noise = torch.randn(4, 2, 8)
    sampled = generator.encode(motion, lengths, noise)
    _, logvar = generator.latents.vae.encode(motion, lengths)
    torch.testing.assert_close(sampled - scaled, 3 * (0.5 * logvar).exp() * noise, rtol=1e-4, atol=1e-5)


def test_a_finished_autoencoder_gets_the_scale_of_unit_variance() -> None:
    generator, batches = small_mld(), [batch_of(seed=seed) for seed in range(40)]
    torch.nn.init.normal_(generator.latents.vae.latent_pre.weight, std=0.3)
    generator.finish("generator", batches)
    assert float(generator.latents.scale) == 1.0
    generator.finish("autoencoder", batches)
    states = torch.cat([generator.sampled_states(batch, i) for i, batch in enumerate(batches)])
    assert float(states.std()) == pytest.approx(1.0, abs=0.1) and float(generator.latents.scale) < 0.9
    other = small_mld(scale_latents=False)
    other.finish("autoencoder", batches)
    assert float(other.latents.scale) == 1.0


@torch.no_grad()
def test_mld_guides_away_from_the_empty_caption_in_one_call() -> None:
    generator, batch, x = small_mld(), batch_of(), torch.randn(4, 2, 8)
    calls = []

    def network(*args: Tensor) -> Tensor:
        calls.append(len(args[0]))
        return generator.network(*args)

    outs = {}
    for scale in (0.0, 1.0, 7.5):
        generator.guidance = scale
        outs[scale] = generator.predict(network, x, torch.tensor(7), batch.text, batch.lengths_B)
    assert calls == [8, 4, 8]
    torch.testing.assert_close(outs[7.5], outs[0.0] + 7.5 * (outs[1.0] - outs[0.0]), rtol=1e-4, atol=1e-4)
    generator.guidance = 1.0
    empty = condition(generator.latents.null.expand(4, -1))
    blind = generator.predict(network, x, torch.tensor(7), empty, batch.lengths_B)
    torch.testing.assert_close(outs[0.0], blind, rtol=1e-5, atol=1e-5)
    assert (outs[1.0] - blind).abs().max() > 1e-2


@torch.no_grad()
def test_consistency_models_take_guidance_as_an_input_in_one_call() -> None:
    generator, batch, x = small_lcm(), batch_of(), torch.randn(4, 2, 8)
    calls = []

    def network(*args: Tensor) -> Tensor:
        calls.append(len(args[0]))
        return generator.network(*args)

    def run(t: Tensor) -> Tensor:
        return generator.predict(network, x, t, batch.text, batch.lengths_B)

    own = run(torch.tensor(40))
    assert torch.equal(run(torch.full((4,), 40)), own)
    assert torch.equal(run(torch.tensor([[40.0, 7.5]], dtype=torch.float64)), own)
    assert (run(torch.tensor([[40.0, 8.5]])) - own).abs().max() > 1e-3
    mixed = run(torch.tensor([[40.0, 7.5], [40.0, 8.5], [40.0, 7.5], [9.0, 7.5]], dtype=torch.float64))
    torch.testing.assert_close(mixed[[0, 2]], own[[0, 2]])
    assert (mixed - own).abs().amax((1, 2))[[1, 3]].min() > 1e-3
    assert calls == [4] * 5
    generator.guidance = 8.5
    assert generator.solver(3).model_time.tolist() == [[[999.0, 8.5]], [[679.0, 8.5]], [[339.0, 8.5]]]


def test_positions_start_smooth_or_uniform() -> None:
    smooth, uniform = (small_mld(smooth_positions=flag).network.query_pos.pe.detach()[:, 0] for flag in (True, False))
    assert smooth.shape == uniform.shape == (500, 16)
    assert (smooth[1:] - smooth[:-1]).norm(dim=1).max() < (uniform[1:] - uniform[:-1]).norm(dim=1).mean()
    assert smooth.min() < 0 and 0 <= uniform.min() and uniform.max() < 1


def test_a_denoiser_refuses_missing_or_unwanted_guidance() -> None:
    x, t, text = torch.zeros(1, 2, 8), torch.tensor([3]), torch.zeros(1, 12)
    with pytest.raises(ValueError, match="guidance"):
        MLDDenoiser(SMALL, guidance_dim=8)(x, t, text)
    with pytest.raises(ValueError, match="guidance"):
        MLDDenoiser(SMALL)(x, t, text, torch.zeros(1, 8))


def test_scalar_and_row_times_are_the_same() -> None:
    generator, batch, x = small_mld(), batch_of(), torch.randn(4, 2, 8)
    outs = [
        generator.predict(generator.network, x, t, batch.text, batch.lengths_B)
        for t in (torch.tensor(40), torch.full((4,), 40))
    ]
    assert torch.equal(*outs)


def test_text_gain_is_the_same_as_larger_text_weights() -> None:
    x, t, text = torch.randn(1, 2, 8), torch.tensor([3]), torch.randn(1, 12)
    loud, plain = (small_mld(text_gain=gain, text_relu=True).network for gain in (3.0, 1.0))
    assert not torch.allclose(loud(x, t, text), plain(x, t, text), atol=1e-3)
    with torch.no_grad():
        plain.emb_proj[1].weight.mul_(3.0)
    torch.testing.assert_close(loud(x, t, text), plain(x, t, text), rtol=1e-4, atol=1e-5)


def test_low_precision_keeps_times_and_guidance_apart() -> None:
    generator = small_lcm()
    network = generator.network.to(torch.bfloat16)

    def engine(*args: Tensor) -> Tensor:  # what engines of low precision do with their inputs
        return network(*(a.to(torch.bfloat16) if a.is_floating_point() else a for a in args)).float()

    batch, x = batch_of(), torch.randn(4, 2, 8)
    rows = [torch.tensor([[t, w]], dtype=torch.float64) for t, w in ((998.0, 7.5), (999.0, 7.5), (999.0, 7.51))]
    outs = [generator.predict(engine, x, row, batch.text, batch.lengths_B) for row in rows]
    assert (outs[0] != outs[1]).any() and (outs[1] != outs[2]).any()
    exact = small_lcm().predict(small_lcm().network, x, rows[1], batch.text, batch.lengths_B)
    assert (outs[1] - exact).abs().max() < 0.1 * exact.abs().max()


# --------------------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("stage", ["autoencoder", "generator", "distill"])
def test_losses_of_a_clip_do_not_depend_on_batch_or_padding(stage: str) -> None:
    teacher, batch = small_mld(), batch_of()
    generator = small_lcm() if stage == "distill" else teacher
    training = generator.training(stage, teacher)
    training.network.eval()

    def loss(part: MotionBatch, step: int = 4) -> Tensor:
        return training.loss(training.network, part, step, 2)[0]

    whole = loss(batch)
    assert whole.shape == (4,)
    parts = torch.cat([loss(batch.slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)
    longer = torch.nn.functional.pad(batch.motions[KIND], (0, 0, 0, 4), value=9.0)
    torch.testing.assert_close(loss(replace(batch, motions={KIND: longer})), whole, rtol=1e-3, atol=1e-5)
    assert (loss(batch, step=5) != whole).all()


def test_a_perfect_denoiser_has_no_loss() -> None:
    generator, batch = small_mld(), batch_of()
    z = generator.sampled_states(batch, 0, "pretrain", 0)

    def perfect(x: Tensor, t_B: Tensor, text_BC: Tensor) -> Tensor:
        ab = generator.alpha_bar[t_B].float()[:, None, None]
        return (x - ab.sqrt() * z) / (1 - ab).sqrt()

    loss, metrics = generator.pretrain_loss(perfect, batch, 0, 0)
    assert float(loss.max()) < 1e-6
    assert float(metrics["loss/noise"]) == pytest.approx(float(loss.mean()))


def test_captions_are_dropped_at_the_configured_rate() -> None:
    generator, batch = small_mld(text_dropout=0.3), batch_of()
    empty: list[float] = []

    def network(x: Tensor, t_B: Tensor, text_BC: Tensor) -> Tensor:
        empty.extend((text_BC == generator.latents.null).all(1).float().tolist())
        return torch.zeros_like(x)

    for step in range(200):
        generator.pretrain_loss(network, batch, step, seed=0)
    assert sum(empty) / len(empty) == pytest.approx(0.3, abs=0.05)


def test_the_autoencoder_is_judged_by_features_joints_and_divergence() -> None:
    generator, batch = small_mld(joint_weight=2.0, kl_weight=0.5), batch_of()
    x, zeros = batch.motions[KIND], torch.zeros(4, 2, 8)
    loss, _ = generator.autoencoder_loss(lambda *_: (x, zeros, zeros), batch, 0, 0)
    assert float(loss.abs().max()) < 1e-6
    shifted, _ = generator.autoencoder_loss(lambda *_: (x, zeros + 2.0, zeros), batch, 0, 0)
    torch.testing.assert_close(shifted, torch.full((4,), 0.5 * 2.0))
    higher = x.clone()
    higher[..., 3] += 0.5  # root height: one feature, and the height of the root joint alone
    _, parts = generator.autoencoder_loss(lambda *_: (higher, zeros, zeros), batch, 0, 0)
    assert float(parts["loss/features"]) == pytest.approx(0.125 / 263, rel=1e-4)
    change = (kinematic_to_joints(higher) - kinematic_to_joints(x)).abs().sum((2, 3))
    torch.testing.assert_close(change, torch.full((4, 16), 0.5), rtol=1e-3, atol=1e-3)
    assert float(parts["loss/joints"]) == pytest.approx(0.125 / 66, rel=1e-3)


def test_the_other_skeleton_has_its_own_width() -> None:
    teacher, batch = small_mld(features=251), batch_of(features=251)
    assert teacher.decode(torch.randn(4, 2, 8), batch.lengths_B).shape == (4, 16, 251)
    for stage in ("autoencoder", "generator"):
        training = teacher.training(stage)
        assert training.loss(training.network, batch, 0, 0)[0].isfinite().all()
    training = small_lcm(features=251).training("distill", teacher)
    assert training.loss(training.network, batch, 0, 0)[0].isfinite().all()


# -------------------------------------------------------------------------------------------------------- cards, errors


@pytest.mark.parametrize("config", [SMALL, SMALL_LCM], ids=["mld", "motionlcm"])
def test_a_card_rebuilds_the_generator_with_its_frozen_parts(config: MLDConfig | MotionLCMConfig) -> None:
    text = TextSide("stub", 7, 12, condition(torch.randn(1, 12)) if config.needs_null else None)
    statistics = Normalizer(torch.randn(263), torch.rand(263) + 0.5, KIND)
    settings = GeneratorConfig(model=replace(config, text_dim=1), max_frames=24, guidance=3.0)
    first = build_generator(settings, statistics, text, 20.0)
    card = json.loads(json.dumps(generator_card(settings, statistics, text, 20.0)))
    found, second = generator_from_card(card, statistics)
    assert found == settings and second.spec == first.spec and second.guidance == 3.0
    second.network.load_state_dict(first.network.state_dict(), strict=True)
    second.frozen.load_state_dict(first.frozen.state_dict(), strict=True)
    batch = batch_of()
    assert torch.equal(motions(first, batch), motions(second, batch))


def test_impossible_settings_are_refused_with_their_names() -> None:
    with pytest.raises(ConfigError, match=r"mld: .*layers must be odd.*heads 3"):
        MLDConfig(layers=4, heads=3)
    with pytest.raises(ConfigError, match=r"motionlcm: .*latent_tokens.*grid_points"):
        MotionLCMConfig(latent_tokens=0, grid_points=0)
    with pytest.raises(ConfigError, match="at most 56 frames"):
        small_mld(positions=60)
    small_mld(positions=14, frames_per_token=6)
    with pytest.raises(ConfigError, match="at most 54 frames"):
        small_mld(positions=13, frames_per_token=6)
    with pytest.raises(ConfigError, match="sampling=tuned"):
        build = build_of("motionlcm", 12)
        type(small_lcm())(replace(build, spec=replace(build.spec, train_steps=500)), LCM_V2)
    with pytest.raises(ConfigError, match="1 to 50 denoising steps"):
        small_lcm().solver(51)
    with pytest.raises(ConfigError, match=r"\(1, 2, 4\)"):
        small_lcm(sampling="tuned").solver(8)
    with pytest.raises(ConfigError, match="joint"):
        GeneratorConfig(model=OFFICIAL).representation(Representation.JOINT.value)


def test_stages_and_teachers_that_do_not_fit_are_refused() -> None:
    student, teacher = small_lcm(), small_mld()
    with pytest.raises(ConfigError, match="distill"):
        student.training("generator")
    with pytest.raises(ConfigError, match="distill"):
        student.pretrain_loss(student.network, batch_of(), 0, 0)
    with pytest.raises(ConfigError, match="autoencoder"):
        teacher.training("distill", teacher)
    with pytest.raises(ConfigError, match=r"family .mld.; got none"):
        student.training("distill")
    with pytest.raises(ConfigError, match="family 'motionlcm'"):
        student.training("distill", small_lcm())
    with pytest.raises(ConfigError, match=r"width 16; got width 32"):
        student.training("distill", small_mld(width=32))
    foreign = small_mld()
    foreign.normalizer = Normalizer(torch.ones(263), torch.ones(263), KIND)
    with pytest.raises(ConfigError, match="statistics"):
        student.training("distill", foreign)
