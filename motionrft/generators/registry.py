"""Generator families by name, and the card by which a checkpoint says how to rebuild its generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.protocols import GeneratorSpec
from motionrft.core.types import Condition, Representation
from motionrft.generators.acmdm import ACMDMConfig, ACMDMGenerator
from motionrft.generators.acmdm_released import ACMDMReleased
from motionrft.generators.base import Build, Generator, ModelConfig
from motionrft.generators.hymotion import HYMotionConfig, HYMotionGenerator
from motionrft.generators.hymotion_released import HYMotionFormat
from motionrft.generators.mdm import MDMConfig, MDMGenerator
from motionrft.generators.mdm_released import MDMReleased
from motionrft.generators.mld import MLDConfig, MLDGenerator
from motionrft.generators.mld_released import MLDFormat, MotionLCMFormat
from motionrft.generators.motiondiffuse import MotionDiffuseConfig, MotionDiffuseGenerator
from motionrft.generators.motiondiffuse_released import MotionDiffuseReleased
from motionrft.generators.motionlcm import MotionLCMConfig, MotionLCMGenerator
from motionrft.generators.released import ReleasedFormat
from motionrft.representations.normalize import Normalizer

_FAMILIES: list[tuple[type[ModelConfig], Callable[[Build, Any], Generator]]] = [
    (MDMConfig, MDMGenerator),
    (MLDConfig, MLDGenerator),
    (MotionLCMConfig, MotionLCMGenerator),
    (MotionDiffuseConfig, MotionDiffuseGenerator),
    (ACMDMConfig, ACMDMGenerator),
    (HYMotionConfig, HYMotionGenerator),
]
FAMILIES = {config.family: (config, make) for config, make in _FAMILIES}
"""Family -> its configuration, and what makes its generator."""

_FORMATS: list[ReleasedFormat] = [
    MLDFormat(),
    MotionLCMFormat(),
    MDMReleased(),
    MotionDiffuseReleased(),
    ACMDMReleased(),
    HYMotionFormat(),
]
FORMATS = {form.family: form for form in _FORMATS}
"""Family -> how its released files are read and written."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Which generator, how large, and how it samples."""

    model: ModelConfig = field(default_factory=MDMConfig)
    """Family, sizes and variant. Sizes of text features are those of the text encoder in use."""
    max_frames: int = 60
    """Longest motion the generator is trained for."""
    train_steps: int = 1000
    """Diffusion steps of the training schedule; flows allow up to as many solver steps."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 switches it off and halves the cost. None = the family's published one."""
    solver: str = ""
    """One of the family's samplers; "" = its first."""
    eta: float = 0.0
    """Share of fresh noise of DDIM; 0 is deterministic."""
    sampling_steps: int = 10
    """Denoising steps S when generating and fine-tuning."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        solvers = self.model.solvers
        rules = [
            (self.max_frames >= 1, f"max_frames must be >= 1, got {self.max_frames}"),
            (
                self.solver in ("", *solvers),
                f"solver must be one of {solvers} for {self.model.family}, got {self.solver!r}",
            ),
            (0 <= self.eta <= 1, f"eta must be in [0, 1], got {self.eta}"),
            (self.guidance is None or self.guidance >= 0, f"guidance must be >= 0, got {self.guidance}"),
            (
                1 <= self.sampling_steps <= self.train_steps,
                f"need 1 <= sampling_steps <= train_steps, got {self.sampling_steps} and {self.train_steps}",
            ),
        ]
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise ConfigError("generator: " + "; ".join(problems))

    def representation(self, name: str = "") -> Representation:
        """Return the representation called `name`, "" = the family's own.

        Raises:
            ConfigError: one this family cannot generate.
        """
        known = self.model.representations
        if name and name not in [r.value for r in known]:
            names = [r.value for r in known]
            raise ConfigError(f"generator {self.model.family!r} makes {names}, not {name!r}")
        return Representation(name) if name else known[0]


@dataclass(frozen=True)
class TextSide:
    """The text features a generator reads, and the encoder they come from."""

    fingerprint: str
    """Of the encoder, or its name where its weights were not at hand."""
    token_dim: int
    """Features per token."""
    pooled_dim: int
    """Features of the sentence vector."""
    null: Condition | None = None
    """The empty caption, one row; needed by families that encode it when weights are new."""


def build_generator(config: GeneratorConfig, normalizer: Normalizer, text: TextSide, fps: float) -> Generator:
    """Return a generator with new weights drawn from torch's global generator (seed it first).

    Args:
        config: family, sizes, sampler.
        normalizer: statistics of the representation it generates.
        text: what captions look like to it.
        fps: frames per second of the motions.
    """
    model = config.model
    spec = GeneratorSpec(
        family=model.family,
        representation=normalizer.representation,
        fps=fps,
        max_frames=config.max_frames,
        text_encoder=text.fingerprint,
        prediction=model.prediction,
        train_steps=config.train_steps,
        guidance_scale=model.default_guidance if config.guidance is None else config.guidance,
        sampling_steps=config.sampling_steps,
    )
    build = Build(spec, normalizer, text.token_dim, text.pooled_dim, config.solver, config.eta, text.null)
    return FAMILIES[model.family][1](build, model)


def generator_card(config: GeneratorConfig, normalizer: Normalizer, text: TextSide, fps: float) -> dict[str, Any]:
    """Return the JSON-ready description from which `generator_from_card` rebuilds the generator. Arguments as there."""
    return {
        "kind": "generator",
        "family": config.model.family,
        "config": to_plain(config),
        "token_dim": text.token_dim,
        "pooled_dim": text.pooled_dim,
        "text_encoder": text.fingerprint,
        "fps": fps,
        "representation": normalizer.representation.value,
        "normalizer": normalizer.fingerprint,
    }


def generator_from_card(card: Mapping[str, Any], normalizer: Normalizer) -> tuple[GeneratorConfig, Generator]:
    """Return the card's config and its generator, whose weights and frozen parts are still to be loaded.

    Raises:
        CheckpointError: not a generator's card, a malformed one, or other statistics than it was trained with.
    """
    try:
        if "model" not in card["config"]:
            raise ConfigError(
                "it has no `model`: an earlier version wrote it, whose models are not read; train it again"
            )
        config = from_plain(GeneratorConfig, card["config"], "generator card")
        text = TextSide(card["text_encoder"], card["token_dim"], card["pooled_dim"])
        kind, fingerprint, fps = card["kind"], card["normalizer"], card["fps"]
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
    return config, build_generator(config, normalizer, text, fps)
