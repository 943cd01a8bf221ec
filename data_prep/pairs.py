"""Training pairs of the adapters, from clips and from generated motion.

Preference: a clean or mildly damaged clip is preferred to a more damaged copy of it. Damage comes in kinds and grades.
Authenticity: a captured clip and a generated one of the same caption and length. In both, the two members are reduced
to joint positions and take the same way back to the three representations: no member carries a trace of its origin.

Letters: T frames, J = 22 joints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_prep.represent import motions_of_joints
from motionrft.core.errors import DataError, explain
from motionrft.core.rng import numpy_rng
from motionrft.core.types import Representation
from motionrft.data.pairs import MEMBERS, PAIR_SCHEMA, pair_file
from motionrft.data.tables import ClipTable
from motionrft.representations.convert import to_joints

Damage = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
GRADES = 3
_GROUP = 64


def jitter(joints: np.ndarray, grade: float, rng: np.random.Generator) -> np.ndarray:
    """Shake every joint independently, 6 mm per grade."""
    return joints + 0.006 * grade * rng.standard_normal(joints.shape)


def root_speed(joints: np.ndarray, grade: float, rng: np.random.Generator) -> np.ndarray:
    """Stretch or shrink the path on the ground while the legs keep their pace: the feet slide."""
    factor = 1 + (0.3 if rng.random() < 0.5 else -0.25) * grade
    root = joints[:, :1] * np.array([1.0, 0.0, 1.0])
    return joints + (factor - 1) * (root - root[:1])


def time_jump(joints: np.ndarray, grade: float, rng: np.random.Generator) -> np.ndarray:
    """Leave out frames in the middle and freeze at the end, 3 frames per grade."""
    skip = min(int(3 * grade), len(joints) // 3)
    at = int(rng.integers(len(joints) // 3, max(2 * len(joints) // 3 - skip, len(joints) // 3 + 1)))
    index = np.minimum(np.where(np.arange(len(joints)) < at, 0, skip) + np.arange(len(joints)), len(joints) - 1)
    return joints[index]


def wobble(joints: np.ndarray, grade: float, rng: np.random.Generator) -> np.ndarray:
    """Let the whole body drift up and down and to the sides slowly, 2 cm per grade."""
    time = np.arange(len(joints))[:, None]
    waves = np.sin(2 * np.pi * (time * rng.uniform(0.02, 0.06, 3) + rng.random(3)))
    return joints + 0.02 * grade * waves[:, None]


def foot_skate(joints: np.ndarray, grade: float, rng: np.random.Generator) -> np.ndarray:
    """Push the whole body along a straight line, 4 cm/frame at grade 3."""
    angle = 2 * np.pi * rng.random()
    step = 0.013 * grade * np.array([np.cos(angle), 0.0, np.sin(angle)])
    return joints + np.arange(len(joints))[:, None, None] * step


DAMAGE: dict[str, Damage] = {
    "jitter": jitter,
    "root_speed": root_speed,
    "time_jump": time_jump,
    "wobble": wobble,
    "foot_skate": foot_skate,
}


def build_preference_pairs(
    clips: ClipTable, folder: Path, split: str, *, seed: int, per_clip: int = 1, max_clips: int = 0
) -> int:
    """Write FOLDER/preference_SPLIT.parquet and return the number of pairs.

    Args:
        clips: clean clips of one split.
        folder: of the pair tables.
        split: name of the split.
        seed: of the choice, kinds and damage; each pair depends on it and its own clip.
        per_clip: pairs per clip.
        max_clips: use at most this many clips, drawn by seed; 0 = all.
    """
    chosen = _choose(len(clips), max_clips, seed, split)
    names, books, members = [], [], []
    for row in chosen:
        clean = _joints(clips, row)
        for number in range(per_clip):
            rng = numpy_rng("preference", seed, clips.item_ids[row], number)
            kind = list(DAMAGE)[int(rng.integers(len(DAMAGE)))]
            better, worse = sorted(rng.choice(GRADES + 1, 2, replace=False).tolist())
            draw = int(rng.integers(2**31))
            # one draw for both grades: they differ in strength, not in place
            pair = [
                clean if g == 0 else DAMAGE[kind](clean, float(g), np.random.default_rng(draw)) for g in (better, worse)
            ]
            names.append(f"{clips.item_ids[row]}:{number}")
            books.append((clips.clip_ids[row], f"{kind} {better}>{worse}"))
            members.append(pair)
    return _write(folder, "preference", split, names, books, members)


def build_authenticity_pairs(
    clips: ClipTable,
    rows: Sequence[int],
    motions: Sequence[np.ndarray],
    lengths: Sequence[int],
    representation: Representation,
    folder: Path,
    split: str,
    *,
    seed: int,
) -> int:
    """Write FOLDER/authenticity_SPLIT.parquet and return the number of pairs.

    Args:
        clips: captured clips of one split.
        rows: which clip each generated motion was made for.
        motions: generated physical features (T, D), possibly padded.
        lengths: their true frames; the captured clip is cut to the same.
        representation: of the generated motions.
        folder: of the pair tables.
        split: name of the split.
        seed: recorded in the pair ids.

    Raises:
        DataError: no generated motion.
    """
    if not len(rows):
        raise DataError(explain("generated motions", "none", f"split {split!r}", "Generate some for its captions."))
    names, books, members = [], [], []
    for row, motion, length in zip(rows, motions, lengths, strict=True):
        frames = torch.from_numpy(np.asarray(motion[:length])).double()
        made = to_joints(frames, representation).numpy()
        real = _joints(clips, row)[:length]
        if len(real) < len(made):
            made = made[: len(real)]
        names.append(f"{clips.item_ids[row]}:generated:{seed}")
        books.append((clips.clip_ids[row], "generated"))
        members.append([real, made])
    return _write(folder, "authenticity", split, names, books, members)


def _choose(count: int, limit: int, seed: int, split: str) -> list[int]:
    order = numpy_rng("pair-clips", seed, split).permutation(count)
    return np.sort(order[: limit or None]).tolist()


def _joints(clips: ClipTable, row: int) -> np.ndarray:
    return clips.frames(row, Representation.JOINT).astype(np.float64).reshape(-1, 22, 3)


def _write(
    folder: Path,
    name: str,
    split: str,
    ids: Sequence[str],
    books: Sequence[tuple[str, str]],
    members: Sequence[Sequence[np.ndarray]],
) -> int:
    """Convert both members alike, drop pairs that do not convert, and write the table atomically."""
    columns: dict[str, list] = {field: [] for field in PAIR_SCHEMA.names}
    for start in range(0, len(ids), _GROUP):
        group = members[start : start + _GROUP]
        flat = [torch.from_numpy(np.ascontiguousarray(m)) for pair in group for m in pair]
        motions = motions_of_joints(flat)
        for offset in range(len(group)):
            pair = motions[2 * offset : 2 * offset + 2]
            parts = {f"{r.value}_{m}": pair[i].get(r).numpy() for i, m in enumerate(MEMBERS) for r in Representation}
            if not all(np.isfinite(p).all() and len(p) for p in parts.values()):
                continue
            clip_id, kind = books[start + offset]
            row = {"pair_id": ids[start + offset], "clip_id": clip_id, "kind": kind, "n_frames": len(pair[0].joint_TD)}
            for field, value in {**row, **{k: v.reshape(-1) for k, v in parts.items()}}.items():
                columns[field].append(value)
    folder.mkdir(parents=True, exist_ok=True)
    path = pair_file(folder, name, split)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    pq.write_table(pa.table(columns, schema=PAIR_SCHEMA), partial, use_dictionary=False, compression="zstd")
    partial.replace(path)
    return len(columns["pair_id"])
