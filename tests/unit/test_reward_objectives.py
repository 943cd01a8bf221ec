"""Stage 1: what the step computes, and that the worker layout does not matter."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, RepresentationError
from motionrft.core.types import MotionBatch
from motionrft.reward.noise import NoisePolicy
from motionrft.reward.objectives import SemanticConfig, SemanticObjective, scale_gradient
from tests.reward_fixtures import NORMALIZERS, TINY, make_backbone, make_batch

NAMES = ("kinematic", "joint", "rotation")


class ThreadedRank:
    """One of W ranks in one process: gathers through a shared list, gradient to its own rows only."""

    def __init__(self, rank: int, slots: list, barrier: threading.Barrier) -> None:
        self.rank, self.world = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def gather(self, value: Tensor) -> Tensor:
        self._slots[self.rank] = value
        self._barrier.wait()
        rows = torch.cat([v if r == self.rank else v.detach() for r, v in enumerate(self._slots)])
        self._barrier.wait()
        return rows


def gradients(objective: SemanticObjective, batch: MotionBatch, step: int = 2) -> tuple[float, dict[str, Tensor]]:
    loss, _ = objective(**SemanticObjective.inputs(batch, step))
    loss.backward()
    grads = {n: p.grad for n, p in objective.named_parameters() if p.requires_grad}
    missing = [n for n, g in grads.items() if g is None]
    assert not missing, f"an engine would refuse parameters without gradient: {missing}"
    return loss.item(), grads


def make_objective(config: SemanticConfig | None = None, collective: object = None, **model: object):
    backbone = make_backbone(replace(TINY, **model))
    return SemanticObjective(backbone, NORMALIZERS, config or SemanticConfig(), seed=0, collective=collective)


def test_two_ranks_give_the_gradient_of_one() -> None:
    # heavy contrastive weights, so that a wrong factor on the gathered part cannot hide
    config = SemanticConfig(cl=1.0, cra=1.0, cra_cl=1.0)
    batch = make_batch(num=6)
    whole_loss, whole = gradients(make_objective(config), batch)
    slots, barrier = [None, None], threading.Barrier(2)
    results: list = [None, None]

    # built here, not in the threads: seeding goes through the process-wide random state
    objectives = [make_objective(config, ThreadedRank(r, slots, barrier)) for r in range(2)]

    def work(rank: int) -> None:
        results[rank] = gradients(objectives[rank], batch.slice(3 * rank, 3 * rank + 3))

    threads = [threading.Thread(target=work, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sum(loss for loss, _ in results) / 2 == pytest.approx(whole_loss, rel=1e-5)
    for name, want in whole.items():
        got = (results[0][1][name] + results[1][1][name]) / 2
        assert float((got - want).abs().max()) < 2e-5 * (1 + float(want.abs().max())), name


def test_step_is_deterministic_and_another_step_or_seed_draws_other_noise() -> None:
    batch = make_batch()
    losses = [gradients(make_objective(), batch, step)[0] for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_total_is_the_weighted_sum_of_its_reported_parts() -> None:
    config = SemanticConfig(rec=0.7, kl=0.3, lat=0.2, cl=0.5, cra=0.4)
    loss, metrics = make_objective(config)(**SemanticObjective.inputs(make_batch(), 0))
    means = {k: sum(metrics[f"loss/{n}/{k}"] for n in NAMES) / 3 for k in ("rec", "kl", "lat", "cl")}
    want = sum(getattr(config, k) * v for k, v in means.items()) + 0.4 * metrics["loss/cra"]
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert all(v.dim() == 0 and not v.requires_grad for v in metrics.values())


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (SemanticConfig(rec=0.0), {}),
        (SemanticConfig(cra=0.0, kl=0.0, lat=0.0, sample_latent=False), {}),
        (SemanticConfig(divergence="js", mask_recon=False), {"text_time": True}),
        (SemanticConfig(), {"frames_per_token": 2, "representations": ("rotation", "joint")}),
        (SemanticConfig(), {"decoder_layers": 3, "num_layers": 1}),
    ],
    ids=["no-decoder", "few-terms", "js-padded", "two-frames-two-representations", "depths"],
)
def test_every_choice_trains_all_its_trainable_parameters(config: SemanticConfig, model: dict) -> None:
    loss, grads = gradients(make_objective(config, **model), make_batch())
    assert torch.isfinite(torch.tensor(loss))
    assert all(g.isfinite().all() for g in grads.values())


def test_padded_reconstruction_averages_over_padding_too() -> None:
    batch = make_batch()
    masked, padded = (
        make_objective(SemanticConfig(mask_recon=flag))(**SemanticObjective.inputs(batch, 0))[1]["loss/joint/rec"]
        for flag in (True, False)
    )
    assert padded < masked
    full = make_batch(full=True)
    masked, padded = (
        make_objective(SemanticConfig(mask_recon=flag))(**SemanticObjective.inputs(full, 0))[1]["loss/joint/rec"]
        for flag in (True, False)
    )
    assert masked.item() == pytest.approx(padded.item(), rel=1e-6)


def test_classmates_count_as_negatives_only_when_asked() -> None:
    batch = make_batch()
    clean = NoisePolicy(p_clean=1.0)
    losses = [
        make_objective(SemanticConfig(same_class_is_negative=flag, noise=clean))(**SemanticObjective.inputs(batch, 0))[
            1
        ]["loss/joint/cl"].item()
        for flag in (False, True)
    ]
    assert losses[0] < losses[1]


def test_missing_or_misaligned_representations_raise() -> None:
    batch = make_batch()
    inputs = SemanticObjective.inputs(batch, 0)
    short = inputs["motions"] | {"joint": inputs["motions"]["joint"][:, :-1]}
    without = {k: v for k, v in inputs["motions"].items() if k != "joint"}
    for motions in (short, without):
        with pytest.raises(RepresentationError, match="row-aligned"):
            make_objective()(**inputs | {"motions": motions})


def test_contradicting_settings_raise() -> None:
    with pytest.raises(ConfigError, match="every weight is zero"):
        SemanticConfig(rec=0, kl=0, lat=0, cl=0, cra=0)
    with pytest.raises(ConfigError, match="divergence"):
        SemanticConfig(divergence="wasserstein")
    with pytest.raises(ConfigError, match="always"):
        make_objective(time_token="none_when_clean")


def test_scaled_gradient_keeps_the_value_bit_for_bit() -> None:
    x = torch.tensor([0.1, 3.3e7], requires_grad=True)
    y = scale_gradient(x, 3.0)
    assert torch.equal(y, x)
    y.sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_stage1_learns_to_retrieve_eight_pairs_in_every_representation() -> None:
    objective = make_objective(SemanticConfig(sample_latent=False, noise=NoisePolicy(p_clean=0.5, max_t=100)))
    batch = make_batch(num=8)
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 3e-3)
    for step in range(200):
        optimiser.zero_grad()
        loss, _ = objective(**SemanticObjective.inputs(batch, step))
        loss.backward()
        optimiser.step()
    net = objective.backbone
    text = torch.nn.functional.normalize(net.text(batch.text.tokens_BLD, batch.text.mask_BL)[0], dim=-1)
    for name in NAMES:
        x = NORMALIZERS[name].normalise(batch.motions[name])
        mu = torch.nn.functional.normalize(net.motion(x, batch.lengths_B, name, torch.tensor(0))[0], dim=-1)
        assert (text @ mu.T).argmax(1).tolist() == list(range(8)), name
