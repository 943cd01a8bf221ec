"""A strict BVH reader: bytes in, named joints with world positions and rotations out.

Why an own reader: of the packages on PyPI, `bvh` (unmaintained) and `upc-pymotion` return a file cut between two
frames as if it were whole, `pymotion` and `bvhio` read from paths only while clips may sit in an archive, and `bvhio`
pins exact versions of three dependencies. The grammar is small, and cut files must become reject rows.

Letters: T frames, N joints of the file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionrft.core.errors import DataError

_AXES = {"X": 0, "Y": 1, "Z": 2}


@dataclass(frozen=True)
class BvhClip:
    """One parsed file, in its own unit and axes."""

    names: tuple[str, ...]  # N, parents first
    parents: tuple[int, ...]  # N, -1 for the root
    fps: float  # 1 / frame time; nan if the file gives none
    positions_TN3: np.ndarray  # world positions, float64
    rotations_TN33: np.ndarray  # world rotations of the joints' own frames, float64

    def joint(self, name: str) -> int:
        """Return the index of a joint.

        Raises:
            DataError: no such joint.
        """
        if name not in self.names:
            raise DataError(f"no joint {name!r}; the file has {', '.join(self.names)}")
        return self.names.index(name)


@dataclass
class _Joint:
    name: str
    parent: int
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    channels: tuple[str, ...] = ()


def parse_bvh(data: bytes) -> BvhClip:
    """Parse a BVH file.

    Raises:
        DataError: not BVH, cut short, or numbers that are none; the text says where.
    """
    text = data.decode("utf-8", errors="replace")
    head, mark, motion = text.partition("MOTION")
    if not mark or "HIERARCHY" not in head:
        raise DataError("no HIERARCHY followed by MOTION: not a BVH file, or cut in its header")
    joints = _hierarchy(head.split())
    count, frame_time, values = _motion(motion)
    width = sum(len(j.channels) for j in joints)
    if width == 0:
        raise DataError("no joint has channels")
    if len(values) != count * width:
        whole = len(values) // width
        raise DataError(f"{count} frames of {width} numbers announced, the file holds {whole} whole frames: truncated")
    positions, rotations = _forward(joints, values.reshape(count, width))
    fps = 1.0 / frame_time if np.isfinite(frame_time) and frame_time > 0 else float("nan")
    return BvhClip(tuple(j.name for j in joints), tuple(j.parent for j in joints), fps, positions, rotations)


def _hierarchy(tokens: list[str]) -> list[_Joint]:
    joints: list[_Joint] = []
    stack: list[int] = []  # open braces; -1 = an end site
    opening: int | None = None
    position = 0
    try:
        while position < len(tokens):
            token = tokens[position]
            if token in ("ROOT", "JOINT"):
                if token == "ROOT" and joints:
                    raise DataError("more than one ROOT: not supported")
                joints.append(_Joint(tokens[position + 1], stack[-1] if stack else -1))
                opening = len(joints) - 1
                position += 2
            elif token == "End":
                opening = -1
                position += 2
            elif token == "{":
                if opening is None:
                    raise DataError("a brace that opens no joint")
                stack.append(opening)
                opening = None
                position += 1
            elif token == "}":
                stack.pop()
                position += 1
            elif token == "OFFSET":
                x, y, z = (float(v) for v in tokens[position + 1 : position + 4])
                if stack[-1] >= 0:
                    joints[stack[-1]].offset = (x, y, z)
                position += 4
            elif token == "CHANNELS":
                number = int(tokens[position + 1])
                channels = tuple(tokens[position + 2 : position + 2 + number])
                known = all(c[:1] in _AXES and c[1:] in ("position", "rotation") for c in channels)
                if len(channels) != number or not known:
                    raise DataError(f"channels {channels} are not X/Y/Z position or rotation")
                joints[stack[-1]].channels = channels
                position += 2 + number
            else:
                position += 1
    except (IndexError, ValueError) as error:
        raise DataError(f"broken hierarchy near token {position}: {error}") from error
    if stack or not joints:
        raise DataError("the hierarchy is not closed: truncated" if joints else "the hierarchy has no joint")
    return joints


def _motion(text: str) -> tuple[int, float, np.ndarray]:
    tokens = text.split()
    try:
        if tokens[0] != "Frames:" or tokens[2:4] != ["Frame", "Time:"]:
            raise DataError(f"MOTION starts with {tokens[:5]}, expected 'Frames: n Frame Time: s'")
        count, frame_time = int(tokens[1]), float(tokens[4])
    except (IndexError, ValueError) as error:
        raise DataError(f"broken MOTION header: {error}") from error
    try:
        return count, frame_time, np.array(tokens[5:], dtype=np.float64)
    except ValueError as error:
        raise DataError(f"a value that is no number, as in a file cut mid-line: {error}") from error


def _forward(joints: list[_Joint], values_TC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return world positions (T, N, 3) and rotations (T, N, 3, 3). Position channels replace the offset."""
    positions, rotations = [], []
    start = 0
    for joint in joints:
        local = np.broadcast_to(np.array(joint.offset), (len(values_TC), 3)).copy()
        turn: np.ndarray | None = None
        for column, channel in enumerate(joint.channels, start):
            axis = _AXES[channel[0]]
            if channel[1:] == "position":
                local[:, axis] = values_TC[:, column]
            else:
                step = _axis_rotation(axis, np.deg2rad(values_TC[:, column]))
                turn = step if turn is None else turn @ step
        start += len(joint.channels)
        own = np.broadcast_to(np.eye(3), (len(values_TC), 3, 3)) if turn is None else turn
        if joint.parent < 0:
            positions.append(local)
            rotations.append(own)
        else:
            above = rotations[joint.parent]
            positions.append(positions[joint.parent] + np.einsum("tij,tj->ti", above, local))
            rotations.append(above @ own)
    return np.stack(positions, axis=1), np.stack(rotations, axis=1)


def _axis_rotation(axis: int, angle_T: np.ndarray) -> np.ndarray:
    result = np.zeros((len(angle_T), 3, 3))
    b, c = (axis + 1) % 3, (axis + 2) % 3
    cos, sin = np.cos(angle_T), np.sin(angle_T)
    result[:, axis, axis] = 1.0
    result[:, b, b], result[:, b, c], result[:, c, b], result[:, c, c] = cos, -sin, sin, cos
    return result
