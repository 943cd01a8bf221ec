"""Offline scoring: motions from files, every term per motion, shards mapped over a pool of workers.

On Ray the pool is `runtime.executor.RayExecutor`: an actor reads reward and text encoder once (`_loaded`) and scores
many shards, also those of later calls with the same executor.

Letters: N motions, T frames, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from motionrft.core.errors import ConfigError, DataError, explain
from motionrft.core.protocols import Executor
from motionrft.core.types import Representation
from motionrft.nn.text import TextEncoder, load_text_encoder
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.terms import import_terms
from motionrft.training.recipes.evaluate import RewardFolders

_SHARD = 64


@dataclass(frozen=True)
class ScoreRequest:
    """What to score."""

    motions: tuple[Path, ...]  # npz files, or folders of them
    captions: Path | None = None  # one line per motion; None = the files carry them
    references: Path | None = None  # npz of as many motions
    representation: str | None = None  # where the files do not say
    terms: tuple[str, ...] = ()  # empty = all the reward has and the input allows
    text_encoder: str = "minilm"
    weights: Mapping[str, float] | None = None  # of the total; terms that are not computed are left out of it
    term_modules: tuple[str, ...] = ()  # modules that register the user's own terms


@dataclass(frozen=True)
class MotionFile:
    """Motions read from one or several npz files."""

    names: tuple[str, ...]  # FILE:ROW
    motions: tuple[np.ndarray, ...]  # (T_i, D) float32, physical units
    representation: Representation
    captions: tuple[str, ...]  # empty where the files carry none


@dataclass(frozen=True)
class _Shard:
    start: int
    motions: tuple[np.ndarray, ...]
    captions: tuple[str, ...]
    references: tuple[np.ndarray, ...]


def read_motions(places: Sequence[Path], representation: str | None) -> MotionFile:
    """Return all motions of npz files: `motion` (N, T, D), `lengths` (N,), optional `representation` and `captions`.

    Raises:
        DataError: a missing or damaged file, wrong shapes, frames that are not finite, or mixed representations.
    """
    files = [f for p in places for f in (sorted(Path(p).glob("*.npz")) if Path(p).is_dir() else [Path(p)])]
    if not files:
        raise DataError(explain("npz files", "none", str(places[0]), "Give files that `motionrft generate` wrote."))
    names: list[str] = []
    motions: list[np.ndarray] = []
    captions: list[str] = []
    kinds = set()
    for path in files:
        try:
            with np.load(path, allow_pickle=False) as file:
                stored = {key: file[key] for key in file.files}
        except (OSError, ValueError, EOFError) as error:
            raise DataError(explain("an npz file of arrays", str(error), str(path), "Write it again.")) from error
        kind = str(stored.get("representation", representation or ""))
        if not kind:
            raise DataError(
                explain(
                    "a representation", "none in the file", str(path), "Give --representation kinematic|joint|rotation."
                )
            )
        kinds.add(kind)
        motion, lengths = stored.get("motion"), stored.get("lengths")
        dim = Representation(kind).dim
        if motion is not None and motion.ndim == 4:
            motion = motion.reshape(*motion.shape[:2], -1)
        if (
            motion is None
            or lengths is None
            or motion.ndim != 3
            or motion.shape[2] != dim
            or len(lengths) != len(motion)
        ):
            shapes = {k: v.shape for k, v in stored.items()}
            raise DataError(
                explain(
                    f"motion (N, T, {dim}) and lengths (N,)", f"{shapes}", str(path), "Store them under these names."
                )
            )
        for row, length in enumerate(lengths.astype(int).tolist()):
            clip = np.asarray(motion[row, :length], dtype=np.float32)
            if not 1 <= length <= motion.shape[1] or not np.isfinite(clip).all():
                problem = "frames that are not finite" if 1 <= length <= motion.shape[1] else f"length {length}"
                raise DataError(explain("finite frames", problem, f"{path}, motion {row}", "Leave this motion out."))
            names.append(f"{path.name}:{row}")
            motions.append(clip)
        captions += [str(c) for c in stored.get("captions", [])]
    if len(kinds) > 1:
        raise DataError(explain("one representation", f"{sorted(kinds)}", "the motion files", "Score them one by one."))
    if captions and len(captions) != len(motions):
        captions = []
    return MotionFile(tuple(names), tuple(motions), Representation(kinds.pop()), tuple(captions))


def score_motions(executor: Executor, folders: RewardFolders, request: ScoreRequest, out: Path) -> dict[str, Any]:
    """Write OUT (one row per motion: name, caption, terms, total) and return means and percentiles.

    Raises:
        DataError: input that cannot be read, or as many captions or references as motions are missing.
        ConfigError: a term that the reward or the input cannot give, or another text encoder than the reward's.
    """
    files = read_motions(request.motions, request.representation)
    captions = _captions(request, files)
    references: tuple[np.ndarray, ...] = ()
    if request.references is not None:
        other = read_motions([request.references], request.representation)
        if len(other.motions) != len(files.motions) or other.representation != files.representation:
            raise DataError(
                explain(
                    f"{len(files.motions)} {files.representation.value} motions",
                    f"{len(other.motions)} {other.representation.value}",
                    str(request.references),
                    "Give one reference per motion, in the same order.",
                )
            )
        references = other.motions
    terms = request.terms or tuple(t for t in folders.terms if t != "similarity" or references)
    if "similarity" in terms and not references:
        raise ConfigError("the term 'similarity' needs --references")
    shards = [
        _Shard(i, files.motions[i : i + _SHARD], captions[i : i + _SHARD], references[i : i + _SHARD])
        for i in range(0, len(files.motions), _SHARD)
    ]
    work = partial(_score_shard, folders, request.text_encoder, files.representation, terms, request.term_modules)
    parts = executor.map_shards(work, shards)
    values = {name: np.concatenate([p[name] for p in parts]) for name in terms}
    used = {n: w for n, w in (request.weights or {}).items() if n in values}
    if used:
        values["total"] = sum(w * values[n] for n, w in used.items())  # type: ignore[assignment]
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = {"name": list(files.names), "caption": list(captions), **{n: pa.array(v) for n, v in values.items()}}
    pq.write_table(pa.table(columns), out)
    summary: dict[str, Any] = {"motions": len(files.motions), "table": str(out), "weights": used}
    for key, of in (("mean", np.mean), ("p10", partial(np.percentile, q=10)), ("p90", partial(np.percentile, q=90))):
        summary[key] = {name: float(of(v)) for name, v in values.items()}  # type: ignore[operator]
    return summary


def _captions(request: ScoreRequest, files: MotionFile) -> tuple[str, ...]:
    if request.captions is None:
        found = files.captions
    elif not request.captions.is_file():
        raise DataError(f"--captions {request.captions} does not exist")
    else:
        found = tuple(line.strip() for line in request.captions.read_text(encoding="utf-8").splitlines())
    if len(found) != len(files.motions) or not all(found):
        raise DataError(
            explain(
                f"{len(files.motions)} captions, none empty",
                f"{len(found)}, {sum(not c for c in found)} of them empty",
                str(request.captions or "the motion files"),
                "Give --captions FILE with one line per motion.",
            )
        )
    return found


@torch.no_grad()
def _score_shard(
    folders: RewardFolders,
    text_encoder: str,
    representation: Representation,
    terms: Sequence[str],
    term_modules: Sequence[str],
    shard: _Shard,
) -> dict[str, np.ndarray]:
    import_terms(term_modules, "finetune.term_modules")
    reward, encoder = _loaded(folders, text_encoder)
    motion, lengths = _padded(shard.motions)
    target = reward.embed(*_padded(shard.references), representation) if shard.references else None
    found = reward.score(
        motion,
        lengths,
        representation,
        text_BE=reward.encode_text(encoder.encode(list(shard.captions))),
        target_BE=target,
        terms=terms,
    )
    return {name: found.values[name].double().numpy() for name in terms}


@lru_cache(maxsize=2)  # a worker scores many shards: weights are read once per process
def _loaded(folders: RewardFolders, text_encoder: str) -> tuple[MotionReward, TextEncoder]:
    encoder, reward = load_text_encoder(text_encoder), folders.load()
    reward.check_text_encoder(encoder.fingerprint, f"--text-encoder {text_encoder}")
    return reward, encoder


def _padded(motions: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(m) for m in motions])
    motion = torch.zeros(len(motions), int(lengths.max()), motions[0].shape[1])
    for row, clip in zip(motion, motions):
        row[: len(clip)] = torch.from_numpy(clip)
    return motion, lengths
