"""The Arrow schema of a dataset folder: one row per item, three representations of the same frames side by side.

Letters: T frames, D features. Layout of a dataset folder::

    ROOT/manifest.json                          what it is, counts, options, checksums; written last
    ROOT/clips/split=train/part-00000.parquet   rows of `CLIP_SCHEMA`, likewise val and test
    ROOT/stats/kinematic.npz                    normaliser of the training split, likewise joint and rotation
    ROOT/text/ENCODER/part-00000.parquet        rows of `TEXT_SCHEMA`, ENCODER = fingerprint of the text encoder
    ROOT/quality.parquet, ROOT/quality.txt      what was rejected or suspicious, and why

Motion columns are flat `list<float32>` of T * D numbers, row-major: any Parquet tool reads them, and decoding is a
slice of the value buffer. Their dictionary encoding is off (it makes floats larger); bytes are split by significance
and compressed with zstd.
"""

from __future__ import annotations

import zlib
from enum import IntFlag

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from motionrft.core.types import Representation
from motionrft.representations.kinematic import KinematicFlag

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
ROW_GROUP = 128  # rows; about 30 MB with three representations of 200 frames

CLIP_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),  # unique in the dataset
        ("clip_id", pa.string()),  # groups mirrors and segments of one recording
        ("source", pa.string()),
        ("split", pa.string()),
        ("n_frames", pa.int32()),  # T, the same for all three representations
        ("fps", pa.float32()),
        ("class_id", pa.int32()),  # index in the manifest's classes, -1 = unknown
        ("class_name", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("rot_source", pa.string()),  # body_model | bvh | ik (fitted to positions: twist is a guess)
        ("mirrored", pa.bool_()),
        ("qc_flags", pa.uint32()),  # QcFlag
        ("crc_kinematic", pa.uint32()),  # CRC-32 of the little-endian float32 bytes
        ("crc_joint", pa.uint32()),
        ("crc_rotation", pa.uint32()),
        ("kinematic", pa.list_(pa.float32())),  # T * 263
        ("joint", pa.list_(pa.float32())),  # T * 66
        ("rotation", pa.list_(pa.float32())),  # T * 135
    ]
)
"""Columns of clips/split=*/part-*.parquet."""

TEXT_SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("n_tokens", pa.int32()),  # L
        ("tokens", pa.list_(pa.float16())),  # L * D
        ("pooled", pa.list_(pa.float32())),  # P, not always D
    ]
)
"""Columns of text/*/part-*.parquet; the empty caption is always there (unconditional guidance needs it)."""

QUALITY_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("severity", pa.string()),  # rejected (not in the dataset) | flagged (kept)
        ("code", pa.string()),
        ("detail", pa.string()),
    ]
)
"""Columns of quality.parquet."""

MOTION_COLUMNS = tuple(r.value for r in Representation)


class QcFlag(IntFlag):
    """What is unusual about an item that was kept: bits of the column `qc_flags`.

    The low eight bits are those of `KinematicFlag`; NONFINITE, TOO_SHORT and ZERO_BONE_FIRST_FRAME are always rejected.
    """

    ZERO_BONE = int(KinematicFlag.ZERO_BONE)
    ANTIPODAL_BONE = int(KinematicFlag.ANTIPODAL_BONE)
    ANTIPODAL_HEADING = int(KinematicFlag.ANTIPODAL_HEADING)
    DEGENERATE_HEADING = int(KinematicFlag.DEGENERATE_HEADING)
    YAW_SIGN_ERROR = int(KinematicFlag.YAW_SIGN_ERROR)
    RESAMPLED = 1 << 8  # another frame rate in the source
    CUT = 1 << 9  # longer than max_frames: the start was kept
    NO_CAPTION = 1 << 10  # nothing for text tasks; statistics and authenticity still use it
    BAD_CAPTION_DROPPED = 1 << 11  # an empty caption was dropped, others remain
    UNUSUAL_FPS = 1 << 12  # source rate outside 10..240
    UNUSUAL_SIZE = 1 << 13  # leg length outside 0.5..1.2 m
    FAST = 1 << 14  # a joint faster than 20 m/s, or a root step above 0.5 m per frame
    FLOATING = 1 << 15  # feet never near the floor
    REPAIRED = 1 << 16  # at most three frames with NaN were interpolated
    ROTATION_DISAGREES = 1 << 17  # given rotations and positions differ: rotations were fitted instead
    NEVER_UPRIGHT = 1 << 18  # head never well above the feet: lying throughout, or a wrong up axis


def crc(array: np.ndarray) -> int:
    """Return the CRC-32 of an array's little-endian float32 bytes."""
    return zlib.crc32(np.ascontiguousarray(array, dtype="<f4").data)


def parquet_writer(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer with the encodings of this project: same rows in, same bytes out."""
    floats = [f.name for f in schema if pa.types.is_list(f.type) and pa.types.is_floating(f.type.value_type)]
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=[f.name for f in schema if f.name not in floats and not pa.types.is_list(f.type)],
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in floats},
        write_statistics=[f.name for f in schema if f.name not in floats],
    )
