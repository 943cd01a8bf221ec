"""Recipes of generators: pre-training, its continuation as a control, generating for captions; saving and loading.

Pre-training runs at a constant learning rate with a parameter average, so that a snapshot on the way is as finished a
model as the last one, and going on from a snapshot is the same training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.protocols import Engine, Runtime
from motionrft.core.rng import derive_seed, numpy_rng
from motionrft.core.types import MotionBatch
from motionrft.generators.base import Generator, Training
from motionrft.generators.registry import (
    GeneratorConfig,
    TextSide,
    build_generator,
    generator_card,
)
from motionrft.generators.sampling import generate
from motionrft.representations.normalize import Normalizer
from motionrft.training.checkpoint import Card, Snapshot, load_checkpoint, save_checkpoint
from motionrft.training.ema import Ema
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.common import (
    BatchSource,
    Split,
    TrainConfig,
    close,
    in_parts,
    put_parameters,
    train,
    whole_parameters,
)
from motionrft.training.recipes.generator_files import (
    KIND,
    Fixed,
    generator_checkpoint_card,
    load_generator,
    save_weights,
    take_frozen,
)
from motionrft.training.stages import read_json, seconds_of, write_json

PRETRAIN_STAGES = ("generator", "autoencoder", "distill")
_FINISH_BATCHES = 16  # training batches on which a finished stage measures its latent statistics


@dataclass(frozen=True)
class PretrainRecipe:
    """How a generator is trained from scratch."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=800,
            batch_size=64,
            ema_decay=0.995,
            optim=OptimConfig(lr=4e-4, schedule="constant", warmup_steps=50),
        )
    )
    """Length and optimiser."""
    longer: float = 1.0
    """Go on to this multiple of `train.steps` in the same run; the model at `train.steps` is kept as well."""
    representation: str = ""
    """What it generates: "kinematic", "joint" or "rotation"; "" = the family's own."""
    stage: str = "generator"
    """What learns: "autoencoder" (first, for families that denoise latents), "generator", or "distill"."""
    text_encoder: str = ""
    """Fingerprint (or its beginning) or name of an encoder added to the dataset; "" = the dataset's own."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        problems = []
        if self.longer < 1.0:
            problems.append(f"longer must be at least 1, got {self.longer}")
        if self.stage not in PRETRAIN_STAGES:
            problems.append(f"stage must be one of {PRETRAIN_STAGES}, got {self.stage!r}")
        if problems:
            raise ConfigError("pretrain: " + "; ".join(problems))

    @property
    def long_steps(self) -> int:
        """Batches of the longer training."""
        return round(self.train.steps * self.longer)


@dataclass(frozen=True)
class PretrainJob:
    """One pre-training run, or the continuation of one."""

    dataset: str
    """Dataset folder."""
    seed: int = 0
    """Of weights, data order, noise."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """What is trained."""
    recipe: PretrainRecipe = field(default_factory=PretrainRecipe)
    """How."""
    continue_from: str = ""
    """Folder of a pre-training stage whose kept snapshot this one goes on from, with its own data order."""
    seconds_of: str = ""
    """With `continue_from`: train for as many seconds as this finished stage took, instead of `recipe.train.steps`."""
    autoencoder: str = ""
    """Model folder that a stage "autoencoder" wrote: what a generator of latents decodes with."""
    teacher: str = ""
    """Model folder of the generator that stage "distill" learns from; its autoencoder is taken over."""


def run_pretrain(runtime: Runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: train a generator and write FOLDER/model (and FOLDER/model_long if the recipe goes on)."""
    job = from_plain(PretrainJob, config, "pretrain")
    split = _prompting(Split.open(job.dataset, "train", data), job.recipe.text_encoder)
    kind = job.generator.representation(job.recipe.representation)
    batches = BatchSource(
        split,
        [kind],
        job.generator.max_frames,
        job.recipe.train.batch_size,
        derive_seed("pretrain-data", job.seed, job.continue_from != ""),
        runtime,
    )
    generator, card = _new_generator(job, split, split.normalizer(kind))
    training = _training(generator, job, runtime.device)
    generator.to(runtime.device)
    steps = _planned_steps(job, folder, runtime)
    settings = replace(job.recipe.train, steps=steps)
    base_steps = job.recipe.train.steps
    validation = None
    if settings.validate_every:
        validation = _prompting(Split.open(job.dataset, "val", data), job.recipe.text_encoder)
    start = _Start(job.continue_from)
    noise_seed = derive_seed("pretrain-noise", job.seed, job.continue_from != "")

    def learn(engine: Engine, batch: MotionBatch, step: int) -> Mapping[str, Tensor]:
        def loss_of(part: MotionBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
            loss_B, metrics = training.loss(engine, part, step, noise_seed)
            return loss_B.mean(), {**metrics, "loss/total": loss_B.detach().mean()}

        return in_parts(engine, batch.parts(settings.micro_batches), loss_of)

    def keep(engine: Engine, ema: Ema | None, place: Path, done: int) -> None:
        """Write the model (the average, where there is one) to PLACE. Collective."""
        weights = whole_parameters(engine, ema)
        if job.recipe.stage == "autoencoder":
            # Its weights are a frozen part of the generator that is trained next: measure on what is written, and let
            # training go on where it was.
            own = {name: p.detach().clone() for name, p in training.network.named_parameters()}
            put_parameters(training.network, weights)
            generator.finish("autoencoder", [batches(step) for step in range(min(_FINISH_BATCHES, base_steps))])
            fixed = Fixed.of(generator)
            put_parameters(training.network, own)
            weights = {name: p.detach().float().cpu() for name, p in generator.network.named_parameters()}
        else:
            fixed = Fixed.of(generator)
        if runtime.rank == 0:
            save_weights(place, weights, card, fixed, done, engine.steps)

    def on_step(engine: Engine, ema: Ema | None, done: int) -> Mapping[str, float] | None:
        if training.after_step is not None:
            training.after_step(engine.trainable_tensors(), done)
        if done == base_steps and not job.continue_from and steps > base_steps:
            keep(engine, ema, folder / "model", done)
        if done == base_steps and not job.continue_from and job.recipe.stage == "generator":
            _keep_snapshot(engine, ema, runtime, folder / "snapshot", card, done)
        if validation is not None and done % settings.validate_every == 0:
            loss = _validation_loss(training, generator, engine, ema, validation, runtime, job)
            return {"loss/validation": loss}
        return None

    engine, ema, outcome = train(
        runtime,
        training.network,
        settings,
        folder,
        card,
        job.seed,
        batches,
        learn,
        on_step,
        start.apply,
        extras=training.extras,
    )
    long = steps > base_steps and not job.continue_from
    keep(engine, ema, folder / ("model_long" if long else "model"), outcome.step)
    close(engine)
    return {"steps": steps, "base_steps": base_steps, "loss": outcome.metrics.get("loss/total", math.nan)}


def _prompting(split: Split, encoder: str) -> Split:
    """Return the split with features of the encoder that is called, or whose fingerprint begins, so."""
    if not encoder:
        return split
    added = split.dataset.added_texts().values()
    named = [e.fingerprint for e in added if e.name == encoder or e.fingerprint.startswith(encoder)]
    return split.prompting(named[0] if len(named) == 1 else encoder)


def _training(generator: Generator, job: PretrainJob, device: torch.device) -> Training:
    """Return what learns in this stage, after taking over what earlier stages left.

    Raises:
        ConfigError: a stage this family does not have, or one whose predecessor is not named.
    """
    stage, known = job.recipe.stage, generator.config.stages
    where = f"pretrain.stage of {generator.spec.family}"
    if stage not in known:
        raise ConfigError(explain(f"one of {known}", repr(stage), where, "Choose another stage or family."))
    if stage == "distill":
        if not job.teacher:
            raise ConfigError(explain("inputs.teacher", "nothing", where, "Name the model folder to distil."))
        return generator.training(stage, load_generator(job.teacher, device))
    if stage == "generator" and "autoencoder" in known:
        if not job.autoencoder:
            raise ConfigError(
                explain("inputs.autoencoder", "nothing", where, "Train one with --pretrain.stage=autoencoder first.")
            )
        found = load_checkpoint(Path(job.autoencoder), expected_kind=KIND).snapshot.extras
        take_frozen(generator, found.get("frozen", {}), job.autoencoder)
    training = generator.training(stage)
    if stage == "autoencoder":
        training.network.requires_grad_(True)  # a frozen part at every other time
    return training


class _Start:
    """Weights, moments and average of the snapshot that a continuation begins with."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def apply(self, engine: Engine, ema: Ema | None) -> None:
        """Restore the snapshot; nothing without one."""
        if not self.folder:
            return
        found = load_checkpoint(Path(self.folder) / "snapshot", expected_kind=KIND).snapshot
        state = {f"param/{name}": tensor for name, tensor in found.model.items()}
        engine.import_state({**state, **found.optimizer}, found.optimizer_step)
        if ema is not None:
            ema.import_state(found.extras["ema"])


def _planned_steps(job: PretrainJob, folder: Path, runtime: Runtime) -> int:
    """Return the batches to run. Seconds become batches once: a resumed control keeps its length."""
    if not job.continue_from:
        return job.recipe.long_steps
    if not job.seconds_of:
        return job.recipe.train.steps
    plan = folder / "plan.json"
    runtime.barrier()
    if runtime.rank == 0 and not plan.exists():
        source = Path(job.continue_from)
        record = read_json(source / "stage.json")
        if record is None:
            raise CheckpointError(f"{source} is not a finished pre-training stage: it has no stage.json")
        per_batch = float(record["seconds"]) / float(record["result"]["steps"])
        seconds = seconds_of(Path(job.seconds_of))
        folder.mkdir(parents=True, exist_ok=True)
        steps = max(1, round(seconds / per_batch))
        write_json(plan, {"steps": steps, "seconds": seconds, "seconds_per_batch": per_batch})
    runtime.barrier()
    return int((read_json(plan) or {})["steps"])


def _new_generator(job: PretrainJob, split: Split, normalizer: Normalizer) -> tuple[Generator, Card]:
    read = split.prompts or split.text
    null = read.condition([""]) if job.generator.model.needs_null else None
    text = TextSide(read.fingerprint, read.dim, read.pooled_dim, null)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("generator", job.seed))
        generator = build_generator(job.generator, normalizer, text, split.clips.fps)
    made = to_plain(generator_card(job.generator, normalizer, text, split.clips.fps))
    return generator, generator_checkpoint_card(made, normalizer, {"job": to_plain(job)})


def _keep_snapshot(engine: Engine, ema: Ema | None, runtime: Runtime, place: Path, card: Card, done: int) -> None:
    """Write what training needs to go on from here. Collective."""
    state = engine.export_state()
    average = ema.export_state() if ema is not None else {}
    if runtime.rank == 0:
        model = {name.removeprefix("param/"): t for name, t in state.items() if name.startswith("param/")}
        moments = {name: t for name, t in state.items() if not name.startswith("param/")}
        extras = {"ema": average} if average else {}
        save_checkpoint(place, Snapshot(done, engine.steps, model, moments, extras), card)


@torch.no_grad()
def _validation_loss(
    training: Training,
    generator: Generator,
    engine: Engine,
    ema: Ema | None,
    split: Split,
    runtime: Runtime,
    job: PretrainJob,
) -> float:
    """Return the loss of this rank's share of validation clips, at times and noise that never change."""
    rows = range(runtime.rank, len(split.clips), runtime.world)
    batch = split.batch(rows, [generator.spec.representation], job.generator.max_frames).to(runtime.device)
    module = engine.module
    module.eval()
    with ema.applied(module) if ema is not None else nullcontext():
        loss_B, _ = training.loss(module, batch, 0, derive_seed("validation"))
    module.train()
    return float(loss_B.mean())


# --------------------------------------------------------------------------------------------------------- generating


@dataclass(frozen=True)
class GenerateJob:
    """Motions for the captions of dataset splits: the generated side of authenticity pairs."""

    dataset: str
    """Dataset folder."""
    generator: str
    """Model folder."""
    splits: tuple[str, ...] = ("train", "val")
    """For whose captions and lengths."""
    clips: int = 0
    """At most this many per split, drawn by seed; 0 = all."""
    num_steps: int = 10
    """Denoising steps."""
    batch_size: int = 128
    """Clips at a time."""
    seed: int = 0
    """Of the choice and the noise."""


def run_generate(runtime: Runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: every rank generates its share of clips into FOLDER/SPLIT_rank.npz (rows, lengths, motion)."""
    job = from_plain(GenerateJob, config, "generate")
    generator = load_generator(job.generator, runtime.device)
    kind = generator.spec.representation
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name in job.splits:
        split = Split.open(job.dataset, name, data).prompting(generator.spec.text_encoder)
        order = numpy_rng("generate", job.seed, name).permutation(split.clips.rows(with_captions=True))
        chosen = np.sort(order[: job.clips or None])
        mine = chosen[runtime.rank :: runtime.world].tolist()
        counts[name] = len(chosen)
        if not mine:
            continue
        batch = split.batch(mine, [kind], generator.spec.max_frames).to(runtime.device)
        motion = generate(
            generator,
            None,
            batch.prompt,
            batch.lengths_B,
            batch.keys_B,
            num_steps=job.num_steps,
            seed=job.seed,
            batch_size=job.batch_size,
        )
        np.savez(
            folder / f"{name}_{runtime.rank}.npz",
            rows=np.array(mine),
            lengths=batch.lengths_B.cpu().numpy(),
            motion=motion.cpu().numpy(),
            representation=np.array(kind.value),
        )
    return {"clips": counts, "world": runtime.world}
