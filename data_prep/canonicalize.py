"""One frame rate, one longest length, one place and heading.

Positions get floor, XZ origin and heading from the feature conversion itself (`represent`), so that J and K agree to
the last digit; here are resampling, cutting, mirroring, and the moves that bring rotations along.

Letters: T frames, J = 22 joints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.captions import mirror_class, mirror_text
from data_prep.sources.base import Rejected
from data_prep.validate import CheckedClip
from motionrft.config.prepare import PrepareConfig
from motionrft.data.schema import QcFlag
from motionrft.representations.kinematics import mirror_joints, mirror_rotations
from motionrft.representations.rotations import slerp
from motionrft.representations.skeleton import T2M

_SAME_RATE = 1e-3  # relative; 0.0333333 s per frame is 30 fps


@dataclass(frozen=True)
class ReadyClip:
    """A clip at the target rate, ready to be converted. Still in its own place, heading and body size."""

    item_id: str
    clip_id: str
    split: str
    source: str
    captions: tuple[str, ...]
    class_name: str
    flags: QcFlag
    mirrored: bool
    joints_TJ3: Tensor  # float64; one frame more than feature rows, unless `features_TD` is given
    rotations_TJ33: Tensor | None  # float64
    rot_source: str
    features_TD: Tensor | None  # (T, 263) released features, kept as given


def canonicalise(checked: CheckedClip, config: PrepareConfig) -> ReadyClip | Rejected:
    """Resample to `config.fps` and cut to `config.max_frames` feature rows, or say why not."""
    clip, flags = checked.clip, checked.flags
    joints = torch.from_numpy(clip.joints_TJ3.astype(np.float64))
    rotations = None if clip.rotations_TJ33 is None else torch.from_numpy(clip.rotations_TJ33.astype(np.float64))
    features = None if clip.kinematic_TD is None else torch.from_numpy(clip.kinematic_TD)

    def reject(code: str, detail: str) -> Rejected:
        return Rejected(clip.clip_id, clip.split, clip.source, code, detail)

    if abs(clip.fps / config.fps - 1) > _SAME_RATE:
        if features is not None:
            return reject("WRONG_FPS", f"released features at {clip.fps:g} fps cannot become {config.fps:g} fps")
        flags |= QcFlag.RESAMPLED
        joints, rotations = resample(joints, rotations, clip.fps, config.fps)
    extra = 0 if features is not None else 1  # conversion drops the last frame
    rows = len(joints) - extra
    if rows < config.min_frames:
        return reject("TOO_SHORT", f"{rows} feature rows at {config.fps:g} fps, min_frames is {config.min_frames}")
    if rows > config.max_frames:
        if config.long_clips == "reject":
            return reject("TOO_LONG", f"{rows} feature rows at {config.fps:g} fps, max_frames is {config.max_frames}")
        flags |= QcFlag.CUT
        keep = config.max_frames + extra
        joints = joints[:keep]
        rotations = None if rotations is None else rotations[:keep]
        features = None if features is None else features[:keep]
    if rotations is None and config.rotations == "require":
        return reject("NO_ROTATIONS", "the source gives positions only and rotations=require")
    return ReadyClip(
        item_id=clip.clip_id,
        clip_id=clip.clip_id.split("#")[0],
        split=clip.split,
        source=clip.source,
        captions=clip.captions,
        class_name=clip.class_name,
        flags=flags,
        mirrored=False,
        joints_TJ3=joints,
        rotations_TJ33=rotations,
        rot_source=clip.rot_source,
        features_TD=features,
    )


def mirrored(clip: ReadyClip) -> ReadyClip:
    """Return the left-right mirrored clip `M<id>`, with captions and class swapped. Positions are converted anew."""
    return ReadyClip(
        item_id=f"M{clip.item_id}",
        clip_id=clip.clip_id,
        split=clip.split,
        source=clip.source,
        captions=tuple(mirror_text(c) for c in clip.captions),
        class_name=mirror_class(clip.class_name),
        flags=clip.flags,
        mirrored=True,
        joints_TJ3=mirror_joints(clip.joints_TJ3),
        rotations_TJ33=None if clip.rotations_TJ33 is None else mirror_rotations(clip.rotations_TJ33),
        rot_source=clip.rot_source,
        features_TD=None,
    )


def resample(
    joints_TJ3: Tensor, rotations_TJ33: Tensor | None, source_fps: float, target_fps: float
) -> tuple[Tensor, Tensor | None]:
    """Return positions interpolated linearly and rotations spherically at multiples of 1 / target_fps seconds.

    Frame 0 stays; the last new frame is the last one inside the clip.
    """
    last = len(joints_TJ3) - 1
    count = math.floor(last / source_fps * target_fps + 1e-4) + 1
    time = torch.arange(count, dtype=torch.float64) * (source_fps / target_fps)
    low = time.floor().long().clamp(0, last)
    high = (low + 1).clamp(max=last)
    fraction = (time - low).clamp(0.0, 1.0)
    joints = torch.lerp(joints_TJ3[low], joints_TJ3[high], fraction[:, None, None])
    if rotations_TJ33 is None:
        return joints, None
    weights = fraction[:, None].expand(-1, rotations_TJ33.shape[1])
    return joints, slerp(rotations_TJ33[low], rotations_TJ33[high], weights)


def turn_between(source_TJ3: Tensor, target_TJ3: Tensor) -> Tensor:
    """Return the rotation about Y (3, 3) that best turns the bone directions of one clip into those of another.

    The conversion to ground joints keeps bone directions and turns the whole clip by one angle: this finds it exactly.
    """
    parents = list(T2M.parents[1:])
    a = torch.nn.functional.normalize(source_TJ3[:, 1:] - source_TJ3[:, parents], dim=-1)
    b = torch.nn.functional.normalize(target_TJ3[:, 1:] - target_TJ3[:, parents], dim=-1)
    cos = (a[..., 0] * b[..., 0] + a[..., 2] * b[..., 2]).sum()
    sin = (a[..., 2] * b[..., 0] - a[..., 0] * b[..., 2]).sum()
    norm = torch.hypot(cos, sin)
    if float(norm) < 1e-12:
        return torch.eye(3, dtype=source_TJ3.dtype)
    cos, sin = cos / norm, sin / norm
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    return torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos]).view(3, 3)
