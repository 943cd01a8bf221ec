"""The ACMDM family without reference data: layout, causality, independence from padding and batch, keyed draws."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.protocols import MotionGenerator
from motionrft.core.types import valid_mask
from motionrft.generators.acmdm import ACMDM, ACMDMConfig, ACMDMGenerator, ACMDMLatentConfig, released, released_latent
from motionrft.generators.acmdm_autoencoder import CausalAutoencoder
from motionrft.generators.acmdm_network import hidden_width, rotary_angles, rotary_base
from motionrft.generators.base import Build
from motionrft.generators.lora import adapter_for, add_adapter
from motionrft.generators.registry import (
    FAMILIES,
    GeneratorConfig,
    TextSide,
    build_generator,
    generator_card,
    generator_from_card,
)
from motionrft.generators.sampling import generate
from motionrft.representations.normalize import Normalizer
from tests.acmdm_fixtures import JOINT, LATENT, MODELS, RAW, SPEC, make, make_batch, randomise, statistics

EACH = pytest.mark.parametrize("name", MODELS)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def per_clip(generator: ACMDMGenerator, value: Tensor, lengths: Tensor) -> list[Tensor]:
    return [value[i, :n] for i, n in enumerate(generator.state_lengths(lengths).tolist())]


# ------------------------------------------------------------------------------------------------------- layout


def test_generators_satisfy_the_protocol_and_states_have_frames_first() -> None:
    raw, latent = make(), make(LATENT)
    assert isinstance(raw, MotionGenerator) and isinstance(latent, MotionGenerator)
    assert raw.state_shape(17) == (17, 22, 3)
    assert [latent.state_shape(n) for n in (16, 17, 20, 24)] == [(4, 22, 4), (5, 22, 4), (5, 22, 4), (6, 22, 4)]
    assert raw.solver(10).model_time.tolist() == [i / 10 for i in range(10)]


@EACH
def test_new_networks_output_exactly_zero(name: str) -> None:
    generator, batch = make(MODELS[name], random_gates=False), make_batch()
    x = draw(2, 5, *generator.state_shape(16))
    out = generator.predict(generator.network, x, torch.tensor(0.3), batch.text, batch.lengths_B)
    assert out.shape == x.shape and (out == 0).all()


@pytest.mark.parametrize("patch", [2, 11, 22])
def test_a_token_is_a_frames_patch_of_neighbouring_joints(patch: int) -> None:
    network = ACMDM(22, 3, 8, replace(RAW, patch=patch))
    randomise(network)
    x = draw(3, 1, 4, 22, 3)
    tokens = network.embed(x)
    changed = x.clone()
    changed[0, 2, patch % 22, 1] += 1.0
    changed[0, 2, 21, 0] += 1.0
    touched = (network.embed(changed) - tokens).abs().amax(2)[0] > 1e-6
    per_frame = 22 // patch
    assert set(touched.nonzero()[:, 0].tolist()) == {2 * per_frame + 1 % per_frame, 3 * per_frame - 1}
    # A last layer that only has one bias, of joint j and channel c of a patch, moves these joints only.
    with torch.no_grad():
        network.final_layer.linear.weight.zero_()
        network.final_layer.linear.bias.zero_()
        network.final_layer.linear.bias[(patch - 1) * 3 + 2] = 1.0
    keep = torch.ones(1, dtype=torch.bool)
    out = network(x, torch.zeros(1), x, keep, torch.zeros(1, 12), keep, torch.tensor([4]))
    want_out = torch.zeros(22, 3)
    want_out[patch - 1 :: patch, 2] = 1.0
    assert torch.equal(out[0], want_out.expand(4, 22, 3))


def test_rotary_bases_and_widths_are_the_published_ones() -> None:
    assert [rotary_base(n) for n in (49, 98, 196, 539)] == [200, 300, 500, 1400]
    assert [hidden_width(64 * n) for n in (8, 12, 16, 20)] == [1365, 2048, 2730, 3413]
    angles = rotary_angles(3, 200)
    assert float(angles[2, 0]) == 2.0 and float(angles[2, 31]) == pytest.approx(2 / 200)  # both ends
    assert float(angles[1, 1]) == pytest.approx(200 ** (-1 / 31))
    assert [make(c).network.base for c in (RAW, LATENT)] == [rotary_base(2 * 24), rotary_base(2 * 6)]


def test_text_gain_is_the_same_as_larger_text_weights() -> None:
    batch, x = make_batch(), draw(8, 5, 16, 22, 3)
    loud, plain = make(replace(RAW, text_gain=3.0)), make()
    outs = [g.predict(g.network, x, torch.tensor(0.5), batch.text, batch.lengths_B) for g in (loud, plain)]
    assert not torch.allclose(*outs, atol=1e-3)
    with torch.no_grad():
        plain.network.y_embedder.weight.mul_(3.0)
    outs[1] = plain.predict(plain.network, x, torch.tensor(0.5), batch.text, batch.lengths_B)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- causality


def encoder_of(seed: int = 0) -> CausalAutoencoder:
    torch.manual_seed(seed)
    return CausalAutoencoder(LATENT).double().eval()


@torch.no_grad()
def test_the_autoencoder_never_looks_ahead_and_cuts_are_exact() -> None:
    model, x = encoder_of(), draw(4, 2, 27, 22, 3).double()
    z = model.encode(x)
    assert z.shape == (2, 6, 22, 4) and model(x).shape == (2, 24, 22, 3)
    for n in range(1, 6):
        torch.testing.assert_close(model.encode(x[:, : 4 * n]), z[:, :n], rtol=0, atol=1e-12)
        torch.testing.assert_close(model.decode(z[:, :n]), model.decode(z)[:, : 4 * n], rtol=0, atol=1e-12)
    for k in range(6):
        for frame in range(4 * k, 4 * k + 4):
            moved = x.clone()
            moved[:, frame] += 1.0
            change = (model.encode(moved) - z).abs().amax((0, 2, 3))
            assert (change[:k] == 0).all() and change[k] > 0
        moved = z.clone()
        moved[:, k] += 1.0
        change = (model.decode(moved) - model.decode(z)).abs().amax((0, 2, 3))
        assert (change[: 4 * k] == 0).all() and change[4 * k] > 0


@torch.no_grad()
def test_joints_are_encoded_by_themselves() -> None:
    model, x = encoder_of(), draw(4, 1, 8, 22, 3).double()
    moved = x.clone()
    moved[:, :, 7] += 1.0
    touched = (model.encode(moved) - model.encode(x)).abs().amax((0, 1, 3)) > 0
    assert touched.nonzero()[:, 0].tolist() == [7]


@torch.no_grad()
def test_lengths_that_are_no_multiple_of_four_fill_the_last_latent_with_the_last_frame() -> None:
    generator, batch = make(LATENT), make_batch()
    state = generator.encode(batch.motions[JOINT], batch.lengths_B)
    assert generator.state_lengths(batch.lengths_B).tolist() == [4, 3, 2, 1, 1]
    for row, length in enumerate(batch.lengths_B.tolist()):
        motion = batch.motions[JOINT][row : row + 1, :length]
        held = torch.cat([motion, motion[:, -1:].expand(-1, -length % 4, -1)], dim=1)
        alone = generator.space.encode(statistics().normalise(held).unflatten(2, (22, 3)))
        torch.testing.assert_close(state[row : row + 1, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------- independence and decoding


@EACH
@torch.no_grad()
def test_padding_content_and_length_do_not_matter(name: str) -> None:
    generator, batch = make(MODELS[name]), make_batch()
    x = draw(2, 5, *generator.state_shape(16))
    first = generator.predict(generator.network, x, torch.tensor(0.4), batch.text, batch.lengths_B)
    padded = torch.cat([x, torch.zeros(5, 2, *x.shape[2:])], dim=1)
    padded[~valid_mask(generator.state_lengths(batch.lengths_B), padded.shape[1])] = 1e3
    second = generator.predict(generator.network, padded, torch.tensor(0.4), batch.text, batch.lengths_B)
    for a, b in zip(per_clip(generator, first, batch.lengths_B), per_clip(generator, second, batch.lengths_B)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert first.abs().max() > 0.1


@EACH
def test_sampling_does_not_depend_on_batch_split_order_or_padding(name: str) -> None:
    generator, batch = make(MODELS[name]), make_batch()
    text, lengths, keys = batch.text, batch.lengths_B, batch.keys_B
    whole = generate(generator, None, text, lengths, keys, 4, seed=3)
    split = generate(generator, generator.network, text, lengths, keys, 4, seed=3, batch_size=2)
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-3)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = generate(generator, None, text.index(order), lengths[order], keys[order], 4, seed=3)
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-3, atol=1e-3)
    assert whole.shape == (5, 16, 66)
    for row, length in enumerate(lengths.tolist()):
        assert (whole[row, length:] == 0).all() and whole[row, :length].abs().max() > 0
    other = generate(generator, None, text, lengths, keys, 4, seed=4)
    assert (other - whole).abs().max() > 1e-2


def test_raw_decode_inverts_encode_and_zeroes_padding() -> None:
    generator, batch = make(), make_batch()
    motion, mask = batch.motions[JOINT], batch.mask_BT
    state = generator.encode(motion, batch.lengths_B).requires_grad_()
    decoded = generator.decode(state, batch.lengths_B)
    torch.testing.assert_close(decoded[mask], motion[mask], rtol=1e-5, atol=1e-5)
    assert (decoded[~mask] == 0).all()
    decoded.sum().backward()
    assert (state.grad[~mask] == 0).all() and (state.grad[mask] != 0).all()


def test_latent_decode_undoes_the_statistics_crops_and_is_differentiable() -> None:
    generator, lengths = make(LATENT), torch.tensor([11, 6])
    state = draw(6, 2, 4, 22, 4).requires_grad_()
    decoded = generator.decode(state, lengths)
    assert decoded.shape == (2, 11, 66) and (decoded[1, 6:] == 0).all()
    z = state.detach() * torch.tensor([0.5, 1.5, 1.0, 0.7]) + torch.tensor([0.1, -0.2, 0.0, 0.3])
    want = statistics().denormalise(generator.space.autoencoder.decode(z).flatten(2))
    torch.testing.assert_close(decoded[0].detach(), want[0, :11])
    decoded.sum().backward()
    reached = state.grad.abs().amax((2, 3)) > 0
    assert reached.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert all(p.grad is None for p in generator.frozen.parameters())


@torch.no_grad()
def test_guidance_combines_both_predictions_and_the_empty_caption_is_zeros() -> None:
    generator, batch = make(), make_batch()
    x, t = draw(7, 5, 16, 22, 3), torch.tensor(0.25)
    outs = {}
    for scale in (0.0, 1.0, 2.5):
        generator.guidance = scale
        outs[scale] = generator.predict(generator.network, x, t, batch.text, batch.lengths_B)
    torch.testing.assert_close(outs[2.5], outs[0.0] + 2.5 * (outs[1.0] - outs[0.0]), rtol=1e-4, atol=1e-4)
    generator.guidance = 1.0
    blind = replace(batch.text, pooled_BD=torch.zeros(5, 12))
    unseen = generator.predict(generator.network, x, t, blind, batch.lengths_B)
    torch.testing.assert_close(unseen, outs[0.0], rtol=1e-4, atol=1e-4)
    assert (outs[0.0] - outs[1.0]).abs().max() > 1e-2


# --------------------------------------------------------------------------------------------------- pre-training


@EACH
def test_pretraining_loss_of_a_clip_does_not_depend_on_batch_or_padding(name: str) -> None:
    generator, batch = make(MODELS[name]), make_batch()
    whole, metrics = generator.pretrain_loss(generator.network, batch, step=4, seed=2)
    parts = [generator.pretrain_loss(generator.network, batch.slice(i, i + 1), step=4, seed=2)[0] for i in range(5)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    longer = torch.nn.functional.pad(batch.motions[JOINT], (0, 0, 0, 5), value=9.0)
    padded, _ = generator.pretrain_loss(generator.network, replace(batch, motions={JOINT: longer}), step=4, seed=2)
    torch.testing.assert_close(padded, whole, rtol=1e-4, atol=1e-5)
    other, _ = generator.pretrain_loss(generator.network, batch, step=5, seed=2)
    assert whole.shape == (5,) and (other != whole).all()
    torch.testing.assert_close(metrics["loss/velocity"], whole.detach().mean())


def test_a_perfect_network_has_no_loss_and_is_asked_on_the_straight_path() -> None:
    generator, batch = make(), make_batch()
    clean = generator.encode(batch.motions[JOINT], batch.lengths_B)
    asked = []

    def perfect(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        asked.append(t)
        return (clean - x) / (1 - t.float())[:, None, None, None]  # the straight line's velocity

    loss, _ = generator.pretrain_loss(perfect, batch, 0, 0)
    assert float(loss.detach().max()) < 1e-6 and len(set(asked[0].tolist())) == 5
    loss, _ = generator.pretrain_loss(lambda x, t, *_: perfect(x, t) + 2.0, batch, 0, 0)
    torch.testing.assert_close(loss, torch.full((5,), 4.0))


def test_captions_are_dropped_at_the_configured_rate() -> None:
    generator, batch = make(replace(RAW, text_dropout=0.3)), make_batch()
    kept = []

    def network(*args: Tensor) -> Tensor:
        kept.append(args[5])
        return torch.zeros_like(args[0])

    for step in range(200):
        generator.pretrain_loss(network, batch, step, seed=0)
    assert 0.65 < float(torch.stack(kept).float().mean()) < 0.75


def train(network: torch.nn.Module, loss_of, steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        loss = loss_of(step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@EACH
def test_training_lowers_the_loss(name: str) -> None:
    generator, batch = make(MODELS[name], random_gates=False), make_batch()
    losses = train(
        generator.network, lambda step: generator.pretrain_loss(generator.network, batch, step, 0)[0], 60, 3e-3
    )
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_the_autoencoder_learns_and_its_latents_are_standardised_afterwards() -> None:
    generator, batch = make(LATENT), make_batch()
    stage = generator.training("autoencoder")
    assert stage.network is generator.space.autoencoder
    stage.network.requires_grad_(True).train()
    losses = train(stage.network, lambda step: stage.loss(stage.network, batch, step, 0)[0], 60, 3e-3)
    assert losses[-1] < 0.7 * losses[0]
    generator.finish("autoencoder", [batch.slice(0, 2), batch.slice(2, 5)])
    assert stage.network.training  # as it was
    generator.frozen.eval()
    state = generator.encode(batch.motions[JOINT], batch.lengths_B)
    rows = torch.cat(per_clip(generator, state, batch.lengths_B)).flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(rows.std(0, unbiased=False), torch.ones(4), rtol=1e-4, atol=0)


def test_reconstruction_error_is_smooth_l1_of_valid_frames() -> None:
    generator, batch = make(LATENT), make_batch()

    def off(by: float) -> Tensor:
        loss, metrics = generator.autoencoder_loss(lambda x: x + by, batch, 0, 0)
        torch.testing.assert_close(metrics["loss/reconstruction"], loss.mean())
        return loss

    torch.testing.assert_close(off(0.5), torch.full((5,), 0.125), rtol=1e-4, atol=0)
    torch.testing.assert_close(off(3.0), torch.full((5,), 2.5), rtol=1e-4, atol=0)

    def wrong_padding(x: Tensor) -> Tensor:
        return torch.where(valid_mask(batch.lengths_B, x.shape[1])[..., None, None], x, 1e3)

    assert float(generator.autoencoder_loss(wrong_padding, batch, 0, 0)[0].max()) == 0.0


@EACH
def test_every_parameter_gets_a_gradient(name: str) -> None:
    generator, batch = make(MODELS[name]), make_batch()
    generator.pretrain_loss(generator.network, batch, 0, 0)[0].sum().backward()
    silent = [n for n, p in generator.network.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert silent == []
    if generator.is_latent:
        stage = generator.training("autoencoder")
        stage.network.requires_grad_(True)
        stage.loss(stage.network, batch, 0, 0)[0].sum().backward()
        silent = [n for n, p in stage.network.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert silent == []


def test_sampling_and_training_forwards_are_the_same_bits() -> None:
    generator, batch, x = make(), make_batch(), draw(9, 5, 16, 22, 3)
    args = (generator.network, x, torch.tensor(0.5), batch.text, batch.lengths_B)
    with torch.no_grad():
        still = generator.predict(*args)
    assert torch.equal(generator.predict(*args).detach(), still)


# ---------------------------------------------------------------------------------------------- cards and refusals


@EACH
def test_a_card_rebuilds_its_generator_and_refuses_other_statistics(name: str) -> None:
    text = TextSide("stub", 0, 12)
    config = GeneratorConfig(model=replace(MODELS[name], text_dim=1), max_frames=24, guidance=2.0)
    first = build_generator(config, statistics(), text, 20.0)
    card = json.loads(json.dumps(generator_card(config, statistics(), text, 20.0)))
    found, second = generator_from_card(card, statistics())
    assert found == config and second.spec == first.spec and type(second.config) is type(MODELS[name])
    second.network.load_state_dict(first.network.state_dict(), strict=True)
    second.frozen.load_state_dict(first.frozen.state_dict(), strict=True)
    with pytest.raises(CheckpointError, match="normaliser"):
        generator_from_card(card, Normalizer(torch.zeros(66), torch.ones(66), JOINT))
    assert FAMILIES["acmdm"] == (ACMDMConfig, ACMDMGenerator)


def test_published_models_have_their_sizes_and_adapter_targets() -> None:
    assert released("XL", 2) == ACMDMConfig(layers=20, heads=20, patch=2, text_dim=512)
    latent = released_latent("S")
    assert (latent.width, latent.ae_width, latent.ae_depth, latent.ae_dropout) == (512, 512, 3, 0.2)
    assert isinstance(latent, ACMDMLatentConfig) and latent.stages == ("autoencoder", "generator")
    assert released("S").stages == ("generator",)
    generator = make()
    names = add_adapter(generator.network, adapter_for(RAW, 2, 4.0))
    parts = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")
    assert set(names) == {f"ACMDMTransformer.{i}.{part}" for i in (0, 1) for part in parts}


def test_latent_models_can_be_chosen_by_name() -> None:
    plain = to_plain(GeneratorConfig(model=LATENT))
    assert from_plain(GeneratorConfig, plain).model == LATENT
    chosen = {"model": {"class_path": "motionrft.generators.acmdm_network.ACMDMConfig", "init_args": {"layers": 3}}}
    assert from_plain(GeneratorConfig, chosen).model == ACMDMConfig(layers=3)


def test_impossible_settings_are_refused_with_their_names() -> None:
    with pytest.raises(ConfigError, match=r"layers.*text_dropout.*text_gain"):
        ACMDMConfig(layers=0, text_dropout=1.0, text_gain=0.0)
    with pytest.raises(ConfigError, match=r"heads.*ae_width.*ae_dropout"):
        ACMDMLatentConfig(heads=0, ae_width=0, ae_dropout=1.0)
    with pytest.raises(ConfigError, match=r"divides 22 joints.*patch"):
        make(replace(RAW, patch=4))
    with pytest.raises(ConfigError, match="solver"):
        ACMDMGenerator(Build(SPEC, statistics(), 12, 12, "ddim"), RAW)
    with pytest.raises(ConfigError, match="frames"):
        make().state_shape(25)
    with pytest.raises(ConfigError, match="stage"):
        make().training("autoencoder")
    with pytest.raises(ConfigError, match="variational"):
        make(replace(LATENT, variational=True)).training("autoencoder")
    with pytest.raises(ConfigError, match="rotation"):
        GeneratorConfig(model=RAW).representation("rotation")


def test_a_variational_encoder_gives_its_mean_as_latent() -> None:
    generator = make(replace(LATENT, variational=True))
    x = draw(3, 1, 8, 22, 3)
    both = generator.space.autoencoder.encoder(x.permute(0, 3, 1, 2))
    assert both.shape[1] == 8
    torch.testing.assert_close(generator.space.autoencoder.encode(x).permute(0, 3, 1, 2), both[:, :4])


def test_a_clean_output_becomes_the_velocity_towards_it() -> None:
    """x + (1 - t) v is what the last layer gives, and a network that gives the clean state has no loss."""
    plain, clean = make(RAW), make(replace(RAW, output="clean", frame_weight=2.0))
    batch = make_batch()
    x = torch.randn(5, 16, 22, 3, generator=torch.Generator().manual_seed(4))
    text, keep = batch.prompt, torch.ones(5, dtype=torch.bool)
    t_B = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9])
    raw = plain.call(plain.network, x, t_B, text, keep, batch.lengths_B)
    velocity = clean.call(clean.network, x, t_B, text, keep, batch.lengths_B)
    torch.testing.assert_close(x + (1 - t_B)[:, None, None, None] * velocity, raw, rtol=1e-4, atol=1e-4)

    x1 = clean.encode(batch.motions[JOINT], batch.lengths_B)

    def perfect(x_t: Tensor, t_B: Tensor, *_: object) -> Tensor:
        return (x1 - x_t) / (1 - t_B.float())[:, None, None, None]

    loss_B, metrics = clean.pretrain_loss(perfect, batch, 0, 0)
    assert float(loss_B.max()) < 1e-8 and set(metrics) == {"loss/clean", "loss/change"}
    off, _ = clean.pretrain_loss(
        lambda x_t, t_B, *_: perfect(x_t, t_B) + 1.0 / (1 - t_B.float())[:, None, None, None], batch, 0, 0
    )
    torch.testing.assert_close(off, torch.ones(5), rtol=1e-4, atol=1e-4)  # constant: no frame difference
    with pytest.raises(ConfigError, match=r"output.*frame_weight"):
        replace(RAW, output="noise", frame_weight=-1.0)
