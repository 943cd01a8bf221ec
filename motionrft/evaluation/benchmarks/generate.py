"""What sampling costs at released sizes: caption features kept and fused attention, against neither.

Weights are random (cost does not depend on them), text encoders have the released shapes with random weights; the
language model of HY-Motion is reduced, and called so. A denoising step is timed a few times and a rollout is S of them
and one decoding. `respace` runs whole rollouts of a model trained on 1000 steps.

Letters: B clips, T frames, S denoising steps, L text tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from motionrft.core.memory import peak_rss_bytes
from motionrft.core.rng import generator as seeded
from motionrft.core.types import Condition, Representation
from motionrft.diffusion.denoise import SAMPLE, denoise, initial_noise, keyed_noise
from motionrft.evaluation.benchmarks.reward_train import T5Captions
from motionrft.evaluation.benchmarks.timing import fastest_seconds, torch_threads
from motionrft.generators import hymotion_network, mdm_network, mld, motiondiffuse_network, motionlcm
from motionrft.generators.acmdm import ACMDMConfig, ACMDMLatentConfig
from motionrft.generators.base import Generator, ModelConfig
from motionrft.generators.registry import GeneratorConfig, TextSide, build_generator
from motionrft.generators.sampling import generate
from motionrft.representations.normalize import Normalizer

_FRAMES = 196
_TOKENS = 13  # of a caption of average length
CLIP_B32 = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
QWEN_REDUCED = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
}
"""Four layers of a quarter of the width of the 8 B model: 60 M parameters."""


@dataclass(frozen=True)
class Released:
    """One released model and how it is sampled."""

    model: ModelConfig
    steps: int
    encoder: str
    token_dim: int = 512
    pooled_dim: int = 512
    rows: int = 2
    rounds: int = 3
    timed_steps: int = 2


RELEASED = {
    "mld": Released(mld.OFFICIAL, 50, "sentence-t5-large", 1024, 768),
    "mld++": Released(mld.MLDPP, 50, "sentence-t5-large", 1024, 768),
    "motionlcm-v2": Released(motionlcm.LCM_V2, 4, "sentence-t5-large", 1024, 768),
    "mdm-50": Released(mdm_network.OFFICIAL, 50, "clip-b32"),
    "motiondiffuse-50": Released(motiondiffuse_network.OFFICIAL, 50, "clip-b32"),
    "acmdm-raw-s": Released(ACMDMConfig(layers=8, heads=8), 50, "clip-b32"),
    "acmdm-latent-s": Released(ACMDMLatentConfig(layers=8, heads=8, ae_width=512, ae_depth=3), 50, "clip-b32"),
    "hymotion-lite": Released(hymotion_network.LITE, 50, "qwen-reduced", 4096, 768, rows=1, rounds=1),
    "hymotion": Released(hymotion_network.FULL, 50, "qwen-reduced", 4096, 768, rows=1, rounds=1),
}


def run(names: Sequence[str] = tuple(RELEASED), threads: int = 2, frames: int = _FRAMES) -> dict[str, Any]:
    """Time every model and return, per model, what a step and a clip cost and how much faster that is than without.

    Args:
        names: of `RELEASED`.
        threads: of torch.
        frames: length of the clips.

    Returns:
        Per model: parameters, steps, rows, text_tokens, step_ms, decode_ms, clips_per_s; unfused_step_ms (other
        attention kernel), text_ms (one encoding of captions and empty caption), plain_clips_per_s (both in every
        step) and over_plain, the ratio. Further threads, frames and peak_rss_bytes.
    """
    found: dict[str, Any] = {}
    with torch_threads(threads):
        for name in names:
            found[name] = _measure(RELEASED[name], frames)
    return {**found, "threads": threads, "frames": frames, "peak_rss_bytes": peak_rss_bytes()}


def _measure(released: Released, frames: int) -> dict[str, Any]:
    made = build(released, frames)
    rows, rng = released.rows, seeded("generate benchmark")
    tokens = 77 if isinstance(released.model, motiondiffuse_network.MotionDiffuseConfig) else _TOKENS
    text = Condition(
        torch.randn(rows, tokens, released.token_dim, generator=rng),
        torch.ones(rows, tokens, dtype=torch.bool),
        torch.randn(rows, released.pooled_dim, generator=rng),
    )
    lengths, keys = torch.full((rows,), frames), torch.arange(rows)
    shape = made.state_shape(frames)
    table, x_T = made.solver(released.steps), initial_noise(keys, shape, 0)
    encode = text_encoder(released.encoder, 2 * rows)

    @torch.no_grad()
    def some_steps() -> Tensor:
        state = x_T
        actions = [SAMPLE] * released.timed_steps if released.steps > 1 else [SAMPLE]
        noise = keyed_noise(keys, shape, 0)
        for step in denoise(table, actions, lambda x, t: made.predict(made.network, x, t, text, lengths), x_T, noise):
            state = step.x_prev
        return state

    def unfused_steps() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return some_steps()

    @torch.no_grad()
    def decode() -> Tensor:
        return made.decode(x_T, lengths)

    works: dict[str, Callable[[], object]] = {
        "steps": some_steps, "unfused": unfused_steps, "decode": decode, "text": encode
    }  # fmt: skip
    seconds = fastest_seconds(works, released.rounds, time.perf_counter)
    count = min(released.timed_steps, released.steps)
    step, unfused = seconds["steps"] / count, seconds["unfused"] / count
    clip = rows / (released.steps * step + seconds["decode"])
    plain = rows / (released.steps * (unfused + seconds["text"]) + seconds["decode"])
    return {
        "parameters": sum(p.numel() for p in made.network.parameters()),
        "steps": released.steps,
        "rows": rows,
        "text_tokens": tokens,
        "text_encoder": released.encoder,
        "step_ms": 1e3 * step,
        "unfused_step_ms": 1e3 * unfused,
        "text_ms": 1e3 * seconds["text"],
        "decode_ms": 1e3 * seconds["decode"],
        "clips_per_s": clip,
        "plain_clips_per_s": plain,
        "over_plain": clip / plain,
    }


def build(released: Released, frames: int) -> Generator:
    """Return a generator of the released size with random weights."""
    kind = released.model.representations[0]
    statistics = Normalizer(torch.zeros(kind.dim), torch.ones(kind.dim), Representation(kind))
    null = Condition(
        torch.zeros(1, 1, released.token_dim), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, released.pooled_dim)
    )
    config = GeneratorConfig(released.model, max_frames=frames, sampling_steps=released.steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = TextSide("benchmark", released.token_dim, released.pooled_dim, null)
        made = build_generator(config, statistics, text, 20.0)
    made.network.eval().requires_grad_(False)
    return made


def text_encoder(name: str, rows: int) -> Callable[[], object]:
    """Return a function that encodes captions (half of them empty) once, with random weights of the named shapes."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if name == "sentence-t5-large":
            lengths = torch.tensor([_TOKENS] * (rows // 2) + [1] * (rows - rows // 2))
            return T5Captions(lengths)
        if name == "clip-b32":
            from transformers import CLIPTextConfig, CLIPTextModelWithProjection

            clip = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=512, **CLIP_B32)).eval()  # type: ignore[arg-type]
            ids = torch.randint(1, 1000, (rows, 77))
            return torch.no_grad()(lambda: clip(input_ids=ids))
        from transformers import Qwen3Config, Qwen3Model

        qwen = Qwen3Model(Qwen3Config(**QWEN_REDUCED)).eval()  # type: ignore[arg-type]
        ids = torch.randint(1, 1000, (rows, 120))  # system prompt and caption
        return torch.no_grad()(lambda: qwen(input_ids=ids))


# ------------------------------------------------------------------------------------------------------------ respace


def respace(
    model: ModelConfig | None = None, steps: Sequence[int] = (25, 50, 1000), threads: int = 2, frames: int = 60
) -> dict[str, float]:
    """Return seconds per rollout of MotionDiffuse at S of its 1000 steps, one clip, each really run to its end.

    Args:
        model: sizes; default: the released ones.
        steps: numbers of denoising steps; the last one is what the others are compared with.
        threads: of torch.
        frames: length of the clip.
    """
    released = Released(model or motiondiffuse_network.OFFICIAL, max(steps), "clip-b32", rows=1)
    made = build(released, frames)
    text = Condition(torch.randn(1, 77, 512), torch.ones(1, 77, dtype=torch.bool), torch.randn(1, 512))
    seconds = {}
    with _seeded(), torch_threads(threads):
        for count in (min(steps), *steps):  # the first one only warms up
            started = time.perf_counter()
            generate(made, None, text, torch.tensor([frames]), torch.tensor([1]), count, 0)
            seconds[count] = time.perf_counter() - started
    whole = seconds[steps[-1]]
    return {
        **{f"seconds_at_{count}": value for count, value in seconds.items()},
        **{f"faster_at_{count}": whole / seconds[count] for count in steps[:-1]},
    }


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
