"""Recipe: fine-tune a generator on a reward with any strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.protocols import Runtime
from motionrft.core.rng import derive_seed
from motionrft.core.types import Representation
from motionrft.diffusion.guidance import GRADIENTS
from motionrft.finetune.step import SIMILARITY_TARGETS, Objective, rollout_step
from motionrft.finetune.strategies import EasyTune, Strategy
from motionrft.generators.base import Generator
from motionrft.generators.lora import Adapter, adapter_for, add_adapter
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.terms import LEARNED_TERMS, TERMS, import_terms, without_gradient
from motionrft.training.checkpoint import Card, CheckpointStore
from motionrft.training.ema import Ema
from motionrft.training.guard import Guard, GuardConfig
from motionrft.training.loop import run_loop
from motionrft.training.metrics import MetricsWriter
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.between import Between
from motionrft.training.recipes.common import BatchSource, Split, close
from motionrft.training.recipes.evaluate import EvaluateRecipe, RewardFolders, validation_recipe
from motionrft.training.recipes.generator_files import load_description, load_generator
from motionrft.training.recipes.reward import require_text_encoder
from motionrft.training.recipes.watch import Probe, Snapshots, Store, Validation
from motionrft.training.stages import RECORD, read_json

_RACE = 1000  # a run until its snapshots may take so many times the planned batches, so that it ends


@dataclass(frozen=True)
class FinetuneRecipe:
    """How a generator is fine-tuned.

    Precision is the hardware's: `hardware.zero.precision` is fp32, autocast (fp32 weights, bf16 network; every engine)
    or bf16 (bf16 weights with an fp32 master; ZeRO 1 to 3, least memory). With any of them the optimiser moves fp32
    numbers, without which updates of 1e-5 would be rounded away, and guidance, sampler, decoding and reward compute in
    fp32: low precision begins and ends in the engine's forward.
    """

    strategy: Strategy = field(default_factory=EasyTune)
    """Which denoising steps learn, and from what."""
    weights: dict[str, float] = field(
        default_factory=lambda: {"semantic": 1.0, "preference": 0.002, "authenticity": 0.002, "similarity": 1.0}
    )
    """Reward term -> weight. Terms with weight 0 are computed and logged where the reward has them. Defaults are the
    paper's."""
    term_modules: tuple[str, ...] = ()
    """Modules that register your own reward terms: imported by every process that reads this configuration."""
    similarity_target: str = "reference"
    """"reference": what the frozen generator makes of the same noise (paper). "ground_truth": the clip (released
    code)."""
    reward_ceiling: float | None = None
    """Total reward above which nothing is gained (`Objective.ceiling`); null = none."""
    reference_pull: float = 0.0
    """Weight of the squared distance to the clean estimates of the generator the run starts from; 0 = none. Up to a
    factor per denoising step the KL divergence of the two samplers."""
    guidance_gradient: str = "both"
    """Branches of classifier-free guidance with gradient: both | caption | caption_unscaled (`diffusion.guidance`)."""
    num_steps: int = 50
    """Denoising steps S."""
    batches: int = 200
    """Prompt batches; one batch takes as many updates as the strategy plans."""
    batch_size: int = 32
    """Prompts per batch over all workers."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-5, warmup_steps=10, grad_clip=1.0))
    """AdamW; its total_steps is filled in with the planned updates."""
    max_frames: int = 196
    """Longest motion."""
    lora_rank: int | None = None
    """Rank of low-rank adapters; 0 = the weights themselves are trained. None = as the generator's family prefers."""
    lora_alpha: float = 16.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_preset: str = ""
    """Which layers get adapters, by the family's name for the choice; "" = its first."""
    ema_decay: float = 0.0
    """Average of the trained parameters, moved once a batch; what is probed, validated and saved. 0 = none."""
    max_seconds: float = 0.0
    """End after this many seconds of training; probes, validation and checkpoints are not counted. The rate and the
    curriculum still follow `batches`. 0 = no limit."""
    probe_every: int = 0
    """Batches between rewards of final samples for fixed held-out prompts, also before the first batch and at the end
    (probe/reward/..., against probe/train_seconds and probe/updates); 0 = with validation only."""
    probe_clips: int = 16
    """How many prompts: the first ones of the validation split."""
    snapshot_updates: tuple[int, ...] = ()
    """Keep a model in snapshots/updates_N at the first batch boundary with N updates."""
    snapshot_seconds: tuple[float, ...] = ()
    """Keep a model in snapshots/seconds_T at the first batch boundary after T seconds of training."""
    until_snapshots: bool = False
    """End when the last of these models is kept, be it before or after `batches`; the curriculum follows `batches`."""
    log_every: int = 1
    """Batches between metric rows."""
    log_term_gradients_every: int = 0
    """Batches between measurements of reward/TERM/gradient, the rms of d (weight x term) / d motion: which term drives.
    Costs a backward pass through the reward per term; 0 = never."""
    checkpoint_every: int = 50
    """Batches between checkpoints."""
    validate_every: int = 0
    """Batches between validation scores, also before the first batch (needs an evaluator); 0 = never."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What follows from validation: alarm at reward hacking, early stopping, which model is kept."""

    def __post_init__(self) -> None:
        """Import the user's terms, then report every contradiction at once."""
        import_terms(self.term_modules, "finetune.term_modules")
        known = [*LEARNED_TERMS, *TERMS]
        unknown = [n for n in self.weights if n not in known]
        negative = [n for n, w in self.weights.items() if not w >= 0]
        flat = without_gradient(n for n, w in self.weights.items() if w)
        window = getattr(self.strategy, "window", 0)
        rules = [
            (not unknown, f"weights name unknown terms {unknown}; known: {known}"),
            (not negative, f"weights must not be negative: {negative}"),
            (
                not (flat and self.strategy.differentiates_reward),
                f"{type(self.strategy).__name__} differentiates the reward, but terms {flat} have no gradient: use "
                "strategy DDPO or FlowGRPO, or give them weight 0",
            ),
            (any(self.weights.values()), "every weight is zero: nothing to maximise"),
            (self.similarity_target in SIMILARITY_TARGETS, f"similarity_target must be one of {SIMILARITY_TARGETS}"),
            (self.num_steps >= 1, f"num_steps must be at least 1, got {self.num_steps}"),
            (
                window <= self.num_steps,
                f"strategy.window is {window}, more than the {self.num_steps} denoising steps: lower it, or raise "
                "num_steps",
            ),
            *((getattr(self, n) >= 1, f"{n} must be at least 1") for n in ("batches", "batch_size", "log_every")),
            (self.checkpoint_every >= 1, "checkpoint_every must be at least 1"),
            *(
                (getattr(self, n) >= 0, f"{n} must not be negative, got {getattr(self, n)}")
                for n in ("validate_every", "probe_every", "reference_pull", "max_seconds", "log_term_gradients_every")
            ),
            (
                self.validate_every > 0 or not self.guard.acts,
                "guard.on_alarm=stop, guard.early_stop_patience and guard.keep=best need validate_every",
            ),
            (self.probe_clips >= 1, "probe_clips must be at least 1"),
            (self.guidance_gradient in GRADIENTS, f"guidance_gradient must be one of {GRADIENTS}"),
            (0.0 <= self.ema_decay < 1.0, f"ema_decay must be in [0, 1), got {self.ema_decay}"),
            (
                all(n > 0 for n in (*self.snapshot_updates, *self.snapshot_seconds)),
                "snapshot_updates and snapshot_seconds must be positive: the model to start from is there already",
            ),
            (self.lora_rank is None or self.lora_rank >= 0, f"lora_rank must not be negative, got {self.lora_rank}"),
            (self.lora_alpha > 0, f"lora_alpha must be positive, got {self.lora_alpha}"),
        ]
        problems = [text for holds, text in rules if not holds]
        if problems:
            raise ConfigError("finetune: " + "; ".join(problems))

    @property
    def updates(self) -> int:
        """Optimiser steps of the whole run."""
        return self.batches * self.strategy.updates_per_rollout(self.num_steps)

    @property
    def optim_for_run(self) -> OptimConfig:
        """The optimiser settings with the length of this run; a constant rate needs none."""
        return replace(self.optim, total_steps=0 if self.optim.schedule == "constant" else self.updates)


@dataclass(frozen=True)
class FinetuneJob:
    """One fine-tuning run."""

    dataset: str
    """Dataset folder."""
    generator: str
    """Model folder of the generator to start from; its frozen copy is the reference."""
    reward: RewardFolders
    """The reward."""
    seed: int = 0
    """Of prompts and noise."""
    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    """How."""
    evaluators: dict[str, str] = field(default_factory=dict)
    """Name -> model folder; the first one scores validation."""
    validation: EvaluateRecipe = field(default_factory=lambda: validation_recipe(EvaluateRecipe()))
    """How validation is scored."""
    as_long_as: str = ""
    """Folder of a finished fine-tuning stage whose training seconds are one more of `snapshot_seconds`."""


@dataclass(frozen=True)
class Parts:
    """What every batch of a fine-tuning needs, before an engine wraps the network."""

    generator: Generator  # only what is trained asks for gradients
    reference: Generator
    reward: MotionReward
    objective: Objective
    batches: BatchSource
    adapter: Adapter | None


def assemble(
    runtime: Runtime,
    recipe: FinetuneRecipe,
    dataset: str,
    generator_folder: str,
    rewards: RewardFolders,
    seed: int,
    data: Mapping[str, Any],
) -> Parts:
    """Return the parts that a recipe describes.

    Args:
        runtime: device, rank.
        recipe: how.
        dataset: folder.
        generator_folder: model to start from.
        rewards: the reward.
        seed: of batches and adapters.
        data: as stages get it.

    Raises:
        RepresentationError: a driving term that the reward does not have for this generator.
    """
    generator, reference = (load_generator(generator_folder, runtime.device) for _ in range(2))
    reference.network.requires_grad_(False)
    split = Split.open(dataset, "train", data).prompting(generator.spec.text_encoder)
    reward = rewards.load(runtime.device)
    require_text_encoder(reward, split)
    kind = generator.spec.representation
    # A weight of 0 asks for nothing: the term is watched where the reward has it, and not missed where it has not.
    known = reward.terms_for(kind)
    objective = Objective(
        weights={n: w for n, w in recipe.weights.items() if w or n in known},
        terms=tuple(n for n in rewards.terms if n not in recipe.weights and n in known),
        similarity_target=recipe.similarity_target,
        ceiling=recipe.reward_ceiling,
        reference_pull=recipe.reference_pull,
        gradients_every=recipe.log_term_gradients_every,
    )
    reward.check_terms(objective.driving, kind)
    generator.guidance_gradient = recipe.guidance_gradient
    clips = recipe.similarity_target == "ground_truth" or recipe.strategy.needs_motions
    frames = min(recipe.max_frames, generator.spec.max_frames)
    kinds = [kind] if clips else [Representation.JOINT]
    batches = BatchSource(split, kinds, frames, recipe.batch_size, seed, runtime)
    return Parts(generator, reference, reward, objective, batches, _prepare(generator, recipe, seed))


def run(runtime: Runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: fine-tune and write FOLDER/model; return the last metrics and validation scores."""
    job = from_plain(FinetuneJob, config, "finetune")
    recipe = job.recipe
    seed = derive_seed("finetune", job.seed)
    parts = assemble(runtime, recipe, job.dataset, job.generator, job.reward, seed, data)
    generator, reference, reward, objective = parts.generator, parts.reference, parts.reward, parts.objective
    batches = parts.batches
    engine = runtime.build_engine(generator.network, recipe.optim_for_run)
    ema = Ema(engine.trainable_tensors(), recipe.ema_decay) if recipe.ema_decay else None
    description, fixed = load_description(job.generator)
    card = Card(
        description.kind, {**description.config, "origin": {"finetune": to_plain(job)}}, description.fingerprints
    )
    _write_plan(recipe, folder, runtime)
    store = Store(parts.adapter, reference, card, fixed, Path(job.generator))
    # Methods differ in updates per batch and seconds per update: only the snapshots say when a race is over.
    total = recipe.batches * _RACE if recipe.until_snapshots else recipe.batches
    seconds = (*recipe.snapshot_seconds, *_as_long_as(job))
    probe = validate = None
    if recipe.probe_every or recipe.validate_every:
        held_out = Split.open(job.dataset, "val", data).prompting(generator.spec.text_encoder)
        probe = Probe(
            engine, ema, generator, reference, reward, objective, held_out,
            clips=recipe.probe_clips, num_steps=recipe.num_steps, max_frames=batches.max_frames, runtime=runtime,
        )  # fmt: skip
    if recipe.validate_every:
        where = (job.dataset, job.generator, job.evaluators, job.validation)
        validate = Validation(*where, folder, store, runtime)
    between = Between(
        engine, ema, runtime, store, folder,
        Snapshots(folder / "snapshots", recipe.snapshot_updates, seconds),
        Guard(recipe.guard),
        batches=total, max_seconds=recipe.max_seconds, until_snapshots=recipe.until_snapshots,
        probe_every=recipe.probe_every, probe=probe, validate_every=recipe.validate_every, validate=validate,
    )  # fmt: skip

    def body(step: int) -> dict[str, float]:
        between.begin()
        return rollout_step(
            engine,
            generator,
            reference,
            reward,
            batches(step),
            objective=objective,
            strategy=recipe.strategy,
            num_steps=recipe.num_steps,
            progress=min(step / recipe.batches, 1.0),
            step=step,
            seed=seed,
            collective=runtime,
        )

    with MetricsWriter(folder / "metrics.jsonl", enabled=runtime.rank == 0) as metrics:
        outcome = run_loop(
            body,
            total_steps=total,
            engine=engine,
            runtime=runtime,
            checkpoints=CheckpointStore(folder / "checkpoints", card),
            metrics=metrics,
            seed=seed,
            log_every=recipe.log_every,
            checkpoint_every=recipe.checkpoint_every,
            ema=ema,
            extras={"stopwatch": between.stopwatch, "guard": between.guard},
            on_start=between.on_start,
            on_step=between.on_step,
            stop=between.stop,
            item_ids=batches.item_ids,
        )
    result = between.finish(outcome)
    close(engine)
    last = {name: value for name, value in outcome.metrics.items() if name.startswith(("reward/", "optim/"))}
    return {**result, "last": last}


def _as_long_as(job: FinetuneJob) -> tuple[float, ...]:
    """Return the training seconds of the run that sets the time, if one does.

    Raises:
        CheckpointError: it is not finished.
    """
    if not job.as_long_as:
        return ()
    record = read_json(Path(job.as_long_as) / RECORD)
    if record is None:
        raise CheckpointError(
            explain("a finished fine-tuning stage", f"no {RECORD}", job.as_long_as, "Run the stages in order.")
        )
    return (float(record["result"]["train_seconds"]),)


def _prepare(generator: Generator, recipe: FinetuneRecipe, seed: int) -> Adapter | None:
    """Leave trainable what this run trains: an adapter, or the network without the parts its family keeps."""
    model = generator.config
    rank = model.default_lora_rank if recipe.lora_rank is None else recipe.lora_rank
    if rank:
        adapter = adapter_for(model, rank, recipe.lora_alpha, recipe.lora_preset)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("lora", seed))
            add_adapter(generator.network, adapter)
        return adapter
    for name, parameter in generator.network.named_parameters():
        parameter.requires_grad_(not name.startswith(model.kept_in_finetuning or ("\0",)))
    return None


def _write_plan(recipe: FinetuneRecipe, folder: Path, runtime: Runtime) -> None:
    """Keep what will be executed beside the run: the plan strips and the weights, as text people and tests read."""
    if runtime.rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.txt").write_text(show_plan(recipe), encoding="utf-8")


def show_plan(recipe: FinetuneRecipe, moments: int = 5) -> str:
    """Return plan strips at evenly spaced moments of the run, with the weights."""
    import numpy as np

    lines = [f"strategy {to_plain(recipe.strategy)}", f"weights {dict(recipe.weights)}"]
    lines += [f"{recipe.batches} batches of {recipe.batch_size} prompts, {recipe.updates} updates"]
    for index in range(moments):
        step = round(index * (recipe.batches - 1) / max(moments - 1, 1))
        rng = np.random.default_rng(step)
        sketch = recipe.strategy.sketch(recipe.num_steps, step / recipe.batches, rng)
        lines += [f"batch {step} of {recipe.batches} (noisiest step left):", sketch]
    return "\n".join(lines) + "\n"
