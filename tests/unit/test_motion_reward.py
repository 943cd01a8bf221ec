"""Scores: which terms, from which state, with which errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, RepresentationError
from motionrft.core.protocols import RewardModel
from motionrft.core.types import Representation
from motionrft.representations.normalize import Normalizer
from motionrft.reward import terms as terms_module
from motionrft.reward.losses import cosine
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.noise import time_of_noise_level
from motionrft.reward.terms import register_term
from tests.reward_fixtures import NORMALIZERS, TINY, make_adapted, make_backbone, make_batch

ALL = ("semantic", "preference", "authenticity", "similarity", "smoothness", "foot_sliding")


def make_reward(**changes: object) -> MotionReward:
    backbone = make_backbone(replace(TINY, **changes))
    return MotionReward(backbone, NORMALIZERS, make_adapted(backbone))


def score(reward: MotionReward, name: str = "kinematic", terms: tuple[str, ...] = ALL, **more: object) -> dict:
    batch = make_batch()
    motion = batch.motions[Representation(name)]
    target = reward.embed(motion.flip(0), batch.lengths_B.flip(0), Representation(name))
    given = {"text_BE": reward.encode_text(batch.text), "target_BE": target, "terms": terms} | more
    return dict(reward.score(motion, batch.lengths_B, Representation(name), **given).values)


def test_reward_satisfies_the_protocol_and_returns_exactly_the_terms_asked_for() -> None:
    reward = make_reward()
    assert isinstance(reward, RewardModel)
    for name in Representation:
        values = score(reward, name)
        assert tuple(values) == ALL
        assert all(v.shape == (6,) and v.dtype == torch.float32 and v.isfinite().all() for v in values.values())
        assert (values["semantic"].abs() <= 1).all()
        assert ((values["authenticity"] > 0) & (values["authenticity"] < 1)).all()
    assert tuple(score(reward, terms=("smoothness",))) == ("smoothness",)


def test_scores_are_deterministic_and_stay_so_in_train_mode() -> None:
    reward = make_reward(dropout=0.3)
    first = score(reward)
    reward.train()
    second = score(reward)
    assert all(torch.equal(first[n], second[n]) for n in ALL)


@pytest.mark.parametrize("name", list(Representation))
def test_folded_scores_and_gradients_equal_the_adapted_ones(name: Representation) -> None:
    reward = make_reward()
    batch = make_batch()
    text = reward.encode_text(batch.text)
    results = []
    for _ in range(2):
        motion = batch.motions[name].clone().requires_grad_()
        terms = reward.score(motion, batch.lengths_B, name, text_BE=text, noise_level=0.3, terms=ALL[:3])
        total = terms.total({"semantic": 1.0, "preference": 0.3, "authenticity": 0.3})
        results.append((total.detach(), torch.autograd.grad(total.sum(), motion)[0]))
        reward.freeze_for_scoring()
    assert float((results[0][0] - results[1][0]).abs().max()) < 1e-5
    assert float((results[0][1] - results[1][1]).abs().max()) < 1e-5


def test_semantic_is_the_cosine_of_posterior_means_of_normalised_motion() -> None:
    reward, batch = make_reward(), make_batch()
    x = NORMALIZERS[Representation.JOINT].normalise(batch.motions["joint"])
    mu, _ = reward.motion(x, batch.lengths_B, "joint", torch.tensor(0))
    want = cosine(mu, reward.text(batch.text.tokens_BLD, batch.text.mask_BL)[0])
    assert torch.allclose(score(reward, "joint")["semantic"], want, atol=1e-6)


def test_similarity_of_a_motion_with_itself_is_one() -> None:
    reward, batch = make_reward(), make_batch()
    target = reward.embed(batch.motions["joint"], batch.lengths_B, Representation.JOINT)
    assert score(reward, "joint", ("similarity",), target_BE=target)["similarity"].tolist() == pytest.approx([1.0] * 6)


def test_noise_level_chooses_the_time_token_and_clean_motion_gets_time_zero_or_none() -> None:
    seen: list[Tensor | None] = []
    for policy in ("always", "none_when_clean"):
        reward = make_reward(time_token=policy)
        reward.motion.forward = lambda x, lengths, name, t, inner=reward.motion.forward: (
            seen.append(t),
            inner(x, lengths, name, t),
        )[1]
        batch = make_batch()
        text = reward.encode_text(batch.text)
        for level in (0.0, 0.4):
            reward.score(
                batch.motions["joint"],
                batch.lengths_B,
                Representation.JOINT,
                text_BE=text,
                noise_level=level,
                terms=("semantic",),
            )
    noisy = time_of_noise_level(0.4, TINY.max_t)
    assert noisy > 0
    assert [None if t is None else t.unique().tolist() for t in seen] == [[0], [noisy], None, [noisy]]


def test_gradients_reach_the_valid_frames_and_nothing_else() -> None:
    reward, batch = make_reward(), make_batch()
    text = reward.encode_text(batch.text)
    assert not text.requires_grad
    motion = batch.motions["joint"].clone().requires_grad_()
    values = reward.score(motion, batch.lengths_B, Representation.JOINT, text_BE=text, terms=ALL[:3]).values
    sum(v.sum() for v in values.values()).backward()
    mask = batch.mask_BT
    assert (motion.grad[mask].abs().sum(-1) > 0).all()
    assert (motion.grad[~mask] == 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in reward.parameters())


def test_missing_adapters_targets_and_unknown_terms_are_errors_not_zeros() -> None:
    batch = make_batch()
    reward = MotionReward(make_backbone(), NORMALIZERS)
    assert set(score(reward, terms=("semantic", "smoothness"))) == {"semantic", "smoothness"}
    with pytest.raises(ConfigError, match="weights of these terms to 0"):
        score(reward, terms=("preference",))
    with pytest.raises(ConfigError, match="Embed the reference motion"):
        score(reward, terms=("similarity",), target_BE=None)
    with pytest.raises(ConfigError, match="beauty"):
        score(reward, terms=("beauty",))
    with pytest.raises(RepresentationError, match="normaliser per representation"):
        MotionReward(make_backbone(), {Representation.JOINT: NORMALIZERS[Representation.JOINT]})
    with pytest.raises(ConfigError, match="encoded with 12 features per token; got 16"):
        make_reward(text_token_dim=12).encode_text(batch.text)
    reward = MotionReward(make_backbone(replace(TINY, representations=("joint",))), NORMALIZERS)
    with pytest.raises(RepresentationError, match="Convert it"):
        reward.embed(batch.motions["rotation"], batch.lengths_B, Representation.ROTATION)


def test_an_adapter_scores_only_the_representations_it_was_trained_on() -> None:
    backbone = make_backbone()
    trained_on = {"preference": tuple(Representation), "authenticity": ("kinematic", "joint")}
    reward = MotionReward(backbone, NORMALIZERS, make_adapted(backbone), trained_on)
    for frozen in (False, True):
        if frozen:
            reward.freeze_for_scoring()
        assert score(reward, "joint", ("authenticity",))["authenticity"].isfinite().all()
        with pytest.raises(RepresentationError, match=r"\['kinematic', 'joint'\] for 'authenticity'.*'rotation'"):
            score(reward, "rotation", ("preference", "authenticity"))
        assert set(score(reward, "rotation", ("preference", "semantic"))) == {"preference", "semantic"}
    reward = MotionReward(backbone, NORMALIZERS, make_adapted(backbone), {"preference": tuple(Representation)})
    with pytest.raises(RepresentationError, match="a loaded 'authenticity' adapter"):
        score(reward, "joint", ("authenticity",))


def test_normaliser_files_class_is_accepted() -> None:
    stats = {r: Normalizer(torch.zeros(r.dim), torch.full((r.dim,), 2.0), r) for r in Representation}
    reward = MotionReward(make_backbone(), stats)
    assert score(reward, terms=("semantic",))["semantic"].isfinite().all()


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(terms_module.TERMS)
    yield
    terms_module.TERMS.clear()
    terms_module.TERMS.update(before)


def test_a_user_term_is_scored_by_its_name(clean_registry: None) -> None:
    reward = make_reward()  # built first: a term registered later is known to it

    @register_term
    class FirstFrameHeight:
        name = "first_frame_height"

        def __call__(self, motion):
            return motion.motion_BTD[:, 0, 1]

    batch = make_batch()
    values = score(reward, "joint", ("first_frame_height",))
    assert torch.equal(values["first_frame_height"], batch.motions["joint"][:, 0, 1])
    assert register_term(FirstFrameHeight) is FirstFrameHeight  # a notebook cell run twice
    for taken in ("first_frame_height", "semantic"):
        with pytest.raises(ConfigError, match="unused term name"):
            register_term(type("Another", (), {"name": taken}))


def test_smoothness_is_zero_on_straight_lines_and_minus_the_mean_square_otherwise() -> None:
    reward = make_reward()
    line = torch.arange(8.0)[None, :, None].expand(1, 8, 66) * 0.3
    kink = line.clone()
    kink[:, 4, 5] += 0.5  # normalised by 0.5: second differences 1, -2, 1 in one of 66 channels, 6 of them
    text = torch.ones(1, TINY.latent_dim)
    lengths = torch.tensor([8])
    flat, bent = (
        reward.score(m, lengths, Representation.JOINT, text_BE=text, terms=["smoothness"]).values["smoothness"].item()
        for m in (line, kink)
    )
    assert flat == pytest.approx(0.0, abs=1e-9)
    assert bent == pytest.approx(-(1 + 4 + 1) / 66 / 6, rel=1e-5)


def test_foot_sliding_counts_planar_speed_of_low_toes_only() -> None:
    reward = make_reward()
    joints = torch.zeros(2, 10, 22, 3)
    joints[:, :, 10:12, 0] = torch.arange(10.0)[None, :, None] * 0.05  # 1 m/s at 20 fps
    joints[1, :, :, 1] = 1.0  # in the air
    text = torch.ones(2, TINY.latent_dim)
    lengths = torch.tensor([10, 10])
    values = reward.score(joints.flatten(2), lengths, Representation.JOINT, text_BE=text, terms=["foot_sliding"]).values
    assert values["foot_sliding"].tolist() == pytest.approx([-1.0, 0.0], abs=2e-3)
