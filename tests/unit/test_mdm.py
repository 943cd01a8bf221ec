"""The MDM family without reference data: independence from padding and batching, keyed dropout, cards."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, RepresentationError
from motionrft.core.protocols import GeneratorSpec, MotionGenerator
from motionrft.core.types import Condition, MotionBatch, Representation
from motionrft.generators.base import Build
from motionrft.generators.mdm import MDM, MDMConfig, MDMGenerator
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

KIND = Representation.KINEMATIC
SMALL = MDMConfig(latent_dim=16, layers=2, heads=2, ff=24, text_dim=12)
ENCODER = replace(SMALL, frames_per_token=1, norm_first=False, condition_bias=False)
DECODER = replace(ENCODER, arch="decoder", text="tokens")
TIMED = replace(ENCODER, arch="decoder", time_token=True)
VARIANTS = {"small": SMALL, "encoder": ENCODER, "decoder": DECODER, "timed": TIMED}


def statistics() -> Normalizer:
    draw = torch.Generator().manual_seed(5)
    return Normalizer(torch.randn(263, generator=draw), torch.rand(263, generator=draw) + 0.5, KIND)


SPEC = GeneratorSpec("mdm", KIND, 20.0, 24, "stub", "x0", 1000, 2.5)


def make(config: MDMConfig = SMALL, seed: int = 0, solver: str = "ddim", eta: float = 0.0, **settings) -> MDMGenerator:
    torch.manual_seed(seed)
    return MDMGenerator(Build(SPEC, statistics(), 12, 12, solver, eta), config, **settings)


def make_batch(rows: int = 5, frames: int = 16, seed: int = 1) -> MotionBatch:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([16, 11, 7, 2, 1][:rows]).clamp(max=frames)
    mask = torch.ones(rows, 4, dtype=torch.bool)
    mask[1:, 3] = False
    tokens = torch.randn(rows, 4, 12, generator=draw) * mask[..., None]
    text = Condition(tokens, mask, tokens.mean(1))
    motion = torch.randn(rows, frames, 263, generator=draw)
    ids = tuple(f"clip{i}" for i in range(rows))
    return MotionBatch(
        ids, {KIND: motion}, lengths, 20.0, ids, text, torch.full((rows,), -1), torch.arange(rows) * 17 + 3
    )


def network_output(generator: MDMGenerator, batch: MotionBatch, x: Tensor, lengths: Tensor) -> Tensor:
    return generator.predict(generator.network, x, torch.tensor(321), batch.text, lengths)


def test_generator_satisfies_the_protocol() -> None:
    generator = make()
    assert isinstance(generator, MotionGenerator)
    assert generator.state_shape(16) == (16, 263)
    assert len(generator.solver(10)) == 10 and generator.solver(10).model_time[0] == 999


def test_default_network_has_the_size_of_the_quickstart_recipe() -> None:
    parameters = sum(p.numel() for p in MDM(263, MDMConfig()).parameters())
    assert 1.5e6 < parameters < 1.6e6


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_padding_content_and_length_do_not_matter(name: str) -> None:
    generator, batch = make(VARIANTS[name]), make_batch()
    generator.network.eval()
    x = torch.randn(5, 16, 263, generator=torch.Generator().manual_seed(2))
    first = network_output(generator, batch, x, batch.lengths_B)
    padded = torch.cat([x, torch.full((5, 5, 263), 50.0)], dim=1)
    for row, length in enumerate(batch.lengths_B.tolist()):
        padded[row, length:] = 1e3
    second = network_output(generator, batch, padded, batch.lengths_B)
    for row, length in enumerate(batch.lengths_B.tolist()):
        torch.testing.assert_close(second[row, :length], first[row, :length], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_frame_mask_the_model_runs_at_full_length() -> None:
    generator = make(replace(ENCODER, mask_frames=False))
    generator.network.eval()
    assert generator.state_shape(16) == (24, 263)
    batch = make_batch()
    motion = generate(generator, None, batch.text, batch.lengths_B, batch.keys_B, 3, seed=0)
    assert motion.shape == (5, 16, 263)
    x = torch.randn(5, 24, 263)
    full, short = (network_output(generator, batch, part, batch.lengths_B)[:, :16] for part in (x, x[:, :16]))
    assert (full - short).abs().max() > 1e-3  # why it must


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_sampling_does_not_depend_on_batch_split_order_or_padding(name: str, solver: str) -> None:
    generator, batch = make(VARIANTS[name], solver=solver), make_batch()
    text, lengths, keys = batch.text, batch.lengths_B, batch.keys_B
    whole = generate(generator, None, text, lengths, keys, 4, seed=3)
    split = generate(generator, generator.network, text, lengths, keys, 4, seed=3, batch_size=2)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = generate(generator, None, text.index(order), lengths[order], keys[order], 4, seed=3)
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-4, atol=1e-4)
    for row, length in enumerate(lengths.tolist()):
        assert (whole[row, length:] == 0).all() and whole[row, :length].abs().max() > 0
    other = generate(generator, None, text, lengths, keys, 4, seed=4)
    assert (other - whole).abs().max() > 1e-2


def test_sampling_leaves_the_network_in_its_mode_and_without_graph() -> None:
    generator, batch = make(replace(SMALL, dropout=0.5)), make_batch()
    generator.network.train()
    args = (batch.text, batch.lengths_B, batch.keys_B, 2)
    first = generate(generator, None, *args, seed=0)
    assert generator.network.training and not first.requires_grad
    assert torch.equal(generate(generator, None, *args, seed=0), first)


@torch.no_grad()
def test_guidance_combines_both_predictions_in_one_call() -> None:
    generator, batch = make(), make_batch()
    generator.network.eval()
    x = torch.randn(5, 16, 263)
    calls = []

    def network(*args: Tensor) -> Tensor:
        calls.append(len(args[0]))
        return generator.network(*args)

    outs = {}
    for scale in (0.0, 1.0, 2.5):
        generator.guidance = scale
        outs[scale] = generator.predict(network, x, torch.tensor(7), batch.text, batch.lengths_B)
    assert calls == [10, 5, 10]
    expected = outs[0.0] + 2.5 * (outs[1.0] - outs[0.0])
    torch.testing.assert_close(outs[2.5], expected, rtol=1e-4, atol=1e-4)
    blind = replace(batch, text=Condition(*(torch.zeros_like(t) for t in _parts(batch.text))))
    generator.guidance = 1.0
    empty = generator.predict(network, x, torch.tensor(7), blind.text, batch.lengths_B)
    torch.testing.assert_close(outs[0.0], empty, rtol=1e-5, atol=1e-5)


def _parts(text: Condition) -> tuple[Tensor, Tensor, Tensor]:
    return text.tokens_BLD, text.mask_BL, text.pooled_BD


@torch.no_grad()
def test_scalar_and_row_times_are_the_same() -> None:
    generator, batch = make(), make_batch()
    x = torch.randn(5, 16, 263)
    generator.network.eval()
    outs = [
        generator.predict(generator.network, x, t, batch.text, batch.lengths_B)
        for t in (torch.tensor(40), torch.full((5,), 40))
    ]
    assert torch.equal(*outs)


def test_decode_inverts_encode_and_zeroes_padding() -> None:
    generator, batch = make(), make_batch()
    motion = batch.motions[KIND]
    state = generator.encode(motion, batch.lengths_B).requires_grad_()
    decoded = generator.decode(state, batch.lengths_B)
    torch.testing.assert_close(decoded[batch.mask_BT], motion[batch.mask_BT], rtol=1e-5, atol=1e-5)
    assert (decoded[~batch.mask_BT] == 0).all()
    decoded.sum().backward()
    assert (state.grad[~batch.mask_BT] == 0).all() and (state.grad[batch.mask_BT] != 0).all()


def test_pretraining_loss_of_a_clip_does_not_depend_on_batch_or_padding() -> None:
    generator, batch = make(), make_batch()
    generator.network.eval()
    whole, metrics = generator.pretrain_loss(generator.network, batch, step=4, seed=2)
    parts = [generator.pretrain_loss(generator.network, batch.slice(i, i + 1), step=4, seed=2)[0] for i in range(5)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    longer = torch.nn.functional.pad(batch.motions[KIND], (0, 0, 0, 4), value=9.0)
    padded, _ = generator.pretrain_loss(generator.network, replace(batch, motions={KIND: longer}), step=4, seed=2)
    torch.testing.assert_close(padded, whole, rtol=1e-4, atol=1e-5)
    other, _ = generator.pretrain_loss(generator.network, batch, step=5, seed=2)
    assert (other != whole).all()
    total = metrics["loss/x0"] + 2 * metrics["loss/velocity"]
    torch.testing.assert_close(total, whole.detach().mean())


def test_captions_are_dropped_by_clip_and_step_at_the_configured_rate() -> None:
    generator, rows = make(replace(SMALL, text_dropout=0.3)), 5
    kept: dict[int, list[bool]] = {i: [] for i in range(rows)}

    def network(x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor, pooled: Tensor, keep: Tensor, n: Tensor) -> Tensor:
        for i, flag in zip(ids, keep.tolist(), strict=True):
            kept[i].append(flag)
        return torch.zeros_like(x)

    batch = make_batch(rows)
    for step in range(300):
        ids = list(range(rows))
        generator.pretrain_loss(network, batch, step, seed=0)
    shares = [sum(flags) / 300 for flags in kept.values()]
    assert all(0.6 < share < 0.8 for share in shares)
    alone: dict[int, list[bool]] = {i: list(flags) for i, flags in kept.items()}
    for flags in kept.values():
        flags.clear()
    for step in range(300):
        ids = [2]
        generator.pretrain_loss(network, batch.slice(2, 3), step, seed=0)
    assert kept[2] == alone[2]


def test_a_perfect_network_has_no_loss() -> None:
    generator, batch = make(), make_batch()
    clean = generator.encode(batch.motions[KIND], batch.lengths_B)
    loss, _ = generator.pretrain_loss(lambda *_: clean, batch, 0, 0)
    assert float(loss.abs().max()) == 0.0
    off = clean.clone()
    off[..., 70] += 1.0  # constant over time: no velocity error
    loss, metrics = generator.pretrain_loss(lambda *_: off, batch, 0, 0)
    torch.testing.assert_close(loss, torch.full((5,), 1 / 263))
    assert float(metrics["loss/velocity"]) == 0.0


def test_training_lowers_the_loss() -> None:
    generator, batch = make(), make_batch()
    optimizer = torch.optim.AdamW(generator.network.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        loss = generator.pretrain_loss(generator.network, batch, step, seed=0)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_every_parameter_is_used() -> None:
    for config in VARIANTS.values():
        generator = make(config)
        generator.pretrain_loss(generator.network, make_batch(), 0, 0)[0].sum().backward()
        assert all(p.grad is not None for p in generator.network.parameters())


def test_a_card_rebuilds_its_generator_and_refuses_other_statistics() -> None:
    text = TextSide("stub", 12, 12)
    config = GeneratorConfig(model=replace(SMALL, text_dim=1), max_frames=24, solver="ddpm", guidance=3.0)
    first = build_generator(config, statistics(), text, 20.0)
    card = json.loads(json.dumps(generator_card(config, statistics(), text, 20.0)))
    found, second = generator_from_card(card, statistics())
    assert found == config and second.spec == first.spec and second.spec.guidance_scale == 3.0
    second.network.load_state_dict(first.network.state_dict(), strict=True)
    with pytest.raises(CheckpointError, match="normaliser"):
        generator_from_card(card, Normalizer(torch.zeros(263), torch.ones(263), KIND))
    with pytest.raises(CheckpointError, match="card"):
        generator_from_card({"config": {"family": "nothing"}}, statistics())
    with pytest.raises(CheckpointError, match="earlier version"):
        generator_from_card({**card, "config": {"family": "mdm", "mdm": {}}}, statistics())
    assert "mdm" in FAMILIES


def test_impossible_settings_are_refused_with_their_names() -> None:
    with pytest.raises(ConfigError, match=r"heads.*dropout"):
        MDMConfig(latent_dim=10, heads=3, dropout=1.5)
    with pytest.raises(ConfigError, match="arch=decoder"):
        MDMConfig(text="tokens")
    with pytest.raises(ConfigError, match=r"max_frames.*solver"):
        GeneratorConfig(max_frames=0, solver="euler")
    with pytest.raises(ConfigError, match="solver"):
        make(solver="euler")
    with pytest.raises(ConfigError, match="frames"):
        make().state_shape(25)
    with pytest.raises(ConfigError, match="denoising steps"):
        make().solver(1001)
    joints = Normalizer(torch.zeros(66), torch.ones(66), Representation.JOINT)
    with pytest.raises(RepresentationError, match="joint"):
        MDMGenerator(Build(SPEC, joints, 12, 12), SMALL)
    with pytest.raises(ConfigError, match="x0"):
        MDMGenerator(Build(replace(SPEC, prediction="eps"), statistics(), 12, 12), SMALL)


def test_text_gain_is_the_same_as_larger_text_weights():
    batch = make_batch()
    loud, plain = make(replace(SMALL, text_gain=3.0, dropout=0.0)), make(replace(SMALL, dropout=0.0))
    x = torch.randn(5, 16, 263, generator=torch.Generator().manual_seed(8))
    before = network_output(plain, batch, x, batch.lengths_B)
    with torch.no_grad():
        plain.network.embed_text.weight.mul_(3.0)
    assert not torch.allclose(before, network_output(plain, batch, x, batch.lengths_B), atol=1e-3)
    torch.testing.assert_close(
        network_output(loud, batch, x, batch.lengths_B), network_output(plain, batch, x, batch.lengths_B)
    )
    with pytest.raises(ConfigError, match="text_gain"):
        replace(SMALL, text_gain=0.0)
