"""The project's own checkpoint: a folder of safetensors and JSON, whole or absent, exact on any layout.

    step_00000100/            number = batches done
        model.safetensors     NAME -> fp32 trainable parameter, and persistent buffers in their own type
        optimizer.safetensors exp_avg/NAME, exp_avg_sq/NAME, fp32, full (not sharded)
        <extra>.safetensors   e.g. ema
        state.json            optimiser step, batches done, seeding, data position
        MANIFEST.json         written last: kind, fingerprints, config, sizes and hashes of every other file

A folder is written under a temporary name, flushed to disk and renamed, so a reader sees all of it or nothing.
Nothing here unpickles.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from motionrft.core.errors import CheckpointError, explain
from motionrft.training.optim import trainable
from motionrft.training.state_dict import persistent_buffers, require_same_tensors

SCHEMA = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".tar")
_FOLDER = re.compile(r"step_(\d{8,})")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.(safetensors|json)")
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to continue. Tensors are full and on CPU."""

    batches: int  # loop position: batches done
    optimizer_step: int  # optimiser steps applied
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    extras: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # file stem -> tensors
    state: Mapping[str, Any] = field(default_factory=dict)  # JSON: seeding, data position, counters


@dataclass(frozen=True)
class Card:
    """What a checkpoint is of. A loader that expects something else refuses it."""

    kind: str  # e.g. "generator/mdm", "reward"
    config: Mapping[str, Any] = field(default_factory=dict)  # resolved configuration, JSON
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # representation, normaliser, text encoder ...

    @property
    def config_fingerprint(self) -> str:
        """SHA-256 of the configuration in canonical JSON."""
        return fingerprint(self.config)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory, with its manifest."""

    path: Path
    card: Card
    snapshot: Snapshot
    metrics: Mapping[str, float]
    code_version: str


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def code_version() -> str:
    """Return the installed version of the project, or "source" for an uninstalled checkout."""
    try:
        return metadata.version("motionrft")
    except metadata.PackageNotFoundError:
        return "source"


# ---------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(root: Path, snapshot: Snapshot, card: Card, metrics: Mapping[str, float] | None = None) -> Path:
    """Write `snapshot` to ROOT/step_XXXXXXXX atomically and return that folder.

    A complete checkpoint of the same run at the same step is kept as it is: the run is deterministic.

    Raises:
        CheckpointError: if the disk is full or the folder belongs to another run; earlier checkpoints stay intact.
    """
    root = Path(root)
    final = root / f"step_{snapshot.batches:08d}"
    if (final / MANIFEST).exists():
        _require_same_run(read_manifest(final), card, final)
        return final
    temporary = root / f"{_TEMPORARY}{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if final.exists():  # no manifest: not one of ours, or damaged by hand
            raise CheckpointError(
                explain("a free or complete checkpoint folder", "one without MANIFEST.json", str(final), "Remove it")
            )
        temporary.mkdir()
        _write_contents(temporary, snapshot, card, metrics or {})
        os.replace(temporary, final)
        _sync_folder(root)
    except (OSError, SafetensorError) as error:
        raise _as_write_error(error, final) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _require_same_run(manifest: Mapping[str, Any], card: Card, folder: Path) -> None:
    if (manifest["kind"], manifest["config_fingerprint"]) != (card.kind, card.config_fingerprint):
        raise CheckpointError(
            explain(
                f"a folder for this run ({card.kind})",
                f"a checkpoint of another run ({manifest['kind']})",
                str(folder),
                "Choose another run folder",
            )
        )


def _write_contents(folder: Path, snapshot: Snapshot, card: Card, metrics: Mapping[str, float]) -> None:
    tensors = {"model": snapshot.model, "optimizer": snapshot.optimizer, **snapshot.extras}
    files = {}
    for stem, values in tensors.items():
        name = f"{stem}.safetensors"
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"extra {stem!r} is not a plain file stem")
        _write_tensors(folder / name, values)
        files[name] = _describe(folder / name)
    state = {"batches": snapshot.batches, "optimizer_step": snapshot.optimizer_step, **snapshot.state}
    _write_json(folder / STATE, state)
    files[STATE] = _describe(folder / STATE)
    manifest = {
        "schema": SCHEMA,
        "kind": card.kind,
        "batches": snapshot.batches,
        "optimizer_step": snapshot.optimizer_step,
        "fingerprints": dict(card.fingerprints),
        "config_fingerprint": card.config_fingerprint,
        "config": dict(card.config),
        "metrics": {name: float(value) for name, value in metrics.items() if math.isfinite(value)},
        "code": {"motionrft": code_version(), "torch": torch.__version__},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    _write_json(folder / MANIFEST, manifest)
    _sync_folder(folder)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # safetensors refuses tensors that share memory (tied weights, views): copies are independent.
    save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, path)
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True)
    with path.open("w", encoding="ascii") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _as_write_error(error: Exception, final: Path) -> CheckpointError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    advice = "Free disk space, or point the run folder at a larger disk" if full else "Check the folder's permissions"
    reason = "the disk is full" if full else str(error)
    return CheckpointError(
        f"checkpoint {final} could not be written: {reason}. Earlier checkpoints are intact. {advice}, "
        "then rerun the same command to continue from the latest one."
    )


# ---------------------------------------------------------------------------------------------------------- reading


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint folder.

    Raises:
        CheckpointError: if the folder is missing, holds pickles, or its manifest is absent, torn or of another schema.
    """
    folder = Path(folder)
    if folder.suffix.lower() in _PICKLE_SUFFIXES and not folder.is_dir():
        raise _pickle_error(folder)
    if folder.is_file():
        raise CheckpointError(explain("a checkpoint folder", "a file", str(folder), "Give the step_XXXXXXXX folder"))
    if not folder.is_dir():
        raise CheckpointError(explain("a checkpoint folder", "nothing", str(folder), _list_available(folder.parent)))
    path = folder / MANIFEST
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _PICKLE_SUFFIXES)
        if pickles:
            raise _pickle_error(folder / pickles[0])
        raise CheckpointError(
            explain(f"a checkpoint with {MANIFEST}", "a folder without one", str(folder), _list_available(folder))
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
        if schema == SCHEMA:
            _ = manifest["kind"], manifest["batches"], manifest["config_fingerprint"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            explain("a readable manifest", f"a damaged one ({error!r})", str(path), "Use an earlier checkpoint")
        ) from error
    if schema != SCHEMA:
        raise CheckpointError(
            explain(f"schema {SCHEMA}", f"schema {schema}", str(path), "Use the code version named in the manifest")
        )
    return manifest


def load_checkpoint(
    folder: Path,
    *,
    expected_kind: str | None = None,
    expected_fingerprints: Mapping[str, str] | None = None,
    with_optimizer: bool = True,
) -> Checkpoint:
    """Return the verified checkpoint in `folder`, or the latest one inside it.

    Args:
        folder: a step_XXXXXXXX folder, or a folder of them.
        expected_kind: refuse any other kind.
        expected_fingerprints: name -> value that the manifest must carry.
        with_optimizer: read the moments too; False for inference.

    Raises:
        CheckpointError: missing, torn, changed since it was written, of another model, or unsafe to read.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists() and folder.is_dir() and (newest := latest(folder)) is not None:
        folder = newest
    manifest = read_manifest(folder)
    _require_kind(manifest, expected_kind, expected_fingerprints or {}, folder)
    contents = {name: entry for name, entry in manifest["files"].items() if with_optimizer or "optimizer" not in name}
    for name, entry in contents.items():
        _verify(folder, name, entry)
    tensors = {
        name.removesuffix(".safetensors"): _read_tensors(folder / name)
        for name in contents
        if name.endswith(".safetensors")
    }
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        model, optimizer = tensors.pop("model"), tensors.pop("optimizer", {})
        snapshot = Snapshot(state.pop("batches"), state.pop("optimizer_step"), model, optimizer, tensors, state)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            explain("model.safetensors and state.json", f"an incomplete folder ({error!r})", str(folder), _EARLIER)
        ) from error
    card = Card(manifest["kind"], manifest.get("config", {}), manifest.get("fingerprints", {}))
    return Checkpoint(folder, card, snapshot, manifest.get("metrics", {}), manifest["code"]["motionrft"])


_EARLIER = "Delete this folder to continue from the one before, or copy the checkpoint again"


def _require_kind(manifest: Mapping[str, Any], kind: str | None, fingerprints: Mapping[str, str], folder: Path) -> None:
    if kind is not None and manifest["kind"] != kind:
        raise CheckpointError(
            explain(
                f"a checkpoint of kind {kind!r}", f"kind {manifest['kind']!r}", str(folder), "Give the right folder"
            )
        )
    saved = manifest.get("fingerprints", {})
    different = [
        f"{name}: expected {value[:16]}, got {str(saved.get(name))[:16]}"
        for name, value in fingerprints.items()
        if saved.get(name) != value
    ]
    if different:
        raise CheckpointError(
            f"checkpoint {folder} was made with other data or encoders ({'; '.join(different)}). "
            "Use the statistics and text encoder it was trained with, or train again."
        )


def _verify(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    path = folder / name
    if Path(name).suffix.lower() in _PICKLE_SUFFIXES:
        raise _pickle_error(path)
    if not _PLAIN_NAME.fullmatch(name):
        raise CheckpointError(explain("plain .safetensors and .json files", repr(name), str(folder), _EARLIER))
    if not path.is_file():
        raise CheckpointError(explain(name, "nothing", str(folder), _EARLIER))
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(explain(f"{entry['bytes']} bytes", f"{size}: truncated or replaced", str(path), _EARLIER))
    digest = _sha256(path)
    if digest != entry["sha256"]:
        raise CheckpointError(
            explain(f"sha256 {entry['sha256'][:16]}", f"{digest[:16]}: changed since written", str(path), _EARLIER)
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            explain("a safetensors file", f"something else ({error})", str(path), _EARLIER)
        ) from error


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        explain(
            "a checkpoint folder of safetensors and JSON",
            f"{path.name}, a pickle that can run code when opened",
            str(path),
            "Convert released weights with `motionrft import`, which reads them safely",
        )
    )


def _list_available(folder: Path) -> str:
    found = [p.name for p in complete_checkpoints(folder)]
    return f"Checkpoints here: {', '.join(found[-5:])}" if found else "There is no complete checkpoint here"


def load_into(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a module whose trainable parameters and buffers it must cover exactly.

    Raises:
        CheckpointError: listing every missing, unexpected and mis-shaped name.
    """
    targets = {**{n: p.data for n, p in trainable(module)}, **persistent_buffers(module)}
    require_same_tensors(
        {n: tuple(t.shape) for n, t in targets.items()}, checkpoint.snapshot.model, f"checkpoint {checkpoint.path}"
    )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(checkpoint.snapshot.model[name])


# -------------------------------------------------------------------------------------------------------- retention


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoint folders in `root`, oldest first. Half-written ones are not listed."""
    if not Path(root).is_dir():
        return []
    found = [p for p in Path(root).iterdir() if _FOLDER.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def latest(root: Path) -> Path | None:
    """Return the newest complete checkpoint folder in `root`, or None."""
    found = complete_checkpoints(root)
    return found[-1] if found else None


def best(root: Path, metric: str, mode: str = "min") -> Path | None:
    """Return the checkpoint whose recorded `metric` is best ("min" or "max"), the earliest on ties, or None."""
    scored = [(read_manifest(p)["metrics"].get(metric), p) for p in complete_checkpoints(root)]
    usable = [(value if mode == "min" else -value, p) for value, p in scored if value is not None and value == value]
    return min(usable, key=lambda pair: pair[0])[1] if usable else None


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run: where they are, what they are of, which are kept."""

    root: Path
    card: Card
    keep_last: int = 2  # the newest ones; 1 would leave nothing if it is damaged
    best_metric: str = ""  # also keep the best by this metric
    best_mode: str = "min"

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise ValueError(f"keep_last must be >= 2, got {self.keep_last}")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode must be 'min' or 'max', got {self.best_mode!r}")

    def save(self, snapshot: Snapshot, metrics: Mapping[str, float] | None = None) -> Path:
        """Write a checkpoint, then drop the ones that are neither recent nor best.

        Raises:
            CheckpointError: as `save_checkpoint`.
        """
        path = save_checkpoint(self.root, snapshot, self.card, metrics)
        self.prune()
        return path

    def prune(self) -> None:
        """Remove old checkpoints and left-overs of interrupted writes."""
        found = complete_checkpoints(self.root)
        keep = set(found[-self.keep_last :])
        if self.best_metric and (chosen := best(self.root, self.best_metric, self.best_mode)) is not None:
            keep.add(chosen)
        for folder in found:
            if folder not in keep:
                # Renamed first: a removal that is interrupted leaves no half checkpoint under a valid name.
                os.replace(folder, self.root / f"{_TEMPORARY}removed-{folder.name}-{uuid.uuid4().hex[:8]}")
        for leftover in Path(self.root).glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return latest(self.root)

    def load_latest(self) -> Checkpoint | None:
        """Return the newest checkpoint, verified against this run's card, or None if there is none yet.

        Raises:
            CheckpointError: damaged, or of a run with another kind, other fingerprints or another configuration.
        """
        path = self.latest()
        if path is None:
            return None
        checkpoint = load_checkpoint(path, expected_kind=self.card.kind, expected_fingerprints=self.card.fingerprints)
        changed = changed_keys(checkpoint.card.config, json.loads(_canonical(self.card.config)))
        if changed:
            raise CheckpointError(
                f"run folder {self.root} was started with another configuration: {'; '.join(changed[:8])}. "
                "Restore those values to continue it, or choose another run folder."
            )
        return checkpoint


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return "dotted.key: old -> new" for every leaf on which two nested mappings differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted({*old, *new}, key=str):
            dotted = f"{prefix}.{key}" if prefix else str(key)
            lines += changed_keys(old.get(key, "<absent>"), new.get(key, "<absent>"), dotted)
        return lines
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
