"""Losses of the reward model as pure functions: arrays in, one value per sample out; the caller averages last.

Letters: B batch, T frames, F features, d latent. Posteriors are (mu, logvar) of diagonal Gaussians. All in float32 or
better; the callers keep autocast away.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize, smooth_l1_loss, softplus

LOGVAR_RANGE = (-10.0, 10.0)


def smooth_l1(pred: Tensor, target: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Return the Huber distance (beta 1) per sample, (B,), averaged over its elements.

    Args:
        pred: (B, ...) array.
        target: same shape.
        mask_BT: valid frames of (B, T, F) arrays; None averages over everything, padding included.
    """
    error = smooth_l1_loss(pred, target, reduction="none")
    if mask_BT is None:
        return error.flatten(1).mean(1)
    return torch.where(mask_BT, error.mean(2), 0.0).sum(1) / mask_BT.sum(1)


def gaussian_kl(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """Return KL(q || p) per sample, (B,), averaged (not summed) over the latent axes."""
    logvar_q, logvar_p = logvar_q.clamp(*LOGVAR_RANGE), logvar_p.clamp(*LOGVAR_RANGE)
    gap = logvar_q - logvar_p
    per_axis = 0.5 * (gap.exp() + (mu_p - mu_q) ** 2 * torch.exp(-logvar_p) - 1.0 - gap)
    return per_axis.mean(-1)


def kl_to_prior(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(q || N(0, 1)) per sample, (B,)."""
    return gaussian_kl(mu, logvar, torch.zeros_like(mu), torch.zeros_like(logvar))


def jeffreys(mu_1: Tensor, logvar_1: Tensor, mu_2: Tensor, logvar_2: Tensor) -> Tensor:
    """Return KL(1 || 2) + KL(2 || 1) per sample: what the published code calls its JS divergence."""
    return gaussian_kl(mu_1, logvar_1, mu_2, logvar_2) + gaussian_kl(mu_2, logvar_2, mu_1, logvar_1)


def jensen_shannon(mu_1: Tensor, logvar_1: Tensor, mu_2: Tensor, logvar_2: Tensor, nodes: int = 64) -> Tensor:
    """Return the Jensen-Shannon divergence of the marginals per sample, (B,), averaged over axes; in [0, ln 2].

    No closed form exists for Gaussians. Each axis is integrated by Gauss-Hermite quadrature with `nodes` points, which
    is deterministic and differentiable.
    """
    logvar_1, logvar_2 = logvar_1.clamp(*LOGVAR_RANGE), logvar_2.clamp(*LOGVAR_RANGE)
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    x_n = mu_1.new_tensor(points)
    w_n = mu_1.new_tensor(weights / math.sqrt(2.0 * math.pi))

    def divergence_from_mixture(mu_a: Tensor, logvar_a: Tensor, mu_b: Tensor, logvar_b: Tensor) -> Tensor:
        # x = mu_a + std_a u. log a(x) and log b(x) share the constant -ln(2 pi) / 2, which cancels.
        log_a = -0.5 * (x_n**2 + logvar_a[..., None])
        offset = mu_a[..., None] + torch.exp(0.5 * logvar_a)[..., None] * x_n - mu_b[..., None]
        log_b = -0.5 * (offset**2 * torch.exp(-logvar_b)[..., None] + logvar_b[..., None])
        return ((math.log(2.0) - softplus(log_b - log_a)) * w_n).sum(-1)

    forward = divergence_from_mixture(mu_1, logvar_1, mu_2, logvar_2)
    backward = divergence_from_mixture(mu_2, logvar_2, mu_1, logvar_1)
    return (0.5 * (forward + backward)).mean(-1)


def blocked_negatives(
    num: int,
    sentence_BE: Tensor | None = None,
    threshold: float = 0.9,
    class_ids_B: Tensor | None = None,
    keys_B: Tensor | None = None,
) -> Tensor:
    """Return the (B, B) bool mask of pairs that must not count as negatives; the diagonal is never blocked.

    Args:
        num: batch size B.
        sentence_BE: unit-norm sentence embeddings; pairs with cosine > 2 threshold - 1 (strict) are blocked.
        threshold: of the rescaled similarity (cos + 1) / 2.
        class_ids_B: semantic classes; equal known classes (>= 0) are blocked.
        keys_B: clip keys; another view of the same clip is blocked.
    """
    some = next((x for x in (sentence_BE, class_ids_B, keys_B) if x is not None), None)
    blocked = torch.zeros(num, num, dtype=torch.bool, device=None if some is None else some.device)
    if sentence_BE is not None:
        unit = normalize(sentence_BE, dim=-1)
        blocked |= unit @ unit.T > 2.0 * threshold - 1.0
    if class_ids_B is not None:
        blocked |= (class_ids_B[:, None] == class_ids_B[None, :]) & (class_ids_B >= 0)[:, None]
    if keys_B is not None:
        blocked |= keys_B[:, None] == keys_B[None, :]
    return blocked & ~torch.eye(num, dtype=torch.bool, device=blocked.device)


def info_nce(
    x_BE: Tensor, y_BE: Tensor, temperature: float = 0.1, blocked_BB: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Return the symmetric contrastive loss per pair, (B,); its mean over B is the batch's InfoNCE.

    Args:
        x_BE: one side; row i belongs to row i of `y_BE`.
        y_BE: other side.
        temperature: of the cosine similarities.
        blocked_BB: pairs left out of the negatives.
        reduction: "mean" averages the two directions (published code), "sum" adds them (paper).
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    logits = normalize(x_BE, dim=-1) @ normalize(y_BE, dim=-1).T / temperature
    if blocked_BB is not None:
        logits = logits.masked_fill(blocked_BB, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    rows = cross_entropy(logits, target, reduction="none")
    columns = cross_entropy(logits.T, target, reduction="none")
    return (rows + columns) * (0.5 if reduction == "mean" else 1.0)


def spl_loss(winner_B: Tensor, loser_B: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL((1, 0) || softmax((winner, loser) / temperature)) per row, (B,): Eq. 13 for a wrong retrieval.

    Where retrieval was right winner and loser are one motion, target and prediction are (1/2, 1/2), and both loss and
    gradient are exactly zero: such rows are left out by the caller.
    """
    return softplus((loser_B - winner_B) / temperature)


def hard_negatives(sims_QN: Tensor, own_Q: Tensor, blocked_QN: Tensor, k: int) -> Tensor:
    """Return the best-ranked wrong motion of each query, (Q,) int64; -1 where its own motion is among the top k.

    Args:
        sims_QN: rewards of all motions of the bank, row = caption.
        own_Q: the query's own motion (column).
        blocked_QN: motions that are neither right nor wrong: other views of the clip, equal captions.
        k: ranks that count as right (Eqs. 11 and 12).
    """
    own = sims_QN.gather(1, own_Q[:, None])
    wrong = sims_QN.masked_fill(blocked_QN, float("-inf")).scatter(1, own_Q[:, None], float("-inf"))
    best, column = wrong.max(dim=1)
    found = ((wrong > own).sum(1) >= k) & (best > float("-inf"))
    return torch.where(found, column, -1)


def preference_loss(preferred_B: Tensor, rejected_B: Tensor) -> Tensor:
    """Return -ln sigmoid(preferred - rejected) per pair, (B,)."""
    return softplus(rejected_B - preferred_B)


def preference_accuracy(preferred_B: Tensor, rejected_B: Tensor) -> Tensor:
    """Return the fraction of pairs ranked correctly, 0-d; ties are wrong."""
    return (preferred_B > rejected_B).to(preferred_B.dtype).mean()


def authenticity_loss(logits_B2: Tensor, labels_B: Tensor) -> Tensor:
    """Return cross entropy per sample, (B,). Index 0 = real, 1 = generated, in logits as in labels."""
    return cross_entropy(logits_B2, labels_B, reduction="none")


def cosine(x_BE: Tensor, y_BE: Tensor) -> Tensor:
    """Return the cosine similarity per row, (B,)."""
    return cosine_similarity(x_BE, y_BE, dim=-1)
