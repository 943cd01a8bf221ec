"""Recipes of the reward model: the semantic stage on all representations, then one adapter at a time.

What a stage leaves behind, in FOLDER/model: a checkpoint without moments whose card names sizes, statistics and text
encoder. The statistics themselves travel with the backbone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.protocols import Engine, Runtime
from motionrft.core.rng import derive_seed
from motionrft.core.types import MotionBatch, Representation
from motionrft.data.collate import choose_captions
from motionrft.data.pairs import PairTable
from motionrft.data.sampler import EpochSampler
from motionrft.representations.normalize import Normalizer
from motionrft.reward.adapters import AdaptedTower
from motionrft.reward.backbone import RewardBackbone, build_backbone
from motionrft.reward.config import AdapterConfig, MotionRewardConfig
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.objectives import (
    AdapterObjectiveConfig,
    AuthenticityObjective,
    PreferenceObjective,
    Relations,
    SemanticConfig,
    SemanticObjective,
    SplConfig,
)
from motionrft.training.checkpoint import Card, Checkpoint, Snapshot, load_checkpoint, save_checkpoint
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.bank import LoserBank
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

_LOG = logging.getLogger(__name__)

BACKBONE = "reward/backbone"
ADAPTER = "reward/adapter"


@dataclass(frozen=True)
class RewardRecipe:
    """How the semantic stage is trained."""

    model: MotionRewardConfig = field(default_factory=MotionRewardConfig)
    """Sizes."""
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    """Loss weights."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=300, batch_size=128, optim=OptimConfig(lr=5e-4, schedule="onecycle"))
    )
    """Length and optimiser."""
    max_frames: int = 196
    """Longest crop."""


@dataclass(frozen=True)
class RefineRecipe:
    """How a trained backbone is refined by its own wrong retrievals (SPL), without new labels."""

    spl: SplConfig = field(default_factory=SplConfig)
    """The loss; weight 0 = the same steps without it, for comparison."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=400, batch_size=128, optim=OptimConfig(lr=1e-5, schedule="constant", warmup_steps=50)
        )
    )
    """Length and optimiser."""


@dataclass(frozen=True)
class RewardJob:
    """The semantic stage of a run, or its refinement."""

    dataset: str
    """Dataset folder."""
    seed: int = 0
    """Of weights, data order, noise."""
    recipe: RewardRecipe = field(default_factory=RewardRecipe)
    """How it is trained."""
    backbone: str = ""
    """Folder of the trained backbone to refine; sizes and losses are then its own. "" trains a new one."""
    refine: RefineRecipe | None = None
    """With `backbone`: how."""


def run_semantic(runtime: Runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: train or refine the backbone and write FOLDER/model; return validation retrieval per representation."""
    job = from_plain(RewardJob, config, "reward")
    split = Split.open(job.dataset, "train", data)
    job, backbone, normalizers = _begin(job, split)
    settings = job.recipe.train if job.refine is None else job.refine.train
    spl = job.refine.spl if job.refine is not None and job.refine.spl.weight > 0 else None
    plain = copy.deepcopy(backbone)
    on_device = {r: n.to(runtime.device) for r, n in normalizers.items()}
    objective = SemanticObjective(backbone, on_device, job.recipe.semantic, job.seed, runtime, spl)
    seed = derive_seed("reward" if job.refine is None else "refine", job.seed)
    batches = BatchSource(split, list(normalizers), job.recipe.max_frames, settings.batch_size, seed, runtime)
    bank = None
    if spl is not None and spl.mode == "bank":
        semantic = job.recipe.semantic
        bank = LoserBank(split, on_device, spl, semantic.threshold, semantic.same_class_is_negative,
                         job.recipe.max_frames, runtime)  # fmt: skip
    prints = {f"normalizer/{r.value}": n.fingerprint for r, n in normalizers.items()}
    prints["text_encoder"] = split.text.fingerprint
    card = Card(BACKBONE, to_plain(job), prints)

    def learn(engine: Engine, batch: MotionBatch, step: int) -> Mapping[str, Any]:
        parts = [objective.inputs(part, step) for part in batch.parts(settings.micro_batches)]
        if bank is not None and spl is not None:
            if step % spl.refresh_every == 0:
                wrong = bank.mine(objective.backbone)
                if runtime.rank == 0:
                    shown = ", ".join(f"{name} {100 * share:.1f} %" for name, share in wrong.items())
                    _LOG.info("bank mined at batch %d, wrong retrievals: %s", step, shown)
            rows = batches.sampler.batch(step)
            choice = choose_captions(split.clips, rows, seed, batches.sampler.epoch(step))
            size = len(rows) // len(parts)
            for i, part in enumerate(parts):
                mine = slice(i * size, (i + 1) * size)
                part["losers"] = bank.losers(rows[mine], choice[mine], runtime.device)
        return learn_in_parts(engine, objective, parts)

    engine, ema, outcome = train(
        runtime, objective, settings, folder, card, seed, batches, learn, extras={} if bank is None else {"bank": bank}
    )
    weights = whole_parameters(engine, ema)
    close(engine)
    if runtime.rank != 0:
        return {}
    put_parameters(plain, {n.removeprefix("backbone."): w for n, w in weights.items()})
    model = {name: t.detach().float().cpu().contiguous() for name, t in plain.state_dict().items()}
    extras = {"normalizers": pack_normalizers(normalizers)}
    save_checkpoint(folder / "model", Snapshot(outcome.step, outcome.optimizer_steps, model, {}, extras), card)
    return _validate(plain, normalizers, job, data)


def _begin(job: RewardJob, split: Split) -> tuple[RewardJob, RewardBackbone, dict[Representation, Normalizer]]:
    """Return the job with the sizes that count, the networks to start from, and their statistics."""
    if job.backbone:
        backbone, normalizers, checkpoint = load_backbone(job.backbone)
        trained = from_plain(RewardJob, checkpoint.card.config, f"card of {job.backbone}")
        expected = checkpoint.card.fingerprints["text_encoder"]
        if expected != split.text.fingerprint:
            raise ConfigError(
                f"the backbone was trained on text features of {expected}, the dataset {job.dataset} holds those of "
                f"{split.text.fingerprint}: prepare it with that encoder"
            )
        job = replace(job, recipe=replace(trained.recipe, train=job.recipe.train))
        return replace(job, refine=job.refine or RefineRecipe()), backbone, normalizers
    if split.text.dim != job.recipe.model.text_token_dim:
        raise ConfigError(
            f"reward.model.text_token_dim is {job.recipe.model.text_token_dim}, but the dataset's text encoder gives "
            f"{split.text.dim} features per token: set it to {split.text.dim}, or prepare with another encoder"
        )
    representations = [Representation(r) for r in job.recipe.model.representations]
    return job, build_backbone(job.recipe.model, job.seed), {r: split.normalizer(r) for r in representations}


def learn_in_parts(engine: Engine, objective: SemanticObjective, parts: Sequence[dict[str, Any]]) -> Mapping[str, Any]:
    """Leave the gradient of a whole batch in the engine, taken in equal parts; return metrics.

    The contrastive losses couple all rows, so parts cannot simply be averaged. First every part is embedded without
    gradient; the coupled losses of all embeddings (of all ranks) give a gradient per embedding; then every part is
    run again with gradient and hands that gradient on. Dropout is seeded per part, so both runs drop the same units.

    Args:
        engine: around `objective`.
        objective: computes the coupled losses.
        parts: keyword arguments of its forward, without `latent_gradient`.
    """
    if len(parts) == 1:
        loss, metrics = engine(**parts[0])
        engine.backward(loss)
        return metrics  # type: ignore[no-any-return]
    seeds = [derive_seed("micro-batch", torch.initial_seed(), i) for i in range(len(parts))]
    latents = []
    with torch.no_grad():
        for seed, part in zip(seeds, parts, strict=True):
            torch.manual_seed(seed)
            latents.append(engine(**part, embed_only=True).float())
    leaf = torch.cat(latents).requires_grad_(True)
    fields = [[getattr(part["relations"], name) for part in parts] for name in ("pooled_BE", "class_ids_B", "keys_B")]
    coupled, metrics = objective.coupled(leaf, Relations(*(torch.cat(x) for x in fields)))
    coupled.backward()
    assert leaf.grad is not None
    found = []
    for seed, part, gradient in zip(seeds, parts, leaf.grad.chunk(len(parts)), strict=True):
        torch.manual_seed(seed)
        loss, local = engine(**part, latent_gradient=gradient * len(parts))
        engine.backward(loss / len(parts))
        found.append(local)
    averaged = {name: torch.stack([m[name] for m in found]).mean(0) for name in found[0]}
    # the surrogate's value means nothing: the local part is what is left of it
    surrogate = sum((g * z).sum() for g, z in zip(leaf.grad, leaf.detach(), strict=True))
    averaged["loss/total"] = averaged["loss/total"] - surrogate + coupled.detach()
    return {**averaged, **metrics}


@torch.no_grad()
def _validate(
    backbone: RewardBackbone, normalizers: Mapping[Representation, Normalizer], job: RewardJob, data: Mapping[str, Any]
) -> dict[str, Any]:
    """Return mean cosine of matching caption and motion, and top-1 among distinct classes, per representation."""
    validation = Split.open(job.dataset, "val", data)
    reward = MotionReward(backbone, normalizers)
    found: dict[str, Any] = {}
    for representation in normalizers:
        batch = validation.batch(range(len(validation.clips)), [representation], job.recipe.max_frames)
        text = torch.nn.functional.normalize(reward.encode_text(batch.text), dim=-1)
        motion = torch.nn.functional.normalize(
            reward.embed(batch.motions[representation], batch.lengths_B, representation), dim=-1
        )
        similarity = text @ motion.T
        same = (batch.class_ids_B[:, None] == batch.class_ids_B[None]) & (batch.class_ids_B >= 0)
        same |= torch.eye(len(batch), dtype=torch.bool)
        nearest = similarity.argmax(1)
        found[representation.value] = {
            "cosine": float(similarity.diagonal().mean()),
            "class_top1": float(same[torch.arange(len(batch)), nearest].float().mean()),
        }
    return {"validation": found}


def pack_normalizers(normalizers: Mapping[Representation, Normalizer]) -> dict[str, torch.Tensor]:
    """Return the statistics that travel with a backbone, as tensors named `REPRESENTATION/mean` and `.../std`."""
    parts: dict[str, torch.Tensor] = {}
    for r, n in normalizers.items():
        parts |= {f"{r.value}/mean": n.mean.cpu().clone(), f"{r.value}/std": n.std.cpu().clone()}
    return parts


def load_backbone(folder: Path | str) -> tuple[RewardBackbone, dict[Representation, Normalizer], Checkpoint]:
    """Return a trained backbone, its statistics and its checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of something else.
    """
    checkpoint = load_checkpoint(Path(folder), expected_kind=BACKBONE)
    job = from_plain(RewardJob, checkpoint.card.config, f"card of {folder}")
    backbone = build_backbone(job.recipe.model, job.seed)
    backbone.load_state_dict(dict(checkpoint.snapshot.model), strict=True)
    packed = checkpoint.snapshot.extras["normalizers"]
    normalizers = {
        Representation(r): Normalizer(packed[f"{r}/mean"], packed[f"{r}/std"], Representation(r))
        for r in job.recipe.model.representations
    }
    for r, n in normalizers.items():
        if checkpoint.card.fingerprints[f"normalizer/{r.value}"] != n.fingerprint:
            raise CheckpointError(f"checkpoint {checkpoint.path}: its {r.value} statistics do not match its card")
    return backbone, normalizers, checkpoint


# ----------------------------------------------------------------------------------------------------------- adapters


@dataclass(frozen=True)
class AdapterRecipe:
    """How one adapter is trained."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Rank and scale."""
    objective: AdapterObjectiveConfig = field(default_factory=AdapterObjectiveConfig)
    """Representations and noise."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=200, batch_size=64, optim=OptimConfig(lr=5e-4, schedule="onecycle"))
    )
    """Length and optimiser; batch_size counts pairs (preference) or motions (authenticity)."""


@dataclass(frozen=True)
class AdapterJob:
    """One adapter of a run."""

    name: str
    """ "preference" or "authenticity"."""
    backbone: str
    """Folder of the backbone's checkpoint."""
    pairs: str
    """Folder of the pair tables."""
    seed: int = 0
    """Of weights, data order, noise."""
    recipe: AdapterRecipe = field(default_factory=AdapterRecipe)
    """How it is trained."""


class _PairBatches:
    """Rows of a pair table as the objective's inputs; a pure function of the step."""

    def __init__(self, job: AdapterJob, table: PairTable, runtime: Runtime) -> None:
        self.table, self.device = table, runtime.device
        self.sampler = EpochSampler(
            len(table), job.recipe.train.batch_size, derive_seed("pairs", job.seed), runtime.rank, runtime.world
        )
        self.representations = [Representation(r) for r in job.recipe.objective.representations]

        self.parts = job.recipe.train.micro_batches

    def __call__(self, step: int) -> list[list[int]]:
        """Return the rows of batch `step` in equal parts."""
        rows = self.sampler.batch(step)
        size = len(rows) // self.parts
        return [rows[i * size : (i + 1) * size] for i in range(self.parts)]

    def inputs(self, rows: list[int]) -> dict[str, Any]:
        """Return the objective's arguments for these rows."""
        return self.table.inputs(rows, self.representations, self.device)

    def item_ids(self, step: int) -> list[str]:
        return [self.table.pair_ids[row] for row in self.sampler.batch(step)]


def run_adapter(runtime: Runtime, config: Mapping[str, Any], folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Stage: train one adapter on the frozen backbone and write FOLDER/model; return held-out accuracy."""
    job = from_plain(AdapterJob, config, "adapter")
    backbone, normalizers, _ = load_backbone(job.backbone)
    adapted = AdaptedTower(backbone.motion, job.recipe.adapter, job.seed)
    kind = {"preference": PreferenceObjective, "authenticity": AuthenticityObjective}[job.name]
    table = PairTable.open(Path(job.pairs), job.name, "train")
    on_device = {r: n.to(runtime.device) for r, n in normalizers.items()}
    objective = kind(adapted, on_device, job.recipe.objective, job.seed)
    card = Card(
        ADAPTER,
        to_plain(job),
        {
            "backbone": adapted.backbone_fingerprint,
            **{f"normalizer/{r}": n.fingerprint for r, n in normalizers.items()},
        },
    )

    def learn(engine: Engine, rows: Sequence[list[int]], step: int) -> Mapping[str, Any]:
        return in_parts(engine, rows, lambda part: engine(**batches.inputs(part), step=step))

    batches = _PairBatches(job, table, runtime)
    engine, ema, outcome = train(
        runtime,
        objective,
        job.recipe.train,
        folder,
        card,
        derive_seed("adapter", job.name, job.seed),
        batches,
        learn,
    )
    weights = whole_parameters(engine, ema)
    close(engine)
    if runtime.rank != 0:
        return {}
    put_parameters(objective, {n: w.to(runtime.device) for n, w in weights.items()})
    state = adapted.adapter_state(job.name)
    save_checkpoint(folder / "model", Snapshot(outcome.step, outcome.optimizer_steps, state, {}), card)
    return {"validation": _held_out(objective, job, runtime)}


@torch.no_grad()
def _held_out(objective: Any, job: AdapterJob, runtime: Runtime) -> dict[str, float]:
    """Return loss and accuracy of the validation pairs, at the noise of training."""
    table = PairTable.open(Path(job.pairs), job.name, "val")
    objective.train(False)
    inputs = table.inputs(range(len(table)), [Representation(r) for r in job.recipe.objective.representations],
                          runtime.device)  # fmt: skip
    _, metrics = objective(**inputs, step=0)
    return {name: float(value) for name, value in metrics.items()}


def load_reward(backbone: Path | str, adapters: Mapping[str, Path | str], device: Any = "cpu") -> MotionReward:
    """Return the unified reward: frozen, merged for scoring.

    Args:
        backbone: folder of the semantic stage's model.
        adapters: name -> folder of the adapter's model; empty = semantic and similarity terms only.
        device: where it scores.

    Raises:
        CheckpointError: missing or damaged, or an adapter of another backbone.
    """
    net, normalizers, about = load_backbone(backbone)
    adapted: AdaptedTower | None = None
    trained_on: dict[str, tuple[str, ...]] = {}
    for name, folder in adapters.items():
        checkpoint = load_checkpoint(Path(folder), expected_kind=ADAPTER)
        job = from_plain(AdapterJob, checkpoint.card.config, f"card of {folder}")
        if job.name != name:
            raise CheckpointError(f"{folder} holds the {job.name} adapter, expected {name}. Give the right folder")
        if adapted is None:
            adapted = AdaptedTower(net.motion, job.recipe.adapter, job.seed)
        elif adapted.config != job.recipe.adapter:
            raise CheckpointError(f"{folder}: adapters of one reward need one size, {job.recipe.adapter} differs")
        adapted.load_adapter(name, checkpoint.snapshot.model, checkpoint.card.fingerprints["backbone"])
        trained_on[name] = tuple(job.recipe.objective.representations)
    on_device = {r: n.to(device) for r, n in normalizers.items()}
    text_encoder = about.card.fingerprints.get("text_encoder", "")
    return MotionReward(net, on_device, adapted, trained_on, text_encoder).to(device).freeze_for_scoring()


def require_text_encoder(reward: MotionReward, split: Split) -> None:
    """Refuse captions encoded by another text encoder than the reward's; warn where that cannot be known.

    Raises:
        ConfigError: they come from another one.
    """
    root = split.dataset.root
    if not reward.check_text_encoder(split.text.fingerprint, f"dataset {root}"):
        _LOG.warning(
            "the reward holds no fingerprint of its text encoder (%s): whether %s was encoded by it cannot be checked. "
            "Import it again with --text-encoder FOLDER to have that checked",
            reward.text_encoder or "not named",
            root,
        )
