"""Generator families by name, and the card by which a checkpoint says how to rebuild its generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.protocols import GeneratorSpec, MotionGenerator
from motionrft.generators.mdm import SOLVERS, MDMConfig, MDMGenerator
from motionrft.representations.normalize import Normalizer


@dataclass(frozen=True)
class GeneratorConfig:
    """Which generator, how large, and how it samples."""

    family: str = "mdm"
    """Name in `FAMILIES`."""
    mdm: MDMConfig = field(default_factory=MDMConfig)
    """Sizes and variant of the mdm family. Its text_dim is replaced by the size of the text features when building."""
    max_frames: int = 60
    """Longest motion the generator is trained for."""
    train_steps: int = 1000
    """Diffusion steps of the training schedule."""
    guidance: float = 2.5
    """Classifier-free guidance scale; 1 switches it off and halves the cost."""
    solver: str = "ddim"
    """"ddim" or "ddpm" (ancestral)."""
    eta: float = 0.0
    """Share of fresh noise of DDIM; 0 is deterministic."""
    sampling_steps: int = 10
    """Denoising steps S when generating and fine-tuning."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        rules = [
            (self.family in FAMILIES, f"family must be one of {sorted(FAMILIES)}, got {self.family!r}"),
            (self.max_frames >= 1, f"max_frames must be >= 1, got {self.max_frames}"),
            (self.solver in SOLVERS, f"solver must be one of {SOLVERS}, got {self.solver!r}"),
            (0 <= self.eta <= 1, f"eta must be in [0, 1], got {self.eta}"),
            (self.guidance >= 0, f"guidance must be >= 0, got {self.guidance}"),
            (
                1 <= self.sampling_steps <= self.train_steps,
                f"need 1 <= sampling_steps <= train_steps, got {self.sampling_steps} and {self.train_steps}",
            ),
        ]
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise ConfigError("generator: " + "; ".join(problems))


Builder = Callable[[GeneratorConfig, Normalizer, GeneratorSpec, int], MotionGenerator]
"""(config, normalizer, spec, text_dim) -> generator with a freshly initialised network."""


def _build_mdm(config: GeneratorConfig, normalizer: Normalizer, spec: GeneratorSpec, text_dim: int) -> MDMGenerator:
    sizes = MDMConfig(**{**asdict(config.mdm), "text_dim": text_dim})
    return MDMGenerator(spec, sizes, normalizer, solver=config.solver, eta=config.eta)


FAMILIES: dict[str, Builder] = {"mdm": _build_mdm}


def text_width(config: GeneratorConfig, token_dim: int, pooled_dim: int) -> int:
    """Return the size of the text features a generator reads: of tokens, or of the sentence vector."""
    return token_dim if config.mdm.text == "tokens" else pooled_dim


def build_generator(
    config: GeneratorConfig, normalizer: Normalizer, *, text_dim: int, text_encoder: str, fps: float
) -> MotionGenerator:
    """Return a generator with new weights drawn from torch's global generator (seed it first).

    Args:
        config: family, sizes, sampler.
        normalizer: statistics of the representation it generates.
        text_dim: size of the text features it reads; see `text_width`.
        text_encoder: fingerprint of the text encoder.
        fps: frames per second of the motions.
    """
    spec = GeneratorSpec(
        family=config.family,
        representation=normalizer.representation,
        fps=fps,
        max_frames=config.max_frames,
        text_encoder=text_encoder,
        prediction="x0",
        train_steps=config.train_steps,
        guidance_scale=config.guidance,
    )
    return FAMILIES[config.family](config, normalizer, spec, text_dim)


def generator_card(
    config: GeneratorConfig, normalizer: Normalizer, *, text_dim: int, text_encoder: str, fps: float
) -> dict[str, Any]:
    """Return the JSON-ready description from which `generator_from_card` rebuilds the generator. Arguments as there."""
    return {
        "kind": "generator",
        "config": asdict(config),
        "text_dim": text_dim,
        "text_encoder": text_encoder,
        "fps": fps,
        "representation": normalizer.representation.value,
        "normalizer": normalizer.fingerprint,
    }


def generator_from_card(card: Mapping[str, Any], normalizer: Normalizer) -> tuple[GeneratorConfig, MotionGenerator]:
    """Return the card's config and its generator, whose weights are still to be loaded.

    Raises:
        CheckpointError: not a generator's card, a malformed one, or other statistics than it was trained with.
    """
    try:
        settings = dict(card["config"])
        config = GeneratorConfig(**{**settings, "mdm": MDMConfig(**settings["mdm"])})
        text = {"text_dim": card["text_dim"], "text_encoder": card["text_encoder"], "fps": card["fps"]}
        kind, fingerprint = card["kind"], card["normalizer"]
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            explain("a generator card", f"{error!r} while reading it", "checkpoint card", "Check the checkpoint path.")
        ) from error
    if kind != "generator" or fingerprint != normalizer.fingerprint:
        raise CheckpointError(
            explain(
                f"a generator trained with normaliser {normalizer.fingerprint[:12]}",
                f"kind {kind!r}, normaliser {str(fingerprint)[:12]}",
                "checkpoint card",
                "Load the statistics stored beside the checkpoint.",
            )
        )
    return config, build_generator(config, normalizer, **text)
