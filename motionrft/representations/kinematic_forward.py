"""The batched core of the joints-to-features conversion. Public entry points are in `kinematic`.

Letters: N frames of all clips one after another, B clips, J joints, K = J - 1 bones, D = 12 J - 1.

Inside, arrays are float64 with the frame axis LAST, (J, 3, N): every step below is then an element-wise operation over
contiguous runs of frames. Nothing loops over joints or frames, and no padded frame is ever computed.

The reference fits quaternions to the source, replays them on the target skeleton and fits again. With one swing
rotation per bone the rotations telescope away: the retargeted joint is the sum of (target length x source bone
direction) along its ancestors, and the same directions, turned by the initial heading, give the rotation features.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from motionrft.representations.kinematic_layout import Variant
from motionrft.representations.skeleton import Skeleton

_SIGMA_FRAMES = 20.0
_RADIUS_FRAMES = 80
_SMOOTH_BLOCK = 64  # frames smoothed by one product; a value never depends on how far its batch is padded
_ZERO_BONE = 1e-6  # length below which a bone has no direction
_ANTIPODAL = 1e-7  # 1 + cosine below which the shortest rotation has no axis
_WEAK_HEADING = 1e-3  # horizontal norm below which a heading is doubtful (flagged) ...
_NO_HEADING = 1e-6  # ... and below which it is replaced
_FRAMES_PER_CHUNK = 2048  # temporaries of one chunk stay in the processor cache


class KinematicFlag(IntFlag):
    """What was unusual about a clip; bits of `KinematicResult.flags_B`."""

    NONFINITE = 1  # NaN or inf in the joints: features are NaN
    TOO_SHORT = 2  # one frame: no velocity, no feature row
    ZERO_BONE = 4  # a bone without length after frame 0: the nearest valid direction was used
    ZERO_BONE_FIRST_FRAME = 8  # ... in frame 0: the retarget scale is not to be trusted, reject the clip
    ANTIPODAL_BONE = 16  # a bone exactly against its raw axis: half turn about a fixed axis
    ANTIPODAL_HEADING = 32  # a heading exactly opposite to +Z
    DEGENERATE_HEADING = 64  # body upside down or lying sideways: heading nearly undefined
    YAW_SIGN_ERROR = 128  # "compatible" only: a yaw step with the reference's sign error, K does not recover J


def convert_flat(
    flat_NJ3: Tensor, lengths_B: Tensor, skeleton: Skeleton, variant: Variant, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert clips laid end to end, a cache-sized group of whole clips at a time."""
    tables = _tables(skeleton, variant, flat_NJ3.device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    first_clip = first_frame = frames = 0
    lengths = lengths_B.tolist()
    for clip, length in enumerate(lengths):
        frames += length
        if frames >= _FRAMES_PER_CHUNK or clip == len(lengths) - 1:
            chunk = flat_NJ3[first_frame : first_frame + frames]
            parts.append(_convert(chunk, lengths_B[first_clip : clip + 1], tables, dtype))
            first_clip, first_frame, frames = clip + 1, first_frame + frames, 0
    if not parts:
        empty = flat_NJ3.new_zeros(0, skeleton.kinematic_dim, dtype=dtype)
        return empty, flat_NJ3.to(dtype), torch.zeros(0, dtype=torch.int64, device=flat_NJ3.device)
    features, ground, flags = zip(*parts)
    return torch.cat(features), torch.cat(ground), torch.cat(flags)


@dataclass(frozen=True)
class _Tables:
    """Constant tensors of one skeleton and variant."""

    skeleton: Skeleton
    fixed: bool
    parents: Tensor  # (J-1,)
    predecessors: Tensor  # (J-1,)
    reach_JK: Tensor  # (J, J-1) ancestor matrix times target lengths: joints minus root = reach @ directions
    initial_K: Tensor  # (J-1,) row that gives hips + shoulders, right minus left
    heading_K: Tensor  # (J-1,) the same for the per-frame heading of the variant
    axis_rows: Tensor  # (J,) row of the (3 (J-1), N) directions along each raw axis (entry 0 is a placeholder) ...
    axis_signs: Tensor  # (J, 1) ... and its sign
    cross_rows: Tensor  # (3 J,) rows and signs that give axis x direction
    cross_signs: Tensor  # (3 J, 1)
    half_turn: Tensor  # (9, J, 1) half turn about an axis perpendicular to the raw axis
    smoothing: Tensor  # (block + 2 radius, block) banded: one block of smoothed frames from its neighbourhood


@lru_cache(maxsize=16)
def _tables(skeleton: Skeleton, variant: Variant, device: torch.device) -> _Tables:
    with torch.inference_mode(False):  # cached: a first call in inference mode must not spoil later gradients
        return _build_tables(skeleton, variant, device)


def _build_tables(skeleton: Skeleton, variant: Variant, device: torch.device) -> _Tables:
    count = skeleton.num_joints
    ancestors = torch.zeros(count, count - 1, dtype=torch.float64)
    for joint in range(1, count):
        ancestors[joint] = ancestors[skeleton.parents[joint]]
        ancestors[joint, joint - 1] = 1.0
    reach = ancestors * skeleton.bone_length_tensor()
    right_hip, left_hip, right_shoulder, left_shoulder = skeleton.facing_joints
    hips, shoulders = reach[right_hip] - reach[left_hip], reach[right_shoulder] - reach[left_shoulder]
    fixed = variant == "fixed"
    axis_rows, axis_signs, cross_rows, cross_signs, half_turns = [], [], [], [], []
    for joint in range(count):
        bone = max(joint - 1, 0)
        axis = skeleton.raw_axes[bone + 1]
        k = max(range(3), key=lambda i: abs(axis[i]))
        sign = axis[k]
        axis_rows.append(3 * bone + k)
        axis_signs.append(sign)
        # For axis = sign * e_k: (axis x u)_(k+1) = -sign u_(k+2), (axis x u)_(k+2) = sign u_(k+1), (axis x u)_k = 0.
        rows, signs = [3 * bone] * 3, [0.0] * 3
        rows[(k + 1) % 3], signs[(k + 1) % 3] = 3 * bone + (k + 2) % 3, -sign
        rows[(k + 2) % 3], signs[(k + 2) % 3] = 3 * bone + (k + 1) % 3, sign
        cross_rows += rows
        cross_signs += signs
        half_turns.append(torch.diag(torch.tensor([1.0, -1.0, -1.0] if k == 1 else [-1.0, 1.0, -1.0])))
    source = torch.arange(_SMOOTH_BLOCK + 2 * _RADIUS_FRAMES, dtype=torch.float64)[:, None]
    offsets = source - _RADIUS_FRAMES - torch.arange(_SMOOTH_BLOCK, dtype=torch.float64)
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA_FRAMES**2)) * (offsets.abs() <= _RADIUS_FRAMES)
    f64 = torch.float64
    return _Tables(
        skeleton=skeleton,
        fixed=fixed,
        parents=torch.tensor(skeleton.parents[1:], device=device),
        predecessors=torch.tensor((skeleton.parents if fixed else skeleton.predecessors)[1:], device=device),
        reach_JK=reach.to(device),
        initial_K=(hips + shoulders).to(device),
        heading_K=(hips + shoulders if fixed else shoulders - hips).to(device),
        axis_rows=torch.tensor(axis_rows, device=device),
        axis_signs=torch.tensor(axis_signs, dtype=f64, device=device)[:, None],
        cross_rows=torch.tensor(cross_rows, device=device),
        cross_signs=torch.tensor(cross_signs, dtype=f64, device=device)[:, None],
        half_turn=torch.stack(half_turns, dim=-1).view(9, -1, 1).to(device, f64),
        smoothing=(weights / weights.sum(0)).to(device),
    )


def _convert(flat_NJ3: Tensor, lengths_B: Tensor, tables: _Tables, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return features (N - B, D), ground joints (N, J, 3) and flags (B,) of clips laid end to end."""
    num_frames, num_joints = flat_NJ3.shape[:2]
    device = flat_NJ3.device
    starts_B = lengths_B.cumsum(0) - lengths_B
    clip_N = torch.repeat_interleave(torch.arange(len(lengths_B), device=device), lengths_B)
    start_N = torch.zeros(num_frames, dtype=torch.bool, device=device)
    start_N[starts_B] = True
    flags_B = torch.where(lengths_B < 2, int(KinematicFlag.TOO_SHORT), 0)

    p = flat_NJ3.to(torch.float64).reshape(num_frames, -1).t().contiguous()  # (3 J, N)
    nonfinite_B = _any_frame(~p.sum(0).isfinite(), clip_N, lengths_B)
    flags_B = flags_B | nonfinite_B * int(KinematicFlag.NONFINITE)
    if nonfinite_B.any():
        p = torch.where(nonfinite_B[clip_N], 0.0, p)
    p = p.view(num_joints, 3, num_frames)

    # 1. Bone directions, and the scale that brings the legs to standard length, from frame 0 of each clip.
    bones = p[1:] - p.index_select(0, tables.parents)
    length = _norm(bones)
    u, flags_B = _directions(bones, length, clip_N, starts_B, tables, flags_B)
    first, second = tables.skeleton.leg_joints
    source_B = length[first - 1, starts_B] + length[second - 1, starts_B]
    target = tables.reach_JK[first, first - 1] + tables.reach_JK[second, second - 1]
    scale_B = target / torch.where(source_B > _ZERO_BONE, source_B, target)
    root = p[0] * scale_B[clip_N]
    root = root - _ground_only(root)[:, starts_B][:, clip_N]

    # 2. Heading of every frame, smoothed, and the rotation that turns the clip to +Z.
    flat_u = u.reshape(num_joints - 1, -1)
    across = (tables.heading_K @ flat_u).view(3, num_frames)
    facing = _smooth(_facing(across), starts_B, lengths_B, clip_N, tables.smoothing)
    if tables.fixed:
        facing, flags_B = _unit_heading(facing, clip_N, lengths_B, flags_B)
        initial = facing[:, starts_B]
    else:
        first_across = (tables.initial_K @ u[:, :, starts_B].reshape(num_joints - 1, -1)).view(3, -1)
        own_B = torch.arange(len(lengths_B), device=device)
        initial, flags_B = _unit_heading(_facing(first_across), own_B, torch.ones_like(lengths_B), flags_B)
        facing, flags_B = _unit_heading(facing, clip_N, lengths_B, flags_B)
    turn0 = _yaw_to_forward(initial)[:, clip_N]
    antipodal_B = 1 + initial[1] < _ANTIPODAL
    u, root = _rotate_y(u, turn0), _rotate_y(root[None], turn0)[0]
    facing = torch.stack([turn0[0] * facing[0] + turn0[1] * facing[1], turn0[0] * facing[1] - turn0[1] * facing[0]])
    facing = torch.where(start_N, facing.new_tensor([[0.0], [1.0]]), facing)  # frame 0 faces +Z by definition
    antipodal_B = antipodal_B | _any_frame(1 + facing[1] < _ANTIPODAL, clip_N, lengths_B)
    flags_B = flags_B | antipodal_B * int(KinematicFlag.ANTIPODAL_HEADING)

    # 3. Retargeted joints on the floor.
    local = (tables.reach_JK @ u.reshape(num_joints - 1, -1)).view(num_joints, 3, num_frames)
    lowest_N = local[:, 1].amin(0) + root[1]
    floor_B = torch.segment_reduce(lowest_N, "min", lengths=lengths_B)
    root = torch.stack([root[0], root[1] - floor_B[clip_N], root[2]])
    joints = local + root
    ground_NJ3 = joints.view(-1, num_frames).t().to(dtype).reshape(num_frames, num_joints, 3)

    # 4. Features. Columns are steps t -> t+1; those that straddle two clips are dropped at the end.
    turn = _yaw_to_forward(facing)
    cos_half, sin_half = _half_yaw(facing)
    yaw = sin_half[1:] * cos_half[:-1] - cos_half[1:] * sin_half[:-1]
    same_sign = cos_half[1:] * cos_half[:-1] + sin_half[1:] * sin_half[:-1]
    step_N = ~start_N[1:]
    if tables.fixed:
        yaw = torch.where(same_sign < 0, -yaw, yaw)
    else:
        flipped_N = F.pad((same_sign < 0) & step_N, (0, 1))
        flags_B = flags_B | _any_frame(flipped_N, clip_N, lengths_B) * int(KinematicFlag.YAW_SIGN_ERROR)
    steps = joints[..., 1:] - joints[..., :-1]
    root_step = _rotate_y(steps[:1], turn[:, 1:])[0]
    positions = _rotate_y(local[1:], turn, joints[1:, 1])
    velocities = _rotate_y(steps, turn[:, :-1])
    contact_steps = steps[list(tables.skeleton.contact_joints)]
    contacts = ((contact_steps * contact_steps).sum(1) < tables.skeleton.contact_threshold).to(yaw.dtype)
    rotations, antipodal_N = _rotation_features(u, turn, tables, dtype)
    flags_B = flags_B | _any_frame(antipodal_N, clip_N, lengths_B) * int(KinematicFlag.ANTIPODAL_BONE)
    columns = [
        torch.asin(yaw.clamp(-1.0, 1.0))[None],
        root_step[0::2],
        root[1:2, :-1],
        positions.flatten(0, 1)[:, :-1],
        rotations[:, :-1],
        velocities.flatten(0, 1),
        contacts,
    ]
    features_MD = torch.cat([c.to(dtype) for c in columns]).t().contiguous().index_select(0, step_N.nonzero()[:, 0])
    if nonfinite_B.any():
        flags_B = torch.where(nonfinite_B, int(KinematicFlag.NONFINITE), flags_B)  # what else it lacks is unknown
        bad_N = nonfinite_B[clip_N]
        features_MD = torch.where(bad_N[:-1][step_N][:, None], torch.nan, features_MD)
        ground_NJ3 = torch.where(bad_N[:, None, None], torch.nan, ground_NJ3)
    return features_MD, ground_NJ3, flags_B


def _any_frame(frames_N: Tensor, clip_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Return (B,) bool: does any frame of the clip hold?"""
    result = torch.zeros_like(lengths_B, dtype=torch.bool)
    if frames_N.any():
        result[clip_N[frames_N]] = True
    return result


def _norm(v_K3N: Tensor) -> Tensor:
    x, y, z = v_K3N.unbind(1)
    return torch.sqrt(x * x + y * y + z * z)


def _ground_only(v_3N: Tensor) -> Tensor:
    return torch.stack([v_3N[0], torch.zeros_like(v_3N[1]), v_3N[2]])


def _rotate_y(v_K3N: Tensor, turn_2N: Tensor, height_KN: Tensor | None = None) -> Tensor:
    """Rotate (K, 3, N) about Y by (cos, sin) per frame: x' = cos x + sin z, z' = cos z - sin x, y' = y or `height`."""
    cos, sin = turn_2N
    x, y, z = v_K3N.unbind(1)
    y = y if height_KN is None else height_KN
    return torch.stack([cos * x + sin * z, y, cos * z - sin * x], dim=1)


def _yaw_to_forward(facing_2N: Tensor) -> Tensor:
    """Return (cos, sin) of the rotation about Y that turns the unit facing (x, z) to +Z."""
    return torch.stack([facing_2N[1], -facing_2N[0]])


def _half_yaw(facing_2N: Tensor) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of half that rotation's angle, cos >= 0.

    normalise(1 + z, -x), multiplied by (1 - z) / |x| in the rear half plane, where 1 + z cancels.
    """
    x, z = facing_2N
    cos = torch.where(z >= 0, 1 + z, x.abs())
    sin = torch.where(z >= 0, -x, -torch.copysign(1 - z, x))
    norm = torch.sqrt(cos * cos + sin * sin)
    return cos / norm, sin / norm


def _facing(across_3N: Tensor) -> Tensor:
    """Return Y x unit(across) as (x, z), not renormalised: facing of a body whose right-minus-left is `across`."""
    norm = torch.sqrt((across_3N * across_3N).sum(0)).clamp_min(1e-12)
    return torch.stack([across_3N[2] / norm, -across_3N[0] / norm])


def _unit_heading(facing_2N: Tensor, clip_N: Tensor, lengths_B: Tensor, flags_B: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise headings; a vanishing one takes the last usable of its clip, else the next, else +Z."""
    norm = torch.sqrt((facing_2N * facing_2N).sum(0))
    weak_B = _any_frame(norm < _WEAK_HEADING, clip_N, lengths_B)
    flags_B = flags_B | weak_B * int(KinematicFlag.DEGENERATE_HEADING)
    valid_N = norm >= _NO_HEADING
    unit = facing_2N / torch.where(valid_N, norm, 1.0)
    if not valid_N.all():
        source_N = _nearest_valid(valid_N, clip_N)
        forward = unit.new_tensor([[0.0], [1.0]])
        unit = torch.where(source_N >= 0, unit[:, source_N.clamp_min(0)], forward)
    return unit, flags_B


def _nearest_valid(valid: Tensor, clip_N: Tensor) -> Tensor:
    """Return for each frame the last valid frame of its clip at or before it, else the first after it, else -1."""
    count = valid.shape[-1]
    frame = torch.arange(count, device=valid.device).expand_as(valid)
    before = torch.where(valid, frame, -1).cummax(-1).values
    after = torch.where(valid, frame, count).flip(-1).cummin(-1).values.flip(-1)
    before = torch.where((before >= 0) & (clip_N[before.clamp_min(0)] == clip_N), before, -1)
    after = torch.where((after < count) & (clip_N[after.clamp_max(count - 1)] == clip_N), after, -1)
    return torch.where(before >= 0, before, after)


def _directions(
    bones: Tensor, length: Tensor, clip_N: Tensor, starts_B: Tensor, tables: _Tables, flags_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return unit bone directions (J-1, 3, N); a bone without length takes the nearest valid direction of its clip."""
    if length.amin() > _ZERO_BONE:
        return bones / length[:, None], flags_B
    valid_KN = length > _ZERO_BONE
    u = bones / torch.where(valid_KN, length, 1.0)[:, None]
    source_KN = _nearest_valid(valid_KN, clip_N)
    filled = torch.gather(u, 2, source_KN.clamp_min(0)[:, None].expand_as(u))
    raw = tables.skeleton.raw_axes_tensor().to(u)[1:, :, None]
    u = torch.where((source_KN >= 0)[:, None], filled, raw)
    first_B = ~valid_KN[:, starts_B].all(0)
    flags_B = flags_B | _any_frame(~valid_KN.all(0), clip_N, flags_B) * int(KinematicFlag.ZERO_BONE)
    return u, flags_B | first_B * int(KinematicFlag.ZERO_BONE_FIRST_FRAME)


def _smooth(facing_2N: Tensor, starts_B: Tensor, lengths_B: Tensor, clip_N: Tensor, weights: Tensor) -> Tensor:
    """Gaussian-smooth each clip along time (sigma 20 frames, radius 80), its end values repeated outwards."""
    num_frames = facing_2N.shape[1]
    padded = -(-int(lengths_B.max()) // _SMOOTH_BLOCK) * _SMOOTH_BLOCK
    offset = torch.arange(-_RADIUS_FRAMES, padded + _RADIUS_FRAMES, device=facing_2N.device)
    frame = starts_B[:, None] + torch.minimum(offset.clamp_min(0)[None], lengths_B[:, None] - 1)
    blocks = facing_2N[:, frame].unfold(-1, len(weights), _SMOOTH_BLOCK)  # (2, B, blocks, block + 2 radius)
    smooth = (blocks @ weights).view(2, -1)
    return smooth[:, clip_N * padded + torch.arange(num_frames, device=frame.device) - starts_B[clip_N]]


def _rotation_features(u_K3N: Tensor, turn_2N: Tensor, tables: _Tables, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the swing rotations ((J-1) 6, N), columns 0 and 1 of G_pred^T G, and (N,) bool: a bone is antipodal.

    G = d I + [k]x + k k^T / (1 + d), k = axis x u, d = axis . u, is the shortest rotation from the raw axis to u.
    """
    num_bones, _, num_frames = u_K3N.shape
    cos, sin = turn_2N
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    if tables.fixed:
        u_K3N = _rotate_y(u_K3N, turn_2N)
        root = [one, zero, zero, zero, one, zero, zero, zero, one]
    else:  # the reference uses the world-to-heading rotation here, not its inverse
        root = [cos, zero, -sin, zero, one, zero, sin, zero, cos]
    rows = u_K3N.reshape(3 * num_bones, num_frames)
    d = rows.index_select(0, tables.axis_rows) * tables.axis_signs
    k = rows.index_select(0, tables.cross_rows) * tables.cross_signs
    kx, ky, kz = k.view(num_bones + 1, 3, num_frames).unbind(1)
    divisor = 1 + d
    any_antipodal = bool(divisor.amin() < _ANTIPODAL)
    antipodal = divisor < _ANTIPODAL if any_antipodal else None
    m = 1 / (divisor if antipodal is None else torch.where(antipodal, 1.0, divisor))
    mx, my, mz = m * kx, m * ky, m * kz
    xy, xz, yz = mx * ky, mx * kz, my * kz
    # Entry 3 c + r is row r of column c.
    swing = [d + mx * kx, xy + kz, xz - ky, xy - kz, d + my * ky, yz + kx, xz + ky, yz - kx, d + mz * kz]
    if antipodal is not None:
        swing = [torch.where(antipodal, half, entry) for half, entry in zip(tables.half_turn, swing)]
    for entry, value in zip(swing, root):
        entry[0] = value  # row 0 was a placeholder for the root
    prev = [entry.index_select(0, tables.predecessors) for entry in swing]
    own = [entry[1:] for entry in swing[:6]]
    entries = []
    for c in (0, 3):
        for i in (0, 3, 6):
            dot = torch.addcmul(prev[i] * own[c], prev[i + 1], own[c + 1])
            entries.append(torch.addcmul(dot, prev[i + 2], own[c + 2]).to(dtype))
    antipodal_N = torch.zeros_like(one, dtype=torch.bool) if antipodal is None else antipodal.any(0)
    return torch.stack(entries, dim=1).view(6 * num_bones, num_frames), antipodal_N
