"""One fixed group of clip ids to one Arrow table: the unit of work, the same wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from data_prep.canonicalize import ReadyClip, canonicalise, mirrored
from data_prep.represent import Motions, represent
from data_prep.sources.base import Rejected, Source
from data_prep.validate import check
from motionrft.config.prepare import PrepareConfig
from motionrft.core.types import Representation
from motionrft.data.schema import CLIP_SCHEMA, crc

GROUP = 64  # ids per unit of work: fixed, so that rounding never depends on the number of workers
ROW_SCHEMA = CLIP_SCHEMA.append(pa.field("code", pa.string())).append(pa.field("detail", pa.string()))
"""A clip row with code "", or a rejected one with its reason and empty motions."""


def process_group(source: Source, ids: Sequence[str], config: PrepareConfig) -> pa.Table:
    """Read, validate, canonicalise and convert clips; one row per id (two with a mirrored copy), never an exception.

    Computes with one torch thread: sums then have one order on every machine layout.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _process(source, ids, config)
    finally:
        torch.set_num_threads(threads)


def _process(source: Source, ids: Sequence[str], config: PrepareConfig) -> pa.Table:
    results: list[ReadyClip | Rejected] = []
    for clip_id in ids:
        result = _read(source, clip_id, config)
        results.append(result)
        if isinstance(result, Rejected) or not config.mirror:
            continue
        if result.split == "train" or config.mirror_held_out:
            results.append(mirrored(result))
    ready = [r for r in results if isinstance(r, ReadyClip)]
    motions = iter(represent(ready, config))
    rows = [(r, r if isinstance(r, Rejected) else next(motions)) for r in results]
    return _table(rows, config)


def _read(source: Source, clip_id: str, config: PrepareConfig) -> ReadyClip | Rejected:
    try:
        clip = source.read(clip_id)
        if isinstance(clip, Rejected):
            return clip
        checked = check(clip, config.repair_frames)
        return checked if isinstance(checked, Rejected) else canonicalise(checked, config)
    except Exception as error:  # noqa: BLE001 - whatever one file does, it becomes a row, not the end of the job
        return Rejected(clip_id, "", source.name, "UNREADABLE", f"{type(error).__name__}: {error}")


def _table(rows: Sequence[tuple[ReadyClip | Rejected, Motions | Rejected]], config: PrepareConfig) -> pa.Table:
    columns: dict[str, list] = {name: [] for name in ROW_SCHEMA.names}
    arrays: dict[str, list[np.ndarray]] = {r.value: [] for r in Representation}
    for clip, motions in rows:
        values: dict[str, Any] = {"fps": config.fps, "class_id": -1, "mirrored": False}
        if isinstance(clip, ReadyClip):
            values["mirrored"] = clip.mirrored
        if isinstance(motions, Rejected):
            values |= {"item_id": motions.clip_id, "clip_id": motions.clip_id.split("#")[0], "source": motions.source}
            values |= {"split": motions.split, "code": motions.reason_code, "detail": motions.detail}
            values |= {"n_frames": 0, "class_name": "", "captions": [], "rot_source": "", "qc_flags": 0}
            parts = {r.value: np.zeros(0, dtype=np.float32) for r in Representation}
        else:
            assert isinstance(clip, ReadyClip)
            values |= {"item_id": clip.item_id, "clip_id": clip.clip_id, "source": clip.source, "split": clip.split}
            values |= {"code": "", "detail": "", "n_frames": len(motions.kinematic_TD), "class_name": clip.class_name}
            values |= {"captions": list(clip.captions), "rot_source": motions.rot_source}
            values["qc_flags"] = int(motions.flags)
            parts = {r.value: motions.get(r).numpy().reshape(-1) for r in Representation}
        for name, part in parts.items():
            arrays[name].append(part)
            values[f"crc_{name}"] = crc(part)
        for name, value in values.items():
            columns[name].append(value)
    return pa.Table.from_arrays(
        [_lists(arrays[f.name]) if f.name in arrays else pa.array(columns[f.name], type=f.type) for f in ROW_SCHEMA],
        schema=ROW_SCHEMA,
    )


def _lists(parts: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int32)
    values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    return pa.ListArray.from_arrays(offsets, pa.array(values, pa.float32()))
