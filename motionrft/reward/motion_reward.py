"""The unified reward: physical motion of any representation in, named per-sample terms out.

Letters: B batch, T frames, D features, E = d latent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

import motionrft.reward.terms_physical  # noqa: F401  registers its terms
from motionrft.core.errors import ConfigError, RepresentationError, explain
from motionrft.core.types import Condition, Representation, RewardTerms
from motionrft.reward.adapters import ADAPTERS, AdaptedTower
from motionrft.reward.backbone import RewardBackbone
from motionrft.reward.encoders import MotionTower
from motionrft.reward.losses import cosine
from motionrft.reward.noise import time_of_noise_level
from motionrft.reward.terms import LEARNED_TERMS, TERMS, MotionScale, MotionView, RewardTerm

_FINGERPRINT = re.compile("[0-9a-f]{64}")
_PREPARE = "Prepare the dataset with prepare.text_encoder=FOLDER, the folder of that encoder."


class MotionReward(nn.Module):
    """Deterministic, frozen, float32: posterior means, eval mode, gradients through the motion only.

    Terms: `semantic` cos(motion, caption), `similarity` cos(motion, target), `preference` unbounded score,
    `authenticity` probability of being real, and every registered term of `reward.terms`.

    Args:
        backbone: trained networks; this object takes them over and freezes them.
        normalizers: `Normalizer` per representation: the statistics the backbone was trained with, on its device.
        adapters: trained adapters and heads on that backbone; without them only the other terms exist.
        trained_on: adapter -> representations it was trained on, an adapter not named on none; None = all on all.
        text_encoder: fingerprint of the encoder whose features the text tower reads; a mere name, or "", where no
            fingerprint is known.
    """

    def __init__(
        self,
        backbone: RewardBackbone,
        normalizers: Mapping[Representation, MotionScale],
        adapters: AdaptedTower | None = None,
        trained_on: Mapping[str, Collection[str]] | None = None,
        text_encoder: str = "",
    ) -> None:
        super().__init__()
        self.config = backbone.config
        missing = [r for r in self.config.representations if Representation(r) not in normalizers]
        if missing:
            raise RepresentationError(
                explain("a normaliser per representation", f"none for {missing}", "MotionReward", "Load its stats.")
            )
        self.normalizers = {r: normalizers[Representation(r)] for r in self.config.representations}
        self.motion, self.text = backbone.motion, backbone.text
        self.adapters = adapters
        self.trained_on = trained_on
        self.text_encoder = text_encoder
        self.merged: nn.ModuleDict | None = None
        self._terms: dict[str, RewardTerm] = {}
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> MotionReward:
        """Stay in eval mode, whatever the module that holds this one is told."""
        return super().train(False)

    def freeze_for_scoring(self) -> MotionReward:
        """Fold each adapter into its own plain tower copy: same scores up to rounding, fewer operations."""
        if self.adapters is not None and self.merged is None:
            self.merged = nn.ModuleDict({name: self.adapters.merged(name) for name in self.adapters.heads})
        return self

    @torch.no_grad()
    def encode_text(self, condition: Condition) -> Tensor:
        """Return caption embeddings (B, E), to be computed once per prompt batch.

        Raises:
            ConfigError: the captions were encoded by another text encoder than the one the reward was trained with.
        """
        if condition.tokens_BLD.shape[-1] != self.config.text_token_dim:
            expected = f"captions encoded with {self.config.text_token_dim} features per token"
            got = f"{condition.tokens_BLD.shape[-1]} features"
            raise ConfigError(explain(expected, got, "MotionReward.encode_text", _PREPARE))
        mu, _ = self.text(condition.tokens_BLD.float(), condition.mask_BL)
        return mu

    def check_text_encoder(self, fingerprint: str, where: str) -> bool:
        """Return whether captions are known to be encoded as the reward was trained; False = it holds no fingerprint.

        Args:
            fingerprint: of the encoder that made the features.
            where: they are, for the message.

        Raises:
            ConfigError: they come from another text encoder.
        """
        if not _FINGERPRINT.fullmatch(self.text_encoder):
            return False
        if fingerprint != self.text_encoder:
            expected = f"captions encoded by the reward's text encoder {self.text_encoder[:12]}"
            raise ConfigError(explain(expected, f"by {fingerprint[:12]}", where, _PREPARE))
        return True

    def terms_for(self, representation: Representation) -> tuple[str, ...]:
        """Return the terms this reward has for motion of a representation; none for one it does not know."""
        if representation not in self.normalizers:
            return ()
        learned = [n for n in LEARNED_TERMS if n not in ADAPTERS or self._knows(n, representation)]
        return (*learned, *TERMS)

    def embed(
        self, motion_BTD: Tensor, lengths_B: Tensor, representation: Representation, noise_level: float = 0.0
    ) -> Tensor:
        """Return embeddings (B, E) of physical motion: the similarity target, or a retrieval entry.

        `noise_level` labels motion that carries noise, as in `score`.
        """
        with _full_precision(motion_BTD):
            x = self._view(motion_BTD, lengths_B, representation).normalised_BTD
            mu, _ = self.motion(x, lengths_B, representation, self._time(noise_level, len(x), x.device))
        return mu

    def score(
        self,
        motion_BTD: Tensor,
        lengths_B: Tensor,
        representation: Representation,
        *,
        text_BE: Tensor,
        noise_level: float = 0.0,
        target_BE: Tensor | None = None,
        terms: Sequence[str],
    ) -> RewardTerms:
        """Return the named terms, each (B,) float32.

        Args:
            motion_BTD: physical motion (B, T, D), noisy by `noise_level` in the normalised space.
            lengths_B: int64, 1 <= length <= T.
            representation: of the motion.
            text_BE: what `encode_text` gave for the captions.
            noise_level: standard deviation of the noise in the scored motion, 0 clean .. 1 pure noise.
            target_BE: what `embed` gave for the target of `similarity`.
            terms: names to compute; nothing else is computed.

        Raises:
            ConfigError: for an unknown term, a learned term without its adapter, or `similarity` without target.
            RepresentationError: for a representation the reward does not know or a term's adapter was not trained on,
                or the wrong number of features.
        """
        self.check_terms(terms, representation)
        if "similarity" in terms and target_BE is None:
            raise ConfigError(
                explain("target_BE for 'similarity'", "None", "MotionReward.score", "Embed the reference motion first.")
            )
        values: dict[str, Tensor] = {}
        with _full_precision(motion_BTD):
            view = self._view(motion_BTD, lengths_B, representation)
            x, t_B = view.normalised_BTD, self._time(noise_level, len(motion_BTD), motion_BTD.device)
            if "semantic" in terms or "similarity" in terms:
                mu, _ = self.motion(x, lengths_B, representation, t_B)
                if "semantic" in terms:
                    values["semantic"] = cosine(mu, text_BE)
                if "similarity" in terms and target_BE is not None:
                    values["similarity"] = cosine(mu, target_BE)
            if "preference" in terms:
                values["preference"] = self._head("preference", x, lengths_B, representation, t_B)[:, 0]
            if "authenticity" in terms:
                logits = self._head("authenticity", x, lengths_B, representation, t_B)
                values["authenticity"] = torch.sigmoid(logits[:, 0] - logits[:, 1])
            values |= {name: self._term(name)(view) for name in terms if name in TERMS}
        return RewardTerms({name: values[name] for name in terms})

    def head_outputs(self, name: str, motion_BTD: Tensor, lengths_B: Tensor, representation: Representation) -> Tensor:
        """Return what adapter `name`'s head says of clean motion: score (B, 1), or logits (B, 2) of real, generated."""
        with _full_precision(motion_BTD):
            x = self._view(motion_BTD, lengths_B, representation).normalised_BTD
            return self._head(name, x, lengths_B, representation, self._time(0.0, len(x), x.device))

    def _head(self, name: str, x: Tensor, lengths_B: Tensor, representation: str, t_B: Tensor | None) -> Tensor:
        assert self.adapters is not None
        if self.merged is None:
            return self.adapters(name, x, lengths_B, representation, t_B)
        tower = self.merged[name]
        assert isinstance(tower, MotionTower)
        mu, _ = tower(x, lengths_B, representation, t_B)
        return self.adapters.heads[name](mu)

    def _term(self, name: str) -> RewardTerm:
        """Return this reward's instance of a term, also of one registered after the reward was built."""
        if name not in self._terms:
            self._terms[name] = TERMS[name]()
        return self._terms[name]

    def _view(self, motion_BTD: Tensor, lengths_B: Tensor, representation: str) -> MotionView:
        self._check_representation(representation)
        normalizer = self.normalizers[representation]
        return MotionView(motion_BTD.float(), lengths_B, Representation(representation), normalizer)

    def _time(self, noise_level: float, batch: int, device: torch.device) -> Tensor | None:
        if noise_level == 0.0 and self.config.time_token == "none_when_clean":
            return None
        return torch.full((batch,), time_of_noise_level(noise_level, self.config.max_t), device=device)

    def check_terms(self, terms: Sequence[str], representation: Representation) -> None:
        """Refuse terms this reward cannot give for motion of a representation.

        Raises:
            ConfigError: an unknown term, or a learned one without any adapter.
            RepresentationError: the reward does not know the representation, or a term's adapter was not trained on it.
        """
        unknown = [n for n in terms if n not in LEARNED_TERMS and n not in TERMS]
        if unknown:
            known = [*LEARNED_TERMS, *TERMS]
            raise ConfigError(explain(f"terms of {known}", str(unknown), "MotionReward", "Check the weights."))
        self._check_representation(representation)
        if self.adapters is None and set(ADAPTERS) & set(terms):
            raise ConfigError(
                explain(
                    "trained preference and authenticity adapters",
                    "a reward without adapters",
                    "MotionReward",
                    "Train them, or set the weights of these terms to 0.",
                )
            )
        for name in ADAPTERS:
            # An adapter returns a number for any motion; on what it never saw in training that number is noise.
            if name in terms and not self._knows(name, representation):
                known = [str(r) for r in (self.trained_on or {}).get(name, ())]
                if not known:
                    do = f"Give inputs.reward.{name}, or set its weight to 0."
                    raise RepresentationError(explain(f"a loaded {name!r} adapter", "none", "MotionReward", do))
                raise RepresentationError(
                    explain(
                        f"motion of {known} for {name!r}",
                        f"{str(representation)!r}, on which this adapter was not trained",
                        "MotionReward",
                        f"Convert the motion, or set the weight of {name} to 0: it is left out then.",
                    )
                )

    def _check_representation(self, representation: str) -> None:
        if representation not in self.normalizers:
            raise RepresentationError(
                explain(f"one of {list(self.normalizers)}", repr(str(representation)), "MotionReward", "Convert it.")
            )

    def _knows(self, adapter: str, representation: str) -> bool:
        if self.adapters is None:
            return False
        return self.trained_on is None or representation in self.trained_on.get(adapter, ())


def _full_precision(motion_BTD: Tensor) -> torch.autocast:
    return torch.autocast(motion_BTD.device.type, enabled=False)
