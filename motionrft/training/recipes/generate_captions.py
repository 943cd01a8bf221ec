"""Any captions to motions: shards of captions mapped over workers that load generator and text encoder once.

Letters: N motions, T frames, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from motionrft.core.errors import CheckpointError, ConfigError, DataError, explain
from motionrft.core.protocols import Executor, GeneratorSpec
from motionrft.core.rng import stable_key
from motionrft.evaluation.motions import MotionSet
from motionrft.generators.base import Generator
from motionrft.generators.sampling import generate
from motionrft.nn.text import TextEncoder, load_text_encoder
from motionrft.training.recipes.generator_files import load_generator

SHARD = 32
"""Motions per shard. A batch is a function of its shard alone: the same clips come out of any number of workers."""


@dataclass(frozen=True)
class Prompt:
    """One motion to make."""

    caption: str
    seconds: float
    sample: int = 0
    """Number among several motions of one caption: other noise."""

    @property
    def key(self) -> int:
        """Seeds the noise: one caption and sample number gives one motion, whatever stands around it."""
        return stable_key(f"{self.sample}\x1f{self.caption}")


@dataclass(frozen=True)
class GenerateRequest:
    """How motions are made."""

    generator: str
    """Model folder."""
    text_encoder: str
    """Name, as `nn.text.load_text_encoder` takes it."""
    num_steps: int = 0
    """Denoising steps; 0 = what the generator is meant to be sampled with."""
    seed: int = 0
    """Of the noise."""
    guidance: float | None = None
    """Guidance scale; None = the generator's."""
    batch_size: int = SHARD
    """Motions per network call, at most a shard."""
    device: str = "cpu"
    """Where workers compute."""
    compiled: bool = False
    """Compile the network first (`torch.compile`): pays off for many motions of few different lengths."""


def read_prompts(path: Path, seconds: float, samples: int = 1) -> list[Prompt]:
    """Return the prompts of a text file: one caption per line, optionally followed by a tab and its seconds.

    Raises:
        DataError: no such file, no caption, or a length that is no number.
    """
    if not path.is_file():
        raise DataError(explain("a text file of captions", "no such file", str(path), "Check the path."))
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        caption, _, length = line.partition("\t")
        if not caption.strip():
            continue
        try:
            own = float(length) if length.strip() else seconds
        except ValueError:
            raise DataError(
                explain("CAPTION or CAPTION<tab>SECONDS", repr(line), f"{path}, line {number}", "Correct the line.")
            ) from None
        prompts += [Prompt(caption.strip(), own, sample) for sample in range(samples)]
    if not prompts:
        raise DataError(explain("one caption per line", "none", str(path), "Write captions into the file."))
    return prompts


def generate_captions(executor: Executor, request: GenerateRequest, prompts: Sequence[Prompt]) -> MotionSet:
    """Return one motion per prompt, in order.

    Raises:
        CheckpointError: no generator there, or a text encoder other than the one it was trained with.
        ConfigError: a length the generator cannot make.
    """
    spec = _loaded(request)[0].spec
    frames = [_frames(prompt, spec) for prompt in prompts]
    shards = [(tuple(prompts[i : i + SHARD]), tuple(frames[i : i + SHARD])) for i in range(0, len(prompts), SHARD)]
    parts = executor.map_shards(partial(_make, request), shards)
    longest = max(frames)
    motion = torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])
    return MotionSet(motion, torch.tensor(frames), spec.representation, spec.fps)


def _frames(prompt: Prompt, spec: GeneratorSpec) -> int:
    frames = round(prompt.seconds * spec.fps)
    if not 2 <= frames <= spec.max_frames:
        raise ConfigError(
            explain(
                f"{2 / spec.fps:g} to {spec.max_frames / spec.fps:g} seconds",
                f"{prompt.seconds:g}",
                f"caption {prompt.caption!r}",
                "Change its length.",
            )
        )
    return frames


def _make(request: GenerateRequest, shard: tuple[tuple[Prompt, ...], tuple[int, ...]]) -> torch.Tensor:
    prompts, frames = shard
    generator, encoder = _loaded(request)
    text = encoder.encode([p.caption for p in prompts]).to(request.device)
    lengths = torch.tensor(frames, device=request.device)
    keys = torch.tensor([p.key for p in prompts], device=request.device)
    steps = request.num_steps or generator.spec.sampling_steps
    return generate(generator, None, text, lengths, keys, steps, request.seed, request.batch_size).float().cpu()


@lru_cache(maxsize=2)  # a worker makes many shards: weights are read once per process
def _loaded(request: GenerateRequest) -> tuple[Generator, TextEncoder]:
    generator, encoder = load_generator(request.generator, request.device), load_text_encoder(request.text_encoder)
    if encoder.fingerprint != generator.spec.text_encoder:
        raise CheckpointError(
            explain(
                f"the text encoder {generator.spec.text_encoder[:12]} this generator was trained with",
                f"{request.text_encoder} ({encoder.fingerprint[:12]})",
                request.generator,
                "Give --text-encoder.",
            )
        )
    move = getattr(encoder, "to", None)  # the stub has nothing to move
    if move is not None:
        move(request.device)
    if request.compiled:
        generator.network.compile()
    if request.guidance is not None:
        generator.guidance = request.guidance
    return generator, encoder
