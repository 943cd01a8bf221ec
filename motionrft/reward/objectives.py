"""The training steps of the reward model. `forward` is a whole differentiable step, so that any engine can wrap it.

Every objective takes physical motion, is deterministic given (seed, step, clip keys), and means the same on any worker
layout: per-sample terms are averaged over the local rows, batch-coupled terms see the global batch.
Letters: B local rows, W ranks, T frames, D features, L text tokens, E text features, d latent, R representations.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from motionrft.core.errors import ConfigError, RepresentationError, explain
from motionrft.core.protocols import Collective
from motionrft.core.rng import keyed_normal
from motionrft.core.types import MotionBatch, Representation, valid_mask
from motionrft.reward import losses
from motionrft.reward.adapters import AdaptedTower
from motionrft.reward.backbone import RewardBackbone
from motionrft.reward.config import check
from motionrft.reward.noise import NoisePolicy, draw_times, noised
from motionrft.reward.terms import MotionScale

Metrics = dict[str, Tensor]
Posterior = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SemanticConfig:
    """Weights and choices of stage 1. Defaults are the published weights on the corrected recipe."""

    rec: float = 1.0
    """Weight of the three reconstruction terms. 0 leaves the decoder out."""
    kl: float = 1e-5
    """Weight of the four KL terms."""
    lat: float = 1e-5
    """Weight of the distance between motion and text latent."""
    cl: float = 0.1
    """Weight of the text-motion InfoNCE."""
    cra: float = 0.1
    """Weight of the cross-representation alignment."""
    cra_lat: float = 0.1
    """Inside the alignment: weight of the latent distance."""
    cra_divergence: float = 1e-5
    """Inside the alignment: weight of the divergence."""
    cra_cl: float = 0.1
    """Inside the alignment: weight of the InfoNCE."""
    divergence: str = "jeffreys"
    """Divergence of the alignment: "jeffreys" (published code) or "js" (true Jensen-Shannon)."""
    temperature: float = 0.1
    """Of every InfoNCE."""
    reduction: str = "mean"
    """Of the two directions of every InfoNCE: "mean" (published code, whose weights go with it) or "sum" (paper)."""
    threshold: float = 0.9
    """Captions closer than this (cosine rescaled to [0, 1]) are no negatives of each other."""
    same_class_is_negative: bool = False
    """Count clips of one known semantic class as negatives of each other."""
    mask_recon: bool = True
    """Average reconstruction over valid frames; False counts padding, as the published code."""
    sample_latent: bool = True
    """Train on posterior samples; False trains on the means."""
    noise: NoisePolicy = field(default_factory=NoisePolicy)
    """How motions are made noisy."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        names = ("rec", "kl", "lat", "cl", "cra", "cra_lat", "cra_divergence", "cra_cl")
        check(
            *((getattr(self, n) >= 0, f"{n} must not be negative") for n in names),
            (any(getattr(self, n) > 0 for n in names[:5]), "every weight is zero"),
            (self.divergence in ("jeffreys", "js"), "divergence must be 'jeffreys' or 'js'"),
            (self.temperature > 0, "temperature must be positive"),
            (self.reduction in ("mean", "sum"), "reduction must be 'mean' or 'sum'"),
            (0.0 <= self.threshold <= 1.0, "threshold must be in [0, 1]"),
            where="reward.semantic",
        )


@dataclass(frozen=True)
class SplConfig:
    """Self-refinement preference learning (Eqs. 11-13): the right motion against the best-ranked wrong one."""

    weight: float = 1e-2
    """Of the loss, beside the terms of stage 1 (published code)."""
    temperature: float = 0.1
    """Of the two rewards' softmax: 1 is the paper, 0.01 what the published code does in effect."""
    k: int = 10
    """A caption whose own motion is among its k nearest is right and adds nothing."""
    mode: str = "bank"
    """ "bank" mines over all training motions (paper), "in_batch" over the global batch (published code)."""
    refresh_every: int = 200
    """Batches between two minings of the bank."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        check(
            (self.weight >= 0, "weight must not be negative"),
            (self.temperature > 0, "temperature must be positive"),
            (self.k >= 1, "k must be at least 1"),
            (self.mode in ("bank", "in_batch"), "mode must be 'bank' or 'in_batch'"),
            (self.refresh_every >= 1, "refresh_every must be at least 1"),
            where="reward.spl",
        )


@dataclass(frozen=True)
class Relations:
    """What decides which rows of a batch count as negatives of each other."""

    pooled_BE: Tensor  # (B, E) sentence embeddings
    class_ids_B: Tensor  # (B,) int64 semantic class, -1 = unknown
    keys_B: Tensor  # (B,) int64 clip keys

    @classmethod
    def of(cls, batch: MotionBatch) -> Relations:
        """Return those of a batch."""
        return cls(batch.text.pooled_BD, batch.class_ids_B, batch.keys_B)


@dataclass(frozen=True)
class LoserMotions:
    """Hard negatives of some rows of a batch, in one representation."""

    rows: Tensor  # (H,) int64: whose hard negative each is
    motion_HTD: Tensor  # physical motion
    lengths_H: Tensor  # (H,) int64
    keys_H: Tensor  # (H,) int64 clip keys


Losers = Mapping[str, LoserMotions]


class SemanticObjective(nn.Module):
    """Stage 1: reconstruction, KL, latent and contrastive terms per representation, plus their mutual alignment.

    All representations of the same clips pass the shared encoder as one batch. Clips are noised before encoding and
    reconstructed clean.

    Args:
        backbone: what is trained.
        normalizers: one per representation of the backbone.
        config: weights and choices.
        seed: of noise and latent samples.
        collective: gathers embeddings of all ranks for the contrastive terms; the backward of its gather sums over
            ranks what each rank's (whole) loss wants of the local rows, and the engine averages. None = one process.
        spl: self-refinement on top of stage 1; None = stage 1 alone.
    """

    def __init__(
        self,
        backbone: RewardBackbone,
        normalizers: Mapping[Representation, MotionScale],
        config: SemanticConfig,
        seed: int,
        collective: Collective | None = None,
        spl: SplConfig | None = None,
    ) -> None:
        super().__init__()
        self.spl = spl
        if backbone.config.time_token != "always":
            raise ConfigError(
                explain("time_token 'always'", "'none_when_clean'", "SemanticObjective", "It is for imported weights.")
            )
        self.backbone, self.config, self.seed, self.collective = backbone, config, seed, collective
        self.normalizers = _complete(normalizers, backbone.config.representations)
        if backbone.text.time is not None:
            backbone.text.time.requires_grad_(False)  # the published mode never feeds it
        if config.rec == 0:
            backbone.decoder.requires_grad_(False)

    @staticmethod
    def inputs(batch: MotionBatch, step: int) -> dict[str, Any]:
        """Return the keyword arguments of `forward` for a batch."""
        return {
            "motions": {str(r): m for r, m in batch.motions.items()},
            "lengths_B": batch.lengths_B,
            "tokens_BLE": batch.text.tokens_BLD,
            "text_mask_BL": batch.text.mask_BL,
            "relations": Relations.of(batch),
            "keys_B": batch.keys_B,
            "step": step,
        }

    def forward(
        self,
        motions: Mapping[str, Tensor],
        lengths_B: Tensor,
        tokens_BLE: Tensor,
        text_mask_BL: Tensor,
        relations: Relations,
        keys_B: Tensor,
        step: int,
        losers: Losers | None = None,
        latent_gradient: Tensor | None = None,
        embed_only: bool = False,
    ) -> Any:
        """Return (loss, metrics), 0-d each. `motions` holds physical motion (B, T, D) of every representation.

        Args:
            motions: representation -> physical motion.
            lengths_B: int64 lengths.
            tokens_BLE: caption tokens.
            text_mask_BL: their mask.
            relations: what decides which rows are negatives of each other.
            keys_B: sample keys of noise and latents.
            step: batch index.
            losers: hard negatives of self-refinement, mined over the bank.
            latent_gradient: (B, K, d) gradient of the batch-coupled losses with respect to what `embed_only` returned
                for these rows: it replaces those losses (see `training.recipes.reward.learn_in_parts`).
            embed_only: return the (B, K, d) latents that the batch-coupled losses read, and nothing else.
        """
        net, cfg, names = self.backbone, self.config, self.backbone.config.representations
        num_frames = _common_frames(motions, names)
        mask_BT = valid_mask(lengths_B, num_frames)
        clean = {n: _normalised(self.normalizers[n], motions[n], mask_BT) for n in names}
        t_B = draw_times(keys_B, cfg.noise, self.seed, step)
        noisy = {n: noised(clean[n], lengths_B, t_B, keys_B, n, self.seed, step) for n in names}

        motion = _encode_all(net.motion, noisy, lengths_B, t_B)
        text = net.text(tokens_BLE, text_mask_BL)
        z_text = self._latent(text, keys_B, "text", step)
        z = {n: self._latent(motion[n], keys_B, n, step) for n in names}
        in_batch = self.spl is not None and self.spl.mode == "in_batch"
        means = [text[0], *(motion[n][0] for n in names)] if in_batch else []
        latents = torch.stack([z_text, *(z[n] for n in names), *means], dim=1)
        if embed_only:
            return latents

        with _full_precision(latents):
            loss, metrics = self._local(clean, motion, text, z, z_text, lengths_B, mask_BT)
            if self.spl is not None and losers is not None:
                refined, found = self._refine(motion, text, t_B, losers, step)
                loss, metrics = loss + self.spl.weight * refined, metrics | found
            if latent_gradient is None:
                coupled, found = self.coupled(latents, relations)
                loss, metrics = loss + coupled, metrics | found
            else:
                loss = loss + (latents.float() * latent_gradient).sum()
        metrics["loss/total"] = loss.detach()
        return loss, metrics

    def coupled(self, latents_BKd: Tensor, relations: Relations) -> tuple[Tensor, Metrics]:
        """Return the losses that see the global batch, weighted and summed, with metrics. Collective.

        Args:
            latents_BKd: what `forward(embed_only=True)` returned for this rank's rows.
            relations: of the same rows.
        """
        cfg, names = self.config, self.backbone.config.representations
        blocked_GG, same_clip_GG = self._blocked(relations)
        everyone = latents_BKd.float()
        if self.collective is not None and self.collective.world > 1:
            everyone = self.collective.gather(everyone)
        z_text, z = everyone[:, 0], {n: everyone[:, i + 1] for i, n in enumerate(names)}
        metrics: Metrics = {}
        terms = []
        for n in names:
            cl = losses.info_nce(z_text, z[n], cfg.temperature, blocked_GG, cfg.reduction).mean()
            terms.append(cfg.cl * cl)
            metrics[f"loss/{n}/cl"] = cl.detach()
            metrics[f"retrieval/{n}/batch_top1"] = batch_top1(z_text.detach(), z[n].detach(), blocked_GG)
        loss = torch.stack(terms).mean()
        if cfg.cra > 0 and len(names) > 1:
            pairs = [
                losses.info_nce(z[a], z[b], cfg.temperature, same_clip_GG, cfg.reduction).mean()
                for a, b in itertools.combinations(names, 2)
            ]
            alignment = torch.stack(pairs).mean()
            loss = loss + cfg.cra * cfg.cra_cl * alignment
            metrics["loss/cra/cl"] = alignment.detach()
        if self.spl is not None and self.spl.mode == "in_batch":
            means = everyone[:, len(names) + 1 :]
            refined, found = self._refine_in_batch(means, blocked_GG)
            loss, metrics = loss + self.spl.weight * refined, metrics | found
        return loss, metrics

    def _local(
        self,
        clean: Mapping[str, Tensor],
        motion: Mapping[str, Posterior],
        text: Posterior,
        z: Mapping[str, Tensor],
        z_text: Tensor,
        lengths_B: Tensor,
        mask_BT: Tensor,
    ) -> tuple[Tensor, Metrics]:
        """Return what is a mean over rows: reconstruction, KL, latent distance and the alignment's part of these."""
        cfg, names = self.config, self.backbone.config.representations
        parts = {n: _latent_terms(motion[n], text, z[n], z_text) for n in names}
        if cfg.rec > 0:
            for n, rec_B in self._reconstruct(clean, z, z_text, lengths_B, mask_BT).items():
                parts[n]["rec"] = rec_B
        terms: list[Tensor] = []
        metrics: Metrics = {}
        for n in names:
            means = {k: v.mean() for k, v in parts[n].items()}
            terms.append(torch.stack([getattr(cfg, k) * v for k, v in means.items()]).sum())
            metrics |= {f"loss/{n}/{k}": v.detach() for k, v in means.items()}
        loss = torch.stack(terms).mean()
        if cfg.cra > 0 and len(names) > 1:
            pairs = [
                alignment_terms(motion[a], motion[b], z[a], z[b], cfg.divergence)
                for a, b in itertools.combinations(names, 2)
            ]
            lat, divergence = (torch.stack(x).mean() for x in zip(*pairs, strict=True))
            loss = loss + cfg.cra * (cfg.cra_lat * lat + cfg.cra_divergence * divergence)
            metrics |= {"loss/cra/lat": lat.detach(), "loss/cra/divergence": divergence.detach()}
        return loss, metrics

    def _refine(
        self, motion: Mapping[str, Posterior], text: Posterior, t_B: Tensor, losers: Losers, step: int
    ) -> tuple[Tensor, Metrics]:
        """Return the self-refinement loss against mined motions, averaged over all rows and representations.

        A loser gets the time of its query and noise of its own: the two motions differ by content alone.
        """
        assert self.spl is not None
        terms, metrics = [], {}
        for n, found in losers.items():
            batch = len(t_B)
            if len(found.rows):
                mask_HT = valid_mask(found.lengths_H, found.motion_HTD.shape[1])
                clean = _normalised(self.normalizers[n], found.motion_HTD, mask_HT)
                t_H = t_B[found.rows]
                noisy = noised(clean, found.lengths_H, t_H, found.keys_H, n, "loser", self.seed, step)
                mu_l, _ = self.backbone.motion(noisy, found.lengths_H, n, t_H)
                r_w = losses.cosine(text[0][found.rows], motion[n][0][found.rows])
                r_l = losses.cosine(text[0][found.rows], mu_l)
                terms.append(losses.spl_loss(r_w.float(), r_l.float(), self.spl.temperature).sum() / batch)
                metrics[f"spl/{n}/gap"] = (r_w - r_l).detach().mean()
            else:
                terms.append(text[0].sum() * 0.0)
                metrics[f"spl/{n}/gap"] = text[0].new_zeros(())
            metrics[f"spl/{n}/wrong"] = text[0].new_tensor(len(found.rows) / batch)
        loss = torch.stack(terms).mean()
        return loss, metrics | {"loss/spl": loss.detach()}

    def _refine_in_batch(self, means_GRd: Tensor, blocked_GG: Tensor) -> tuple[Tensor, Metrics]:
        """Return the self-refinement loss with the global batch as the bank."""
        assert self.spl is not None
        text, names = means_GRd[:, 0], self.backbone.config.representations
        terms, metrics = [], {}
        for i, n in enumerate(names):
            sims = torch.nn.functional.normalize(text, dim=-1)
            sims = sims @ torch.nn.functional.normalize(means_GRd[:, i + 1], dim=-1).T
            own = torch.arange(len(sims), device=sims.device)
            worst = losses.hard_negatives(sims.detach(), own, blocked_GG, self.spl.k)
            r_l = sims.gather(1, worst.clamp(min=0)[:, None])[:, 0]
            loss_G = losses.spl_loss(sims.diagonal(), r_l, self.spl.temperature)
            terms.append(torch.where(worst >= 0, loss_G, 0.0).mean())
            metrics[f"spl/{n}/wrong"] = (worst >= 0).float().mean()
        loss = torch.stack(terms).mean()
        return loss, metrics | {"loss/spl": loss.detach()}

    def _reconstruct(
        self, clean: Mapping[str, Tensor], z: Mapping[str, Tensor], z_text: Tensor, lengths_B: Tensor, mask_BT: Tensor
    ) -> Metrics:
        """Return the reconstruction term per representation; the text latent's decoder states are shared by all."""
        decoder, num_frames = self.backbone.decoder, mask_BT.shape[1]
        latents = torch.cat([z_text, *z.values()])
        states = decoder.hidden(latents, lengths_B.repeat(1 + len(z)), num_frames).chunk(1 + len(z))
        terms = {}
        for n, state in zip(z, states[1:], strict=True):
            from_text, from_motion = (decoder.read(s, num_frames, n) for s in (states[0], state))
            valid_B = reconstruction(clean[n], from_motion, from_text, mask_BT)
            terms[n] = valid_B if self.config.mask_recon else valid_B * (lengths_B / num_frames)
        return terms

    def _latent(self, posterior: Posterior, keys_B: Tensor, stream: str, step: int) -> Tensor:
        mu, logvar = posterior
        if not self.config.sample_latent:
            return mu
        noise = keyed_normal(keys_B, tuple(mu.shape[1:]), "reward-latent", stream, self.seed, step).to(mu.dtype)
        return mu + torch.exp(0.5 * logvar.clamp(*losses.LOGVAR_RANGE)) * noise

    def _blocked(self, relations: Relations) -> tuple[Tensor, Tensor]:
        """Return (pairs that are no negatives, other views of the same clip), each (G, G) bool."""
        pooled, classes, keys = relations.pooled_BE, relations.class_ids_B, relations.keys_B
        if self.collective is not None:
            with torch.no_grad():
                pooled, classes, keys = (self.collective.gather(x) for x in (pooled, classes, keys))
        same_clip = losses.blocked_negatives(len(keys), keys_B=keys)
        masked_classes = None if self.config.same_class_is_negative else classes
        blocked = losses.blocked_negatives(len(keys), pooled, self.config.threshold, masked_classes)
        return blocked | same_clip, same_clip


def _latent_terms(motion: Posterior, text: Posterior, z: Tensor, z_text: Tensor) -> Metrics:
    kl = losses.jeffreys(*text, *motion) + losses.kl_to_prior(*motion) + losses.kl_to_prior(*text)
    return {"kl": kl, "lat": losses.smooth_l1(z, z_text)}


def reconstruction(clean: Tensor, from_motion: Tensor, from_text: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Return the three reconstruction distances summed per sample, (B,); None averages over padding too."""
    return (
        losses.smooth_l1(from_text, clean, mask_BT)
        + losses.smooth_l1(from_motion, clean, mask_BT)
        + losses.smooth_l1(from_motion, from_text, mask_BT)
    )


def alignment_terms(
    post_a: Posterior, post_b: Posterior, z_a: Tensor, z_b: Tensor, divergence: str
) -> tuple[Tensor, Tensor]:
    """Return (latent distance, divergence), 0-d each, of two representations of the same clips."""
    measure = losses.jeffreys if divergence == "jeffreys" else losses.jensen_shannon
    return losses.smooth_l1(z_a, z_b).mean(), measure(*post_a, *post_b).mean()


@dataclass(frozen=True)
class AdapterObjectiveConfig:
    """Choices of stages 2 and 3."""

    representations: tuple[str, ...] = ("kinematic", "joint", "rotation")
    """Representations the adapter is trained on; every batch must hold all of them."""
    noise: NoisePolicy = field(default_factory=lambda: NoisePolicy(p_clean=0.7))
    """Share and strength of noise; adapters that score noisy motion must have seen it."""


class _AdapterObjective(nn.Module):
    """What both adapter stages share: one adapter and its head train, the backbone is frozen and in eval mode."""

    name: str

    def __init__(
        self,
        adapted: AdaptedTower,
        normalizers: Mapping[Representation, MotionScale],
        config: AdapterObjectiveConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.adapted, self.config, self.seed = adapted, config, seed
        self.normalizers = _complete(normalizers, config.representations)
        adapted.trainable(self.name, config.representations)
        self.train()

    def train(self, mode: bool = True) -> _AdapterObjective:
        """Switch dropout of the trained adapter and head only."""
        self.training = mode
        self.adapted.set_training(self.name, mode)
        return self

    def _head(self, motions: Mapping[str, Tensor], lengths_B: Tensor, t_B: Tensor, noise_keys: tuple) -> list[Tensor]:
        """Return head outputs per representation; all of them pass the encoder as one batch."""
        keys_B, *parts = noise_keys
        mask_BT = valid_mask(lengths_B, _common_frames(motions, self.config.representations))
        noisy = {}
        for n in self.config.representations:
            clean = _normalised(self.normalizers[n], motions[n], mask_BT)
            noisy[n] = noised(clean, lengths_B, t_B, keys_B, n, *parts)
        with self.adapted.using(self.name) as tower:
            posteriors = _encode_all(tower, noisy, lengths_B, t_B)
        return [self.adapted.heads[self.name](mu) for mu, _ in posteriors.values()]


class PreferenceObjective(_AdapterObjective):
    """Stage 2: rank the preferred motion of a pair above the rejected one, in every representation."""

    name = "preference"

    def forward(
        self,
        preferred: Mapping[str, Tensor],
        rejected: Mapping[str, Tensor],
        preferred_lengths_B: Tensor,
        rejected_lengths_B: Tensor,
        keys_B: Tensor,
        step: int,
    ) -> tuple[Tensor, Metrics]:
        """Return (loss, metrics), 0-d each, for physical motions; `keys_B` names the pair.

        Both motions of a pair get the same time and the same noise: they differ by the motion alone.
        """
        t_B = draw_times(keys_B, self.config.noise, self.seed, step)
        both = {n: torch.cat([preferred[n], rejected[n]]) for n in self.config.representations}
        lengths = torch.cat([preferred_lengths_B, rejected_lengths_B])
        scores = self._head(both, lengths, t_B.repeat(2), (keys_B.repeat(2), self.seed, step))
        metrics, terms = {}, []
        for n, score in zip(self.config.representations, scores, strict=True):
            better, worse = score[:, 0].chunk(2)
            terms.append(losses.preference_loss(better, worse).mean())
            metrics[f"loss/{n}"] = terms[-1].detach()
            metrics[f"accuracy/{n}"] = losses.preference_accuracy(better, worse).detach()
        loss = torch.stack(terms).mean()
        metrics["loss/total"] = loss.detach()
        return loss, metrics


class AuthenticityObjective(_AdapterObjective):
    """Stage 3: tell captured (label 0) from generated (label 1) motion, in every representation."""

    name = "authenticity"

    def forward(
        self, motions: Mapping[str, Tensor], lengths_B: Tensor, labels_B: Tensor, keys_B: Tensor, step: int
    ) -> tuple[Tensor, Metrics]:
        """Return (loss, metrics), 0-d each, for physical motions of true lengths: padding must not tell the label."""
        t_B = draw_times(keys_B, self.config.noise, self.seed, step)
        logits = self._head(motions, lengths_B, t_B, (keys_B, self.seed, step))
        metrics, terms = {}, []
        for n, logits_B2 in zip(self.config.representations, logits, strict=True):
            terms.append(losses.authenticity_loss(logits_B2, labels_B).mean())
            metrics[f"loss/{n}"] = terms[-1].detach()
            metrics[f"accuracy/{n}"] = (logits_B2.argmax(1) == labels_B).float().mean()
        loss = torch.stack(terms).mean()
        metrics["loss/total"] = loss.detach()
        return loss, metrics


def batch_top1(text_BE: Tensor, motion_BE: Tensor, blocked_BB: Tensor) -> Tensor:
    """Return the fraction of captions whose own motion is nearest among the batch's allowed motions, 0-d."""
    logits = torch.nn.functional.normalize(text_BE, dim=-1) @ torch.nn.functional.normalize(motion_BE, dim=-1).T
    best = logits.masked_fill(blocked_BB, float("-inf")).argmax(1)
    return (best == torch.arange(len(best), device=best.device)).float().mean()


def _encode_all(tower: Any, motions: Mapping[str, Tensor], lengths_B: Tensor, t_B: Tensor) -> dict[str, Posterior]:
    """Return posteriors of several representations from one pass of the shared encoder."""
    projected = [tower.project(x, lengths_B, n) for n, x in motions.items()]
    tokens, mask = (torch.cat(parts) for parts in zip(*projected, strict=True))
    mu, logvar = tower.encode(tokens, mask, t_B.repeat(len(motions)))
    return dict(zip(motions, zip(mu.chunk(len(motions)), logvar.chunk(len(motions)), strict=True), strict=True))


def _complete(
    normalizers: Mapping[Representation, MotionScale], representations: tuple[str, ...]
) -> dict[str, MotionScale]:
    missing = [r for r in representations if Representation(r) not in normalizers]
    if missing:
        raise RepresentationError(
            explain("a normaliser per representation", f"none for {missing}", "reward objective", "Load its stats.")
        )
    return {r: normalizers[Representation(r)] for r in representations}


def _common_frames(motions: Mapping[str, Tensor], representations: tuple[str, ...]) -> int:
    missing = [r for r in representations if r not in motions]
    frames = {motions[r].shape[1] for r in representations if r in motions}
    if missing or len(frames) != 1:
        raise RepresentationError(
            explain(
                f"row-aligned motions in {list(representations)}",
                f"{ {k: tuple(v.shape) for k, v in motions.items()} }",
                "reward objective",
                "Collate all of them to one number of frames, or train fewer representations.",
            )
        )
    return frames.pop()


def _normalised(normalizer: MotionScale, motion_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT[..., None], normalizer.normalise(motion_BTD), 0.0)


def _full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
