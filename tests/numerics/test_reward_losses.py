"""Closed forms of the reward losses, schedules and adapter algebra."""

from __future__ import annotations

import math

import pytest
import torch

from motionrft.diffusion.solvers import flow_euler_table
from motionrft.nn.attention import Site
from motionrft.nn.embeddings import time_sinusoid
from motionrft.reward import losses
from motionrft.reward.noise import (
    NoisePolicy,
    add_noise,
    alpha_bar,
    draw_times,
    match_affine_noise,
    time_of_noise_level,
)
from motionrft.reward.objectives import alignment_terms, reconstruction

ZERO = torch.zeros(1, 3, dtype=torch.float64)


def gaussian(mean: float, variance: float, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    full = torch.ones(1, width, dtype=torch.float64)
    return full * mean, full * math.log(variance)


def test_kl_of_gaussians_is_the_closed_form_and_ignores_the_width() -> None:
    assert losses.gaussian_kl(*gaussian(1, 1), *gaussian(0, 1)).item() == pytest.approx(0.5, abs=1e-12)
    want = 0.5 * (3 - math.log(4))
    assert losses.gaussian_kl(*gaussian(0, 4), *gaussian(0, 1)).item() == pytest.approx(want, abs=1e-12)
    assert losses.kl_to_prior(*gaussian(0, 4, width=50)).item() == pytest.approx(want, abs=1e-12)


def test_kl_equals_torch_distributions() -> None:
    rng = torch.Generator().manual_seed(0)
    mu_q, mu_p, lv_q, lv_p = (torch.randn(4, 6, generator=rng, dtype=torch.float64) for _ in range(4))
    q, p = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((mu_q, lv_q), (mu_p, lv_p)))
    want = torch.distributions.kl_divergence(q, p).mean(1)
    assert torch.allclose(losses.gaussian_kl(mu_q, lv_q, mu_p, lv_p), want, atol=1e-12)


def test_jeffreys_sums_both_directions() -> None:
    assert losses.jeffreys(*gaussian(0, 4), *gaussian(0, 1)).item() == pytest.approx(1.125, abs=1e-12)
    assert losses.jeffreys(*gaussian(0, 1), *gaussian(1, 1)).item() == pytest.approx(1.0, abs=1e-12)


def test_jensen_shannon_equals_numerical_integration_and_stays_below_ln2() -> None:
    for a, b in (((0, 1), (2, 1)), ((0, 1), (1, 3)), ((-1, 0.3), (1, 1.5))):
        x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
        p, q = (torch.exp(torch.distributions.Normal(float(m), math.sqrt(v)).log_prob(x)) for m, v in (a, b))
        mixed = 0.5 * (p + q)
        parts = [torch.where(d > 1e-300, d * (d.clamp(min=1e-300) / mixed).log(), 0.0) for d in (p, q)]
        want = 0.5 * sum(torch.trapezoid(part, x).item() for part in parts)
        got = losses.jensen_shannon(*gaussian(*a), *gaussian(*b)).item()
        assert got == pytest.approx(want, abs=2e-4)
        assert losses.jensen_shannon(*gaussian(*b), *gaussian(*a)).item() == pytest.approx(got, abs=1e-12)
    assert losses.jensen_shannon(*gaussian(0, 1), *gaussian(0, 1)).item() == pytest.approx(0.0, abs=1e-12)
    assert losses.jensen_shannon(*gaussian(0, 1), *gaussian(60, 1)).item() == pytest.approx(math.log(2), abs=1e-9)


def test_smooth_l1_is_quadratic_then_linear() -> None:
    assert losses.smooth_l1(torch.tensor([[0.5, 2.0]]), torch.zeros(1, 2)).item() == pytest.approx(0.8125)


def test_reconstruction_sums_three_distances_and_ignores_masked_junk() -> None:
    x, from_motion, from_text = (torch.full((2, 5, 3), v) for v in (0.0, 0.5, 2.0))
    assert reconstruction(x, from_motion, from_text, None).tolist() == pytest.approx([2.625, 2.625])
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    from_text[1, 2:] = 1e6
    assert reconstruction(x, from_motion, from_text, mask).tolist() == pytest.approx([2.625, 2.625])


def test_info_nce_on_orthonormal_and_equal_rows() -> None:
    two, three, same = torch.eye(2), torch.eye(3), torch.ones(4, 3)
    for rows, want in ((two, math.log1p(math.exp(-10))), (three, math.log1p(2 * math.exp(-10))), (same, math.log(4))):
        assert losses.info_nce(rows, rows).mean().item() == pytest.approx(want, abs=1e-6)
        assert losses.info_nce(rows, rows, reduction="sum").mean().item() == pytest.approx(2 * want, abs=2e-6)


@pytest.mark.parametrize(("cosine", "want"), [(0.79, 0.0181499), (0.80, 0.0181499), (0.81, 0.0)])
def test_captions_above_the_threshold_are_no_negatives(cosine: float, want: float) -> None:
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    sine = math.sqrt(1 - cosine**2)
    sentences = torch.tensor([[1.0, 0.0], [cosine, sine]], dtype=torch.float64)
    blocked = losses.blocked_negatives(2, sentences, 0.9 + (1e-12 if cosine == 0.80 else 0.0))
    assert losses.info_nce(rows, rows, blocked_BB=blocked).mean().item() == pytest.approx(want, abs=1e-7)


def test_identical_captions_leave_no_negatives_and_no_loss() -> None:
    blocked = losses.blocked_negatives(2, torch.ones(2, 4))
    assert losses.info_nce(torch.eye(2), torch.eye(2), blocked_BB=blocked).tolist() == [0.0, 0.0]


def test_same_class_and_same_clip_are_blocked_but_unknown_classes_and_the_diagonal_are_not() -> None:
    blocked = losses.blocked_negatives(4, class_ids_B=torch.tensor([3, 3, -1, -1]))
    assert blocked.nonzero().tolist() == [[0, 1], [1, 0]]
    blocked = losses.blocked_negatives(3, keys_B=torch.tensor([5, 6, 5]))
    assert blocked.nonzero().tolist() == [[0, 2], [2, 0]]


def test_alignment_of_equal_posteriors_is_the_contrastive_part_alone() -> None:
    eye = torch.eye(2)
    post = (eye, torch.zeros(2, 2))
    lat, divergence = alignment_terms(post, post, eye, eye, "jeffreys")
    cl = losses.info_nce(eye, eye, 0.1).mean()
    assert (lat.item(), divergence.item()) == (0.0, 0.0)
    assert 0.1 * cl.item() == pytest.approx(0.1 * 4.5399e-5, abs=1e-7)


def test_preference_loss_and_accuracy_count_ties_as_wrong() -> None:
    better, worse = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    loss = losses.preference_loss(better, worse)
    assert loss.tolist() == pytest.approx([0.3132617, 0.6931472])
    assert loss.mean().item() == pytest.approx(0.5032044)
    assert losses.preference_accuracy(better, worse).item() == 0.5


def test_authenticity_loss_equals_binary_cross_entropy_on_the_logit_difference() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    labels = torch.tensor([0, 1])
    loss = losses.authenticity_loss(logits, labels)
    assert loss.tolist() == pytest.approx([0.1269280, 2.1269280])
    gap = logits[:, 0] - logits[:, 1]
    binary = torch.nn.functional.binary_cross_entropy_with_logits(gap, (labels == 0).float(), reduction="none")
    assert loss.tolist() == pytest.approx(binary.tolist())
    assert torch.sigmoid(gap[0]).item() == pytest.approx(0.8807971)


def test_schedule_has_the_published_values() -> None:
    got = alpha_bar()[[0, 499, 999]].tolist()
    assert got == pytest.approx([0.99915, 0.277670, 0.00466], abs=1e-5)
    one = torch.ones(1, 1, 1)
    assert add_noise(one, one, torch.tensor([0])).item() == pytest.approx(1.028730, abs=1e-6)


def test_noise_levels_map_to_the_nearest_trained_time() -> None:
    assert time_of_noise_level(0.0, 500) == 0
    for t in (1, 50, 333, 499):
        assert time_of_noise_level(math.sqrt(1 - alpha_bar()[t].item()), 500) == t
    assert time_of_noise_level(1.0, 500) == 499
    flow = flow_euler_table(4)
    for i, time in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        want = match_affine_noise(time, 1 - time, 1000)
        assert time_of_noise_level(float(flow.noise_level[i]), 1000) == want[0]
        assert float(flow.scale[i]) == pytest.approx(want[1])
    t, scale = match_affine_noise(0.7, 0.7, 1000)
    assert 340 < t < 370
    assert scale == pytest.approx(1 / (0.7 * math.sqrt(2)))


def test_drawn_times_have_the_share_of_clean_rows_and_the_range_asked_for() -> None:
    keys = torch.arange(20_000) * 31
    t = draw_times(keys, NoisePolicy(p_clean=0.3, max_t=100, low_t=10), "s", 0)
    assert (t == 0).float().mean().item() == pytest.approx(0.3 + 0.7 / 100, abs=0.015)
    assert t.max().item() == 99
    low = draw_times(keys, NoisePolicy(p_clean=0.0, max_t=100, low_t=10, p_low=0.8), "s", 0)
    assert (low < 10).float().mean().item() == pytest.approx(0.8 + 0.2 * 0.1, abs=0.015)
    assert (draw_times(keys, NoisePolicy(p_clean=1.0), "s", 0) == 0).all()


def test_time_sinusoid_is_cosines_then_sines() -> None:
    zero, one = time_sinusoid(torch.tensor([0, 1]), 512)
    assert zero.tolist() == [1.0] * 256 + [0.0] * 256
    got = [one[0].item(), one[256].item(), one[1].item()]
    assert got == pytest.approx([0.540302, 0.841471, math.cos(10000 ** (-1 / 256))], abs=1e-6)


def test_low_rank_update_by_hand_on_a_linear_layer_and_on_a_site() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.site = torch.nn.Linear(2, 2, bias=False), Site(2)

    pair = Pair()
    with torch.no_grad():
        pair.linear.weight.copy_(torch.eye(2))
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=2, target_modules=["linear", "site"]), pair, "a")
    for layer in (pair.linear, pair.site):
        layer.lora_A["a"].weight.data = torch.tensor([[1.0, 2.0]])
        layer.lora_B["a"].weight.data = torch.tensor([[3.0], [4.0]])
        assert layer(torch.ones(1, 2)).tolist() == [[19.0, 25.0]]


def test_spl_pulls_only_wrong_retrievals_and_stays_finite() -> None:
    winner, loser = torch.tensor([0.2, -0.8]), torch.tensor([0.6, 0.8])
    assert losses.spl_loss(winner, loser).tolist()[0] == pytest.approx(0.9130152)
    sharp = losses.spl_loss(winner, loser, 0.01)
    assert sharp.tolist() == pytest.approx([40.0, 160.0])
    # Eq. 13 written out: KL of (1, 0) against the softmax of both rewards
    want = -torch.log_softmax(torch.stack([winner, loser], 1), 1)[:, 0]
    assert torch.allclose(losses.spl_loss(winner, loser), want)


def test_hard_negative_is_the_best_wrong_motion_of_a_caption_that_misses_its_own() -> None:
    sims = torch.tensor([[0.2, 0.6], [0.1, 0.9]])
    own, none = torch.tensor([0, 1]), torch.zeros(2, 2, dtype=torch.bool)
    assert losses.hard_negatives(sims, own, none, 1).tolist() == [1, -1]
    assert losses.hard_negatives(sims, own, none, 2).tolist() == [-1, -1]
    assert losses.hard_negatives(sims, own, torch.tensor([[False, True], [False, False]]), 1).tolist() == [-1, -1]
    wide = torch.tensor([[0.5, 0.9, 0.8, 0.7]])
    blocked = torch.tensor([[False, True, False, False]])
    assert losses.hard_negatives(wide, torch.tensor([0]), blocked, 2).tolist() == [2]
    assert losses.hard_negatives(wide, torch.tensor([0]), blocked, 3).tolist() == [-1]  # own is third of what counts
