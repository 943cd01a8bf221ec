"""Sizes, sequences and limits of towers and decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from motionrft.core.errors import ConfigError, RepresentationError
from motionrft.core.types import Representation, valid_mask
from motionrft.nn.transformer import SkipEncoder
from motionrft.representations.normalize import Normalizer
from motionrft.reward.backbone import RewardBackbone, build_backbone
from motionrft.reward.checkpoint_keys import adapter_rules, backbone_rules, from_released, to_released
from motionrft.reward.config import PRESETS, MotionRewardConfig, reward_preset
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.objectives import SemanticConfig, SemanticObjective
from tests.reward_fixtures import NORMALIZERS, TINY, make_adapted, make_backbone, make_batch

PUBLISHED = {
    "retrieval_original": 26_817_232,
    "tiny": 4_310_480,
    "small": 13_994_960,
    "base": 42_491_856,
    "large": 113_866_448,
    "xlarge": 201_301_456,
    "xxlarge": 165_821_648,
    "giant": 264_597_328,
}


def count(module: torch.nn.Module) -> int:
    return sum(t.numel() for t in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_weights(name: str) -> None:
    with torch.device("meta"):
        assert count(RewardBackbone(PRESETS[name])) == PUBLISHED[name]


def test_every_tensor_has_a_released_name_and_the_way_back_is_exact() -> None:
    config = replace(TINY, text_time=True, proj_layers=3)
    backbone = make_backbone(config)
    state = backbone.state_dict()
    rules = backbone_rules(config)
    assert sorted(r.ours for r in rules) == sorted(state)
    back = from_released(to_released(state, rules), rules, "test")
    assert all(torch.equal(back[n], state[n]) for n in state)
    for name in ("preference", "authenticity"):
        adapter = {k: v for k, v in make_adapted(backbone).adapter_state(name).items() if k.startswith("adapter/")}
        assert sorted(r.ours for r in adapter_rules(config, name)) == sorted(adapter)


def test_configuration_reports_every_contradiction_at_once() -> None:
    with pytest.raises(ConfigError, match=r"num_layers must be odd.*dropout"):
        MotionRewardConfig(num_layers=4, dropout=1.5)
    with pytest.raises(ConfigError, match="Choose a known preset"):
        reward_preset("gigantic")
    with pytest.raises(ConfigError, match="num_layer"):
        reward_preset("tiny", num_layer=5)


def test_building_is_seeded_and_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, third = (build_backbone(TINY, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.motion.dist.weight, second.motion.dist.weight)
    assert not torch.equal(first.motion.dist.weight, third.motion.dist.weight)


def test_reading_one_position_equals_reading_all_and_keeping_the_first() -> None:
    for layers in (1, 3, 5):
        encoder = SkipEncoder(16, layers, 2, 32, 0.0).double()
        x = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        mask = valid_mask(torch.tensor([7, 4, 1]), 7)
        assert torch.allclose(encoder(x, mask, 1), encoder(x, mask)[:, :1], atol=1e-12)


def test_no_time_token_is_not_time_zero() -> None:
    tower, batch = make_backbone().motion, make_batch()
    x = batch.motions["joint"]
    none, zero = (tower(x, batch.lengths_B, "joint", t)[0] for t in (None, torch.tensor(0)))
    assert float((none - zero).detach().abs().max()) > 1e-3


def test_sequences_longer_than_the_position_table_raise() -> None:
    tower = make_backbone().motion
    fits = TINY.max_positions - 2
    x, t = torch.zeros(1, fits + 1, 66), torch.zeros(1)
    tower(x[:, :fits], torch.tensor([fits]), "joint", t)
    with pytest.raises(ConfigError, match="at most 80 positions"):
        tower(x, torch.tensor([fits + 1]), "joint", t)


def test_wrong_representation_or_feature_count_raises() -> None:
    tower, lengths = make_backbone(replace(TINY, representations=("joint",))).motion, torch.tensor([4])
    with pytest.raises(RepresentationError, match="kinematic"):
        tower(torch.zeros(1, 4, 263), lengths, "kinematic")
    with pytest.raises(RepresentationError, match=r"\(B, T, 66\)"):
        tower(torch.zeros(1, 4, 135), lengths, "joint")


KIT_WIDTHS = {"kinematic": 251, "joint": 63, "rotation": 129}


def test_twenty_two_joints_have_the_widths_of_the_representations() -> None:
    assert {r: TINY.feature_dim(r) for r in Representation} == {r: r.dim for r in Representation}


@pytest.mark.parametrize("frames_per_token", [1, 2])
def test_a_kit_sized_model_trains_scores_and_decodes_features_of_21_joints(frames_per_token: int) -> None:
    config = replace(TINY, num_joints=21, frames_per_token=frames_per_token)
    backbone, batch = make_backbone(config), make_batch()
    motions = {Representation(n): batch.motions[Representation(n)][..., :w] for n, w in KIT_WIDTHS.items()}
    objective = SemanticObjective(backbone, NORMALIZERS, SemanticConfig(), seed=0)
    loss, _ = objective(**objective.inputs(replace(batch, motions=motions), 0))
    loss.backward()
    assert all(p.grad is not None for p in [*backbone.motion.proj.parameters(), *backbone.decoder.final.parameters()])
    statistics = {r: Normalizer(torch.zeros(w), torch.ones(w), Representation(r)) for r, w in KIT_WIDTHS.items()}
    reward = MotionReward(backbone, {Representation(r): n for r, n in statistics.items()}, make_adapted(backbone))
    text = reward.encode_text(batch.text)
    for name, width in KIT_WIDTHS.items():
        kind = Representation(name)
        assert config.feature_dim(name) == width
        assert backbone.decoder(torch.zeros(6, TINY.latent_dim), batch.lengths_B, 12, name).shape == (6, 12, width)
        terms = ["semantic", "preference", "authenticity", "smoothness"]
        found = reward.score(motions[kind], batch.lengths_B, kind, text_BE=text, terms=terms).values
        assert all(v.isfinite().all() for v in found.values())
        with pytest.raises(RepresentationError, match=rf"\(B, T, {width}\).* of 21 joints"):
            reward.motion(batch.motions[kind], batch.lengths_B, name)


def test_the_presets_are_of_22_joints_and_other_bodies_are_refused() -> None:
    assert {p.num_joints for p in PRESETS.values()} == {22}
    with torch.device("meta"):
        tiny, kit = (count(RewardBackbone(replace(PRESETS["tiny"], num_joints=j))) for j in (22, 21))
    # one joint less: 12 + 3 + 6 features of width 256 going in and (width 128 and a bias) coming out
    assert tiny - kit == 21 * 256 + 21 * (128 + 1)
    with pytest.raises(ConfigError, match="num_joints must be one of"):
        MotionRewardConfig(num_joints=24)


@pytest.mark.parametrize("frames_per_token", [1, 2, 3])
def test_decoder_is_zero_beyond_the_length_and_has_the_shape_of_the_motion(frames_per_token: int) -> None:
    backbone = make_backbone(replace(TINY, frames_per_token=frames_per_token))
    lengths = torch.tensor([11, 4, 1])
    z = torch.randn(3, TINY.latent_dim, generator=torch.Generator().manual_seed(0))
    for name, dim in (("kinematic", 263), ("joint", 66), ("rotation", 135)):
        motion = backbone.decoder(z, lengths, 11, name)
        assert motion.shape == (3, 11, dim)
        mask = valid_mask(lengths, 11)
        assert (motion[~mask] == 0).all()
        assert (motion[mask] != 0).any(dim=-1).all()
