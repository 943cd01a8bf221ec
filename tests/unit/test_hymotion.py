"""The HY-Motion family without reference data: who sees whom, ragged execution, frame rates, training, cards."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.core.memory import SavedTensorMeter
from motionrft.core.protocols import MotionGenerator
from motionrft.core.types import Condition, MotionBatch, valid_mask
from motionrft.diffusion.denoise import SAMPLE, denoise
from motionrft.generators.hymotion import FULL, LITE, HYMotion, HYMotionConfig, HYMotionGenerator
from motionrft.generators.hymotion_blocks import rotary_table, rotate
from motionrft.generators.registry import (
    FAMILIES,
    GeneratorConfig,
    TextSide,
    build_generator,
    generator_card,
    generator_from_card,
)
from motionrft.generators.sampling import generate
from motionrft.nn.embeddings import time_sinusoid
from motionrft.representations.layouts import rotation_to_hymotion
from motionrft.representations.normalize import Normalizer
from motionrft.representations.rotation import matrices_to_rotation, rotation_to_matrices
from motionrft.representations.rotations import yaw_matrix
from motionrft.training.precision import cast_floats
from tests.hymotion_fixtures import (
    CLEAN,
    KIND,
    POOLED,
    RELEASED,
    SMALL,
    TOKENS,
    make,
    make_batch,
    make_text,
    statistics,
)

LENGTHS = torch.tensor([16, 11, 7, 2, 1])


def state(rows: int = 5, frames: int = 16, seed: int = 3) -> Tensor:
    return torch.randn(rows, frames, 135, generator=torch.Generator().manual_seed(seed))


def velocity(
    generator: HYMotionGenerator,
    x: Tensor,
    lengths: Tensor = LENGTHS,
    text: Condition | None = None,
    t: float = 0.3,
    keep: bool = True,
) -> Tensor:
    text = make_text(len(x)) if text is None else text
    times, keeps = torch.full((len(x),), t), torch.full((len(x),), keep)
    return generator.network(x, times, text.tokens_BLD, text.mask_BL, text.pooled_BD, keeps, lengths)


def rows_equal(got: Tensor, want: Tensor, lengths: Tensor = LENGTHS, limit: float = 1e-5) -> None:
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(got[row, :length], want[row, :length], rtol=limit, atol=limit)


# --------------------------------------------------------------------------------------- masks, positions, padding


@pytest.mark.parametrize("config", [SMALL, CLEAN], ids=["velocity", "clean"])
@torch.no_grad()
def test_what_lies_in_padding_changes_nothing_at_all(config: HYMotionConfig) -> None:
    generator, x = make(config), state()
    noisy, text = x.clone(), make_text(5)
    noisy[~valid_mask(LENGTHS, 16)] = 1e3
    loud = Condition(torch.where(text.mask_BL[..., None], text.tokens_BLD, 1e3), text.mask_BL, text.pooled_BD)
    first, second = velocity(generator, x), velocity(generator, noisy, text=loud)
    for row, length in enumerate(LENGTHS.tolist()):
        assert torch.equal(first[row, :length], second[row, :length])
    assert first.isfinite().all()


@torch.no_grad()
def test_a_clip_alone_with_its_own_words_equals_the_clip_padded_to_full_length() -> None:
    generator, text = make(), make_text(5)
    x = state(frames=24)
    # Clip 4 keeps the batch at 24 frames; the others are then padded to it.
    lengths = torch.tensor([16, 11, 7, 2, 24])
    together = velocity(generator, x, lengths, text)
    for row, length in enumerate(lengths.tolist()):
        words = int(text.mask_BL[row].sum())
        own = Condition(text.tokens_BLD[row : row + 1, :words], text.mask_BL[row : row + 1, :words],
                        text.pooled_BD[row : row + 1])  # fmt: skip
        alone = velocity(generator, x[row : row + 1, :length], lengths[row : row + 1], own)
        rows_equal(alone, together[row : row + 1], lengths[row : row + 1])


@torch.no_grad()
def test_frames_and_words_that_nobody_needs_are_not_computed() -> None:
    generator, seen = make(), []
    generator.network.single_blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    text = make_text(5).index(slice(1, 3))  # at most 3 of 4 words
    out = velocity(generator, state(2), torch.tensor([9, 5]), text)
    assert seen == [9 + 3] and out.shape == (2, 16, 135) and (out[:, 9:] == 0).all()


@torch.no_grad()
def test_text_positions_start_behind_the_longest_motion_the_model_knows() -> None:
    x, lengths = state(frames=16), torch.full((5,), 16)
    near, far = make(replace(SMALL, train_frames=16)), make(SMALL)
    far.network.load_state_dict(near.network.state_dict())
    assert (velocity(near, x, lengths) - velocity(far, x, lengths)).abs().max() > 1e-3


@torch.no_grad()
def test_a_frame_reaches_its_band_and_no_further() -> None:
    generator = make(replace(SMALL, double_blocks=1, single_blocks=0))
    x, lengths = state(1), torch.tensor([16])
    moved = x.clone()
    moved[0, 8] += 1.0
    change = (velocity(generator, moved, lengths) - velocity(generator, x, lengths)).abs().amax((0, 2))
    reached = torch.arange(16).sub(8).abs() <= SMALL.band_frames
    assert (change[reached] > 1e-6).all() and (change[~reached] == 0).all()


@torch.no_grad()
def test_text_never_sees_motion_and_motion_sees_text() -> None:
    generator, seen = make(), []
    generator.network.single_blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output[:, 16:]))
    first, second = velocity(generator, state(seed=3)), velocity(generator, state(seed=4))
    assert torch.equal(*seen) and not torch.equal(first, second)
    other = make_text(5, seed=6)
    assert (velocity(generator, state(), text=other) - velocity(generator, state())).abs().amax((1, 2)).min() > 1e-4


@torch.no_grad()
def test_words_matter_beyond_the_sentence_vector_and_the_other_way_round() -> None:
    generator, text, other = make(), make_text(5), make_text(5, seed=6)
    plain = velocity(generator, state(), text=text)
    for changed in (replace(text, tokens_BLD=other.tokens_BLD), replace(text, pooled_BD=other.pooled_BD)):
        assert (velocity(generator, state(), text=changed) - plain).abs().amax((1, 2)).min() > 1e-4


@torch.no_grad()
def test_the_empty_caption_is_learned_features_in_as_many_words() -> None:
    generator, text = make(), make_text(5)
    network = generator.network
    nulls = Condition(
        network.null_ctxt_input.expand(5, 4, -1), text.mask_BL, network.null_vtxt_feat[:, 0].expand(5, -1)
    )
    empty = velocity(generator, state(), keep=False)
    torch.testing.assert_close(empty, velocity(generator, state(), text=nulls))
    torch.testing.assert_close(empty, velocity(generator, state(), text=replace(
        text, tokens_BLD=make_text(5, seed=6).tokens_BLD, pooled_BD=0 * text.pooled_BD), keep=False))  # fmt: skip
    shorter = replace(text, mask_BL=text.mask_BL & (torch.arange(4) < 2))
    assert (velocity(generator, state(), text=shorter, keep=False) - empty)[0].abs().max() > 1e-6


@torch.no_grad()
def test_a_caption_without_words_gives_finite_motion_and_leaves_others_alone() -> None:
    generator, text = make(), make_text(5)
    mask = text.mask_BL.clone()
    mask[1] = False
    got, want = velocity(generator, state(), text=replace(text, mask_BL=mask)), velocity(generator, state())
    assert got.isfinite().all()
    torch.testing.assert_close(got[[0, 2]][:, :7], want[[0, 2]][:, :7])


@torch.no_grad()
def test_the_trunk_reads_a_thousand_t_and_the_refiner_t() -> None:
    network, t = make().network, torch.tensor([0.25, 0.75])
    for encoder, factor in ((network.timestep_encoder, 1000.0), (network.text_refiner.timestep_encoder, 1.0)):
        waves = time_sinusoid(t.double() * factor, 16).float()
        assert torch.equal(encoder(t), encoder.blocks(waves))


def test_rotations_of_neighbouring_features_depend_on_distances_only() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=draw, dtype=torch.float64).expand(1, 1, 6, 8) for _ in range(2))
    near, far = (rotary_table(start + torch.arange(6), 8, torch.float64) for start in (0, 360))
    products = [(rotate(q, table) @ rotate(k, table).mT)[0, 0] for table in (near, far)]
    torch.testing.assert_close(*products)
    torch.testing.assert_close(products[0].diagonal(1), products[0][0, 1].expand(5))
    turned = rotate(
        torch.eye(8, dtype=torch.float64)[None, None, :1], rotary_table(torch.tensor([1]), 8, torch.float64)
    )
    want = torch.tensor([1.0]).double().cos().item(), torch.tensor([1.0]).double().sin().item()
    assert turned.flatten()[:2].tolist() == pytest.approx(want) and (turned.flatten()[2:] == 0).all()


# ----------------------------------------------------------------------------------------------- states and rates


def test_generator_satisfies_the_protocol() -> None:
    generator = make()
    assert isinstance(generator, MotionGenerator)
    assert generator.state_shape(16) == (16, 135) and len(generator.solver(10)) == 10
    assert generator.solver(4).model_time.tolist() == [0.0, 0.25, 0.5, 0.75]


def test_default_network_is_small() -> None:
    assert sum(p.numel() for p in HYMotion(HYMotionConfig()).parameters()) < 3e6


@pytest.mark.parametrize(("frames", "shape"), [(1, 6), (4, 6), (5, 8), (10, 15), (16, 24)])
def test_motion_frames_become_model_frames(frames: int, shape: int) -> None:
    generator = make(RELEASED)
    assert generator.state_shape(frames) == (shape, 201)
    assert generator.state_lengths(torch.tensor([frames])).tolist() == [shape]
    assert make(replace(RELEASED, fps_mode="upstream")).state_shape(frames) == (max(frames, 6), 201)


def test_motion_that_may_be_longer_than_the_network_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most 16 frames.*max_frames 17"):
        make(RELEASED, max_frames=17)
    assert make(replace(RELEASED, fps_mode="upstream"), max_frames=24).state_shape(24) == (24, 201)
    with pytest.raises(ConfigError, match="max_frames 25"):
        make(SMALL, max_frames=25)


def at_thirty(generator: HYMotionGenerator, motion: Tensor) -> Tensor:
    """Return the state of 30 frames per second whose physical features begin with `motion`."""
    motion = motion - torch.nn.functional.pad(torch.tensor(generator.config.rest_pelvis), (0, 132))
    return generator.frozen.normalise(torch.nn.functional.pad(motion, (0, 66)))


def test_steady_motion_keeps_its_speed_from_thirty_to_twenty() -> None:
    generator = make(RELEASED)
    seconds = torch.arange(24) / 30.0
    turns = torch.eye(3).expand(24, 22, 3, 3).clone()
    turns[:, 0] = yaw_matrix(0.05 * seconds)
    motion = matrices_to_rotation(turns, torch.stack([seconds, 0.9 + 0 * seconds, 2 * seconds], dim=1))[None]
    motion = torch.where(generator.frozen.learned_D[:135], motion, generator.frozen.mean[:135])
    got = generator.decode(at_thirty(generator, motion), torch.tensor([16]))
    at = torch.arange(16) / 20.0
    torch.testing.assert_close(got[0, :, 0], at)
    torch.testing.assert_close(got[0, :, 2], 2 * at)
    rotations, _ = rotation_to_matrices(got)
    torch.testing.assert_close(rotations[0, :, 0], yaw_matrix(0.05 * at), atol=1e-5, rtol=0)
    identity = (rotations @ rotations.mT)[0]
    torch.testing.assert_close(identity, torch.eye(3).expand_as(identity))


def test_upstream_mode_is_a_plain_slice() -> None:
    generator = make(replace(RELEASED, fps_mode="upstream"))
    motion = statistics().denormalise(state(2))
    got = generator.decode(at_thirty(generator, motion), torch.tensor([16, 5]))
    varying = generator.frozen.learned_D[:135]
    torch.testing.assert_close(got[0][:, varying], motion[0][:, varying])
    assert (got[1, 5:] == 0).all()


@pytest.mark.parametrize("config", [SMALL, RELEASED], ids=["small", "released"])
def test_decoded_padding_is_zero_and_receives_no_gradient(config: HYMotionConfig) -> None:
    generator = make(config)
    frames, features = generator.state_shape(16)
    x = torch.randn(5, frames, features, requires_grad=True)
    motion = generator.decode(x, LENGTHS)
    mask = valid_mask(LENGTHS, 16)
    assert motion.shape == (5, 16, 135) and (motion[~mask] == 0).all() and (motion[mask] != 0).any(-1).all()
    (motion * torch.randn_like(motion)).sum().backward()
    own = valid_mask(generator.state_lengths(LENGTHS), frames)
    assert (x.grad[~own] == 0).all() and x.grad.isfinite().all()
    assert (x.grad[..., 135:] == 0).all() and (x.grad[..., 20] == 0).all()
    learned = generator.frozen.learned_D.clone()
    learned[135:] = False
    assert (x.grad[0, 0, learned] != 0).all()


def test_decoding_one_clip_does_not_depend_on_its_batch() -> None:
    generator = make(RELEASED)
    x = torch.randn(5, *generator.state_shape(16))
    whole = generator.decode(x, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        frames = generator.state_shape(length)[0]
        alone = generator.decode(x[row : row + 1, :frames], LENGTHS[row : row + 1])
        torch.testing.assert_close(alone[0], whole[row, :length])


def test_decode_inverts_encode_and_constant_features_are_their_mean() -> None:
    for config in (SMALL, replace(RELEASED, native_fps=20.0)):
        generator, batch = make(config), make_batch()
        motion = batch.motions[KIND]
        x = generator.encode(motion, batch.lengths_B)
        own = valid_mask(generator.state_lengths(batch.lengths_B), 16)
        assert x.shape[2] == config.features and (x[~own] == 0).all()
        assert (x[4, : int(own[4].sum())] == x[4, 0]).all()  # a clip of one frame stands still
        decoded, varying = generator.decode(x, batch.lengths_B), generator.frozen.learned_D[:135]
        torch.testing.assert_close(
            decoded[batch.mask_BT][:, varying], motion[batch.mask_BT][:, varying], rtol=1e-4, atol=1e-4
        )
        assert not varying[20] and (decoded[batch.mask_BT][:, 20] == statistics().mean[20]).all()
    joints = rotation_to_hymotion(motion)[..., 135:]
    got = generator.frozen.denormalise(x)[..., 135:]
    torch.testing.assert_close(got[batch.mask_BT], joints[batch.mask_BT], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x[0, :, 0], (motion[0, :, 0] - statistics().mean[0]) / statistics().std[0])
    assert generator.frozen.mean[1] == pytest.approx(0.9 + 0.2)  # translations of the body's origin


# --------------------------------------------------------------------------------------------- sampling, guidance


@pytest.mark.parametrize("config", [SMALL, CLEAN, RELEASED], ids=["small", "clean", "released"])
def test_sampling_does_not_depend_on_batch_split_order_or_padding(config: HYMotionConfig) -> None:
    generator, batch = make(config), make_batch()
    text, lengths, keys = batch.text, batch.lengths_B, batch.keys_B
    whole = generate(generator, None, text, lengths, keys, 4, seed=3)
    split = generate(generator, generator.network, text, lengths, keys, 4, seed=3, batch_size=2)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = generate(generator, None, text.index(order), lengths[order], keys[order], 4, seed=3)
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-4, atol=1e-4)
    for row, length in enumerate(lengths.tolist()):
        assert (whole[row, length:] == 0).all() and whole[row, :length].abs().max() > 0
    assert (generate(generator, None, text, lengths, keys, 4, seed=4) - whole).abs().max() > 1e-2


@torch.no_grad()
def test_guidance_runs_both_captions_in_one_call_and_one_without_guidance() -> None:
    generator, batch, x, calls = make(), make_batch(), state(), []

    def network(*args: Tensor) -> Tensor:
        calls.append((len(args[0]), args[1].dtype))
        return generator.network(*args)

    outs = {}
    for scale in (0.0, 1.0, 5.0):
        generator.guidance = scale
        outs[scale] = generator.predict(network, x, torch.tensor(0.4), batch.text, LENGTHS)
    assert calls == [(10, torch.float64), (5, torch.float64), (10, torch.float64)]
    rows_equal(outs[5.0], outs[0.0] + 5 * (outs[1.0] - outs[0.0]), limit=1e-4)
    rows_equal(outs[0.0], velocity(generator, x, t=0.4, keep=False))


def test_flow_time_survives_an_engine_of_low_precision() -> None:
    times, other = torch.tensor([0.9876543], dtype=torch.float64), torch.tensor([0.9876543])
    kept, rounded = cast_floats((times, other), torch.bfloat16)
    assert torch.equal(kept, times) and rounded.dtype == torch.bfloat16 and float(rounded) != float(other)


@torch.no_grad()
def test_the_network_runs_in_bfloat16_and_under_autocast_near_its_single_precision_values() -> None:
    generator, x, text = make(), state(), make_text(5)
    times, keep = torch.full((5,), 0.37, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    args = (x, times, text.tokens_BLD, text.mask_BL, text.pooled_BD, keep, LENGTHS)
    want = generator.network(*args)
    with torch.autocast("cpu", torch.bfloat16):
        got = {"autocast": generator.network(*args)}
    low = make()
    low.network.to(torch.bfloat16)
    got["bf16"] = low.network(*cast_floats(args, torch.bfloat16))
    for value in got.values():
        error = (value.float() - want)[valid_mask(LENGTHS, 16)]
        assert value.dtype == torch.bfloat16 and float(error.abs().max()) < 0.1 * float(want.abs().max())


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("config", [SMALL, CLEAN], ids=["velocity", "clean"])
def test_a_perfect_velocity_has_no_loss_and_constant_features_none_either(config: HYMotionConfig) -> None:
    generator, batch, given = make(config), make_batch(), []
    x1 = generator.encode(batch.motions[KIND], batch.lengths_B)
    varying = generator.frozen.learned_D

    def perfect(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        given.append(t)
        out = (x1 - x) / (1 - t)[:, None, None].float()
        return torch.where(varying, out, 7.0)

    loss, _ = generator.pretrain_loss(perfect, batch, 0, 0)
    assert float(loss.max()) < 1e-6 and ((given[0] >= 0) & (given[0] < 1)).all() and len(given[0].unique()) == 5
    # Off by one in feature 70: a velocity by one, the clean motion that follows from it by 1 - t.
    off, metrics = generator.pretrain_loss(lambda *a: perfect(*a) + torch.eye(135)[70], batch, 0, 0)
    share = torch.ones(5) if config is SMALL else (1 - given[0]).square().float()
    torch.testing.assert_close(off, share / 134, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(metrics[f"loss/{config.output}"], off.mean())
    assert float(metrics["loss/change"]) < 1e-6

    def trembling(x: Tensor, *rest: Tensor) -> Tensor:
        return perfect(x, *rest) + torch.eye(135)[70] * (torch.arange(x.shape[1]) % 2)[:, None]

    shaken, metrics = generator.pretrain_loss(trembling, batch, 0, 0)
    want = metrics[f"loss/{config.output}"] + config.frame_weight * metrics["loss/change"]
    torch.testing.assert_close(shaken.mean(), want)
    assert float(metrics["loss/change"]) > 1e-4


@torch.no_grad()
def test_a_clean_output_is_the_one_step_estimate_and_where_sampling_ends() -> None:
    generator, batch, seen = make(CLEAN), make_batch(), []
    generator.network.final_layer.register_forward_hook(lambda _, __, output: seen.append(output))
    generator.guidance = 1.0
    steps = list(
        denoise(
            generator.solver(50),
            [SAMPLE] * 50,
            lambda x, t: generator.predict(generator.network, x, t, batch.text, LENGTHS),
            state(),
        )
    )
    for i in (0, 25, 49):
        torch.testing.assert_close(steps[i].x0_hat, seen[i], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps[49].x_prev, seen[49], rtol=1e-4, atol=1e-4)


def test_an_untrained_model_starts_at_zero_velocity_with_the_loss_of_unit_variances() -> None:
    generator, batch = make(replace(SMALL, zero_final=True), opened=False), make_batch()
    assert (velocity(generator, state()) == 0).all()
    loss, _ = generator.pretrain_loss(generator.network, batch, 0, 0)
    assert 1.5 < float(loss[:2].detach().mean()) < 2.5
    assert velocity(make(opened=False), state()).abs().max() > 0.01  # the released models' start


def test_pretraining_loss_of_a_clip_does_not_depend_on_batch_or_padding() -> None:
    generator, batch = make(CLEAN), make_batch()
    whole, _ = generator.pretrain_loss(generator.network, batch, step=4, seed=2)
    parts = [generator.pretrain_loss(generator.network, batch.slice(i, i + 1), step=4, seed=2)[0] for i in range(5)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    longer = torch.nn.functional.pad(batch.motions[KIND], (0, 0, 0, 4), value=9.0)
    padded, _ = generator.pretrain_loss(generator.network, replace(batch, motions={KIND: longer}), step=4, seed=2)
    torch.testing.assert_close(padded, whole, rtol=1e-4, atol=1e-5)
    other, _ = generator.pretrain_loss(generator.network, batch, step=5, seed=2)
    assert (other != whole).all()


def test_captions_are_dropped_by_clip_and_step_at_the_configured_rate() -> None:
    generator, batch, kept = make(replace(SMALL, text_dropout=0.3)), make_batch(), []

    def network(*args: Tensor) -> Tensor:
        kept.append(args[5])
        return torch.zeros_like(args[0])

    for step in range(200):
        generator.pretrain_loss(network, batch, step, seed=0)
    shares = torch.stack(kept).float().mean(0)
    assert ((shares > 0.55) & (shares < 0.85)).all()
    whole = kept.copy()
    kept.clear()
    for step in range(200):
        generator.pretrain_loss(network, batch.slice(2, 3), step, seed=0)
    assert [bool(k[0]) for k in kept] == [bool(k[2]) for k in whole]


def body_batch() -> MotionBatch:
    """Return the batch with orthonormal rotations: what resampling leaves a rotation."""
    batch = make_batch()
    return replace(batch, motions={KIND: matrices_to_rotation(*rotation_to_matrices(batch.motions[KIND]))})


def test_encoding_reads_clips_at_the_models_rate_and_holds_their_end() -> None:
    generator, batch = make(RELEASED), body_batch()
    motion, lengths_B = batch.motions[KIND], batch.lengths_B
    state_lengths_B = generator.state_lengths(lengths_B)
    x = generator.encode(motion, lengths_B)
    assert x.shape == (5, 24, 201) == (5, *generator.state_shape(16))
    assert (x[~valid_mask(state_lengths_B, 24)] == 0).all()
    got = generator.frozen.denormalise(x)[..., :3] + torch.tensor(RELEASED.rest_pelvis)
    for row, length in enumerate(lengths_B.tolist()):
        for frame in range(int(state_lengths_B[row])):
            place = min(frame / 1.5, length - 1)
            after, share = min(int(place) + 1, length - 1), place - int(place)
            want = (1 - share) * motion[row, int(place), :3] + share * motion[row, after, :3]
            torch.testing.assert_close(got[row, frame], want, rtol=1e-4, atol=1e-5)
        alone = generator.encode(motion[row : row + 1, :length], lengths_B[row : row + 1])
        torch.testing.assert_close(alone[0], x[row, : alone.shape[1]])


def test_a_round_trip_between_rates_errs_by_a_sixth_of_the_second_difference() -> None:
    generator, batch = make(RELEASED), body_batch()
    motion, lengths_B = batch.motions[KIND], batch.lengths_B
    back = generator.decode(generator.encode(motion, lengths_B), lengths_B)
    kept = [d for d in range(135) if not 15 <= d < 21]  # the rotation that feature 20, which is constant, belongs to
    for row, length in enumerate(lengths_B.tolist()):
        own, got = motion[row, :length], back[row, :length]
        torch.testing.assert_close(got[::2, kept], own[::2, kept], rtol=1e-4, atol=1e-4)
        # Odd frames lie halfway between two model frames, each a third of a frame away; the end is held.
        later = torch.cat([own[1:], own[-1:]])[:, :3]
        want = own[:, :3].clone()
        want[1::2] += (own[:-1:2, :3][: length // 2] - 2 * own[1::2, :3] + later[1::2]) / 6
        torch.testing.assert_close(got[:, :3], want, rtol=1e-4, atol=1e-4)
    assert (back[~batch.mask_BT] == 0).all()


@pytest.mark.parametrize("config", [RELEASED, replace(RELEASED, output="clean")], ids=["velocity", "clean"])
def test_clips_of_another_frame_rate_are_pretrained_on_at_the_models(config: HYMotionConfig) -> None:
    generator, batch, seen = make(config), body_batch(), []
    x1 = generator.encode(batch.motions[KIND], batch.lengths_B)

    def perfect(x: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        seen.append((x.shape, rest[-1]))
        return (x1 - x) / (1 - t)[:, None, None].float()

    loss_B, _ = generator.pretrain_loss(perfect, batch, 0, 0)
    assert float(loss_B.max()) < 1e-6
    assert seen[0][0] == (5, 24, 201) and seen[0][1].tolist() == generator.state_lengths(batch.lengths_B).tolist()
    whole, _ = generator.pretrain_loss(generator.network, batch, 0, 0)
    alone, _ = generator.pretrain_loss(generator.network, batch.slice(2, 3), 0, 0)
    torch.testing.assert_close(whole[2:3], alone, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss_from_closed_gates() -> None:
    generator, batch = make(replace(SMALL, zero_final=True, text_dropout=0.0), opened=False), make_batch()
    optimizer = torch.optim.AdamW(generator.network.parameters(), lr=3e-3)
    losses = []
    for step in range(80):
        loss = generator.pretrain_loss(generator.network, batch, step, seed=0)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("config", [SMALL, CLEAN, replace(RELEASED, native_fps=20.0)], ids=str)
def test_every_tensor_gets_a_gradient_once_the_gates_are_open(config: HYMotionConfig) -> None:
    generator = make(replace(config, text_dropout=0.7))
    generator.pretrain_loss(generator.network, make_batch(), 1, 0)[0].sum().backward()
    norms = {name: float(p.grad.norm()) for name, p in generator.network.named_parameters()}
    assert min(norms.values()) > 0, [name for name, norm in norms.items() if norm == 0]


def test_checkpointed_blocks_give_the_same_loss_and_gradients_with_less_memory() -> None:
    found = []
    for checkpointed in (False, True):
        generator = make(replace(SMALL, checkpoint_blocks=checkpointed))
        with SavedTensorMeter(ignore=generator.network.parameters()) as meter:
            loss = generator.pretrain_loss(generator.network, make_batch(), 0, 0)[0].mean()
            peak = meter.peak_bytes
            loss.backward()
        found.append((loss.detach(), [p.grad for p in generator.network.parameters()], peak))
    (loss, grads, plain), (again, same, small) = found
    assert torch.equal(loss, again) and small < 0.4 * plain
    for one, two in zip(grads, same, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


# -------------------------------------------------------------------------------------------------- configuration


def test_a_card_rebuilds_its_generator_and_refuses_other_statistics() -> None:
    text = TextSide("stub", TOKENS, POOLED)
    config = GeneratorConfig(model=replace(RELEASED, checkpoint_blocks=True), max_frames=16)
    first = build_generator(config, statistics(), text, 20.0)
    card = json.loads(json.dumps(generator_card(config, statistics(), text, 20.0)))
    found, second = generator_from_card(card, statistics())
    assert found == config and second.spec == first.spec and second.spec.guidance_scale == 5.0
    assert second.config.token_dim == TOKENS and second.config.pooled_dim == POOLED
    second.network.load_state_dict(first.network.state_dict(), strict=True)
    second.frozen.load_state_dict(first.frozen.state_dict(), strict=True)
    with pytest.raises(CheckpointError, match="normaliser"):
        generator_from_card(card, Normalizer(torch.zeros(135), torch.ones(135), KIND))
    assert FAMILIES["hymotion"][0] is HYMotionConfig


def test_impossible_settings_are_refused_with_their_names() -> None:
    with pytest.raises(ConfigError, match=r"width.*text_dropout"):
        HYMotionConfig(width=10, heads=3, text_dropout=1.0)
    with pytest.raises(ConfigError, match=r"min_frames.*fps_mode"):
        HYMotionConfig(min_frames=90, fps_mode="twice")
    with pytest.raises(ConfigError, match="solver"):
        GeneratorConfig(model=SMALL, solver="ddim")
    with pytest.raises(ConfigError, match="frames"):
        make().state_shape(17)


@pytest.mark.parametrize(("config", "blocks"), [(FULL, (9, 18)), (LITE, (6, 12))])
def test_released_sizes_are_the_published_ones(config: HYMotionConfig, blocks: tuple[int, int]) -> None:
    assert (config.double_blocks, config.single_blocks) == blocks and config.width // config.heads == 64
    assert (config.features, config.train_frames, config.band_frames, config.min_frames) == (201, 360, 60, 20)
