"""Clips to the three representations of the same frames.

Letters: T frames, J = 22 joints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.canonicalize import ReadyClip, turn_between
from data_prep.sources.base import Rejected
from motionrft.config.prepare import PrepareConfig
from motionrft.core.types import Representation
from motionrft.data.collate import recanonicalise
from motionrft.data.schema import QcFlag
from motionrft.representations.kinematic import KinematicFlag, Variant, clips_to_kinematic
from motionrft.representations.kinematics import facing_yaw, forward_kinematics, joints_to_rotations
from motionrft.representations.rotation import matrices_to_rotation
from motionrft.representations.skeleton import T2M

_DISAGREE_M = 0.08  # mean joint distance between given rotations and given positions above which rotations are fitted
_CANONICAL_M, _CANONICAL_RAD = 1e-3, 5e-3  # released clips within these are canonical already
_REJECTED = {
    KinematicFlag.NONFINITE: "NaN or inf after conversion",
    KinematicFlag.TOO_SHORT: "one frame",
    KinematicFlag.ZERO_BONE_FIRST_FRAME: "a bone without length in frame 0",
}


@dataclass(frozen=True)
class Motions:
    """One clip in all representations, row-aligned, float32, physical units."""

    kinematic_TD: Tensor  # (T, 263)
    joint_TD: Tensor  # (T, 66) standard bone lengths, floor 0, from the XZ origin, facing +Z
    rotation_TD: Tensor  # (T, 135) pelvis position and local rotations of the standard body
    flags: QcFlag
    rot_source: str

    def get(self, representation: Representation) -> Tensor:
        """Return one of the three."""
        return {
            Representation.KINEMATIC: self.kinematic_TD,
            Representation.JOINT: self.joint_TD,
            Representation.ROTATION: self.rotation_TD,
        }[representation]


def represent(clips: Sequence[ReadyClip], config: PrepareConfig) -> list[Motions | Rejected]:
    """Convert clips together; results keep their order."""
    variant: Variant = "fixed" if config.variant == "fixed" else "compatible"
    converted = _convert([c.joints_TJ3 for c in clips if c.features_TD is None], variant)
    results: list[Motions | Rejected | None] = []
    kept: list[tuple[int, Tensor, Tensor, QcFlag]] = []
    for clip in clips:
        if clip.features_TD is None:
            features, ground, raw = next(converted)
        else:  # released features and joints belong together row by row
            ground, features, raw = _canonical_joints(clip.joints_TJ3), clip.features_TD, KinematicFlag(0)
        bad = [reason for flag, reason in _REJECTED.items() if raw & flag]
        if bad:
            results.append(Rejected(clip.item_id, clip.split, clip.source, "CONVERSION", "; ".join(bad)))
            continue
        kept.append((len(results), features, ground, clip.flags | QcFlag(int(raw))))
        results.append(None)
    for motions, index in zip(_with_rotations([clips[i] for i, *_ in kept], kept), (i for i, *_ in kept)):
        results[index] = motions
    return [r for r in results if r is not None]


def motions_of_joints(clips: Sequence[Tensor], variant: Variant = "compatible") -> list[Motions]:
    """Return all representations of bare positions (T, 22, 3), T - 1 rows each; rotations are fitted.

    Pairs pass both members through this, so that no trace of a member's origin is left.
    """
    kept = [(i, k, j, QcFlag(int(f) & 0xF4)) for i, (k, j, f) in enumerate(_convert(clips, variant))]
    return _with_rotations([None] * len(kept), kept)


def _canonical_joints(joints_TJ3: Tensor) -> Tensor:
    """Return released joints as they are, or moved to the origin and turned to +Z where they are a later segment."""
    place = joints_TJ3[0, 0, [0, 2]].abs().max()
    if float(place) < _CANONICAL_M and abs(float(facing_yaw(joints_TJ3[0]))) < _CANONICAL_RAD:
        return joints_TJ3
    return recanonicalise(joints_TJ3.flatten(1), Representation.JOINT).double().unflatten(1, (-1, 3))


def _convert(clips: Sequence[Tensor], variant: Variant) -> Iterator[tuple[Tensor, Tensor, KinematicFlag]]:
    """Yield (features, ground joints, flags) per clip, row-aligned, float64."""
    for features, ground, flags in clips_to_kinematic(list(clips), variant=variant, dtype=torch.float64):
        yield features, ground[:-1], flags


def _with_rotations(
    clips: Sequence[ReadyClip | None], kept: Sequence[tuple[int, Tensor, Tensor, QcFlag]]
) -> list[Motions]:
    """Return motions with given rotations where they agree with the positions, fitted ones elsewhere."""
    offsets = T2M.standard_offsets()
    given: list[Tensor | None] = [None if c is None else _given(c, g, offsets) for c, (_, _, g, _) in zip(clips, kept)]
    missing = [ground for r, (_, _, ground, _) in zip(given, kept) if r is None]
    fitted: Iterator[Tensor] = iter(())
    if missing:
        fit = joints_to_rotations(torch.cat(missing), offsets)
        fitted = iter(fit.rotations.split([len(m) for m in missing]))
    results = []
    for clip, rotations, (_, features, ground, flags) in zip(clips, given, kept):
        rot_source = "ik"
        if rotations is not None and clip is not None:
            rot_source = clip.rot_source
        elif clip is not None and clip.rotations_TJ33 is not None:
            flags |= QcFlag.ROTATION_DISAGREES
        matrices = next(fitted) if rotations is None else rotations
        results.append(
            Motions(
                kinematic_TD=features.float(),
                joint_TD=ground.flatten(1).float(),
                rotation_TD=matrices_to_rotation(matrices, ground[:, 0]).float(),
                flags=flags,
                rot_source=rot_source,
            )
        )
    return results


def _given(clip: ReadyClip, ground: Tensor, offsets: Tensor) -> Tensor | None:
    """Return the clip's own rotations in the canonical heading, or None where they do not give the positions."""
    if clip.rotations_TJ33 is None:
        return None
    rotations = clip.rotations_TJ33[: len(ground)]
    turn = turn_between(clip.joints_TJ3[: len(ground)], ground)
    rotations = torch.cat([(turn @ rotations[:, 0])[:, None], rotations[:, 1:]], dim=1)
    joints, _ = forward_kinematics(rotations, ground[:, 0], offsets)
    return rotations if float((joints - ground).norm(dim=-1).mean()) <= _DISAGREE_M else None
