"""The MotionDiffuse family without reference data: padding, batching, text, objective, gradients, cards."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from motionrft.core.errors import ConfigError
from motionrft.core.protocols import GeneratorSpec, MotionGenerator
from motionrft.core.types import Condition, MotionBatch, Representation
from motionrft.generators.base import Build
from motionrft.generators.lora import adapter_for, add_adapter
from motionrft.generators.motiondiffuse import OFFICIAL, MotionDiffuse, MotionDiffuseConfig, MotionDiffuseGenerator
from motionrft.generators.motiondiffuse_network import TEXT_TOWER
from motionrft.generators.registry import (
    GeneratorConfig,
    TextSide,
    build_generator,
    generator_card,
    generator_from_card,
)
from motionrft.generators.sampling import generate
from motionrft.representations.normalize import Normalizer

KIND = Representation.KINEMATIC
SMALL = MotionDiffuseConfig(
    latent_dim=16, layers=2, heads=2, ff=24, text_dim=12, text_width=8, text_heads=2, text_ff=16, positions=24
)
NOISE = replace(SMALL, target="noise")
SPEC = GeneratorSpec("motiondiffuse", KIND, 20.0, 24, "stub", "eps", 1000, 1.0)


def statistics() -> Normalizer:
    draw = torch.Generator().manual_seed(5)
    return Normalizer(torch.randn(263, generator=draw), torch.rand(263, generator=draw) + 0.5, KIND)


def randomise(network: nn.Module) -> None:
    """Give values to what starts at zero: otherwise the network returns zeros whatever it reads."""
    draw = torch.Generator().manual_seed(9)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=draw))


def make(config: MotionDiffuseConfig = SMALL, solver: str = "ddpm", fresh: bool = False, **changes: object):
    torch.manual_seed(0)
    spec = replace(SPEC, **changes)
    generator = MotionDiffuseGenerator(Build(spec, statistics(), 12, 5, solver), config)
    generator.network.eval()
    if not fresh:
        randomise(generator.network)
    return generator


def make_batch(rows: int = 5, frames: int = 16, seed: int = 1) -> MotionBatch:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([16, 11, 7, 2, 1][:rows]).clamp(max=frames)
    mask = torch.ones(rows, 4, dtype=torch.bool)
    mask[1:, 3] = False
    mask[2:, 2] = False
    tokens = torch.randn(rows, 4, 12, generator=draw) * mask[..., None]
    text = Condition(tokens, mask, torch.zeros(rows, 5))
    motion = torch.randn(rows, frames, 263, generator=draw)
    ids = tuple(f"clip{i}" for i in range(rows))
    keys = torch.arange(rows) * 17 + 3
    return MotionBatch(ids, {KIND: motion}, lengths, 20.0, ids, text, torch.full((rows,), -1), keys)


def output(generator: MotionDiffuseGenerator, text: Condition, x: Tensor, lengths: Tensor) -> Tensor:
    return generator.predict(generator.network, x, torch.tensor(321), text, lengths)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def test_generator_satisfies_the_protocol_with_the_published_sampler_and_no_guidance() -> None:
    generator = make()
    assert isinstance(generator, MotionGenerator)
    assert generator.state_shape(16) == (16, 263) and generator.guidance == 1.0
    table = generator.solver(10)
    assert table.model_time[0] == 999 and (table.c[:-1] > 0).all() and table.c[-1] == 0
    assert 150 < float(table.p[0]) < 160  # the amplification the docstring speaks of
    assert (make(solver="ddim").solver(10).c == 0).all()


def test_default_network_is_small() -> None:
    parameters = sum(p.numel() for p in MotionDiffuse(263, MotionDiffuseConfig()).parameters())
    assert 1.5e6 < parameters < 2.5e6


def test_a_new_network_predicts_nothing() -> None:
    generator, batch = make(NOISE, fresh=True), make_batch()
    assert not output(generator, batch.text, noise(5, 16, 263), batch.lengths_B).any()


@torch.no_grad()
def test_noise_and_clean_estimate_follow_from_the_velocity() -> None:
    """A network that outputs v = sqrt(ab) eps - sqrt(1 - ab) x0 gives back the eps and the x0 of which x_t is made."""
    generator, batch = make(), make_batch()
    x0, eps = noise(5, 16, 263), torch.randn(5, 16, 263, generator=torch.Generator().manual_seed(8))
    table = generator.solver(6)
    for i, t in enumerate(table.model_time):
        ab = float(generator.alpha_bar[t])
        x_t, v = ab**0.5 * x0 + (1 - ab) ** 0.5 * eps, ab**0.5 * eps - (1 - ab) ** 0.5 * x0
        out = generator.predict(lambda *_, v=v: v, x_t, t, batch.text, batch.lengths_B)
        torch.testing.assert_close(out, eps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(float(table.p[i]) * x_t + float(table.q[i]) * out, x0, rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_padding_content_and_length_do_not_matter() -> None:
    generator, batch = make(), make_batch()
    x = noise(5, 16, 263)
    first = output(generator, batch.text, x, batch.lengths_B)
    padded = torch.cat([x, torch.full((5, 5, 263), 50.0)], dim=1)
    for row, length in enumerate(batch.lengths_B.tolist()):
        padded[row, length:] = 1e3
    second = output(generator, batch.text, padded, batch.lengths_B)
    for row, length in enumerate(batch.lengths_B.tolist()):
        torch.testing.assert_close(second[row, :length], first[row, :length], rtol=1e-5, atol=1e-5)
        assert (first[row, :length] - first[row - 1, :length]).abs().max() > 1e-2


@torch.no_grad()
def test_text_padding_does_not_matter_and_the_last_valid_token_does() -> None:
    generator, batch = make(), make_batch()
    x, text, lengths = noise(5, 16, 263), batch.text, batch.lengths_B
    first = output(generator, text, x, lengths)
    tokens = torch.cat([text.tokens_BLD, torch.zeros(5, 3, 12)], dim=1)
    mask = torch.cat([text.mask_BL, torch.zeros(5, 3, dtype=torch.bool)], dim=1)
    tokens = torch.where(mask[..., None], tokens, 1e2)
    longer = output(generator, Condition(tokens, mask, text.pooled_BD), x, lengths)
    torch.testing.assert_close(longer, first, rtol=1e-5, atol=1e-5)

    def reordered(order: list[int]) -> Tensor:  # of the first row, which has four tokens
        row = text.index(slice(0, 1))
        return output(generator, replace(row, tokens_BLD=row.tokens_BLD[:, order]), x[:1], lengths[:1])

    torch.testing.assert_close(reordered([2, 0, 1, 3]), first[:1], rtol=1e-5, atol=1e-5)
    assert (reordered([0, 1, 3, 2]) - first[:1]).abs().max() > 1e-2
    summary, _ = generator.network.encode_text(text.tokens_BLD, text.mask_BL)
    alone, _ = generator.network.encode_text(text.tokens_BLD[4:, :2], text.mask_BL[4:, :2])
    torch.testing.assert_close(summary[4:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_sampling_does_not_depend_on_batch_split_order_or_padding(solver: str) -> None:
    generator, batch = make(solver=solver), make_batch()
    text, lengths, keys = batch.text, batch.lengths_B, batch.keys_B
    whole = generate(generator, None, text, lengths, keys, 4, seed=3)
    scale = float(whole.abs().max())
    split = generate(generator, generator.network, text, lengths, keys, 4, seed=3, batch_size=2)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5 * scale)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = generate(generator, None, text.index(order), lengths[order], keys[order], 4, seed=3)
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-4, atol=1e-5 * scale)
    for row, length in enumerate(lengths.tolist()):
        assert (whole[row, length:] == 0).all() and whole[row, :length].abs().max() > 0
    other = generate(generator, None, text, lengths, keys, 4, seed=4)
    assert (other - whole).abs().max() > 1e-2


def test_pretraining_loss_of_a_clip_does_not_depend_on_batch_or_padding() -> None:
    generator, batch = make(), make_batch()
    whole, metrics = generator.pretrain_loss(generator.network, batch, step=4, seed=2)
    parts = [generator.pretrain_loss(generator.network, batch.slice(i, i + 1), step=4, seed=2)[0] for i in range(5)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    longer = nn.functional.pad(batch.motions[KIND], (0, 0, 0, 4), value=9.0)
    padded, _ = generator.pretrain_loss(generator.network, replace(batch, motions={KIND: longer}), step=4, seed=2)
    torch.testing.assert_close(padded, whole, rtol=1e-4, atol=1e-5)
    other, _ = generator.pretrain_loss(generator.network, batch, step=5, seed=2)
    assert (other != whole).all()
    torch.testing.assert_close(metrics["loss/v"], whole.detach().mean())


def test_gradients_of_the_clean_estimate_are_amplified_for_noise_and_not_for_velocity() -> None:
    batch, x, ratio = make_batch(), noise(5, 16, 263), {}
    for config in (NOISE, SMALL):
        generator, norms = make(config), []
        table = generator.solver(5)
        for i in (0, 3):  # training steps 999 and 250
            generator.network.zero_grad()
            out = generator.predict(generator.network, x, table.model_time[i], batch.text, batch.lengths_B)
            motion = generator.decode(float(table.p[i]) * x + float(table.q[i]) * out, batch.lengths_B)
            motion[..., 0].mean().backward()
            norms.append(float(generator.network.out.weight.grad.norm()))
        ratio[config.target] = norms[0] / norms[1]
    assert ratio["noise"] > 100 and ratio["velocity"] < 3, ratio


@pytest.mark.parametrize("config", [NOISE, SMALL], ids=["noise", "velocity"])
def test_a_network_that_knows_the_answer_has_no_loss(config: MotionDiffuseConfig) -> None:
    generator, batch = make(config), make_batch()
    drawn = generator.noisy(batch, 0, 0)
    ab = generator.alpha_bar[drawn.t_B].float()[:, None, None]
    clean = generator.encode(batch.motions[KIND], batch.lengths_B)
    torch.testing.assert_close(drawn.x_t, ab.sqrt() * clean + (1 - ab).sqrt() * drawn.noise, rtol=1e-4, atol=1e-5)
    answer = drawn.noise if config is NOISE else ab.sqrt() * drawn.noise - (1 - ab).sqrt() * clean
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor, pooled: Tensor, keep: Tensor, n: Tensor) -> Tensor:
        seen.extend([x, keep])
        return answer

    loss, _ = generator.pretrain_loss(network, batch, 0, 0)
    assert float(loss.abs().max()) < 1e-10 and seen[1].all() and torch.equal(seen[0], drawn.x_t)
    one_off = answer.clone()
    one_off[..., 70] += 1.0
    loss, _ = generator.pretrain_loss(lambda *_: one_off, batch, 0, 0)
    torch.testing.assert_close(loss, torch.full((5,), 1 / 263))


def test_training_from_zero_lowers_the_loss_and_moves_every_tensor() -> None:
    torch.manual_seed(0)
    kind, batch = Representation.JOINT, make_batch()
    flat = Normalizer(torch.zeros(66), torch.ones(66), kind)
    # Wider than the features: what does not fit through the network is noise it cannot name.
    wide = replace(NOISE, latent_dim=72, layers=1, heads=4)
    generator = MotionDiffuseGenerator(Build(replace(SPEC, representation=kind), flat, 12, 5), wide)
    batch = replace(batch, motions={kind: batch.motions[KIND][..., :66]})
    before = {name: p.detach().clone() for name, p in generator.network.named_parameters()}
    optimizer = torch.optim.AdamW(generator.network.parameters(), lr=5e-3, weight_decay=0.0)
    losses = []
    for step in range(60):
        loss = generator.pretrain_loss(generator.network, batch, step, seed=0)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(1.0, abs=0.1) and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all((p != before[name]).any() for name, p in generator.network.named_parameters())


def test_every_tensor_has_a_gradient_where_one_is_possible() -> None:
    generator, batch = make(), make_batch()
    generator.pretrain_loss(generator.network, batch, 0, 0)[0].sum().backward()
    norms = {name: float(p.grad.norm()) for name, p in generator.network.named_parameters()}
    largest = max(norms.values())
    for name, norm in norms.items():
        # A bias of the keys shifts all positions alike, and the softmax over positions takes the shift out again.
        assert (norm > 1e-6 * largest) == (not re.search(r"[sc]a_block\.key\.bias", name)), (name, norm)


def test_guidance_needs_captions_dropped_in_training_and_then_works() -> None:
    with pytest.raises(ConfigError, match=r"guidance 1.*text_dropout"):
        make(guidance_scale=2.5)
    guided, batch = make(replace(SMALL, text_dropout=0.3), guidance_scale=2.5), make_batch()
    x, outs = noise(5, 16, 263), {}
    for scale in (0.0, 1.0, 2.5):
        guided.guidance = scale
        with torch.no_grad():
            outs[scale] = output(guided, batch.text, x, batch.lengths_B)
    torch.testing.assert_close(outs[2.5], outs[0.0] + 2.5 * (outs[1.0] - outs[0.0]), rtol=1e-4, atol=1e-4)
    empty = replace(batch.text, tokens_BLD=torch.zeros_like(batch.text.tokens_BLD))
    guided.guidance = 1.0
    torch.testing.assert_close(outs[0.0], output(guided, empty, x, batch.lengths_B), rtol=1e-5, atol=1e-5)
    kept = torch.cat([guided.noisy(batch, step, 0).keep_B for step in range(100)]).float().mean()
    assert 0.6 < float(kept) < 0.8


def test_what_fine_tuning_keeps_and_adapts_exists_by_name() -> None:
    with torch.device("meta"):
        network = MotionDiffuse(263, SMALL)
    children = [name for name, _ in network.named_children()]
    assert SMALL.kept_in_finetuning == TEXT_TOWER and set(TEXT_TOWER) <= set(children)
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    chosen = {key: [n for n in linear if re.fullmatch(rule, n)] for key, rule in SMALL.lora_targets.items()}
    assert len(chosen["attention"]) == 2 * 6 and len(chosen["default"]) == 2 * (6 + 2 + 6) + 2
    assert not any(name.startswith(TEXT_TOWER) for name in chosen["default"])


def test_adapters_start_without_effect() -> None:
    generator, batch = make(), make_batch()
    x = noise(5, 16, 263)
    before = output(generator, batch.text, x, batch.lengths_B)
    names = add_adapter(generator.network, adapter_for(SMALL, 2, 4.0))
    assert {"out", "joint_embed", "temporal_decoder_blocks.1.ffn.proj_out.out_layers.2"} < set(names)
    torch.testing.assert_close(output(generator, batch.text, x, batch.lengths_B), before, rtol=0, atol=0)


def test_a_card_rebuilds_its_generator() -> None:
    text = TextSide("stub", 12, 5)
    config = GeneratorConfig(model=replace(SMALL, text_dim=1), max_frames=24, solver="ddim", eta=0.5)
    first = build_generator(config, statistics(), text, 20.0)
    card = json.loads(json.dumps(generator_card(config, statistics(), text, 20.0)))
    found, second = generator_from_card(card, statistics())
    assert found == config and second.spec == first.spec and second.spec.guidance_scale == 1.0
    assert second.config.text_dim == 12 and (second.solver_name, second.eta) == ("ddim", 0.5)
    second.network.load_state_dict(first.network.state_dict(), strict=True)


def test_impossible_settings_are_refused_with_their_names() -> None:
    with pytest.raises(ConfigError, match=r"heads 5.*text_heads 5.*dropout"):
        MotionDiffuseConfig(heads=5, text_heads=5, dropout=1.0)
    with pytest.raises(ConfigError, match="target"):
        MotionDiffuseConfig(target="x0")
    with pytest.raises(ConfigError, match=r"at most 24.*positions"):
        make(max_frames=25)
    with pytest.raises(ConfigError, match="train_steps"):
        make(train_steps=15)
    with pytest.raises(ConfigError, match="frames"):
        make().state_shape(25)
    assert OFFICIAL.target == "noise" and OFFICIAL.positions == 196 and OFFICIAL.text_dropout == 0
