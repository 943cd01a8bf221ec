"""Families with planted feet: sit, stand, squat, lunge, bow, stretch, sway, kick and everything the arms do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_prep.sources.synthetic_body import ABDUCT, ELBOW, FLEX, TWIST, Pose
from data_prep.sources.synthetic_curves import Array, bump, ease, keys
from data_prep.sources.synthetic_take import FLESH_S, Take, arm, gesture, rest_of, standing

_LEFT, _RIGHT = 0, 1


def _seat(take: Take, sitting_T: Array) -> Pose:
    """Return a pose between standing (0) and sitting on a chair (1): the trunk bends forward on the way."""
    pose, leg = standing(take), take.body.leg
    on_way = bump(0.15 + 0.7 * sitting_T) - bump(0.15)
    pose.root_T3[:, 1] += sitting_T * (leg * take.uniform(0.56, 0.63) - take.body.stand)
    pose.root_T3[:, 2] -= sitting_T * leg * take.uniform(0.42, 0.48)
    lean = take.vary(0.75)
    pose.pelvis_T2[:, 0] += 0.5 * lean * on_way - 0.1 * sitting_T
    pose.spine_T3[:, 0] += 0.6 * lean * on_way + 0.1 * sitting_T
    pose.head_T3[:, 0] -= 0.3 * on_way
    flex, elbow = np.deg2rad(take.uniform(22, 38)), np.deg2rad(take.uniform(35, 60))
    pose.arms_2T5[:, :, FLEX] += flex * sitting_T + 0.5 * on_way
    pose.arms_2T5[:, :, ELBOW] += elbow * sitting_T
    return pose


def sit(take: Take) -> Pose:
    """Stand, then sit down and stay."""
    start, length = take.window(take.speed((1.9, 2.4), (0.65, 0.85)))
    return _seat(take, ease((take.t - start) / length))


def stand(take: Take) -> Pose:
    """Sit, then stand up and stay."""
    start, length = take.window(take.speed((1.9, 2.4), (0.65, 0.85)))
    return _seat(take, 1.0 - ease((take.t - start) / length))


def squat(take: Take) -> Pose:
    """Squat 1 to 3 times with the arms held forward."""
    pose, count = standing(take), int(take.action.get("count"))
    start, length = take.window(count * take.vary({1: 1.6, 2: 1.2, 3: 0.98}[count], 0.05))
    x = (take.t - start) / length * count
    down = np.where((x > 0) & (x < count), bump(x - np.floor(x)), 0.0)
    leg = take.body.leg
    deep = leg * take.uniform(0.42, 0.54)
    pose.toes_2T3[:, :, 0] *= take.uniform(1.2, 1.5)
    pose.root_T3[:, 1] -= deep * down
    pose.root_T3[:, 2] -= leg * 0.16 * down
    lean = take.vary(0.85)
    pose.pelvis_T2[:, 0] += 0.5 * lean * down
    pose.spine_T3[:, 0] += 0.4 * lean * down
    pose.head_T3[:, 0] -= 0.4 * down
    pose.arms_2T5[:, :, FLEX] += (np.deg2rad(take.uniform(85, 105)) + 0.3) * ease(1.2 * down)
    return pose


def lunge(take: Take) -> Pose:
    """Step far forward with the left foot, sink, and step back."""
    pose, t, leg = standing(take), take.t, take.body.leg
    start, length = take.window(take.uniform(2.2, 2.7))
    step = 0.24 * length
    out = keys(t, [start, start + step, start + length - step, start + length], [0.0, 1.0, 1.0, 0.0])
    far = leg * take.uniform(0.82, 0.95)
    air = bump((t - start) / step) + bump((t - start - length + step) / step)
    pose.toes_2T3[_LEFT, :, 2] += far * out
    pose.toes_2T3[_LEFT, :, 1] = 0.13 * air**0.7
    pose.feet_2T2[_LEFT, :, 1] = 0.2 * air
    sink = keys(t, [start, start + 0.45 * length, start + 0.55 * length, start + length], [0.0, 1.0, 1.0, 0.0])
    body_out = keys(t, [start, start + 0.4 * length, start + 0.62 * length, start + length], [0.0, 1.0, 1.0, 0.0])
    pose.root_T3[:, 2] += 0.5 * far * body_out
    pose.root_T3[:, 1] -= leg * take.uniform(0.3, 0.38) * sink
    pose.feet_2T2[_RIGHT, :, 1] = take.uniform(0.75, 0.95) * body_out
    hips = arm(flex=-8, abduct=38, twist=62, elbow=95)
    if take.uniform(0, 1) < 0.5:
        for side in (_LEFT, _RIGHT):
            rest = rest_of(pose, side)
            gesture(
                pose,
                take,
                side,
                [start - 0.2, start + 0.4, start + length - 0.3, start + length],
                [rest, hips, hips, rest],
            )
    return pose


def bow(take: Take) -> Pose:
    """Bow once, slightly or deeply, with the arms hanging."""
    pose = standing(take)
    start, length = take.window(take.uniform(1.7, 2.5))
    deep = take.action.get("depth") == "deep"
    angle = np.deg2rad(take.uniform(85, 105) if deep else take.uniform(26, 36))
    down = keys(take.t, [start, start + 0.4 * length, start + 0.6 * length, start + length], [0.0, 1.0, 1.0, 0.0])
    pose.pelvis_T2[:, 0] += 0.55 * angle * down
    pose.spine_T3[:, 0] += 0.45 * angle * down
    pose.head_T3[:, 0] += 0.25 * angle * down
    pose.root_T3[:, 2] -= 0.11 * angle * down
    pose.arms_2T5[:, :, FLEX] += (0.85 if deep else 0.35) * angle * down
    return pose


def stretch(take: Take) -> Pose:
    """Stretch up on tiptoe, or bend the trunk to the left with the right arm overhead."""
    pose, t = standing(take), take.t
    start, length = take.window(take.uniform(2.2, 2.8))
    times = [start, start + 0.36 * length, start + 0.64 * length, start + length]
    held = keys(t, times, [0.0, 1.0, 1.0, 0.0])
    if take.action.get("direction") == "up":
        for side in (_LEFT, _RIGHT):
            rest, top = rest_of(pose, side), arm(abduct=take.uniform(172, 186), twist=-80, elbow=8)
            gesture(pose, take, side, times, [rest, top, top, rest])
        pose.feet_2T2[:, :, 1] += np.deg2rad(take.uniform(22, 34)) * held
        pose.root_T3[:, 1] += 0.09 * held
        pose.root_T3[:, 2] += 0.035 * held
        pose.spine_T3[:, 0] -= 0.2 * held
        pose.head_T3[:, 0] -= 0.4 * held
        return pose
    pose.toes_2T3[:, :, 0] *= take.uniform(1.4, 1.8)
    rest, top = rest_of(pose, _RIGHT), arm(abduct=take.uniform(168, 185), twist=-80, elbow=take.uniform(10, 25))
    gesture(pose, take, _RIGHT, times, [rest, top, top, rest])
    pose.spine_T3[:, 1] += np.deg2rad(take.uniform(32, 44)) * held
    pose.pelvis_T2[:, 1] += 0.12 * held
    pose.root_T3[:, 0] -= 0.05 * held
    pose.head_T3[:, 1] += 0.2 * held
    return pose


def sway(take: Take) -> Pose:
    """Dance on the spot: hips swing from side to side, arms follow the other way."""
    pose, t = standing(take), take.t
    beat = 2.0 * np.pi * (take.speed((0.38, 0.5), (0.95, 1.15)) * t + take.uniform(0, 1))
    wave, double = np.sin(beat), np.cos(2.0 * beat)
    pose.toes_2T3[:, :, 0] *= take.uniform(1.3, 1.7)
    pose.root_T3[:, 0] += take.uniform(0.07, 0.1) * wave
    pose.root_T3[:, 1] -= 0.05 + 0.02 * double
    pose.pelvis_T2[:, 1] -= take.vary(0.16) * wave
    pose.yaw_T += 0.12 * np.cos(beat)
    pose.spine_T3[:, 1] += take.vary(0.3) * wave
    pose.spine_T3[:, 2] -= 0.2 * np.cos(beat)
    pose.head_T3[:, 1] -= 0.2 * wave
    high, elbow = take.uniform(30, 55), take.uniform(60, 90)
    for side, sign in enumerate((1.0, -1.0)):
        pose.arms_2T5[side, :, ABDUCT] += np.deg2rad(high * 0.7) + np.deg2rad(20) * sign * wave
        pose.arms_2T5[side, :, FLEX] += np.deg2rad(high * 0.5) - np.deg2rad(15) * sign * np.cos(beat)
        pose.arms_2T5[side, :, ELBOW] += np.deg2rad(elbow) + 0.2 * sign * wave
        lift = (0.5 - 0.5 * sign * wave) ** 2
        pose.feet_2T2[side, :, 1] += 0.3 * lift
    return pose


def kick(take: Take) -> Pose:
    """Kick once with the left leg, forward or sideways; the right foot stays, the arms balance."""
    pose, t = standing(take), take.t
    start, length = take.window(take.uniform(1.35, 1.7))
    back, hit, down = start + 0.33 * length, start + 0.52 * length, start + length
    forward = take.action.get("direction") == "forward"
    high = take.uniform(0.3, 0.6)
    if forward:
        chamber, end = (0.0, -0.72, -0.42), (-0.02, -0.35 - 0.35 * (1 - high), 0.55 + 0.35 * high)
    else:
        chamber, end = (0.12, -0.62, 0.15), (0.62 + 0.25 * high, -0.72 + 0.55 * high, 0.02)
    stand_at = (0.02, -0.8, -0.06)
    times = [start, back, hit, hit + 0.08, down]
    pose.reach_2T3[_LEFT] = keys(t, times, [stand_at, chamber, end, end, stand_at])
    lifted = keys(t, [start, start + 0.16 * length, down - 0.14 * length, down], [0.0, 1.0, 1.0, 0.0])
    pose.toes_2T3[_LEFT, :, 1] = 0.14 * lifted
    pose.free_2T[_LEFT] = keys(
        t,
        [start + 0.1 * length, start + 0.3 * length, down - 0.28 * length, down - 0.08 * length],
        [0.0, 1.0, 1.0, 0.0],
    )
    pose.point_2T[_LEFT] = keys(t, times, [0.0, 0.4, 0.3 if forward else -0.1, 0.3, 0.0])
    weight = keys(t, [start - 0.25, start + 0.25 * length, down - 0.2 * length, down + 0.2], [0.0, 1.0, 1.0, 0.0])
    pose.root_T3[:, 0] += weight * (pose.toes_2T3[_RIGHT, :, 0] + 0.04) * 0.8
    strike = keys(t, times, [0.0, -0.3, 1.0, 1.0, 0.0])
    pose.pelvis_T2[:, 0] -= (0.22 if forward else 0.0) * strike
    pose.pelvis_T2[:, 1] -= (0.0 if forward else 0.32) * np.maximum(strike, 0)
    pose.spine_T3[:, 0] += (0.15 if forward else 0.05) * strike
    pose.spine_T3[:, 1] -= (0.0 if forward else 0.12) * np.maximum(strike, 0)
    for side, sign in enumerate((1.0, -1.0)):
        pose.arms_2T5[side, :, ABDUCT] += np.deg2rad(take.uniform(18, 35)) * weight
        pose.arms_2T5[side, :, ELBOW] += np.deg2rad(take.uniform(20, 50)) * weight
        pose.arms_2T5[side, :, FLEX] -= sign * 0.45 * strike
    return pose


def punch(take: Take) -> Pose:
    """From a guard, punch 1 to 3 times with the left fist and turn the trunk with it."""
    pose, t, count = standing(take), take.t, int(take.action.get("count"))
    start, length = take.window(0.9 + count * take.uniform(0.48, 0.56))
    guard = arm(flex=take.uniform(32, 45), abduct=12, twist=take.uniform(5, 25), elbow=take.uniform(112, 126))
    out = arm(flex=take.uniform(80, 92), abduct=2, across=take.uniform(2, 12), twist=35, elbow=4)
    up, first = start + 0.42, start + 0.45
    gap = max(0.3, (length - 0.9) / count)
    times, postures, twist = [start, up], [rest_of(pose, _LEFT), guard], [0.0, 0.0]
    for i in range(count):
        hit = first + i * gap + 0.42 * gap
        times += [hit, hit + 0.05, first + (i + 1) * gap]
        postures += [out, out, guard]
        twist += [-1.0, -1.0, 0.0]
    end = times[-1] + 0.05
    times, postures, twist = [*times, end, end + 0.4], [*postures, guard, rest_of(pose, _LEFT)], [*twist, 0.0, 0.0]
    gesture(pose, take, _LEFT, times, postures)
    rest = rest_of(pose, _RIGHT)
    gesture(pose, take, _RIGHT, [start, up, end, end + 0.4], [rest, guard, guard, rest])
    turn = keys(t, times, twist)
    pose.spine_T3[:, 2] += take.vary(0.45) * turn
    pose.yaw_T += 0.2 * turn
    pose.root_T3[:, 2] -= 0.05 * turn
    fight = keys(t, [start, up, end, end + 0.4], [0.0, 1.0, 1.0, 0.0])
    pose.root_T3[:, 1] -= 0.06 * fight
    pose.toes_2T3[:, :, 0] *= 1.3
    split = take.uniform(0.1, 0.16)
    pose.toes_2T3[_LEFT, :, 2] += split
    pose.toes_2T3[_RIGHT, :, 2] -= split
    pose.feet_2T2[_RIGHT, :, 1] += 0.25 * fight
    return pose


def throw(take: Take) -> Pose:
    """Throw once with the left arm: over the shoulder, or from below."""
    pose, t = standing(take), take.t
    start, length = take.window(take.uniform(1.6, 2.0))
    back, release, follow = start + 0.42 * length, start + 0.58 * length, start + 0.7 * length
    rest = rest_of(pose, _LEFT)
    times = [start, back, release, follow, start + length]
    if take.action.get("manner") == "overhand":
        cocked = arm(flex=0, abduct=take.uniform(88, 102), across=-25, twist=-100, elbow=take.uniform(85, 105))
        let_go = arm(flex=40, abduct=take.uniform(95, 110), across=45, twist=-70, elbow=15)
        through = arm(flex=35, abduct=20, across=45, twist=-10, elbow=25)
    else:
        cocked = arm(flex=-take.uniform(50, 62), abduct=14, elbow=12)
        let_go = arm(flex=take.uniform(62, 78), abduct=10, elbow=10)
        through = arm(flex=take.uniform(105, 125), abduct=8, across=8, elbow=22)
    gesture(pose, take, _LEFT, times, [rest, cocked, let_go, through, rest])
    turn = keys(t, times, [0.0, 1.0, -0.6, -0.8, 0.0]) * take.vary(1.0)
    over = take.action.get("manner") == "overhand"
    pose.spine_T3[:, 2] += (0.55 if over else 0.25) * turn
    pose.yaw_T += (0.3 if over else 0.12) * turn
    pose.spine_T3[:, 0] += (0.15 if over else 0.3) * keys(t, times, [0.0, -0.6 if over else 0.6, 0.8, 1.0, 0.0])
    split = take.uniform(0.14, 0.2)
    pose.toes_2T3[_RIGHT, :, 2] += split
    pose.toes_2T3[_LEFT, :, 2] -= split
    pose.root_T3[:, 2] -= keys(t, times, [0.0, 0.09, -0.07, -0.09, 0.0])
    pose.feet_2T2[_LEFT, :, 1] += keys(t, times, [0.05, 0.05, 0.5, 0.6, 0.05])
    pose.root_T3[:, 1] -= 0.03
    other = rest_of(pose, _RIGHT)
    aim = arm(flex=take.uniform(45, 65), abduct=15, elbow=25) if over else arm(flex=15, abduct=25, elbow=30)
    gesture(pose, take, _RIGHT, times, [other, aim, other, other, other])
    return pose


def _kept(rate: float) -> float:
    """Return the share of a swing at `rate` Hz that the later blur leaves: waves stay wide and clapping hands meet."""
    return float(np.exp(-0.5 * (2.0 * np.pi * rate * FLESH_S) ** 2))


def wave(take: Take) -> Pose:
    """Raise the left hand beside the head and wave it from side to side."""
    pose, t = standing(take), take.t
    start, length = take.window(take.duration - 0.3)
    ramp = min(take.speed((0.7, 0.85), (0.4, 0.5)), 0.3 * length)
    up = keys(t, [start, start + ramp, start + length - ramp, start + length], [0.0, 1.0, 1.0, 0.0])[:, None]
    rest = pose.arms_2T5[_LEFT]
    raised = arm(abduct=take.uniform(80, 112), across=take.uniform(5, 30), twist=-88, elbow=take.uniform(70, 88))
    rate = take.speed((0.75, 0.92), (2.0, 2.3))
    shake = np.sin(2.0 * np.pi * (rate * t + take.uniform(0, 1)))[:, None] / _kept(rate)
    size = np.deg2rad(take.uniform(22, 30))
    columns = np.zeros(5)
    columns[ELBOW], columns[TWIST] = size, 0.1
    pose.arms_2T5[_LEFT] = rest * (1.0 - up) + up * (raised + shake * columns)
    pose.head_T3[:, 2] += take.uniform(-0.1, 0.2) * up[:, 0]
    return pose


def raise_arms(take: Take) -> Pose:
    """Raise the left arm or both, to the front or sideways, hold, lower."""
    pose = standing(take)
    start, length = take.window(take.uniform(1.9, 2.6))
    times = [start, start + 0.33 * length, start + 0.67 * length, start + length]
    high, bend = take.uniform(84, 106), take.uniform(2, 12)
    front = take.action.get("direction") == "front"
    for side in (_LEFT, _RIGHT) if take.action.get("side") == "both" else (_LEFT,):
        rest = rest_of(pose, side)
        top = arm(flex=high, abduct=4, elbow=bend) if front else arm(abduct=high, elbow=bend, twist=-10)
        gesture(pose, take, side, times, [rest, top, top, rest])
    held = keys(take.t, times, [0.0, 1.0, 1.0, 0.0])
    pose.spine_T3[:, 0] -= (0.06 if front else 0.0) * held
    return pose


def clap(take: Take) -> Pose:
    """Clap again and again, before the chest or overhead."""
    pose, t = standing(take), take.t
    rate = take.speed((0.85, 1.05), (1.9, 2.2))
    apart = 0.5 - 0.5 / _kept(rate) * np.cos(2.0 * np.pi * (rate * t + take.uniform(0, 1)))
    size = take.vary(1.0, 0.2) * (1.0 if take.action.get("speed") == "slow" else 0.75)
    if take.action.get("place") == "chest":
        closed = arm(flex=take.uniform(30, 44), abduct=5, across=6, twist=48, elbow=take.uniform(72, 84))
        opened = arm(flex=0, abduct=14, across=-22, twist=-14, elbow=-6)
    else:
        closed = arm(flex=0, abduct=take.uniform(180, 184), twist=-75, elbow=37)
        opened = arm(flex=0, abduct=-32, twist=0, elbow=-10)
    for side in (_LEFT, _RIGHT):
        pose.arms_2T5[side] = (
            closed + np.outer(apart * size, opened) + 0.3 * (pose.arms_2T5[side] - rest_of(pose, side))
        )
    pose.spine_T3[:, 0] += 0.03 * apart
    return pose


ACTIONS: dict[str, Callable[[Take], Pose]] = {
    "raise": raise_arms,
    **{f.__name__: f for f in (sit, stand, squat, lunge, bow, stretch, sway, kick, punch, throw, wave, clap)},
}
