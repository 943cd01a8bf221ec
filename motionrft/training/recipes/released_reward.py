"""Released MotionReward weights to checkpoints of this project, and back.

    OUT/backbone  OUT/preference  OUT/authenticity      what `load_reward` takes

The released files hold no statistics, no text encoder and no head counts of bare tensors: whoever imports names them,
and the checkpoint records where they came from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.types import Representation
from motionrft.data.manifest import sha256_of
from motionrft.nn.embeddings import TimeEmbedding
from motionrft.representations.normalize import Normalizer
from motionrft.reward.adapters import ADAPTERS, AdaptedTower
from motionrft.reward.backbone import RewardBackbone, build_backbone
from motionrft.reward.checkpoint_keys import KeyRule, adapter_rules, backbone_rules, from_released, to_released
from motionrft.reward.config import ALL_REPRESENTATIONS, AdapterConfig, MotionRewardConfig
from motionrft.reward.noise import NoisePolicy
from motionrft.reward.objectives import AdapterObjectiveConfig
from motionrft.reward.released import TRAINED_ON, config_of, file_names, model_config_of, plain_names
from motionrft.training.checkpoint import Card, Checkpoint, Snapshot, complete_checkpoints, load_checkpoint
from motionrft.training.checkpoint import save_checkpoint as save
from motionrft.training.recipes.reward import (
    ADAPTER,
    BACKBONE,
    AdapterJob,
    AdapterRecipe,
    RewardJob,
    RewardRecipe,
    load_backbone,
    pack_normalizers,
)
from motionrft.training.released import plain, read_released, released_tensors, write_released
from motionrft.training.state_dict import require_same_tensors

PARTS = ("backbone", *ADAPTERS)
_ORIGIN = "released:motionreward"
_CHECK = "Check that the files are of one published set and unchanged."
# Where runs leave a part, below the folder that is exported: an import, then a quickstart.
_PLACES = {
    "backbone": ("backbone", "reward/model"),
    "preference": ("preference/model", "preference"),
    "authenticity": ("authenticity/model", "authenticity"),
}


@dataclass(frozen=True)
class ImportChoices:
    """What the released files leave open."""

    suffix: str = ""
    """Of the file names: "" or "_r128"."""
    preset: str = ""
    """Published size, for files that do not state their head counts."""
    time_token: str = "none_when_clean"
    """What clean motion gets. The published adapters were trained without a time token."""
    lora_alpha: float = 0.0
    """Of adapters saved as bare tensors; 0 = as the files say."""


@dataclass(frozen=True)
class Imported:
    """What an import found and wrote."""

    folders: Mapping[str, Path]  # part -> folder
    config: MotionRewardConfig
    adapter: AdapterConfig
    ignored: tuple[str, ...]  # names in the backbone file that are not part of it


def import_motionreward(
    folder: Path,
    out: Path,
    normalizers: Mapping[Representation, Normalizer],
    text_encoder: str,
    choices: ImportChoices = ImportChoices(),
    text_dim: int = 0,
) -> Imported:
    """Read the five released files and write OUT/backbone, OUT/preference and OUT/authenticity.

    Everything is read and checked before anything is written.

    Args:
        folder: holds the files.
        out: folder of the checkpoints; must not hold any of them yet.
        normalizers: statistics the weights were trained with, for all representations.
        text_encoder: fingerprint, or the name of the encoder whose features the text tower reads.
        choices: what the files leave open.
        text_dim: features per token of that encoder; 0 = not known.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe; names, shapes, rank or alpha do not agree.
        ConfigError: head counts or alpha are known from nowhere, the text encoder does not fit, or OUT is in use.

    Source: names and shapes of the released MotionReward checkpoints (stages 1 to 3).
    """
    files = _existing(folder, choices.suffix)
    used = [name for name in PARTS if (out / name).exists()]
    if used:
        raise ConfigError(explain("a folder without a reward", f"{', '.join(used)} in it", str(out), "Choose another."))
    backbone, origin, ignored = _read_backbone(files["backbone"], choices)
    if text_dim not in (0, backbone.config.text_token_dim):
        fits = f"a text encoder of {backbone.config.text_token_dim} features per token"
        raise ConfigError(explain(fits, f"one of {text_dim}", str(folder), "Name the encoder of the weights."))
    adapters = {name: _read_adapter(name, files, backbone, choices) for name in ADAPTERS}
    sizes = {name: adapter for name, (adapter, _, _) in adapters.items()}
    if len(set(sizes.values())) > 1:
        raise CheckpointError(explain("adapters of one rank and alpha", str(sizes), str(folder), _CHECK))

    prints = {f"normalizer/{r.value}": normalizers[r].fingerprint for r in Representation}
    state: dict[str, Any] = {"origin": origin}
    state["statistics"] = {r.value: plain(normalizers[r].provenance) for r in Representation}
    model = {name: t.detach().clone() for name, t in backbone.state_dict().items()}
    extras = {"normalizers": pack_normalizers({r: normalizers[r] for r in Representation})}
    job = RewardJob(_ORIGIN, recipe=RewardRecipe(model=backbone.config))
    card = Card(BACKBONE, to_plain(job), {**prints, "text_encoder": text_encoder})
    fingerprint = AdaptedTower(backbone.motion, sizes["preference"], 0).backbone_fingerprint
    save(out / "backbone", Snapshot(0, 0, model, {}, extras, state), card)
    for name, (size, tensors, origin) in adapters.items():
        # Trained on clean motion only, hence p_clean 1.
        objective = AdapterObjectiveConfig(TRAINED_ON[name], NoisePolicy(p_clean=1.0))
        adapter_job = AdapterJob(
            name, str((out / "backbone").resolve()), _ORIGIN, recipe=AdapterRecipe(adapter=size, objective=objective)
        )
        card = Card(ADAPTER, to_plain(adapter_job), {**prints, "backbone": fingerprint})
        save(out / name, Snapshot(0, 0, tensors, {}, {}, {"origin": origin}), card)
    return Imported({name: out / name for name in PARTS}, backbone.config, sizes["preference"], tuple(ignored))


def _existing(folder: Path, suffix: str) -> dict[str, Path]:
    files = {part: folder / name for part, name in file_names(suffix).items()}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        stem = file_names()["backbone"].removesuffix(".pth")
        others = sorted({p.stem.removeprefix(stem) for p in folder.glob(f"{stem}*.pth")} - {suffix})
        do = f"There are files with --suffix {' or '.join(map(repr, others))}." if others else "Check the folder."
        raise CheckpointError(explain("the five released files", f"no {', '.join(missing)}", str(folder), do))
    return files


def _read_backbone(path: Path, choices: ImportChoices) -> tuple[RewardBackbone, dict[str, Any], list[str]]:
    content = read_released(path)
    tensors, ignored = plain_names(released_tensors(content, ("state_dict",), path), str(path))
    stated = content.get("model_config", {})
    stated = stated if isinstance(stated, Mapping) else {}
    config = config_of(tensors, stated, choices.preset, choices.time_token, str(path))
    backbone = build_backbone(config, 0).requires_grad_(False)
    rules = backbone_rules(config)
    _require_same(to_released(backbone.state_dict(), rules), tensors, path)
    backbone.load_state_dict(from_released(tensors, rules, str(path)), strict=True)
    origin = {"file": _described(path, content), "model_config": plain(stated)}
    return backbone.eval(), origin, ignored


def _read_adapter(
    name: str, files: Mapping[str, Path], backbone: RewardBackbone, choices: ImportChoices
) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Any]]:
    path, head_path = files[f"{name}/lora"], files[f"{name}/head"]
    content, head_content = read_released(path), read_released(head_path)
    tensors = released_tensors(content, ("lora_state_dict",), path)
    head = released_tensors(head_content, ("state_dict", "head_state_dict"), head_path)
    size = _adapter_size(tensors, content, choices, path)
    own = AdaptedTower(backbone.motion, size, 0).adapter_state(name)
    rules = adapter_rules(backbone.config, name)
    _require_same(to_released(own, rules), tensors, path)
    own_head = {n.removeprefix("head/"): t for n, t in own.items() if n.startswith("head/")}
    _require_same(own_head, head, head_path)
    state = from_released(tensors, rules, str(path)) | {f"head/{n}": t.clone() for n, t in head.items()}
    return size, state, {"lora": _described(path, content), "head": _described(head_path, head_content)}


def _adapter_size(
    tensors: Mapping[str, Tensor], content: Mapping[str, Any], choices: ImportChoices, path: Path
) -> AdapterConfig:
    ranks = Counter(t.shape[0] for n, t in tensors.items() if n.endswith("lora_A") and t.dim() == 2)
    rank = ranks.most_common(1)[0][0] if ranks else 1
    stated = {"lora_rank": content.get("lora_rank", rank), "file name": _named_rank(choices.suffix) or rank}
    wrong = [f"{source} says {value}" for source, value in stated.items() if value != rank]
    if wrong:
        raise CheckpointError(explain(f"rank {rank}, as the tensors have", "; ".join(wrong), str(path), _CHECK))
    alpha = content.get("lora_alpha", choices.lora_alpha)
    if choices.lora_alpha and alpha != choices.lora_alpha:
        raise ConfigError(
            explain(f"lora_alpha {alpha} as in the file", f"{choices.lora_alpha:g}", str(path), "Drop --lora-alpha.")
        )
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        # The scale alpha / rank cannot be read off the tensors, and a wrong one only shifts the scores.
        raise ConfigError(
            explain("a positive lora_alpha", repr(alpha), str(path), "Give --lora-alpha (published: 2 r).")
        )
    return AdapterConfig(rank=rank, alpha=float(alpha))


def _named_rank(suffix: str) -> int | None:
    """Return the rank a suffix such as "_r128" names, or None."""
    found = re.search(r"_r(\d+)$", suffix)
    return int(found[1]) if found else None


def _require_same(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], path: Path) -> None:
    require_same_tensors({n: tuple(t.shape) for n, t in expected.items()}, got, str(path), _CHECK)


def _described(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": path.name,
        "sha256": sha256_of(path),
        "epoch": plain(content.get("epoch")),
        "metrics": plain(content.get("metrics", {})),
    }


# ------------------------------------------------------------------------------------------------------------- export


def find_parts(folder: Path, given: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Return part -> folder of its checkpoint, as an import or a quickstart lays them out below `folder`.

    Args:
        folder: of the reward.
        given: part -> folder that stands elsewhere; "" = look below `folder`.

    Raises:
        ConfigError: a part is not there; the released format has no place for a missing one.
    """
    found = {name: Path(path) for name, path in (given or {}).items() if path}
    for name, places in _PLACES.items():
        place = next((folder / p for p in places if complete_checkpoints(folder / p)), None)
        if name not in found and place is not None:
            found[name] = place
    missing = [name for name in PARTS if name not in found]
    if missing:
        raise ConfigError(
            explain(
                "backbone, preference and authenticity",
                f"no {', '.join(missing)}",
                str(folder),
                f"Give --{missing[0]} FOLDER, made by `motionrft reward`.",
            )
        )
    return found


def export_motionreward(parts: Mapping[str, Path], out: Path, suffix: str = "") -> tuple[list[Path], list[str]]:
    """Write a reward as the five released files; return their paths and what their readers should know.

    Args:
        parts: part -> folder of its checkpoint; see `find_parts`.
        out: folder of the files; none of them may be there yet.
        suffix: of the file names.

    Raises:
        CheckpointError: a part is damaged or belongs to another backbone.
        ConfigError: the released format cannot hold this reward, or a file is in the way.
    """
    backbone, _, checkpoint = load_backbone(parts["backbone"])
    config = backbone.config
    _require_exportable(config, parts["backbone"])
    names, notes = file_names(suffix), _notes(config)
    tensors = to_released(backbone.state_dict(), backbone_rules(config))
    if not config.text_time:
        tensors |= _unused_text_time(config)
    origin = checkpoint.snapshot.state.get("origin", {})
    files = {
        names["backbone"]: {
            "state_dict": tensors,
            **_epoch_and_metrics(checkpoint, "file"),
            "model_config": origin.get("model_config") or model_config_of(config),
        }
    }
    for name in ADAPTERS:
        adapter = load_checkpoint(parts[name], expected_kind=ADAPTER, with_optimizer=False)
        job = from_plain(AdapterJob, adapter.card.config, f"card of {parts[name]}")
        if job.name != name:
            raise CheckpointError(explain(f"the {name} adapter", job.name, str(parts[name]), "Give the right folder."))
        lora, head = _adapter_tensors(name, backbone, adapter, job, adapter_rules(config, name))
        size = job.recipe.adapter
        if _named_rank(suffix) not in (None, size.rank):
            raise ConfigError(explain(f"a suffix for rank {size.rank}", suffix, str(parts[name]), "Correct --suffix."))
        alpha = int(size.alpha) if size.alpha == int(size.alpha) else size.alpha
        files[names[f"{name}/lora"]] = {
            "lora_state_dict": lora,
            "lora_rank": size.rank,
            "lora_alpha": alpha,
            **_epoch_and_metrics(adapter, "lora"),
        }
        files[names[f"{name}/head"]] = {"state_dict": head, **_epoch_and_metrics(adapter, "head")}
    return write_released(out, files), notes


def _require_exportable(config: MotionRewardConfig, folder: Path) -> None:
    problems = []
    if config.frames_per_token != 1:
        problems.append(f"{config.frames_per_token} frames per token (the released projections read one)")
    missing = [r for r in ALL_REPRESENTATIONS if r not in config.representations]
    if missing:
        problems.append(f"no projection of {', '.join(missing)}")
    if problems:
        raise ConfigError(
            explain(
                "frames_per_token 1 and all three representations",
                "; ".join(problems),
                str(folder),
                "The released format cannot hold this reward: train one with these settings.",
            )
        )


def _notes(config: MotionRewardConfig) -> list[str]:
    notes = ["the statistics are not in these files: keep the arrays or the dataset they came from"]
    if config.text_token_dim != MotionRewardConfig.text_token_dim:
        notes.append(f"the text tower reads {config.text_token_dim} features per token, the released code gives 1024")
    if config.decoder_layers != config.num_layers:
        notes.append(f"the decoder has {config.decoder_layers} blocks, the released code builds {config.num_layers}")
    if not config.text_time:
        notes.append("time_embedding_text is zeros: this text tower has none, and the released one was never trained")
    return notes


def _unused_text_time(config: MotionRewardConfig) -> dict[str, Tensor]:
    with torch.device("meta"):  # shapes only
        shapes = {name: tensor.shape for name, tensor in TimeEmbedding(config.latent_dim).state_dict().items()}
    return {f"time_embedding_text.{name}": torch.zeros(shape) for name, shape in shapes.items()}


def _adapter_tensors(
    name: str, backbone: RewardBackbone, adapter: Checkpoint, job: AdapterJob, rules: list[KeyRule]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tower = AdaptedTower(backbone.motion, job.recipe.adapter, 0)
    tower.load_adapter(name, adapter.snapshot.model, adapter.card.fingerprints["backbone"])
    state = tower.adapter_state(name)
    head = {n.removeprefix("head/"): t for n, t in state.items() if n.startswith("head/")}
    return to_released(state, rules), head


def _epoch_and_metrics(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """Return what an imported file said of itself, or epoch 0 and the metrics of a run here, which counts batches."""
    read = checkpoint.snapshot.state.get("origin", {}).get(part, {})
    return {"epoch": read.get("epoch") or 0, "metrics": read.get("metrics", dict(checkpoint.metrics))}
