"""Footsteps along a path: every stance keeps the toe where it landed, every swing leaves and lands vertically.

Letters: T frames, N samples of the path, 2 sides (0 = left, 1 = right).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_prep.sources.synthetic_curves import Array, bump, ease

_STEP_S = 0.005  # sampling of a path
_MARGIN_S = 4.0  # a path reaches this far beyond the clip: footfalls lie before and after it


@dataclass(frozen=True)
class Path:
    """Where the pelvis travels over the floor and where the body faces."""

    time_N: Array
    place_N2: Array  # x, z
    yaw_N: Array

    def at(self, t: Array) -> tuple[Array, Array]:
        """Return place (..., 2) and yaw (...) at times (...)."""
        place = np.stack([np.interp(t, self.time_N, self.place_N2[:, i]) for i in range(2)], axis=-1)
        return place, np.interp(t, self.time_N, self.yaw_N)


def travel(
    duration: float, speed: Callable[[Array], Array], yaw: Callable[[Array], Array], direction: float = 0.0
) -> Path:
    """Return the path that starts at the origin at time 0 with `speed` (m/s) along heading + `direction` (rad)."""
    time = np.arange(-_MARGIN_S, duration + _MARGIN_S, _STEP_S)
    yaw_N = yaw(time)
    velocity = speed(time)[:, None] * np.stack([np.sin(yaw_N + direction), np.cos(yaw_N + direction)], axis=-1)
    place = np.cumsum(velocity, axis=0) * _STEP_S
    place -= place[round(_MARGIN_S / _STEP_S)]
    return Path(time, place, yaw_N)


@dataclass(frozen=True)
class Gait:
    """How the feet fall. Lengths in metres, angles in radians, `frequency` in cycles (two steps) per second."""

    frequency: float
    duty: float  # share of a cycle a foot stands
    phase: float  # of the left foot at time 0; it lands at whole numbers
    half_width: float
    ahead: float  # toe in front of the pelvis in the middle of its stance
    lift: float  # toe height in the middle of the swing
    heel_off: float = 0.6  # heel-up pitch at the end of stance
    swing_pitch: float = 0.3  # more of it in early swing
    toe_up: float = 0.15  # toes-up pitch before landing
    always_up: float = 0.0  # heel-up pitch at all times (tiptoe)
    lag: float = 0.5  # cycle share the right foot comes after the left
    toe_out: float = 0.06
    backward: bool = False  # roll from toe to heel
    in_place: bool = False  # lift the feet also where they land where they left
    limp: float = 0.0  # share by which the left foot stands shorter

    def cycles(self, t: Array) -> Array:
        """Return the phase (T,) of the left foot in cycles."""
        return self.frequency * t + self.phase


def footfalls(t: Array, gait: Gait, path: Path) -> tuple[Array, Array]:
    """Return toes (2, T, 3) and feet (2, T, 2): world yaw and heel-up pitch."""
    toes, feet = np.zeros((2, len(t), 3)), np.zeros((2, len(t), 2))
    for side in range(2):
        sign, offset = 1.0 - 2.0 * side, gait.lag * side
        duty = gait.duty * (1.0 - gait.limp if side == 0 else 1.0)
        cycle = gait.cycles(t) - offset
        count = np.floor(cycle)
        part = cycle - count
        here, here_yaw = _plant(count, gait, path, sign, offset, duty)
        there, there_yaw = _plant(count + 1, gait, path, sign, offset, duty)
        stride = np.linalg.norm(there - here, axis=-1)
        gate = np.ones_like(t) if gait.in_place else ease((stride + 0.25 * np.abs(there_yaw - here_yaw)) / 0.2)
        swing = np.clip((part - duty) / (1.0 - duty), 0.0, 1.0)
        move = ease((swing - 0.02) / 0.96)
        toes[side][:, [0, 2]] = here + (there - here) * move[:, None]
        toes[side][:, 1] = gate * gait.lift * bump(swing) ** 0.6
        feet[side, :, 0] = here_yaw + (there_yaw - here_yaw) * move
        feet[side, :, 1] = gait.always_up + gate * _roll(part / duty, swing, gait)
    return toes, feet


def _plant(count: Array, gait: Gait, path: Path, sign: float, offset: float, duty: float) -> tuple[Array, Array]:
    """Return place (T, 2) and yaw (T,) of the footfall with number `count`: where the body is in mid-stance."""
    place, yaw = path.at((count + 0.5 * duty + offset - gait.phase) / gait.frequency)
    ahead = np.stack([np.sin(yaw), np.cos(yaw)], axis=-1)
    left = np.stack([np.cos(yaw), -np.sin(yaw)], axis=-1)
    return place + gait.ahead * ahead + sign * gait.half_width * left, yaw + sign * gait.toe_out


def _roll(stance: Array, swing: Array, gait: Gait) -> Array:
    """Return the heel-up pitch: flat, heel off, toes up, flat; backwards in time for backward walking."""
    if gait.backward:
        stance, swing = 1.0 - stance, 1.0 - swing
        rise = np.where((swing > 0) & (swing < 1), 0.0, ease((stance - 0.55) / 0.45))
        carry = np.where((swing > 0) & (swing < 1), 1.0 - ease(swing / 0.7), 0.0)
    else:
        rise = np.where(swing > 0, 0.0, ease((stance - 0.55) / 0.45))
        carry = np.where(swing > 0, 1.0 - ease(swing / 0.7), 0.0)
    kick = gait.swing_pitch * bump(swing / 0.7)
    return gait.heel_off * (rise + carry) + kick - gait.toe_up * bump((swing - 0.5) / 0.5)
