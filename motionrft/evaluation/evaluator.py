"""A text-motion embedding that only measures: strided convolutions and recurrent networks, trained contrastively.

It shares no weights, architecture or text front end with any reward. Two evaluators of a run differ in seed (initial
weights) and in the data order the training recipe derives from it.

The motion side reads root motion and joint positions (channels 0:67 of the kinematic features) and their frame
differences. Results do not depend on padding: everything beyond a clip's length is zeroed after every convolution.

Letters: B clips, T frames, C channels, L words, E latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from motionrft.core.errors import ConfigError, RepresentationError, explain
from motionrft.core.protocols import Collective
from motionrft.core.rng import derive_seed, keyed_normal, stable_key
from motionrft.core.types import MotionBatch, Representation, valid_mask
from motionrft.evaluation.vocabulary import PAD, UNKNOWN, Vocabulary
from motionrft.representations.kinematic_layout import T2M_LAYOUT
from motionrft.representations.normalize import Normalizer
from motionrft.reward.losses import blocked_negatives, info_nce

CHANNELS = T2M_LAYOUT.joint_positions.stop  # 67: root motion and positions; rotations and velocities follow from them
_STRIDE = 4
_ENCODE_ROWS = 256


@dataclass(frozen=True)
class EvaluatorConfig:
    """Size and training choices of an evaluator."""

    latent_dim: int = 64
    """Width of the embeddings."""
    conv_dim: int = 192
    """Channels of the two strided convolutions."""
    hidden_dim: int = 128
    """Units per direction of both recurrent networks."""
    word_dim: int = 64
    """Width of the word table."""
    max_words: int = 32
    """Further words of a caption are not read."""
    word_dropout: float = 0.05
    """Share of training words replaced by the unknown word, so that its vector means something."""
    temperature: float = 0.07
    """Initial temperature of the contrastive loss; learned."""
    min_temperature: float = 0.01
    """The learned temperature stays between this and 1."""
    input_noise: float = 0.0
    """Standard deviation of training noise on normalised input. It blinds the evaluator to jitter: leave it at 0."""
    seed: int = 0
    """Of initial weights, word dropout and input noise; the recipe also derives the data order from it."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        sizes = ("latent_dim", "conv_dim", "hidden_dim", "word_dim", "max_words")
        problems = [f"{n} must be at least 1, got {getattr(self, n)}" for n in sizes if getattr(self, n) < 1]
        if not 0.0 <= self.word_dropout < 1.0:
            problems.append(f"word_dropout must be in [0, 1), got {self.word_dropout}")
        if not 0.0 < self.min_temperature <= self.temperature <= 1.0:
            problems.append("0 < min_temperature <= temperature <= 1 does not hold")
        if self.input_noise < 0:
            problems.append(f"input_noise must not be negative, got {self.input_noise}")
        if problems:
            raise ConfigError("evaluator: " + "; ".join(problems))


class Evaluator(nn.Module):
    """Unit-norm embeddings of motions and captions.

    Args:
        config: sizes and seed.
        vocabulary: words of the training captions.
        normalizer: kinematic statistics of the training split; its numbers travel inside the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EvaluatorConfig, vocabulary: Vocabulary, normalizer: Normalizer) -> None:
        super().__init__()
        if normalizer.representation is not Representation.KINEMATIC or len(normalizer.mean) != T2M_LAYOUT.dim:
            raise RepresentationError(
                explain(
                    f"a normaliser of {T2M_LAYOUT.dim} kinematic features",
                    f"{len(normalizer.mean)} features of {normalizer.representation.value!r}",
                    "evaluator",
                    "Pass the kinematic statistics of the training split.",
                )
            )
        self.config, self.vocabulary, self.normalizer_fingerprint = config, vocabulary, normalizer.fingerprint
        self.register_buffer("mean", normalizer.mean[:CHANNELS].clone())
        self.register_buffer("std", normalizer.std[:CHANNELS].clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("evaluator/init", config.seed))
            hidden = config.hidden_dim
            self.conv_1 = nn.Conv1d(2 * CHANNELS, config.conv_dim, 4, stride=2, padding=1)
            self.conv_2 = nn.Conv1d(config.conv_dim, config.conv_dim, 4, stride=2, padding=1)
            self.motion_gru = nn.GRU(config.conv_dim, hidden, batch_first=True, bidirectional=True)
            self.motion_head = _head(2 * hidden, config.latent_dim)
            self.words = nn.Embedding(len(vocabulary), config.word_dim, padding_idx=PAD)
            self.text_gru = nn.GRU(config.word_dim, hidden, batch_first=True, bidirectional=True)
            self.text_head = _head(2 * hidden, config.latent_dim)

    def normalise(self, motion_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the read channels (B, T, 67) of physical kinematic features, normalised, zero beyond each length."""
        if motion_BTD.ndim != 3 or motion_BTD.shape[-1] != T2M_LAYOUT.dim:
            raise RepresentationError(
                explain(
                    f"kinematic features (B, T, {T2M_LAYOUT.dim})",
                    f"shape {tuple(motion_BTD.shape)}",
                    "evaluator",
                    "Convert the motion with representations.convert first.",
                )
            )
        mask_BT1 = valid_mask(lengths_B, motion_BTD.shape[1])[..., None]
        return torch.where(mask_BT1, (motion_BTD[..., :CHANNELS] - self.mean) / self.std, 0.0)

    def embed_normalised(self, x_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        """Return unit-norm embeddings (B, E) of normalised channels that are zero beyond each length."""
        if x_BTC.shape[1] < _STRIDE:
            x_BTC = F.pad(x_BTC, (0, 0, 0, _STRIDE - x_BTC.shape[1]))
        steps = torch.cat([torch.zeros_like(x_BTC[:, :1]), x_BTC[:, 1:] - x_BTC[:, :-1]], dim=1)
        h = torch.cat([x_BTC, _zeroed(steps, lengths_B)], dim=-1)
        for conv, stride in ((self.conv_1, 2), (self.conv_2, 4)):
            h = F.leaky_relu(conv(h.transpose(1, 2)).transpose(1, 2), 0.2)
            h = _zeroed(h, _token_count(lengths_B, stride))
        state = _last_states(self.motion_gru, h, _token_count(lengths_B, _STRIDE))
        return F.normalize(self.motion_head(state), dim=-1)

    def embed_words(self, word_ids_BL: Tensor, word_lengths_B: Tensor) -> Tensor:
        """Return unit-norm embeddings (B, E) of encoded captions."""
        state = _last_states(self.text_gru, self.words(word_ids_BL), word_lengths_B)
        return F.normalize(self.text_head(state), dim=-1)

    @torch.no_grad()
    def encode_motion(self, motion_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return embeddings (B, E) float32 on CPU of physical kinematic features (B, T, 263); no graph, any B."""
        self.eval()
        device = self.mean.device
        parts = []
        for rows in torch.arange(len(motion_BTD)).split(_ENCODE_ROWS):
            lengths = lengths_B[rows].to(device)
            motion = motion_BTD[rows][:, : max(int(lengths.max()), 1)].to(device, torch.float32)
            parts.append(self.embed_normalised(self.normalise(motion, lengths), lengths).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, self.config.latent_dim)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return embeddings (B, E) float32 on CPU."""
        self.eval()
        unique = sorted(set(captions))
        found = []
        for start in range(0, len(unique), _ENCODE_ROWS):
            ids, lengths = self.vocabulary.encode(unique[start : start + _ENCODE_ROWS], self.config.max_words)
            found.append(self.embed_words(ids.to(self.mean.device), lengths.to(self.mean.device)).cpu())
        row = {caption: i for i, caption in enumerate(unique)}
        return torch.cat(found)[[row[c] for c in captions]] if found else torch.zeros(0, self.config.latent_dim)


class EvaluatorObjective(nn.Module):
    """Symmetric InfoNCE over the global batch; clips of one class or one caption are no negatives of each other.

    Args:
        evaluator: what is trained, together with the temperature.
        collective: gathers embeddings over ranks, so that W ranks of B clips train as one batch of W x B.
    """

    def __init__(self, evaluator: Evaluator, collective: Collective | None = None) -> None:
        super().__init__()
        self.evaluator, self.collective = evaluator, collective
        self.log_temperature = nn.Parameter(torch.tensor([math.log(evaluator.config.temperature)]))

    def inputs(self, batch: MotionBatch, step: int) -> dict[str, object]:
        """Return the keyword arguments of `forward` for a batch."""
        ids, lengths = self.evaluator.vocabulary.encode(batch.captions, self.evaluator.config.max_words)
        device = batch.lengths_B.device
        return {
            "motion_BTD": batch.motions[Representation.KINEMATIC],
            "lengths_B": batch.lengths_B,
            "word_ids_BL": ids.to(device),
            "word_lengths_B": lengths.to(device),
            "class_ids_B": batch.class_ids_B,
            "caption_keys_B": torch.tensor([stable_key(c) for c in batch.captions], device=device),
            "keys_B": batch.keys_B,
            "step": step,
        }

    def forward(
        self,
        motion_BTD: Tensor,
        lengths_B: Tensor,
        word_ids_BL: Tensor,
        word_lengths_B: Tensor,
        class_ids_B: Tensor,
        caption_keys_B: Tensor,
        keys_B: Tensor,
        step: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, metrics), 0-d each, for physical kinematic features (B, T, 263)."""
        net, cfg = self.evaluator, self.evaluator.config
        x = net.normalise(motion_BTD, lengths_B)
        if cfg.input_noise > 0:
            noise = keyed_normal(keys_B, tuple(x.shape[1:]), "evaluator/input", cfg.seed, step)
            x = _zeroed(x + cfg.input_noise * noise, lengths_B)
        words = self._drop_words(word_ids_BL, keys_B, step)
        pair = torch.stack([net.embed_words(words, word_lengths_B), net.embed_normalised(x, lengths_B)], dim=1)
        text_G, motion_G = self._gather(pair).unbind(1)
        with torch.no_grad():
            classes, captions, clips = (self._rows(v) for v in (class_ids_B, caption_keys_B, keys_B))
            blocked = blocked_negatives(len(clips), class_ids_B=classes, keys_B=clips)
            blocked |= blocked_negatives(len(clips), keys_B=captions)
        temperature = self.log_temperature.clamp(math.log(cfg.min_temperature), 0.0).exp()
        loss = info_nce(text_G, motion_G, temperature, blocked).mean()  # type: ignore[arg-type]
        best = (text_G @ motion_G.T).detach().masked_fill(blocked, -2.0).argmax(1)
        return loss, {
            "loss/total": loss.detach(),
            "retrieval/batch_top1": (best == torch.arange(len(best), device=best.device)).float().mean(),
            "evaluator/temperature": temperature.detach()[0],
        }

    def _drop_words(self, word_ids_BL: Tensor, keys_B: Tensor, step: int) -> Tensor:
        cfg = self.evaluator.config
        if cfg.word_dropout == 0 or not self.training:
            return word_ids_BL
        # keyed normals below the quantile of `word_dropout` mark the words that are dropped
        limit = math.sqrt(2.0) * float(torch.erfinv(torch.tensor(2.0 * cfg.word_dropout - 1.0)))
        drawn = keyed_normal(keys_B, (word_ids_BL.shape[1],), "evaluator/words", cfg.seed, step)
        return torch.where((drawn < limit) & (word_ids_BL != PAD), UNKNOWN, word_ids_BL)

    def _rows(self, value_B: Tensor) -> Tensor:
        return value_B if self.collective is None else self.collective.gather(value_B)

    def _gather(self, local: Tensor) -> Tensor:
        """Return the rows of all ranks, with gradient to the local ones."""
        return local if self.collective is None or self.collective.world == 1 else self.collective.gather(local)


def describe(config: EvaluatorConfig) -> dict[str, object]:
    """Return the configuration as plain data."""
    return asdict(config)


def _head(width: int, latent: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.LeakyReLU(0.2), nn.Linear(width, latent))


def _token_count(lengths_B: Tensor, stride: int) -> Tensor:
    return (lengths_B // stride).clamp_min(1)


def _zeroed(x_BTC: Tensor, lengths_B: Tensor) -> Tensor:
    return torch.where(valid_mask(lengths_B, x_BTC.shape[1])[..., None], x_BTC, 0.0)


def _last_states(gru: nn.GRU, x_BLC: Tensor, lengths_B: Tensor) -> Tensor:
    """Return the final forward and backward states side by side, (B, 2 hidden)."""
    packed = pack_padded_sequence(x_BLC, lengths_B.cpu(), batch_first=True, enforce_sorted=False)
    _, states = gru(packed)
    return torch.cat([states[0], states[1]], dim=-1)
