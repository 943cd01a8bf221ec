"""Families that leave the floor: jump, hop, jumping jack. Flights are ballistic, toes stand still in between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_prep.sources.synthetic_body import ABDUCT, ACROSS, ELBOW, FLEX, TWIST, Pose
from data_prep.sources.synthetic_curves import Array, bump, ease, hermite, keys
from data_prep.sources.synthetic_take import Take, standing

_G = 9.81


def _flight_toe(t: Array, start: float, length: float) -> Array:
    """Return toe height (T,) of a ballistic flight."""
    tau = np.clip(t - start, 0.0, length)
    return 0.5 * _G * tau * (length - tau)


def _travel(t: Array, start: float, length: float) -> Array:
    """Return the share (T,) of a flight's distance covered: toes leave and land vertically."""
    return ease((t - start - 0.1 * length) / (0.8 * length))


def jump(take: Take) -> Pose:
    """Jump with both feet: crouch, swing the arms, fly, absorb; 1 to 3 times."""
    pose, t, count = standing(take), take.t, int(take.action.get("count"))
    direction = take.action.get("direction")
    start, length = take.window(count * take.vary({1: 1.5, 2: 1.15, 3: 0.95}[count], 0.06))
    period = length / count
    flight = min(take.vary(0.42 if count == 1 else 0.36, 0.1), 0.4 * period)
    step = {"up": (0, 0), "forward": (0, 0.55), "backward": (0, -0.4), "left": (0.5, 0)}[direction]
    goal = np.array(step) * take.uniform(0.85, 1.2) * take.body.leg / 0.8
    deep, stand, speed = take.uniform(0.16, 0.25), take.body.stand, _G * flight / 2
    times, heights, slopes = [start], [stand], [0.0]
    place, lift, heel, arms = np.zeros((len(t), 2)), np.zeros_like(t), np.zeros_like(t), np.zeros_like(t)
    pitch = np.zeros_like(t)
    for i in range(count):
        low = start + (i + 0.30) * period
        off = low + 0.17
        land = off + flight
        if i == 0:
            times, heights, slopes = [*times, low], [*heights, stand - deep], [*slopes, 0.0]
        times += [off, land, land + 0.16]
        heights += [stand + 0.055, stand + 0.03, stand - 0.7 * deep]
        slopes += [speed, -speed, 0.0]
        lift += _flight_toe(t, off, flight) + take.uniform(0.03, 0.07) * bump((t - off) / flight)
        heel += 0.6 * (ease((t - off + 0.16) / 0.16) - ease((t - off) / flight)) + 0.35 * bump((t - off) / flight)
        place += _travel(t, off, flight)[:, None] * goal
        arms += keys(t, [low - 0.4 * period, low, off + 0.4 * flight, land + 0.25], [0.0, -0.5, 1.0, 0.0])
        pitch += keys(t, [low - 0.3 * period, low, off, land, land + 0.16, land + 0.5], [0.0, 0.45, 0.0, 0.1, 0.4, 0.0])
    times, heights, slopes = [*times, times[-1] + 0.4], [*heights, stand], [*slopes, 0.0]
    pose.root_T3[:, 1] = hermite(t, times, heights, slopes)
    crouch = np.clip(stand - pose.root_T3[:, 1], 0.0, None)
    ahead = goal / 2 if direction != "up" else goal
    lean = sum(
        (bump((t - start - (i + 0.30) * period + 0.15) / (flight + 0.6)) for i in range(count)), np.zeros_like(t)
    )
    pose.root_T3[:, [0, 2]] += place + 0.12 * lean[:, None] * ahead
    pose.root_T3[:, 2] -= 0.45 * crouch
    pose.toes_2T3[:, :, 1] = lift
    pose.toes_2T3[:, :, [0, 2]] += place
    pose.feet_2T2[:, :, 1] = heel
    pose.pelvis_T2[:, 0] += 0.5 * pitch
    pose.spine_T3[:, 0] += 0.7 * pitch
    pose.arms_2T5[:, :, FLEX] += np.deg2rad(take.vary(95.0, 0.25)) * arms
    pose.arms_2T5[:, :, ELBOW] += 0.4 * np.abs(arms)
    return pose


def hop(take: Take) -> Pose:
    """Hop on the left leg the whole time, the right foot held up behind."""
    pose, t = standing(take), take.t
    period, flight = take.uniform(0.5, 0.6), take.uniform(0.22, 0.27)
    stride = take.uniform(0.28, 0.4) * take.body.leg / 0.8 if take.action.get("direction") == "forward" else 0.0
    shift = take.uniform(0.0, period)
    cycle = np.floor((t + shift) / period)
    part = (t + shift) - cycle * period
    stance = period - flight
    speed, stand = _G * flight / 2, take.body.stand
    dip = take.uniform(0.05, 0.08)
    one = hermite(
        part,
        [0.0, stance / 2, stance, period],
        [stand + 0.01, stand - dip, stand + 0.01, stand + 0.01],
        [-speed, 0.0, speed, -speed],
    )
    pose.root_T3[:, 1] = one
    lift = _flight_toe(part, stance, flight) + 0.03 * bump((part - stance) / flight)
    jump_share = _travel(part, stance, flight)
    toe = (cycle - cycle[0] + jump_share) * stride
    pose.toes_2T3[0, :, 0] = 0.3 * pose.toes_2T3[0, :, 0]
    pose.toes_2T3[0, :, 1] = lift
    pose.toes_2T3[0, :, 2] += toe
    pose.root_T3[:, 2] += stride * ((t + shift) / period - cycle[0] - 0.5 * stance / period) - 0.02
    heel = ease((part - stance + 0.12) / 0.12) * (1.0 - ease((part - stance) / flight))
    pose.feet_2T2[0, :, 1] = 0.45 * heel + 0.2 * bump((part - stance) / flight)
    pose.free_2T[1] = 1.0
    beat = np.sin(2.0 * np.pi * (t + shift) / period)
    pose.reach_2T3[1] = np.stack(
        [0.02 * np.ones_like(t), -0.68 + 0.04 * beat, -take.uniform(0.22, 0.34) + 0.03 * beat], axis=-1
    )
    pose.point_2T[1] = 0.5
    pose.pelvis_T2[:, 1] += 0.06
    pose.spine_T3[:, 0] += 0.12
    pose.arms_2T5[:, :, ABDUCT] += np.deg2rad(take.uniform(18, 32)) + np.deg2rad(8) * beat
    pose.arms_2T5[:, :, ELBOW] += np.deg2rad(take.uniform(30, 60))
    pose.arms_2T5[:, :, FLEX] += 0.1 - 0.12 * beat
    return pose


def jack(take: Take) -> Pose:
    """Jumping jacks: feet jump apart while the arms go overhead, and back."""
    pose, t = standing(take), take.t
    period = take.speed((1.55, 1.8), (0.96, 1.1))
    flight = min(0.27, 0.3 * period) * take.vary(1.0, 0.08)
    shift, stand, wide = take.uniform(0.0, period), take.body.stand, take.vary(0.26) * take.body.leg / 0.8
    half = period / 2
    beat = (t + shift) / half
    cycle = np.floor(beat)
    part = (beat - cycle) * half
    off = half - flight
    speed = _G * flight / 2
    pose.root_T3[:, 1] = hermite(
        part,
        [0.0, 0.4 * off, off, half],
        [stand + 0.02, stand - 0.07, stand + 0.03, stand + 0.02],
        [-speed, 0.0, speed, -speed],
    )
    opening = np.where(cycle % 2 == 0, 1.0, -1.0)  # an even half period opens
    share = np.where(opening > 0, _travel(part, off, flight), 1.0 - _travel(part, off, flight))
    swing = ease((part - 0.45 * off) / (half - 0.45 * off))
    open_arms = np.where(opening > 0, swing, 1.0 - swing)
    for side, sign in enumerate((1.0, -1.0)):
        pose.toes_2T3[side, :, 0] = sign * (0.09 + wide * share)
        pose.toes_2T3[side, :, 1] = _flight_toe(part, off, flight) + 0.03 * bump((part - off) / flight)
        rise = ease((part - off + 0.1) / 0.1) * (1.0 - ease((part - off) / flight))
        pose.feet_2T2[side, :, 1] = 0.4 * rise + 0.3 * bump((part - off) / flight)
        up = np.deg2rad(take.uniform(150, 165))
        pose.arms_2T5[side, :, ABDUCT] += (up - 0.2) * open_arms
        pose.arms_2T5[side, :, TWIST] = -1.4 * open_arms
        pose.arms_2T5[side, :, ELBOW] += 0.15 * open_arms
        pose.arms_2T5[side, :, ACROSS] *= 0.2
    return pose


JUMPS: dict[str, Callable[[Take], Pose]] = {f.__name__: f for f in (jump, hop, jack)}
