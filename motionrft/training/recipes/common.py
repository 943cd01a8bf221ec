"""What every recipe shares: opening data, one loop over an objective, weights of an artefact.

A recipe is a composition root: it wires data, model, objective and engine for one stage, and decides nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from motionrft.core.errors import ConfigError, DataError, explain
from motionrft.core.protocols import Engine, Runtime
from motionrft.core.rng import derive_seed
from motionrft.core.types import MotionBatch, Representation
from motionrft.data.collate import collate, training_batch
from motionrft.data.manifest import Dataset
from motionrft.data.normalizers import load_normalizer
from motionrft.data.sampler import EpochSampler
from motionrft.data.tables import ClipTable, TextTable
from motionrft.representations.normalize import Normalizer
from motionrft.training.checkpoint import Card, CheckpointStore
from motionrft.training.ema import Ema
from motionrft.training.loop import LoopResult, Stateful, run_loop
from motionrft.training.metrics import MetricsWriter
from motionrft.training.optim import OptimConfig

Learn = Callable[[Engine, Any, int], Mapping[str, Tensor]]
"""(engine, batch, step) -> metrics: everything between a batch and the engine's step, backward included."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and optimiser of a stage that makes one optimiser step per batch."""

    steps: int = 300
    """Batches."""
    batch_size: int = 64
    """Clips per batch over all workers."""
    micro_batches: int = 1
    """Parts a worker takes its share of a batch in: same gradient, less memory. Batch-coupled losses embed it twice."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW; its total_steps is filled in with `steps`."""
    ema_decay: float = 0.0
    """Average of the parameters; 0 = none."""
    ema_every: int = 1
    """Batches between moves of the average."""
    log_every: int = 20
    """Batches between metric rows."""
    checkpoint_every: int = 500
    """Batches between checkpoints."""
    validate_every: int = 0
    """Batches between looks at the validation split; 0 = never."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        problems = [
            f"{name} must be at least {low}, got {getattr(self, name)}"
            for name, low in (
                ("steps", 1), ("batch_size", 1), ("micro_batches", 1), ("log_every", 1), ("checkpoint_every", 1),
                ("validate_every", 0),
                ("ema_every", 1),
            )
            if getattr(self, name) < low
        ]  # fmt: skip
        if not 0.0 <= self.ema_decay < 1.0:
            problems.append(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if problems:
            raise ConfigError("train: " + "; ".join(problems))

    @property
    def optim_for_run(self) -> OptimConfig:
        """The optimiser settings with the length of this stage; a constant rate needs none."""
        return replace(self.optim, total_steps=0 if self.optim.schedule == "constant" else self.steps)


@dataclass(frozen=True)
class Split:
    """One split of a dataset in memory, and how to draw batches from it."""

    dataset: Dataset
    clips: ClipTable
    text: TextTable
    prompts: TextTable | None = None  # what the generator reads, where its text encoder is another one

    @classmethod
    def open(cls, root: str, split: str, data: Mapping[str, Any]) -> Split:
        """Take Arrow tables handed over by the launcher ("clips/SPLIT"), or read the files."""
        dataset = Dataset.open(root)
        blocks = data.get(f"clips/{split}")
        clips = ClipTable.open(dataset, split) if blocks is None else ClipTable.from_arrow(blocks)
        if not len(clips):
            raise DataError(
                explain(f"clips in split {split!r}", "none", str(root), "Prepare a dataset that has this split.")
            )
        return cls(dataset, clips, TextTable.open(dataset))

    def prompting(self, encoder: str) -> Split:
        """Return the split with batches that also carry the features a generator of this text encoder reads.

        Args:
            encoder: fingerprint, as the generator's card has it.

        Raises:
            DataError: the dataset has no features of that encoder.
        """
        if encoder == self.text.fingerprint:
            return replace(self, prompts=None)
        return replace(self, prompts=TextTable.open_for(self.dataset, encoder))

    def normalizer(self, representation: Representation) -> Normalizer:
        """Return the training-split statistics of a representation."""
        return load_normalizer(self.dataset, representation)

    def batch(
        self,
        rows: Sequence[int],
        representations: Sequence[Representation],
        max_frames: int,
        seed: int | None = None,
        epoch: int = 0,
    ) -> MotionBatch:
        """Return rows as a batch; a seed draws captions and windows per clip and epoch, else the first are taken."""
        if seed is None:
            batch = collate(self.clips, self.text, rows, representations=representations, max_frames=max_frames)
        else:
            batch = training_batch(self.clips, self.text, rows, seed, epoch, representations, max_frames)
        return batch if self.prompts is None else replace(batch, generator_text=self.prompts.condition(batch.captions))


class BatchSource:
    """The training batches of one rank as a pure function of the step."""

    def __init__(
        self,
        split: Split,
        representations: Sequence[Representation],
        max_frames: int,
        batch_size: int,
        seed: int,
        runtime: Runtime,
    ) -> None:
        self.split, self.representations, self.max_frames, self.seed = split, tuple(representations), max_frames, seed
        self.device = runtime.device
        self.sampler = EpochSampler(len(split.clips), batch_size, seed, runtime.rank, runtime.world)

    def __call__(self, step: int) -> MotionBatch:
        """Return this rank's share of global batch `step`."""
        epoch = self.sampler.epoch(step)
        rows = self.sampler.batch(step)
        return self.split.batch(rows, self.representations, self.max_frames, self.seed, epoch).to(self.device)

    def item_ids(self, step: int) -> Sequence[str]:
        """Return the clips of batch `step`, for messages."""
        return [self.split.clips.item_ids[row] for row in self.sampler.batch(step)]


class Batches(Protocol):
    """A rank's training batches as a pure function of the step."""

    def __call__(self, step: int) -> Any:
        """Return this rank's share of global batch `step`."""
        ...

    def item_ids(self, step: int) -> Sequence[str]:
        """Return what batch `step` is made of, for messages."""
        ...


def in_parts(
    engine: Engine, parts: Sequence[Any], loss_of: Callable[[Any], tuple[Tensor, Mapping[str, Tensor]]]
) -> dict[str, Tensor]:
    """Accumulate the gradient of the mean of per-sample losses over equal parts of a batch; return mean metrics."""
    found: list[Mapping[str, Tensor]] = []
    for part in parts:
        loss, metrics = loss_of(part)
        engine.backward(loss / len(parts))
        found.append(metrics)
    return {name: torch.stack([torch.as_tensor(m[name]) for m in found]).mean(0) for name in found[0]}


def train(
    runtime: Runtime,
    module: nn.Module,
    config: TrainConfig,
    folder: Path,
    card: Card,
    seed: int,
    batches: Batches,
    learn: Learn,
    on_step: Callable[[Engine, Ema | None, int], Mapping[str, float] | None] | None = None,
    start: Callable[[Engine, Ema | None], None] | None = None,
    extras: Mapping[str, Stateful] | None = None,
) -> tuple[Engine, Ema | None, LoopResult]:
    """Train `module` for `config.steps` batches and return the engine, the average and how it ended.

    Args:
        runtime: where this runs.
        module: the trainable module; the engine wraps it.
        config: length, batch, optimiser.
        folder: of the stage: checkpoints/ and metrics.jsonl go there.
        card: what the checkpoints are of.
        seed: of the loop's global generator (dropout).
        batches: this rank's batches.
        learn: leaves the gradient of a batch in the engine and returns metrics.
        on_step: called with the batches done; returned values are logged as validation metrics.
        start: puts engine and average where training begins; a checkpoint of this stage overrides it.
        extras: further state that belongs in the checkpoints.

    Raises:
        ConfigError: a share of the batch that its parts cannot divide evenly.
    """
    share = config.batch_size // runtime.world
    if share % config.micro_batches:
        raise ConfigError(
            explain(
                f"a worker's share of the batch ({share}) divisible by micro_batches",
                str(config.micro_batches),
                str(folder),
                "Change train.batch_size or train.micro_batches.",
            )
        )
    engine = runtime.build_engine(module, config.optim_for_run)
    ema = Ema(engine.trainable_tensors(), config.ema_decay, config.ema_every) if config.ema_decay else None
    if start is not None:
        start(engine, ema)

    def body(step: int) -> dict[str, float]:
        started = time.perf_counter()
        batch = batches(step)
        waited = time.perf_counter() - started
        metrics = learn(engine, batch, step)
        info = engine.step()
        values = {name: float(value) for name, value in metrics.items()}
        return {**values, "optim/grad_norm": info.grad_norm, "optim/lr": info.lr, "time/data_s": waited}

    with MetricsWriter(folder / "metrics.jsonl", enabled=runtime.rank == 0) as metrics:
        result = run_loop(
            body,
            total_steps=config.steps,
            engine=engine,
            runtime=runtime,
            checkpoints=CheckpointStore(folder / "checkpoints", card),
            metrics=metrics,
            seed=derive_seed("loop", seed),
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            ema=ema,
            extras=extras,
            on_step=None if on_step is None else lambda done: on_step(engine, ema, done),
            item_ids=batches.item_ids,
        )
    return engine, ema, result


def whole_parameters(engine: Engine, ema: Ema | None) -> dict[str, Tensor]:
    """Return the trained parameters by name, whole and on CPU; the average where there is one. Collective."""
    if ema is not None:
        return {n.removeprefix("avg/"): t for n, t in ema.export_state().items() if n.startswith("avg/")}
    return {name: tensor.detach().float().cpu() for name, tensor in engine.trainable_tensors().items()}


def put_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy whole parameters into a plain (unwrapped) module."""
    with torch.no_grad():
        own = dict(module.named_parameters())
        for name, value in values.items():
            own[name].copy_(value)


def close(engine: Engine) -> None:
    """Free what an engine holds beyond its tensors (DeepSpeed keeps hooks and groups)."""
    release = getattr(engine, "close", None)
    if release is not None:
        release()
