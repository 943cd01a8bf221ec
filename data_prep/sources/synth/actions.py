"""Actions as functions of time: a class name and one clip's variation in, a `Pose` out.

Feet follow a plan of stances (planted, motionless) and swings (an arc between two plants); arms follow keyed or
periodic directions. Nothing here is random: all variation comes in through `Variation`.
Letters: T frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_prep.sources.synth.body import ANKLE_HEIGHT, Pose, smooth

Array = np.ndarray
HIP_WIDTH = 0.09
STAND = 0.905
"""Pelvis height of a standing body at scale 1, metres."""
LEFT, RIGHT = 0, 1
SIDES = {"left": LEFT, "right": RIGHT}
DOWN = np.array([0.18, -1.0, 0.05])
FORE_DOWN = np.array([0.08, -1.0, 0.25])


@dataclass(frozen=True)
class Variation:
    """How one clip differs from another of its class."""

    frames: int
    fps: float
    scale: float  # body size
    tempo: float  # 1 = as written
    amplitude: float  # 1 = as written
    phase: float  # [0, 1)
    wobble: Array  # (6,) phases of slow idle movement, [0, 1)


class Body:
    """A standing body that an action changes frame by frame."""

    def __init__(self, v: Variation) -> None:
        n = v.frames
        self.v, self.t = v, np.arange(n) / v.fps
        self.root = np.zeros((n, 3))
        self.root[:, 1] = STAND
        self.yaw, self.lean, self.bend, self.roll = (np.zeros(n) for _ in range(4))
        self.ankles = np.zeros((n, 2, 3))
        self.ankles[:, :, 0] = (HIP_WIDTH, -HIP_WIDTH)
        self.ankles[:, :, 1] = ANKLE_HEIGHT
        self.foot_yaw, self.foot_pitch = np.zeros((n, 2)), np.zeros((n, 2))
        self.upper, self.fore = np.zeros((n, 2, 3)), np.zeros((n, 2, 3))
        for side in (LEFT, RIGHT):
            self.arm(side, DOWN, FORE_DOWN)
        idle = np.sin(2 * np.pi * (0.35 * self.t[:, None] + v.wobble[None]))
        self.bend += 0.03 * idle[:, 0]
        self.roll += 0.02 * idle[:, 1]
        self.idle = idle

    def arm(self, side: int, upper: Array, fore: Array, share: Array | float = 1.0) -> None:
        """Point an arm, given for the left side, by `share` (T,) of the way from where it points now."""
        flip = np.array([1.0 if side == LEFT else -1.0, 1.0, 1.0])
        share = np.broadcast_to(share, len(self.t))[:, None]
        for name, target in (("upper", upper), ("fore", fore)):
            goal = np.broadcast_to(np.asarray(target, dtype=float), (len(self.t), 3)) * flip
            goal = goal / np.linalg.norm(goal, axis=-1, keepdims=True)
            now = getattr(self, name)
            mixed = (1 - share) * now[:, side] + share * goal
            now[:, side] = mixed / np.maximum(np.linalg.norm(mixed, axis=-1, keepdims=True), 1e-6)

    def pose(self) -> Pose:
        """Return the pose, scaled to the body."""
        s = self.v.scale
        breath = 0.04 * self.idle[:, 2:5]
        upper = self.upper + breath[:, None]
        fore = self.fore + breath[:, None]
        return Pose(
            s * self.root, self.yaw, self.lean, self.bend, self.roll, s * self.ankles, self.foot_yaw, self.foot_pitch,
            upper, fore,
        )  # fmt: skip


def ease(x: Array) -> Array:
    """Return 0 .. 1 with zero speed and acceleration at both ends."""
    x = np.clip(x, 0.0, 1.0)
    return x * x * x * (x * (6 * x - 15) + 10)


def bump(x: Array) -> Array:
    """Return a smooth hill over (0, 1), 0 outside."""
    return np.where((x > 0) & (x < 1), np.sin(np.pi * np.clip(x, 0, 1)) ** 2, 0.0)


def strokes(b: Body, count: int, share: float = 0.8) -> Array:
    """Return (T,) `count` hills spread over the middle of the clip."""
    total = b.t[-1] / count
    start = (1 - share) / 2 * b.t[-1] * (0.6 + 0.8 * b.v.phase)
    spacing = share * b.t[-1] / count
    return np.sum([bump((b.t - start - i * spacing) / min(spacing, total)) for i in range(count)], axis=0)


def hold(b: Body, rise: float = 0.25) -> Array:
    """Return (T,) a rise, a plateau and no return."""
    return ease((b.t / b.t[-1] - 0.08 - 0.1 * b.v.phase) / rise)


# ------------------------------------------------------------------------------------------------------------- feet


def step_feet(b: Body, plants: Callable[[int, float], tuple[Array, float]], period: float, duty: float, lift: float,
              toe: float = 0.12) -> None:  # fmt: skip
    """Let feet step: foot `side` stands around every time (n + phase) x period where `plants` puts it.

    Args:
        b: body.
        plants: (side, time) -> position (3,) of the flat ankle and yaw.
        period: seconds from stance to stance of one foot.
        duty: share of the period a foot is planted.
        lift: height of the swing, metres.
        toe: how far the toes hang in the swing, radians.
    """
    for side in (LEFT, RIGHT):
        offset = (b.v.phase + 0.5 * side) * period
        first = int(np.floor(-offset / period)) - 1
        cycle = np.floor((b.t - offset + 0.5 * duty * period) / period).astype(int)
        local = (b.t - offset + 0.5 * duty * period) / period - cycle
        progress = np.clip((local - duty) / (1 - duty), 0.0, 1.0)
        table = {n: plants(side, offset + n * period) for n in range(first, int(cycle.max()) + 2)}
        here = np.array([table[n][0] for n in cycle])
        there = np.array([table[n + 1][0] for n in cycle])
        yaw_here = np.array([table[n][1] for n in cycle])
        yaw_there = np.array([table[n + 1][1] for n in cycle])
        s = ease(progress)
        b.ankles[:, side] = here + s[:, None] * (there - here)
        b.ankles[:, side, 1] += lift * bump(progress)
        b.foot_yaw[:, side] = yaw_here + s * (yaw_there - yaw_here)
        b.foot_pitch[:, side] = toe * bump(progress)


def along(b: Body, speed: float, turn: float, sideways: float = 0.0) -> Callable[[Array | float], tuple[Array, Array]]:
    """Return time -> (ground position (..., 3), yaw) of a body moving at constant speed and turn rate (rad/s)."""

    def at(time: Array | float) -> tuple[Array, Array]:
        time = np.asarray(time, dtype=float)
        yaw = turn * time
        if abs(turn) > 1e-6:
            x, z = speed * (1 - np.cos(yaw)) / turn, speed * np.sin(yaw) / turn
        else:
            x, z = 0.0 * time, speed * time
        return np.stack([x + sideways * time, 0.0 * time, z], axis=-1), yaw

    return at


def locomotion(b: Body, speed: float, period: float, duty: float, lift: float, turn: float = 0.0, sideways: float = 0.0,
               bounce: float = 0.02, swing_arms: float = 0.45, height: float = STAND) -> None:  # fmt: skip
    """Walk, run, sidestep or march: root along a path, alternating feet, arms opposite to legs."""
    v = b.v
    period, speed, sideways = period / v.tempo, speed * v.tempo * v.amplitude, sideways * v.tempo * v.amplitude
    at = along(b, speed, turn * v.tempo, sideways)
    place, b.yaw = at(b.t)
    b.root = place + np.array([0.0, height, 0.0])
    beat = 2 * np.pi * (b.t / period - v.phase)
    b.root[:, 1] += bounce * np.cos(2 * beat)
    b.root[:, 0] += 0.015 * np.cos(beat) * np.cos(b.yaw)
    b.root[:, 2] -= 0.015 * np.cos(beat) * np.sin(b.yaw)

    def plants(side: int, time: float) -> tuple[Array, float]:
        ground, yaw = at(time)
        width = HIP_WIDTH if side == LEFT else -HIP_WIDTH
        across = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
        return ground + width * across + np.array([0.0, ANKLE_HEIGHT, 0.0]), float(yaw)

    step_feet(b, plants, period, duty, lift)
    for side in (LEFT, RIGHT):
        # the left arm is behind when the left foot is ahead: half a cycle from its own stance
        forward = swing_arms * v.amplitude * np.sin(beat + np.pi * side) * (-1 if speed < 0 else 1)
        upper = np.stack([0.15 + 0 * forward, -np.cos(forward), np.sin(forward)], -1)
        elbow = 0.35 + 0.5 * swing_arms
        fore = np.stack([0.05 + 0 * forward, -np.cos(forward + elbow), np.sin(forward + elbow)], -1)
        b.arm(side, upper, fore)


def two_footed(b: Body, count: int, distance: float, height: float) -> None:
    """Jump with both feet `count` times: crouch, fly, land; the feet are planted between flights."""
    v = b.v
    spacing = 0.86 * b.t[-1] / count
    flight = min(0.5, 0.55 * spacing)
    start = 0.06 * b.t[-1] * (0.5 + v.phase)
    for i in range(count):
        takeoff = start + i * spacing + 0.45 * (spacing - flight)
        p = (b.t - takeoff) / flight
        move = ease(p) * distance * v.amplitude
        arc = np.where((p > 0) & (p < 1), 4 * p * (1 - p), 0.0)
        crouch = bump((b.t - takeoff + 0.34) / 0.42) + 0.8 * bump((b.t - takeoff - flight + 0.06) / 0.4)
        b.root[:, 2] += move
        b.root[:, 1] += height * v.amplitude * smooth(arc, 0.8) - 0.17 * crouch
        b.ankles[:, :, 2] += move[:, None]
        b.ankles[:, :, 1] += (height * v.amplitude * 0.95 * bump(p))[:, None]
        b.foot_pitch += (0.5 * bump(p))[:, None]
        b.lean += 0.28 * crouch
        for side in (LEFT, RIGHT):
            b.arm(side, np.array([0.3, 0.2, 1.0]), np.array([0.2, 0.6, 1.0]), 0.8 * bump(p))


def hop(b: Body, side: int, speed: float) -> None:
    """Hop on one foot; the other is held up behind."""
    v = b.v
    period = 0.55 / v.tempo
    cycle = (b.t / period - v.phase) % 1.0
    number = np.floor(b.t / period - v.phase)
    p = (cycle - 0.42) / 0.58
    travelled = (number + ease(p)) * period * speed * v.amplitude
    up = 0.13 * v.amplitude * bump(p)
    x = (HIP_WIDTH if side == LEFT else -HIP_WIDTH) * 0.4
    b.root[:, 0] += x
    b.root[:, 2] += smooth(travelled, 1.0)
    b.root[:, 1] += smooth(up - 0.05 * bump(cycle / 0.42), 0.7) - 0.02
    b.ankles[:, side, 0] = x
    b.ankles[:, side, 2] = travelled
    b.ankles[:, side, 1] += up
    b.foot_pitch[:, side] = 0.4 * bump(p)
    other = 1 - side
    b.ankles[:, other, 0] = -x * 1.2
    b.ankles[:, other, 2] = b.root[:, 2] - 0.28
    b.ankles[:, other, 1] = b.root[:, 1] - 0.55
    b.foot_pitch[:, other] = 0.9
    for arm in (LEFT, RIGHT):
        b.arm(arm, np.array([1.0, -0.5, 0.1]), np.array([0.8, -0.1, 0.5]), 0.7)


def turn_in_place(b: Body, angle: float) -> None:
    """Turn by stepping on the spot."""
    share = ease((b.t / b.t[-1] - 0.08) / 0.84)
    b.yaw = angle * b.v.amplitude**0.3 * share

    def plants(side: int, time: float) -> tuple[Array, float]:
        yaw = float(np.interp(time, b.t, b.yaw))
        width = HIP_WIDTH if side == LEFT else -HIP_WIDTH
        return np.array([width * np.cos(yaw), ANKLE_HEIGHT, -width * np.sin(yaw)]), yaw

    step_feet(b, plants, 0.8 / b.v.tempo, 0.6, 0.12)


def kick(b: Body, side: int, where: str) -> None:
    """Kick once or twice to the front or the side, standing on the other leg."""
    hit = strokes(b, 2)
    toward = np.array([0.05, 0.55, 0.75]) if where == "front" else np.array([0.75, 0.5, 0.05])
    toward[0] *= 1.0 if side == LEFT else -1.0
    b.ankles[:, side] += hit[:, None] * b.v.amplitude**0.5 * toward
    b.foot_pitch[:, side] = (-0.3 if where == "front" else 0.2) * hit
    shift = ease(b.t / 0.35) * (-0.07 if side == LEFT else 0.07)
    b.root[:, 0] += shift
    b.lean -= 0.18 * hit if where == "front" else 0.0 * hit
    b.roll += (0.0 if where == "front" else (-0.35 if side == LEFT else 0.35)) * hit
    for arm in (LEFT, RIGHT):
        b.arm(arm, np.array([0.8, -0.6, 0.3]), np.array([0.4, 0.2, 1.0]), 0.6)


def lunge(b: Body, side: int) -> None:
    """Step far forward with one leg and sink."""
    share = ease((b.t / b.t[-1] - 0.1 - 0.1 * b.v.phase) / 0.35)
    b.ankles[:, side, 2] += 0.62 * b.v.amplitude * share
    b.ankles[:, side, 1] += 0.1 * bump((b.t / b.t[-1] - 0.1 - 0.1 * b.v.phase) / 0.35)
    b.root[:, 2] += 0.3 * b.v.amplitude * share
    b.root[:, 1] -= 0.24 * share


def wave(b: Body, sides: tuple[int, ...], rate: float) -> None:
    """Raise one or both hands and wave them from side to side."""
    up = ease((b.t / b.t[-1] - 0.02) / 0.2)
    beat = np.sin(2 * np.pi * (rate * b.v.tempo * b.t + b.v.phase))
    for side in sides:
        fore = np.stack([0.15 + 0.75 * b.v.amplitude * beat, np.ones_like(beat), 0.15 + 0 * beat], -1)
        b.arm(side, np.array([1.0, 0.15, 0.3]), fore, up)


def punch(b: Body, side: int, count: int) -> None:
    """Punch forward from a guard."""
    guard = ease(b.t / 0.4)
    for arm in (LEFT, RIGHT):
        b.arm(arm, np.array([0.35, -1.0, 0.35]), np.array([-0.15, 0.9, 0.9]), guard)
    hit = strokes(b, count)
    b.arm(side, np.array([-0.1, 0.1, 1.0]), np.array([-0.15, 0.1, 1.0]), np.clip(1.15 * hit, 0, 1))
    b.yaw += (-0.25 if side == LEFT else 0.25) * hit * b.v.amplitude
    b.bend += 0.12 * hit
    b.root[:, 2] += 0.06 * hit


def raise_arms(b: Body, sides: tuple[int, ...], where: str) -> None:
    """Lift arms to the front or the side and keep them there."""
    goal = np.array([0.1, 0.25 * b.v.amplitude, 1.0]) if where == "front" else np.array([1.0, 0.2 * b.v.amplitude, 0.0])
    for side in sides:
        b.arm(side, goal, goal, hold(b))


def clap(b: Body, where: str) -> None:
    """Clap in front of the chest or above the head."""
    beat = 0.5 - 0.5 * np.cos(2 * np.pi * (1.6 * b.v.tempo * b.t + b.v.phase))
    ready = ease(b.t / 0.5)
    for side in (LEFT, RIGHT):
        if where == "chest":
            upper = np.array([0.45, -0.75, 0.7])
            fore = np.stack([0.35 - 0.95 * beat * b.v.amplitude**0.3, 0.35 + 0 * beat, 1.0 + 0 * beat], -1)
        else:
            upper = np.stack([0.75 - 0.45 * beat, 1.0 + 0 * beat, 0.2 + 0 * beat], -1)
            fore = np.stack([0.3 - 0.75 * beat, 1.0 + 0 * beat, 0.15 + 0 * beat], -1)
        b.arm(side, upper, fore, ready)


def bow(b: Body, depth: float) -> None:
    """Bend forward from hips and spine and come up again."""
    down = strokes(b, 1, 0.9)
    b.lean += 0.55 * depth * b.v.amplitude * down
    b.bend += 0.75 * depth * b.v.amplitude * down
    b.root[:, 2] -= 0.16 * depth * down


def squat(b: Body, count: int) -> None:
    """Squat with arms stretched out."""
    down = strokes(b, count, 0.92)
    b.root[:, 1] -= 0.4 * b.v.amplitude**0.5 * down
    b.root[:, 2] -= 0.1 * down
    b.lean += 0.45 * down
    for side in (LEFT, RIGHT):
        b.arm(side, np.array([0.1, 0.1, 1.0]), np.array([0.05, 0.1, 1.0]), down)


def sit(b: Body, up: bool) -> None:
    """Sit down on, or rise from, a seat that is not there."""
    share = ease((b.t / b.t[-1] - 0.1 - 0.15 * b.v.phase) / 0.55)
    down = 1 - share if up else share
    b.root[:, 1] -= 0.42 * down
    b.root[:, 2] -= 0.36 * down
    b.lean += 0.45 * bump(down) + 0.08 * down
    for side in (LEFT, RIGHT):
        b.arm(side, np.array([0.2, -1.0, 0.5]), np.array([0.0, -0.3, 1.0]), down)


def jacks(b: Body, rate: float) -> None:
    """Jumping jacks: feet apart and together while the arms swing up and down at the sides."""
    period = 1.0 / (rate * b.v.tempo)
    cycle = (b.t / period + b.v.phase) % 2.0
    # stance together, jump apart, stance apart, jump together; feet move only in the air
    apart = ease((cycle - 0.5) / 0.5) - ease((cycle - 1.5) / 0.5)
    air = bump((cycle - 0.5) / 0.5) + bump((cycle - 1.5) / 0.5)
    b.ankles[:, LEFT, 0] += 0.2 * b.v.amplitude * apart
    b.ankles[:, RIGHT, 0] -= 0.2 * b.v.amplitude * apart
    b.ankles[:, :, 1] += 0.12 * air[:, None]
    b.foot_pitch += 0.1 * air[:, None]
    b.root[:, 1] += 0.09 * air - 0.03
    for side in (LEFT, RIGHT):
        angle = 2.6 * smooth(apart, 1.0)
        direction = np.stack([np.sin(0.2 + angle), -np.cos(0.2 + angle), 0.15 + 0 * angle], -1)
        b.arm(side, direction, direction)


def throw(b: Body, side: int) -> None:
    """Draw one arm back over the shoulder and throw forward."""
    t = b.t / b.t[-1] - 0.08 * b.v.phase
    back, forth = bump((t - 0.1) / 0.6), bump((t - 0.45) / 0.5)
    sign = 1.0 if side == LEFT else -1.0
    b.yaw += sign * (0.55 * back - 0.5 * forth) * b.v.amplitude**0.5
    b.arm(side, np.array([0.9, 0.5, -0.7]), np.array([0.2, 1.0, -0.5]), np.clip(1.1 * back, 0, 1))
    b.arm(side, np.array([0.0, 0.25, 1.0]), np.array([-0.1, 0.1, 1.0]), np.clip(1.1 * forth, 0, 1))
    b.bend += 0.25 * forth
    b.root[:, 2] += 0.08 * forth - 0.06 * back


def sway(b: Body, rate: float) -> None:
    """Sway from side to side with loose arms, as in a slow dance."""
    beat = np.sin(2 * np.pi * (rate * b.v.tempo * b.t + b.v.phase))
    b.ankles[:, LEFT, 0] += 0.08
    b.ankles[:, RIGHT, 0] -= 0.08
    b.root[:, 0] += 0.11 * b.v.amplitude * beat
    b.root[:, 1] -= 0.05
    b.roll += 0.16 * beat
    for side in (LEFT, RIGHT):
        lift = 0.4 + 0.3 * (beat if side == LEFT else -beat)
        upper = np.stack([0.9 + 0 * lift, lift - 0.5, 0.25 + 0 * lift], -1)
        fore = np.stack([0.3 + 0 * lift, lift + 0.2, 0.9 + 0 * lift], -1)
        b.arm(side, upper, fore, ease(b.t / 0.5))


def styled(b: Body, style: str) -> None:
    """Change how a walk looks."""
    if style == "arms-raised":
        for side in (LEFT, RIGHT):
            b.arm(side, np.array([0.35, 1.0, 0.1]), np.array([0.1, 1.0, 0.1]), 0.97)
    elif style == "zombie":
        for side in (LEFT, RIGHT):
            b.arm(side, np.array([0.1, 0.05, 1.0]), np.array([0.05, 0.05, 1.0]), 0.97)
    elif style == "tired":
        b.bend += 0.55
        b.lean += 0.12
    elif style == "hands-on-hips":
        for side in (LEFT, RIGHT):
            b.arm(side, np.array([0.9, -0.7, -0.25]), np.array([-0.9, -0.6, 0.3]), 0.97)
