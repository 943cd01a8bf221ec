"""Procedural clips whose captions say what they do: 48 classes of direction x arm x speed, on the 22-joint skeleton."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from motionrft.representations.kinematic import joints_to_kinematic
from motionrft.representations.skeleton import T2M

DIRECTIONS = {"forward": (0.0, 1.0), "backward": (0.0, -1.0), "to the left": (1.0, 0.0), "to the right": (-1.0, 0.0)}
ARMS = {f"{verb} the {side} arm": (side, verb) for verb in ("raising", "lowering") for side in ("left", "right")}
SPEEDS = {"slowly": 0.3, "steadily": 1.0, "quickly": 2.0}
CLASSES = list(itertools.product(DIRECTIONS, ARMS, SPEEDS))


def pose(left_arm: float, right_arm: float, swing: float) -> np.ndarray:
    """Return joints (22, 3) of a standing body with raised arms (radians) and a leg swing (radians)."""
    offsets = T2M.standard_offsets().numpy().copy()
    turns = {"left": left_arm, "right": -right_arm}
    joints = np.zeros((22, 3))
    joints[0] = (0.0, 0.94, 0.0)
    for j in range(1, 22):
        offset, name = offsets[j], T2M.joint_names[j]
        if name.endswith(("elbow", "wrist")):
            c, s = np.cos(turns[name.split("_")[0]]), np.sin(turns[name.split("_")[0]])
            offset = np.array([c * offset[0] - s * offset[1], s * offset[0] + c * offset[1], offset[2]])
        if name.endswith(("knee", "ankle")):
            c, s = np.cos(swing), np.sin(swing) * (1 if name.startswith("left") else -1)
            offset = np.array([offset[0], c * offset[1] - s * offset[2], s * offset[1] + c * offset[2]])
        joints[j] = joints[T2M.parents[j]] + offset
    return joints


def clip(class_id: int, rng: np.random.Generator, frames: int = 41, fps: float = 20.0) -> np.ndarray:
    """Return joints (frames, 22, 3) of a class, varied in phase, speed and reach."""
    direction, arm, speed = CLASSES[class_id]
    side, verb = ARMS[arm]
    reach, phase = rng.uniform(0.9, 1.2), rng.uniform(0, 2 * np.pi)
    metres = SPEEDS[speed] * rng.uniform(0.9, 1.1) / fps
    joints = []
    for t in range(frames):
        done = t / (frames - 1)
        angle = -1.2 + 2.2 * reach * (done if verb == "raising" else 1 - done)
        arms = {"left": -1.2, "right": -1.2, side: angle}
        body = pose(arms["left"], arms["right"], 0.4 * np.sin(0.5 * t + phase))
        x, z = DIRECTIONS[direction]
        joints.append(body + np.array([x * metres * t, 0.0, z * metres * t]))
    # Real captures differ in body and tremble a little; without this any noise would be unlike all training motion.
    result = np.stack(joints) + rng.normal(0.0, 0.01, (1, 22, 3)) + rng.normal(0.0, 0.002, (frames, 22, 3))
    result[..., 1] -= result[..., 1].min()
    return result


@dataclass(frozen=True)
class Toy:
    """A split of toy clips."""

    joints: torch.Tensor  # (N, T, 22, 3)
    features: torch.Tensor  # (N, T - 1, 263)
    lengths: torch.Tensor  # (N,) feature rows
    captions: list[str]
    class_ids: torch.Tensor


def toy_split(takes: int, seed: int) -> Toy:
    """Return `takes` clips of every class."""
    rng = np.random.default_rng(seed)
    ids = [c for c in range(len(CLASSES)) for _ in range(takes)]
    joints = torch.from_numpy(np.stack([clip(c, rng) for c in ids])).float()
    lengths = torch.from_numpy(rng.integers(33, 42, len(ids)))
    result = joints_to_kinematic(joints, lengths)
    verbs = ("walks", "moves", "goes")
    captions = [f"a person {verbs[i % 3]} {CLASSES[c][0]} {CLASSES[c][2]} {CLASSES[c][1]}" for i, c in enumerate(ids)]
    return Toy(joints, result.features, result.lengths_B, captions, torch.tensor(ids))
