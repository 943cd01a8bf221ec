"""Scores and losses know neither padding nor batch mates."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrft.core.types import Representation
from motionrft.reward import terms
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.noise import noised
from motionrft.reward.objectives import Relations, SemanticConfig, SemanticObjective
from tests.reward_fixtures import NORMALIZERS, TINY, make_adapted, make_backbone, make_batch

TERMS = ("semantic", "preference", "authenticity", *terms.TERMS)
REWARDS = {
    n: MotionReward(b, NORMALIZERS, make_adapted(b))
    for n in (1, 2, 3)
    for b in [make_backbone(replace(TINY, frames_per_token=n))]
}


def scores(reward: MotionReward, motion: torch.Tensor, lengths: torch.Tensor, name: str, text: torch.Tensor):
    found = reward.score(motion, lengths, Representation(name), text_BE=text, noise_level=0.2, terms=TERMS)
    return torch.stack([found.values[n] for n in TERMS])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 100),
    name=st.sampled_from([r.value for r in Representation]),
    frames_per_token=st.sampled_from([1, 2, 3]),
    extra=st.integers(0, 7),
    junk=st.floats(-50, 50),
)
def test_scores_ignore_what_stands_beyond_the_length_and_how_much_of_it(
    seed: int, name: str, frames_per_token: int, extra: int, junk: float
) -> None:
    reward, batch = REWARDS[frames_per_token], make_batch(seed=seed)
    motion, text = batch.motions[Representation(name)], reward.encode_text(batch.text)
    want = scores(reward, motion, batch.lengths_B, name, text)
    longer = torch.nn.functional.pad(motion, (0, 0, 0, extra))
    mask = torch.arange(longer.shape[1])[None] < batch.lengths_B[:, None]
    longer = torch.where(mask[..., None], longer, junk)
    got = scores(reward, longer, batch.lengths_B, name, text)
    assert float((got - want).abs().max()) < 1e-5 * (1 + float(want.abs().max()))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 100), name=st.sampled_from([r.value for r in Representation]), row=st.integers(0, 5))
def test_scores_of_one_clip_do_not_depend_on_its_batch(seed: int, name: str, row: int) -> None:
    reward, batch = REWARDS[2], make_batch(seed=seed)
    text = reward.encode_text(batch.text)
    want = scores(reward, batch.motions[Representation(name)], batch.lengths_B, name, text)[:, row]
    one = batch.slice(row, row + 1)
    alone = reward.encode_text(one.text)
    length = int(one.lengths_B)
    got = scores(reward, one.motions[Representation(name)][:, :length], one.lengths_B, name, alone)[:, 0]
    assert float((got - want).abs().max()) < 1e-5 * (1 + float(want.abs().max()))


@settings(max_examples=15, deadline=None)
@given(extra=st.integers(1, 9), step=st.integers(0, 50))
def test_noise_of_a_clip_depends_on_neither_padding_nor_batch_and_never_on_padded_frames(extra: int, step: int) -> None:
    batch = make_batch()
    x, t = batch.motions["joint"], torch.tensor([5, 0, 40, 7, 300, 0])
    want = noised(x, batch.lengths_B, t, batch.keys_B, "s", step)
    longer = torch.nn.functional.pad(x, (0, 0, 0, extra))
    got = noised(longer, batch.lengths_B, t, batch.keys_B, "s", step)
    assert torch.equal(got[:, : x.shape[1]], want)
    assert (got[:, x.shape[1] :] == 0).all()
    assert (want[~batch.mask_BT] == 0).all()
    assert torch.equal(want[[1, 5]], x[[1, 5]])
    alone = noised(x[2:3], batch.lengths_B[2:3], t[2:3], batch.keys_B[2:3], "s", step)
    assert torch.equal(alone, want[2:3])


@pytest.mark.parametrize("frames_per_token", [1, 2])
def test_stage1_loss_ignores_more_padding_and_the_order_of_clips(frames_per_token: int) -> None:
    batch = make_batch()
    backbone = make_backbone(replace(TINY, frames_per_token=frames_per_token))
    objective = SemanticObjective(backbone, NORMALIZERS, SemanticConfig(), seed=0)
    inputs = SemanticObjective.inputs(batch, 4)
    want = objective(**inputs)[0].item()
    padded = {n: torch.nn.functional.pad(m, (0, 0, 0, 5), value=3.0) for n, m in inputs["motions"].items()}
    assert objective(**inputs | {"motions": padded})[0].item() == pytest.approx(want, rel=1e-5)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    moved = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    moved["motions"] = {n: m[order] for n, m in inputs["motions"].items()}
    moved["relations"] = Relations(*(getattr(inputs["relations"], f.name)[order] for f in fields(Relations)))
    assert objective(**moved)[0].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", list(Representation))
def test_gradients_are_finite_on_padded_clips_for_every_term(name: Representation) -> None:
    reward, batch = REWARDS[2], make_batch()
    motion = batch.motions[name].clone().requires_grad_()
    scores(reward, motion, batch.lengths_B, name, reward.encode_text(batch.text)).sum().backward()
    assert motion.grad.isfinite().all()
    assert (motion.grad[~batch.mask_BT] == 0).all()
