"""Rows to padded batches: which caption, which window of frames, zeros after each length.

Choices are keyed by (seed, epoch, item): batch layout, worker count and resume cannot change them.

Letters: B rows, T frames, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from motionrft.core.rng import keyed_uniform
from motionrft.core.types import MotionBatch, Representation
from motionrft.data.tables import ClipTable, TextTable
from motionrft.representations.kinematics import rotation_to_forward
from motionrft.representations.rotation import ROOT_ROTATION, TRANSLATION, rotation_to_joints

_ALL = tuple(Representation)
_GROUND = (1.0, 0.0, 1.0)


def choose_captions(clips: ClipTable, rows: Sequence[int], seed: int, epoch: int) -> list[int]:
    """Return one caption index per row, drawn uniformly per (seed, epoch, item); 0 where there is none."""
    uniform = keyed_uniform(clips.keys[list(rows)], "caption", seed, epoch).tolist()
    return [min(int(u * len(clips.captions[r])), max(len(clips.captions[r]) - 1, 0)) for u, r in zip(uniform, rows)]


def choose_starts(
    clips: ClipTable, rows: Sequence[int], max_frames: int, seed: int, epoch: int, unit: int = 1
) -> list[int]:
    """Return the first frame of each row's window of `max_frames`, drawn uniformly per (seed, epoch, item)."""
    lengths = clips.lengths[list(rows)]
    room = lengths - window_lengths(lengths, max_frames, unit)
    uniform = keyed_uniform(clips.keys[list(rows)], "crop", seed, epoch).double()
    return torch.minimum((uniform * (room + 1)).long(), room).tolist()


def window_lengths(lengths_B: Tensor, max_frames: int, unit: int = 1) -> Tensor:
    """Return lengths cut to `max_frames` and rounded down to multiples of `unit`; shorter ones stay."""
    kept = lengths_B.clamp(max=max_frames)
    return torch.where(kept >= unit, kept - kept % unit, kept)


def collate(
    clips: ClipTable,
    text: TextTable,
    rows: Sequence[int],
    caption_choice: Sequence[int] | None = None,
    representations: Iterable[Representation] = _ALL,
    max_frames: int | None = None,
    crop: Sequence[int] | None = None,
    unit: int = 1,
    pad_to: int | None = None,
) -> MotionBatch:
    """Return rows as one batch in physical units.

    A window that does not start at frame 0 is made canonical again: joints and rotations start in the XZ origin facing
    +Z, and kinematic features do so by construction (with their own, smoothed heading).

    Args:
        clips: items.
        text: features of their captions.
        rows: row indices.
        caption_choice: caption index per row (`choose_captions`); None = the first, for evaluation.
        representations: which ones to return.
        max_frames: longest window; None = no limit.
        crop: first frame per row (`choose_starts`); None = 0, for evaluation.
        unit: lengths become multiples of this.
        pad_to: T of the batch; None = the longest length of the batch.

    Raises:
        ValueError: no rows, a window outside a clip, or `pad_to` below a length.
        DataError: a caption without features.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("a batch needs at least one row")
    own_lengths = clips.lengths[rows]
    lengths_B = window_lengths(own_lengths, int(own_lengths.max()) if max_frames is None else max_frames, unit)
    starts = [0] * len(rows) if crop is None else list(crop)
    if any(not 0 <= s <= o - n for s, o, n in zip(starts, own_lengths.tolist(), lengths_B.tolist(), strict=True)):
        raise ValueError(f"windows starting at {starts} leave their clips of {own_lengths.tolist()} frames")
    num_frames = int(lengths_B.max()) if pad_to is None else pad_to
    if num_frames < int(lengths_B.max()):
        raise ValueError(f"pad_to={pad_to} is shorter than a clip of {int(lengths_B.max())} frames")
    motions = {
        Representation(r): _padded(clips, Representation(r), rows, starts, lengths_B.tolist(), num_frames)
        for r in representations
    }
    choice = [0] * len(rows) if caption_choice is None else list(caption_choice)
    captions = tuple(
        clips.captions[row][index] if clips.captions[row] else "" for row, index in zip(rows, choice, strict=True)
    )
    return MotionBatch(
        item_ids=tuple(clips.item_ids[r] for r in rows),
        motions=motions,
        lengths_B=lengths_B,
        fps=clips.fps,
        captions=captions,
        text=text.condition(captions),
        class_ids_B=clips.class_ids[rows],
        keys_B=clips.keys[rows],
    )


def training_batch(
    clips: ClipTable,
    text: TextTable,
    rows: Sequence[int],
    seed: int,
    epoch: int,
    representations: Iterable[Representation] = _ALL,
    max_frames: int = 196,
    unit: int = 1,
    pad_to: int | None = None,
) -> MotionBatch:
    """Return `collate` with a caption and a window drawn per (seed, epoch, item)."""
    return collate(
        clips,
        text,
        rows,
        choose_captions(clips, rows, seed, epoch),
        representations,
        max_frames,
        choose_starts(clips, rows, max_frames, seed, epoch, unit),
        unit,
        pad_to,
    )


def pad(motions: Sequence[np.ndarray], num_frames: int, dim: int) -> Tensor:
    """Return (B, T, D) float32 with zeros after each motion (T_i, D)."""
    result = np.zeros((len(motions), num_frames, dim), dtype=np.float32)
    for row, motion in zip(result, motions):
        row[: len(motion)] = motion
    return torch.from_numpy(result)


def recanonicalise(motion_TD: Tensor, representation: Representation) -> Tensor:
    """Return a clip (T, D) whose frame 0 stands in the XZ origin and faces +Z; heights and K stay as they are."""
    if representation is Representation.KINEMATIC:
        return motion_TD
    if representation is Representation.JOINT:
        joints = motion_TD.double().unflatten(-1, (-1, 3))
        turn = rotation_to_forward(joints[0])
        moved = (joints - joints[0, 0] * joints.new_tensor(_GROUND)) @ turn.T
        return moved.flatten(-2).float()
    motion = motion_TD.double()
    turn = rotation_to_forward(rotation_to_joints(motion[0]))
    root = (motion[:, TRANSLATION] - motion[0, TRANSLATION] * motion.new_tensor(_GROUND)) @ turn.T
    # Interleaved 6D is a (3, 2) matrix of two columns: turning it is one product.
    heading = (turn @ motion[:, ROOT_ROTATION].unflatten(-1, (3, 2))).flatten(-2)
    return torch.cat([root, heading, motion[:, ROOT_ROTATION.stop :]], dim=-1).float()


def _padded(
    clips: ClipTable,
    representation: Representation,
    rows: list[int],
    starts: list[int],
    lengths: list[int],
    num_frames: int,
) -> Tensor:
    windows = []
    for row, start, length in zip(rows, starts, lengths):
        window = clips.frames(row, representation)[start : start + length]
        if start and representation is not Representation.KINEMATIC:
            window = recanonicalise(torch.from_numpy(window.copy()), representation).numpy()
        windows.append(window)
    return pad(windows, num_frames, representation.dim)
