"""What keeping encoded captions saves: training steps of the semantic stage with and without the text encoder in them.

The published size is trained on random motion of each representation alone and of all three, once from cached caption
features and once encoding the captions in every step, as training code without a cache does. Text encoders: MiniLM (the
packaged default) and an encoder of Sentence-T5-large's shapes with random weights, which takes as long as the real one.

Letters: B batch, T frames, D features, L text tokens, E text features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from motionrft.core.memory import peak_rss_bytes
from motionrft.core.rng import generator
from motionrft.core.types import Condition, MotionBatch, Representation, valid_mask
from motionrft.evaluation.benchmarks.sizes import caption_tokens, clip_lengths
from motionrft.evaluation.benchmarks.timing import fastest_seconds, torch_threads
from motionrft.nn.text import MiniLM
from motionrft.representations.normalize import Normalizer
from motionrft.reward.backbone import build_backbone
from motionrft.reward.config import ALL_REPRESENTATIONS, MotionRewardConfig, reward_preset
from motionrft.reward.objectives import SemanticConfig, SemanticObjective

MIXES = {**{name: (name,) for name in ALL_REPRESENTATIONS}, "all": ALL_REPRESENTATIONS}
T5_LARGE = {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "num_heads": 16, "num_layers": 24, "d_ff": 4096}
"""Encoder of T5 v1.0 large (ReLU): 334,939,648 parameters; with the sentence projection 1024 -> 768."""


class Captioner(Protocol):
    """What turns this benchmark's captions into features of size `dim`."""

    dim: int
    num_parameters: int

    def __call__(self) -> Condition:
        """Encode the batch's captions."""
        ...


def run(
    rounds: int = 3,
    batch: int = 16,
    threads: int = 2,
    encoders: Mapping[str, Callable[[Tensor], Captioner]] | None = None,
    config: MotionRewardConfig | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time training steps and return the figures: wall time of `threads` threads, fastest of all rounds.

    A step is forward, backward and an AdamW update of all trained weights. Captions of one batch are the same in every
    step, which costs an encoder as much as new ones.

    Args:
        rounds: counted steps of every kind.
        batch: clips per step.
        threads: of torch.
        encoders: name -> function of the caption lengths (B,) that builds the encoder; default: MiniLM and the shapes
            of Sentence-T5-large.
        config: sizes; default: the published ones (`tiny`).
        seed: of weights, motions and captions.

    Returns:
        Per encoder: encoder_parameters, encoder_bytes, and by mix of representations clips_per_s (cached text),
        uncached_clips_per_s and cached_over_uncached (ratio of the two). Further batch, frames, text_tokens, threads
        and peak_rss_bytes (of this process, largest so far).
    """
    rng = generator("reward-train benchmark", seed)
    lengths_B, tokens_B = clip_lengths(batch, rng), caption_tokens(batch, rng)
    mask_BT = valid_mask(lengths_B, int(lengths_B.max()))
    motions = {r: torch.randn(*mask_BT.shape, r.dim, generator=rng) * mask_BT[..., None] for r in Representation}
    result: dict[str, Any] = {}
    with torch_threads(threads):
        for name, build in (encoders or ENCODERS).items():
            encoder = build(tokens_B)
            sizes = replace(config or reward_preset("tiny"), text_token_dim=encoder.dim)
            times = {
                mix: _seconds(replace(sizes, representations=kinds), encoder, motions, lengths_B, rounds, seed)
                for mix, kinds in MIXES.items()
            }
            result[name] = {
                "encoder_parameters": encoder.num_parameters,
                "encoder_bytes": 4 * encoder.num_parameters,
                "clips_per_s": {mix: batch / t["cached"] for mix, t in times.items()},
                "uncached_clips_per_s": {mix: batch / t["uncached"] for mix, t in times.items()},
                "cached_over_uncached": {mix: t["uncached"] / t["cached"] for mix, t in times.items()},
            }
            del encoder  # the next one need not fit beside it
    return {
        **result,
        "batch": batch,
        "frames": int(lengths_B.max()),
        "text_tokens": int(tokens_B.max()),
        "threads": threads,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _seconds(
    config: MotionRewardConfig,
    encoder: Captioner,
    motions: Mapping[Representation, Tensor],
    lengths_B: Tensor,
    rounds: int,
    seed: int,
) -> dict[str, float]:
    """Return the seconds of a step with `cached` and with `uncached` text."""
    kinds = [Representation(r) for r in config.representations]
    statistics = {r: Normalizer(torch.zeros(r.dim), torch.ones(r.dim), r) for r in kinds}
    objective = SemanticObjective(build_backbone(config, seed).train(), statistics, SemanticConfig(), seed)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4)
    cached = encoder()

    def step(text: Condition) -> None:
        batch = MotionBatch(
            item_ids=tuple(str(i) for i in range(len(lengths_B))),
            motions={r: motions[r] for r in kinds},
            lengths_B=lengths_B,
            fps=20.0,
            captions=("",) * len(lengths_B),
            text=text,
            class_ids_B=torch.full_like(lengths_B, -1),
            keys_B=torch.arange(len(lengths_B)),
        )
        loss, _ = objective(**objective.inputs(batch, 0))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    works = {"cached": lambda: step(cached), "uncached": lambda: step(encoder())}
    return fastest_seconds(works, rounds, time.perf_counter)


class MiniLMCaptions:
    """The packaged sentence encoder on captions of given lengths, tokenised in every call as training would."""

    _VOCABULARY = "a person walks slowly forward then turns left and raises both arms while the other leg stays".split()

    def __init__(self, tokens_B: Tensor) -> None:
        self._encoder = MiniLM()
        self.dim = self._encoder.dim
        self.num_parameters = sum(p.numel() for p in self._encoder._model.parameters())
        words = self._VOCABULARY
        # A first word of its own: equal captions would be encoded once.
        self._captions = [
            " ".join([f"{row}", *(words[(row + i) % len(words)] for i in range(int(n) - 2))])
            for row, n in enumerate(tokens_B)
        ]

    def __call__(self) -> Condition:
        """Encode the captions."""
        return self._encoder.encode(self._captions)


class T5Captions:
    """An encoder of T5 shapes with random weights on random token ids; float32, one padded batch."""

    def __init__(self, tokens_B: Tensor, shapes: Mapping[str, int] = T5_LARGE, pooled_dim: int = 768) -> None:
        from transformers import T5Config, T5EncoderModel  # seconds of import that nobody else pays

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._encoder: Any = T5EncoderModel(T5Config(feed_forward_proj="relu", **shapes))  # type: ignore[arg-type]
            self._dense = nn.Linear(shapes["d_model"], pooled_dim, bias=False)
        self.dim = shapes["d_model"]
        self._mask_BL = valid_mask(tokens_B, int(tokens_B.max()))
        rng = generator("reward-train captions")
        self._ids_BL = torch.randint(2, shapes["vocab_size"], self._mask_BL.shape, generator=rng) * self._mask_BL
        self._encoder.eval()
        self.num_parameters = sum(p.numel() for part in (self._encoder, self._dense) for p in part.parameters())

    @torch.no_grad()
    def __call__(self) -> Condition:
        """Return token states, zero where masked, and unit-norm sentence embeddings."""
        states = self._encoder(input_ids=self._ids_BL, attention_mask=self._mask_BL.long()).last_hidden_state
        tokens = states * self._mask_BL[..., None]
        mean = tokens.sum(1) / self._mask_BL.sum(1, keepdim=True)
        return Condition(tokens, self._mask_BL, nn.functional.normalize(self._dense(mean), dim=-1))


ENCODERS: dict[str, Callable[[Tensor], Captioner]] = {"minilm": MiniLMCaptions, "sentence_t5_large": T5Captions}
