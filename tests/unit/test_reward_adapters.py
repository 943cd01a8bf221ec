"""Switching, binding, folding and training of the adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from motionrft.core.errors import CheckpointError
from motionrft.reward.adapters import AdaptedTower, tower_fingerprint
from motionrft.reward.config import AdapterConfig
from motionrft.reward.noise import NoisePolicy
from motionrft.reward.objectives import AdapterObjectiveConfig, AuthenticityObjective, PreferenceObjective
from tests.reward_fixtures import NORMALIZERS, TINY, make_adapted, make_backbone, make_batch

NAMES = ("kinematic", "joint", "rotation")


def encode(adapted: AdaptedTower, name: str | None) -> torch.Tensor:
    batch = make_batch()
    with adapted.using(name) as tower, torch.no_grad():
        return tower(batch.motions["kinematic"], batch.lengths_B, "kinematic")[0]


def test_fresh_adapters_change_nothing_bit_for_bit() -> None:
    backbone = make_backbone()
    adapted = AdaptedTower(backbone.motion, AdapterConfig(rank=4), seed=0)
    batch = make_batch()
    plain = backbone.motion(batch.motions["kinematic"], batch.lengths_B, "kinematic")[0]
    for name in (None, "preference", "authenticity"):
        assert torch.equal(encode(adapted, name), plain)


def test_switching_back_restores_the_encoding_and_nesting_restores_the_outer_adapter() -> None:
    adapted = make_adapted(make_backbone())
    base, preference, authenticity = (encode(adapted, n) for n in (None, "preference", "authenticity"))
    assert not torch.equal(base, preference)
    assert not torch.equal(preference, authenticity)
    with adapted.using("preference"):
        assert torch.equal(encode(adapted, None), base)
        assert torch.equal(encode(adapted, "authenticity"), authenticity)
        batch = make_batch()
        inside = adapted.tower(batch.motions["kinematic"], batch.lengths_B, "kinematic")[0]
        assert torch.equal(inside, preference)
    assert torch.equal(encode(adapted, None), base)


def test_switching_restores_the_state_after_an_error() -> None:
    adapted = make_adapted(make_backbone())
    base = encode(adapted, None)
    with pytest.raises(RuntimeError, match="inside"), adapted.using("preference"):
        raise RuntimeError("inside")
    assert torch.equal(encode(adapted, None), base)
    with pytest.raises(ValueError, match="unknown adapter"), adapted.using("beauty"):
        pass


def test_switching_never_changes_requires_grad() -> None:
    adapted = make_adapted(make_backbone())
    for name in (None, "preference", "authenticity", None):
        encode(adapted, name)
        assert not any(p.requires_grad for p in adapted.parameters())
    adapted.trainable("preference", NAMES)
    flags = [p.requires_grad for p in adapted.parameters()]
    assert any(flags)
    for name in ("authenticity", None, "preference"):
        with adapted.using(name):
            assert [p.requires_grad for p in adapted.parameters()] == flags


def test_folded_towers_equal_the_adapted_ones() -> None:
    adapted = make_adapted(make_backbone())
    batch = make_batch()
    for adapter in (None, "preference", "authenticity"):
        merged = adapted.merged(adapter)
        for name in NAMES:
            with adapted.using(adapter) as tower:
                want = tower(batch.motions[name], batch.lengths_B, name, torch.tensor(5))[0]
            got = merged(batch.motions[name], batch.lengths_B, name, torch.tensor(5))[0]
            assert float((want - got).abs().max()) < 1e-5


def test_adapters_share_the_backbone_weights_but_keep_its_state_dict_clean() -> None:
    backbone = make_backbone()
    names = list(backbone.state_dict())
    adapted = make_adapted(backbone)
    assert list(backbone.state_dict()) == names
    assert adapted.tower.dist.weight is backbone.motion.dist.weight
    state = backbone.motion.state_dict()
    kept = adapted.backbone_state()
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[n], state[n]) for n in state)


def test_adapter_state_round_trips_into_a_new_adapter() -> None:
    backbone = make_backbone()
    source, target = make_adapted(backbone, seed=0), make_adapted(backbone, seed=1)
    other = encode(target, "authenticity")
    target.load_adapter("preference", source.adapter_state("preference"), source.backbone_fingerprint)
    assert torch.equal(encode(source, "preference"), encode(target, "preference"))
    assert torch.equal(encode(target, "authenticity"), other)


def test_adapters_of_another_backbone_or_with_wrong_tensors_are_refused() -> None:
    adapted = make_adapted(make_backbone())
    state, own = adapted.adapter_state("preference"), adapted.backbone_fingerprint
    stranger = make_adapted(make_backbone(seed=1))
    with pytest.raises(CheckpointError, match="Load the backbone it was trained on"):
        stranger.load_adapter("preference", state, own)
    first = next(iter(state))
    with pytest.raises(CheckpointError, match="missing"):
        adapted.load_adapter("preference", {k: v for k, v in state.items() if k != first}, own)
    with pytest.raises(CheckpointError, match="unknown extra"):
        adapted.load_adapter("preference", state | {"extra": torch.zeros(1)}, own)
    wider = make_adapted(make_backbone(), rank=3).adapter_state("preference")
    with pytest.raises(CheckpointError, match="expected"):
        adapted.load_adapter("preference", wider, own)


def test_fingerprint_follows_the_weights() -> None:
    backbone = make_backbone()
    before = tower_fingerprint(backbone.motion)
    assert before == tower_fingerprint(make_backbone().motion)
    with torch.no_grad():
        backbone.motion.dist.bias[0] += 1e-3
    assert tower_fingerprint(backbone.motion) != before
    with pytest.raises(ValueError, match="already carries adapters"):
        tower_fingerprint(make_adapted(backbone).tower)


def step_inputs(objective: PreferenceObjective | AuthenticityObjective) -> dict[str, object]:
    batch = make_batch()
    motions = {str(r): m for r, m in batch.motions.items()}
    if isinstance(objective, PreferenceObjective):
        other = make_batch(seed=1)
        return {
            "preferred": motions,
            "rejected": {str(r): m for r, m in other.motions.items()},
            "preferred_lengths_B": batch.lengths_B,
            "rejected_lengths_B": other.lengths_B,
            "keys_B": batch.keys_B,
            "step": 3,
        }
    labels = torch.arange(len(batch)) % 2
    return {
        "motions": motions,
        "lengths_B": batch.lengths_B,
        "labels_B": labels,
        "keys_B": batch.keys_B,
        "step": 3,
    }


@pytest.mark.parametrize("kind", [PreferenceObjective, AuthenticityObjective])
def test_an_adapter_step_changes_its_adapter_and_head_and_nothing_else(kind: type) -> None:
    adapted = make_adapted(make_backbone())
    objective = kind(adapted, NORMALIZERS, AdapterObjectiveConfig(), seed=0)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, 1e-2)
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    loss, metrics = objective(**step_inputs(objective))
    loss.backward()
    assert all(p.grad is not None for p in trainable), "an engine would refuse parameters without gradient"
    optimiser.step()
    changed = {n for n, p in objective.named_parameters() if not torch.equal(before[n], p)}
    assert changed
    assert all(f".{kind.name}." in n for n in changed), sorted(n for n in changed if f".{kind.name}." not in n)
    expected = {n for n, p in objective.named_parameters() if p.requires_grad and p.grad.abs().max() > 0}
    assert changed >= expected
    assert metrics["loss/total"].item() == pytest.approx(loss.item())


def test_representations_that_are_not_trained_keep_their_projection_adapters() -> None:
    adapted = make_adapted(make_backbone())
    config = AdapterObjectiveConfig(representations=("joint",))
    objective = AuthenticityObjective(adapted, NORMALIZERS, config, seed=0)
    free = [n for n, p in adapted.tower.named_parameters() if p.requires_grad and n.startswith("proj.")]
    assert free
    assert all(n.startswith("proj.joint.") for n in free)
    loss, _ = objective(**step_inputs(objective))
    loss.backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_training_mode_reaches_the_adapter_alone() -> None:
    backbone = make_backbone(replace(TINY, dropout=0.1))
    adapted = AdaptedTower(backbone.motion, AdapterConfig(rank=2, dropout=0.2), seed=0)
    objective = PreferenceObjective(adapted, NORMALIZERS, AdapterObjectiveConfig(), seed=0)
    objective.train()
    active = {n for n, m in adapted.named_modules() if isinstance(m, torch.nn.Dropout) and m.training}
    assert active
    assert all(n.endswith("lora_dropout.preference") or n.startswith("heads.preference") for n in active)
    objective.eval()
    assert not any(m.training for m in adapted.modules())


@pytest.mark.parametrize("kind", [PreferenceObjective, AuthenticityObjective])
def test_adapters_learn_separable_data(kind: type) -> None:
    adapted = AdaptedTower(make_backbone().motion, AdapterConfig(rank=4, dropout=0.0), seed=0)
    objective = kind(adapted, NORMALIZERS, AdapterObjectiveConfig(noise=NoisePolicy(p_clean=1.0)), seed=0)
    inputs = step_inputs(objective)
    if kind is AuthenticityObjective:
        shift = inputs["labels_B"][:, None, None] * 0.5
        inputs["motions"] = {n: m + shift for n, m in inputs["motions"].items()}
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-2)
    for step in range(60):
        optimiser.zero_grad()
        loss, metrics = objective(**inputs | {"step": step})
        loss.backward()
        optimiser.step()
    assert all(metrics[f"accuracy/{n}"].item() == 1.0 for n in NAMES), {k: v.item() for k, v in metrics.items()}
