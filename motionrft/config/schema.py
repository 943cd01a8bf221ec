"""The whole configuration of a run: it only composes the dataclasses that live beside what they configure."""

from __future__ import annotations

from dataclasses import dataclass, field

from motionrft.config.hardware import HardwareConfig
from motionrft.config.prepare import PrepareConfig
from motionrft.core.errors import ConfigError
from motionrft.generators.registry import GeneratorConfig
from motionrft.training.recipes.compare import CompareRecipe
from motionrft.training.recipes.evaluate import EvaluateRecipe, RewardFolders
from motionrft.training.recipes.evaluators import EvaluatorRecipe
from motionrft.training.recipes.finetune import FinetuneRecipe
from motionrft.training.recipes.generator import PretrainRecipe
from motionrft.training.recipes.reward import AdapterRecipe, RefineRecipe, RewardRecipe


@dataclass(frozen=True)
class Inputs:
    """What earlier runs left and this one reads."""

    dataset: str = ""
    """Dataset folder, as `motionrft prepare` wrote it."""
    generator: str = ""
    """Model folder of the generator to fine-tune, sample from or evaluate."""
    autoencoder: str = ""
    """Model folder that `pretrain.stage: autoencoder` wrote (families that denoise latents)."""
    teacher: str = ""
    """Model folder that `pretrain.stage: distill` learns from."""
    reference: str = ""
    """Model folder of the generator before fine-tuning (row "before" of `evaluate`)."""
    reward: RewardFolders = field(default_factory=RewardFolders)
    """Model folders of the reward's parts."""
    evaluators: dict[str, str] = field(default_factory=dict)
    """Name -> model folder."""
    pairs: str = ""
    """Folder of preference and authenticity pairs."""


@dataclass(frozen=True)
class PairsConfig:
    """How many training pairs the adapters get."""

    preference_per_clip: int = 1
    """Graded corruptions per training clip."""
    preference_clips: int = 600
    """Training clips that pairs are made of; 0 = all."""
    authenticity_clips: int = 600
    """Generated clips (and as many real ones) per split."""

    def __post_init__(self) -> None:
        """Check signs."""
        if self.preference_per_clip < 1 or self.preference_clips < 0 or self.authenticity_clips < 2:
            raise ConfigError("pairs: need preference_per_clip >= 1, preference_clips >= 0, authenticity_clips >= 2")


@dataclass(frozen=True)
class QuickstartConfig:
    """What the one-command run compares."""

    seeds: int = 3
    """Fine-tuning seeds of one base; intervals are over these."""
    paper_row: bool = True
    """Also fine-tune once with the paper's reward weights."""
    long_base: bool = True
    """Also fine-tune the base that was trained longer (`pretrain.longer`)."""
    control: bool = True
    """Also spend each fine-tuning run's seconds on more pre-training."""
    report_clips: int = 6
    """Prompts shown side by side in the report."""

    def __post_init__(self) -> None:
        """Intervals need seeds."""
        if self.seeds < 1:
            raise ConfigError(f"quickstart.seeds must be at least 1, got {self.seeds}")


PAPER_WEIGHTS = {"semantic": 1.0, "preference": 0.002, "authenticity": 0.002, "similarity": 1.0}
"""Weights of Eq. 20 as published."""


@dataclass(frozen=True)
class RunConfig:
    """One resolved configuration; its YAML reproduces the run."""

    seed: int = 0
    """Everything random derives from it."""
    inputs: Inputs = field(default_factory=Inputs)
    """What the run reads."""
    prepare: PrepareConfig = field(default_factory=lambda: PrepareConfig(out="runs/data"))
    """Source to dataset."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Family, sizes, sampler of a generator trained from scratch."""
    pretrain: PretrainRecipe = field(default_factory=PretrainRecipe)
    """Training a generator from scratch."""
    evaluator: EvaluatorRecipe = field(default_factory=EvaluatorRecipe)
    """The networks that only measure."""
    reward: RewardRecipe = field(default_factory=RewardRecipe)
    """The semantic stage of the reward."""
    refine: RefineRecipe = field(default_factory=RefineRecipe)
    """Self-refinement of a trained backbone (SPL)."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    """Training pairs of the adapters."""
    preference: AdapterRecipe = field(default_factory=AdapterRecipe)
    """The preference adapter."""
    authenticity: AdapterRecipe = field(default_factory=AdapterRecipe)
    """The authenticity adapter."""
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    """Reward fine-tuning."""
    compare: CompareRecipe = field(default_factory=CompareRecipe)
    """Fine-tuning methods side by side."""
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe)
    """Scoring."""
    quickstart: QuickstartConfig = field(default_factory=QuickstartConfig)
    """What the one-command run compares."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """Where it runs."""
