"""Stage 1: what the step computes, and that the worker layout does not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import ConfigError, RepresentationError
from motionrft.core.types import MotionBatch
from motionrft.reward import losses
from motionrft.reward.noise import NoisePolicy, draw_times, noised
from motionrft.reward.objectives import LoserMotions, SemanticConfig, SemanticObjective, SplConfig
from motionrft.training.recipes.reward import learn_in_parts
from tests.reward_fixtures import NORMALIZERS, TINY, make_backbone, make_batch

NAMES = ("kinematic", "joint", "rotation")


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


def test_step_is_deterministic_and_another_step_or_seed_draws_other_noise() -> None:
    batch = make_batch()
    losses = [gradients(make_objective(), batch, step)[0] for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_total_is_the_weighted_sum_of_its_reported_parts() -> None:
    config = SemanticConfig(rec=0.7, kl=0.3, lat=0.2, cl=0.5, cra=0.4)
    loss, metrics = make_objective(config)(**SemanticObjective.inputs(make_batch(), 0))
    means = {k: sum(metrics[f"loss/{n}/{k}"] for n in NAMES) / 3 for k in ("rec", "kl", "lat", "cl")}
    cra = sum(getattr(config, f"cra_{k}") * metrics[f"loss/cra/{k}"] for k in ("lat", "divergence", "cl"))
    want = sum(getattr(config, k) * v for k, v in means.items()) + 0.4 * cra
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert all(v.dim() == 0 and not v.requires_grad for v in metrics.values())


def test_contrastive_directions_are_averaged_as_published_or_summed_as_in_the_paper() -> None:
    config = SemanticConfig(cl=0.5, cra=0.4, cra_cl=0.3)
    (loss_m, mean), (loss_s, summed) = (
        make_objective(replace(config, reduction=r))(**SemanticObjective.inputs(make_batch(), 0))
        for r in (SemanticConfig().reduction, "sum")
    )
    contrastive = [k for k in mean if k.endswith("/cl")]
    assert len(contrastive) == 4  # one per representation, one of the alignment
    for name, value in mean.items():
        if name != "loss/total":
            factor = 2 if name in contrastive else 1
            assert summed[name].item() == pytest.approx(factor * value.item(), rel=1e-5), name
    gained = 0.5 * sum(mean[f"loss/{n}/cl"] for n in NAMES) / 3 + 0.4 * 0.3 * mean["loss/cra/cl"]
    assert (loss_s - loss_m).item() == pytest.approx(gained.item(), rel=1e-4) and gained > 0


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
    with pytest.raises(ConfigError, match="reduction must be 'mean' or 'sum'"):
        SemanticConfig(reduction="none")
    with pytest.raises(ConfigError, match="every weight is zero"):
        SemanticConfig(rec=0, kl=0, lat=0, cl=0, cra=0)
    with pytest.raises(ConfigError, match="divergence"):
        SemanticConfig(divergence="wasserstein")
    with pytest.raises(ConfigError, match="always"):
        make_objective(time_token="none_when_clean")


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


def test_both_passes_of_a_micro_batch_drop_the_same_units_and_parts_drop_others() -> None:
    objective = make_objective(dropout=0.3)
    objective.train()
    first, second = [], []

    class Engine:
        def __call__(self, **inputs):
            if inputs.get("embed_only"):
                first.append(objective(**inputs))
                return first[-1]
            with torch.random.fork_rng(devices=[]):
                second.append(objective(**{**inputs, "embed_only": True, "latent_gradient": None}))
            return objective(**inputs)

        def backward(self, loss: Tensor) -> None:
            loss.backward()

    batch = make_batch(num=3)
    twice = MotionBatch(**{f: getattr(batch, f) for f in batch.__dataclass_fields__})
    learn_in_parts(Engine(), objective, [SemanticObjective.inputs(part, 0) for part in (batch, twice)])
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])


def test_self_refinement_reaches_both_sides_and_rows_without_loser_add_nothing() -> None:
    batch = make_batch()
    spl = SplConfig(weight=1.0)
    plain = make_objective(SemanticConfig(rec=0, kl=0, lat=0, cl=1.0, cra=0))
    objective = SemanticObjective(plain.backbone, NORMALIZERS, plain.config, seed=0, spl=spl)
    none = torch.zeros(0, dtype=torch.int64)
    nobody = LoserMotions(none, torch.zeros(0, 1, 66), none, none)
    one = LoserMotions(torch.tensor([2]), batch.motions[NAMES[1]][4:5], batch.lengths_B[4:5], batch.keys_B[4:5])
    inputs = SemanticObjective.inputs(batch, 0)
    base, _ = plain(**inputs)
    without, _ = objective(**inputs, losers={n: nobody for n in NAMES})
    loss, metrics = objective(**inputs, losers={n: one if n == "joint" else nobody for n in NAMES})
    assert without.item() == pytest.approx(base.item(), rel=1e-6)
    net = objective.backbone
    t = draw_times(batch.keys_B, plain.config.noise, 0, 0)
    text = net.text(batch.text.tokens_BLD, batch.text.mask_BL)[0][2:3]
    x = {i: NORMALIZERS["joint"].normalise(batch.motions["joint"][i : i + 1]) for i in (2, 4)}
    rows = [noised(x[i], batch.lengths_B[i : i + 1], t[2:3], batch.keys_B[i : i + 1], "joint", *extra)
            for i, extra in ((2, (0, 0)), (4, ("loser", 0, 0)))]  # fmt: skip
    mask = [torch.arange(12)[None, :, None] < batch.lengths_B[i] for i in (2, 4)]
    r_w, r_l = (
        torch.cosine_similarity(text, net.motion(r * m, batch.lengths_B[i : i + 1], "joint", t[2:3])[0])
        for r, m, i in zip(rows, mask, (2, 4), strict=True)
    )
    want = losses.spl_loss(r_w, r_l, spl.temperature) / 6 / 3  # mean over rows and representations
    assert loss.item() - base.item() == pytest.approx(want.item(), rel=1e-3)
    assert metrics["spl/joint/wrong"].item() == pytest.approx(1 / 6)
