"""Motions to be measured, whatever their representation: evaluator features, joints, and known damage.

Letters: N clips, T frames, J joints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from motionrft.core.errors import RepresentationError, explain
from motionrft.core.rng import numpy_rng
from motionrft.core.types import Representation, valid_mask
from motionrft.representations.convert import to_joints
from motionrft.representations.kinematic import joints_to_kinematic
from motionrft.representations.skeleton import T2M


@dataclass(frozen=True)
class MotionSet:
    """Clips in physical units, padded to one T."""

    motion_NTD: Tensor
    lengths_N: Tensor  # (N,) int64
    representation: Representation
    fps: float = T2M.fps

    def __post_init__(self) -> None:
        """Check shapes."""
        object.__setattr__(self, "representation", Representation(self.representation))
        shape = tuple(self.motion_NTD.shape)
        if len(shape) != 3 or shape[2] != self.representation.dim or self.lengths_N.shape != shape[:1]:
            raise RepresentationError(
                explain(
                    f"motions (N, T, {self.representation.dim}) and lengths (N,) for {self.representation.value!r}",
                    f"{shape} and {tuple(self.lengths_N.shape)}",
                    "motions to evaluate",
                    "Pass denormalised features of the named representation.",
                )
            )

    def __len__(self) -> int:
        return len(self.motion_NTD)

    @classmethod
    def from_joints(cls, joints_NTJ3: Tensor, lengths_N: Tensor, fps: float = T2M.fps) -> MotionSet:
        """Return joints (N, T, 22, 3) as a set."""
        return cls(joints_NTJ3.flatten(-2), lengths_N, Representation.JOINT, fps)

    @cached_property
    def joints_NTJ3(self) -> Tensor:
        """(N, T, 22, 3) metres, zeros beyond each length."""
        with torch.no_grad():
            joints = to_joints(self.motion_NTD.float(), self.representation)
        return torch.where(valid_mask(self.lengths_N, joints.shape[1])[..., None, None], joints, 0.0)

    @cached_property
    def kinematic(self) -> tuple[Tensor, Tensor]:
        """Kinematic features (N, T, 263) and their lengths; made from joints they have one row less per clip."""
        if self.representation is Representation.KINEMATIC:
            return self.motion_NTD.float(), self.lengths_N
        with torch.no_grad():
            result = joints_to_kinematic(self.joints_NTJ3, self.lengths_N)
        return result.features, result.lengths_B


def damaged(
    motions: MotionSet, damage: Callable[[np.ndarray, np.random.Generator], np.ndarray], seed: int
) -> MotionSet:
    """Return the set as joints, each clip's valid frames (L, 22, 3) passed through `damage` with its own generator."""
    joints = motions.joints_NTJ3.numpy().copy()
    for i, length in enumerate(motions.lengths_N.tolist()):
        joints[i, :length] = damage(joints[i, :length], numpy_rng("evaluation/damage", seed, i))
    return MotionSet.from_joints(torch.from_numpy(joints), motions.lengths_N, motions.fps)


def joint_noise(sigma_m: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """Return damage that moves every joint of every frame by independent noise of `sigma_m` metres per axis."""
    return lambda joints, rng: joints + sigma_m * rng.standard_normal(joints.shape).astype(joints.dtype)


def shuffled_frames(joints: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the frames in random order."""
    return joints[rng.permutation(len(joints))]


def reversed_time(joints: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Return the clip played backwards."""
    return joints[::-1]


def mirrored(joints: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Return the clip with left and right exchanged."""
    return joints[:, list(T2M.mirror_permutation)] * np.array([-1.0, 1.0, 1.0], dtype=joints.dtype)
