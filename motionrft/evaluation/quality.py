"""Physical quality of motion in joint space, metres and seconds: what an embedding-based score hardly sees.

Every function takes a padded batch, reads valid frames only and returns one float64 value per clip (NaN where a clip
is too short to say). Height is Y, the floor is 0.
Letters: B clips, T frames, J joints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from motionrft.core.errors import ConfigError
from motionrft.evaluation.metrics import Array
from motionrft.representations.skeleton import T2M

TOES = (T2M.joint_names.index("left_foot"), T2M.joint_names.index("right_foot"))


@dataclass(frozen=True)
class QualityConfig:
    """Thresholds of the contact metrics."""

    skate_height_m: float = 0.05
    """A toe below this in two frames in a row touches the floor, for the skating ratio of the literature."""
    slide_height_m: float = 0.07
    """The same for the slide speed."""
    skate_speed_m_s: float = 0.5
    """A touching toe faster than this, now and on average over five steps, skates."""
    floor_tolerance_m: float = 0.02
    """Depth below and height above the floor that is not counted: joints are not skin."""
    max_distance_m: float = 20.0
    """A joint further from the origin makes a clip invalid."""
    max_speed_m_s: float = 15.0
    """A joint faster than this makes a clip invalid."""

    def __post_init__(self) -> None:
        """Check signs."""
        bad = [k for k, v in vars(self).items() if v < 0]
        if bad:
            raise ConfigError(f"evaluation.quality: {', '.join(bad)} must not be negative")


def clip_quality(
    joints_BTJ3: ArrayLike, lengths_B: ArrayLike, fps: float, config: QualityConfig | None = None
) -> dict[str, Array]:
    """Return every quality metric per clip, each (B,).

    Keys: foot_skate_ratio (share of steps), foot_slide (m/s), contact_share (share of steps), jerk (m/s^3),
    acceleration (m/s^2), bone_drift (coefficient of variation), penetration and float (m), valid (0 or 1).

    Args:
        joints_BTJ3: (B, T, 22, 3) metres.
        lengths_B: valid frames per clip.
        fps: frames per second of these arrays.
        config: thresholds.
    """
    cfg = config or QualityConfig()
    joints, lengths = _checked(joints_BTJ3, lengths_B, fps)
    depth, height = floor_distance(joints, lengths, cfg.floor_tolerance_m)
    slide, contact = foot_slide(joints, lengths, fps, cfg.slide_height_m)
    return {
        "foot_skate_ratio": foot_skate_ratio(joints, lengths, fps, cfg.skate_height_m, cfg.skate_speed_m_s),
        "foot_slide": slide,
        "contact_share": contact,
        "jerk": mean_derivative(joints, lengths, fps, 3),
        "acceleration": mean_derivative(joints, lengths, fps, 2),
        "bone_drift": bone_drift(joints, lengths),
        "penetration": depth,
        "float": height,
        "valid": validity(joints, lengths, fps, cfg.max_distance_m, cfg.max_speed_m_s),
    }


def _toe_steps(joints: Array, lengths: np.ndarray, fps: float, height_m: float) -> tuple[Array, np.ndarray, np.ndarray]:
    """Return planar toe speed (B, T-1, 2), contact in both frames of the step, and which steps are valid (B, T-1)."""
    toes = joints[:, :, TOES]
    steps = np.diff(toes[..., [0, 2]], axis=1)
    valid = np.arange(steps.shape[1])[None] < (lengths - 1)[:, None]
    speed = np.where(valid[..., None], np.linalg.norm(steps, axis=-1) * fps, 0.0)
    low = toes[..., 1] < height_m
    return speed, low[:, 1:] & low[:, :-1] & valid[..., None], valid


def _five_step_mean(speed: Array) -> Array:
    """Return the centred mean over five steps; outside the clip counts as standing still."""
    padded = np.pad(speed, ((0, 0), (2, 2), (0, 0)))
    return np.stack([padded[:, i : i + speed.shape[1]] for i in range(5)]).mean(0)


def contact_speed(joints_BTJ3: ArrayLike, lengths_B: ArrayLike, fps: float, height_m: float = 0.05) -> Array:
    """Return the five-step mean planar speed (B, T-1, 2) of touching toes, zero elsewhere."""
    joints, lengths = _checked(joints_BTJ3, lengths_B, fps)
    speed, contact, _ = _toe_steps(joints, lengths, fps, height_m)
    return contact * _five_step_mean(speed)


def foot_skate_ratio(
    joints_BTJ3: ArrayLike, lengths_B: ArrayLike, fps: float, height_m: float = 0.05, speed_m_s: float = 0.5
) -> Array:
    """Return the share of steps in which a touching toe is fast, now and on average over five steps."""
    joints, lengths = _checked(joints_BTJ3, lengths_B, fps)
    speed, contact, valid = _toe_steps(joints, lengths, fps, height_m)
    skates = contact & (speed > speed_m_s) & (_five_step_mean(speed) > speed_m_s)
    return _mean(np.asarray(skates.any(-1)), valid)


def foot_slide(joints_BTJ3: ArrayLike, lengths_B: ArrayLike, fps: float, height_m: float = 0.07) -> tuple[Array, Array]:
    """Return (mean planar speed of touching toes in m/s, share of toe steps in contact).

    Read both: lifting the feet also removes sliding. A clip without contact has no slide speed (NaN).
    """
    joints, lengths = _checked(joints_BTJ3, lengths_B, fps)
    speed, contact, valid = _toe_steps(joints, lengths, fps, height_m)
    both = np.broadcast_to(valid[..., None], contact.shape)
    return _mean(speed, contact), _mean(contact, both)


def mean_derivative(joints_BTJ3: ArrayLike, lengths_B: ArrayLike, fps: float, order: int) -> Array:
    """Return the mean norm of the `order`-th time derivative over joints and frames: 2 acceleration, 3 jerk."""
    joints, lengths = _checked(joints_BTJ3, lengths_B, fps)
    change = np.linalg.norm(np.diff(joints, n=order, axis=1), axis=-1) * fps**order
    valid = np.arange(change.shape[1])[None] < (lengths - order)[:, None]
    return _mean(change.mean(-1), valid)


def bone_drift(joints_BTJ3: ArrayLike, lengths_B: ArrayLike) -> Array:
    """Return the coefficient of variation over time of each bone's length, averaged over bones; rigid bodies give 0."""
    joints, lengths = _checked(joints_BTJ3, lengths_B, 1.0)
    bones = np.linalg.norm(joints[:, :, 1:] - joints[:, :, list(T2M.parents[1:])], axis=-1)
    valid = (np.arange(bones.shape[1])[None] < lengths[:, None])[..., None]
    mean = np.where(valid, bones, 0.0).sum(1) / lengths[:, None]
    variance = np.where(valid, (bones - mean[:, None]) ** 2, 0.0).sum(1) / lengths[:, None]
    return (np.sqrt(variance) / np.maximum(mean, 1e-8)).mean(-1)


def floor_distance(joints_BTJ3: ArrayLike, lengths_B: ArrayLike, tolerance_m: float = 0.02) -> tuple[Array, Array]:
    """Return (mean depth of the lowest joint below the floor, mean height above it), beyond the tolerance, metres."""
    joints, lengths = _checked(joints_BTJ3, lengths_B, 1.0)
    lowest = joints[..., 1].min(-1)
    valid = np.arange(lowest.shape[1])[None] < lengths[:, None]
    depth, height = np.maximum(-lowest - tolerance_m, 0.0), np.maximum(lowest - tolerance_m, 0.0)
    return _mean(depth, valid), _mean(height, valid)


def validity(
    joints_BTJ3: ArrayLike, lengths_B: ArrayLike, fps: float, max_distance_m: float = 20.0, max_speed_m_s: float = 15.0
) -> Array:
    """Return 1 for clips that are finite, near the origin and not absurdly fast, else 0."""
    joints, lengths = _checked(joints_BTJ3, lengths_B, fps)
    frames = np.arange(joints.shape[1])[None] < lengths[:, None]
    near = (np.abs(joints).max((-1, -2)) < max_distance_m) | ~frames  # NaN compares False
    speed = np.linalg.norm(np.diff(joints, axis=1), axis=-1).max(-1) * fps
    slow = (speed < max_speed_m_s) | ~(np.arange(speed.shape[1])[None] < (lengths - 1)[:, None])
    return (near.all(1) & slow.all(1)).astype(np.float64)


def jerk_curves(joints_BTJ3: ArrayLike, lengths_B: ArrayLike) -> Array:
    """Return per-frame jerk (B, T-3) as transition benchmarks do: L1 over axes, largest joint, per-frame units."""
    joints, lengths = _checked(joints_BTJ3, lengths_B, 1.0)
    jerk = np.abs(np.diff(joints, n=3, axis=1)).sum(-1).max(-1)
    return np.where(np.arange(jerk.shape[1])[None] < (lengths - 3)[:, None], jerk, 0.0)


def peak_jerk_and_area(curves_BT: ArrayLike, reference: float) -> tuple[float, float]:
    """Return (largest value, area of |value - reference|) of the clip-averaged jerk curve."""
    curve = np.asarray(curves_BT, dtype=np.float64).mean(0)
    return float(curve.max()), float(np.abs(curve - reference).sum())


def joint_error(a_TJ3: ArrayLike, b_TJ3: ArrayLike, align_root: bool = True) -> Array:
    """Return the mean joint distance per frame (T,), metres, relative to the root if `align_root`."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a_TJ3, b_TJ3))
    if align_root:
        a, b = a - a[..., :1, :], b - b[..., :1, :]
    return np.linalg.norm(a - b, axis=-1).mean(-1)


def acceleration_error(a_TJ3: ArrayLike, b_TJ3: ArrayLike) -> Array:
    """Return the mean joint distance of second differences per frame (T-2,), metres per frame^2."""
    gap = np.asarray(a_TJ3, dtype=np.float64) - np.asarray(b_TJ3, dtype=np.float64)
    return np.linalg.norm(np.diff(gap, n=2, axis=0), axis=-1).mean(-1)


def _mean(values: np.ndarray, mask: np.ndarray) -> Array:
    """Return the mean over all axes but the first where `mask` holds; NaN where it never does."""
    axes = tuple(range(1, values.ndim))
    count = mask.sum(axes)
    total = np.where(mask, values, 0.0).sum(axes)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _checked(joints_BTJ3: ArrayLike, lengths_B: ArrayLike, fps: float) -> tuple[Array, np.ndarray]:
    joints, lengths = np.asarray(joints_BTJ3, dtype=np.float64), np.asarray(lengths_B, dtype=np.int64)
    if joints.ndim != 4 or joints.shape[2:] != (T2M.num_joints, 3) or lengths.shape != joints.shape[:1]:
        raise ValueError(f"quality needs joints (B, T, 22, 3) and lengths (B,), got {joints.shape} and {lengths.shape}")
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= joints.shape[1]:
        raise ValueError(f"lengths must lie in 1..{joints.shape[1]}, got {lengths.min()}..{lengths.max()}")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    return joints, lengths
