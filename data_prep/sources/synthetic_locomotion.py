"""Families that travel or step: walk, circle, tiptoe, limp, run, sidestep, crouch, march, turn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_prep.sources.synthetic_body import FLEX, Pose
from data_prep.sources.synthetic_curves import Array, ease
from data_prep.sources.synthetic_gait import Gait, Path, travel
from data_prep.sources.synthetic_take import Carriage, Take, stepping


def _along(take: Take, speed: float, direction: float = 0.0, yaw_rate: float = 0.0) -> Path:
    """Return a path at `speed` m/s: one clip in three starts from standing, one in six comes to a stop."""
    case, delay = take.uniform(0.0, 1.0), take.uniform(0.1, 0.35)
    end = take.duration - take.uniform(0.1, 0.3)
    wave, phase = take.uniform(0.0, 0.06), take.uniform(0.0, 6.28)

    def pace(time: Array) -> Array:
        go = ease((time - delay) / 0.6) if case < 1 / 3 else np.ones_like(time)
        stop = 1.0 - ease((time - end + 0.6) / 0.6) if case > 5 / 6 else np.ones_like(time)
        return speed * go * stop * (1.0 + wave * np.sin(1.3 * time + phase))

    drift = take.uniform(-0.05, 0.05)

    def heading(time: Array) -> Array:
        share = pace(time) / speed
        return (yaw_rate + drift) * np.cumsum(share) * float(time[1] - time[0])

    return travel(take.duration, pace, heading, direction)


def walk(take: Take) -> Pose:
    """Walk forward or backward."""
    speed, cadence, swing = {
        "slow": (take.uniform(0.45, 0.62), take.uniform(0.62, 0.72), 13.0),
        "normal": (take.uniform(0.95, 1.15), take.uniform(0.84, 0.94), 22.0),
        "fast": (take.uniform(1.45, 1.65), take.uniform(1.14, 1.26), 33.0),
    }[take.action.get("speed", "normal")]
    size = take.body.leg / 0.8
    back = take.action.get("direction") == "backward"
    if back:
        speed, swing = 0.75 * speed, 0.6 * swing
    gait = Gait(
        frequency=cadence, duty=take.uniform(0.6, 0.63) - 0.025 * speed, phase=take.uniform(0.0, 1.0),
        half_width=take.vary(0.085), ahead=take.body.toe_ahead * (0.35 if back else 0.25), lift=take.vary(0.125) * size,
        heel_off=0.45 + 0.3 * speed, toe_up=0.22, backward=back,
    )  # fmt: skip
    carriage = Carriage(
        arm_swing=take.vary(swing, 0.25),
        height=-0.022,
        lean=(-1.0 if back else 2.0) + 2.5 * speed,
        hip_turn=take.vary(5.0, 0.3),
    )
    return stepping(take, gait, _along(take, speed * size, np.pi if back else 0.0), carriage)


def circle(take: Take) -> Pose:
    """Walk in a circle, always turning to one side, and lean into it."""
    speed, rate = take.uniform(0.9, 1.15), take.uniform(1.1, 1.5)
    gait = Gait(
        frequency=take.uniform(0.86, 0.98), duty=0.62, phase=take.uniform(0.0, 1.0), half_width=take.vary(0.085),
        ahead=take.body.toe_ahead * 0.25, lift=take.vary(0.125), heel_off=0.75, toe_up=0.22,
    )  # fmt: skip
    pose = stepping(
        take, gait, _along(take, speed, 0.0, rate), Carriage(arm_swing=take.vary(20.0, 0.25), lean=5.0, height=-0.022)
    )
    pose.pelvis_T2[:, 1] += 0.05
    pose.head_T3[:, 2] += 0.2
    return pose


def tiptoe(take: Take) -> Pose:
    """Walk with short steps on the balls of the feet, arms a little out."""
    gait = Gait(
        frequency=take.uniform(0.85, 1.0), duty=0.62, phase=take.uniform(0.0, 1.0), half_width=take.vary(0.07),
        ahead=take.body.toe_ahead * 0.6, lift=take.vary(0.13), heel_off=0.1, swing_pitch=0.1, toe_up=0.0,
        always_up=take.uniform(0.65, 0.8),
    )  # fmt: skip
    pose = stepping(
        take, gait, _along(take, take.uniform(0.5, 0.65)), Carriage(arm_swing=8.0, elbow=40.0, lean=0.0, height=0.09)
    )
    pose.arms_2T5[:, :, 1] += np.deg2rad(take.uniform(20, 32))
    return pose


def limp(take: Take) -> Pose:
    """Walk with a bad left leg: short stance, dip and lean to its side, arms uneven."""
    gait = Gait(
        frequency=take.uniform(0.68, 0.8), duty=0.7, phase=take.uniform(0.0, 1.0), half_width=take.vary(0.1),
        ahead=take.body.toe_ahead * 0.7, lift=take.vary(0.1), heel_off=0.45, toe_up=0.1, lag=0.42, limp=0.35,
    )  # fmt: skip
    pose = stepping(take, gait, _along(take, take.uniform(0.5, 0.65)), Carriage(arm_swing=10.0, lean=7.0, bob=0.0))
    bad = 0.5 + 0.5 * np.cos(2.0 * np.pi * (gait.cycles(take.t) - 0.22))
    pose.root_T3[:, 1] -= 0.075 * take.vary(1.0) * bad**2
    pose.spine_T3[:, 1] += np.deg2rad(take.vary(16.0)) * bad
    pose.spine_T3[:, 0] += 0.1 * bad
    pose.arms_2T5[0, :, 1] += 0.25 * bad
    return pose


def run(take: Take) -> Pose:
    """Run or jog: a flight phase, bent elbows, heels high."""
    size = take.body.leg / 0.8
    slow = take.action.get("speed", "slow") == "slow"
    speed = take.uniform(1.8, 2.1) if slow else take.uniform(2.9, 3.3)
    gait = Gait(
        frequency=take.uniform(1.15, 1.25) if slow else take.uniform(1.42, 1.55), duty=0.36 if slow else 0.3,
        phase=take.uniform(0.0, 1.0), half_width=take.vary(0.06), ahead=take.body.toe_ahead * 0.3,
        lift=size * (take.vary(0.24) if slow else take.vary(0.34)), heel_off=0.95, swing_pitch=0.4, toe_up=0.1,
    )  # fmt: skip
    carriage = Carriage(
        sway=0.012, bob=take.vary(0.035), height=-0.055, lean=take.vary(9.0 if slow else 15.0),
        arm_swing=take.vary(30.0 if slow else 45.0), elbow=take.uniform(75, 90), elbow_swing=12.0, hip_turn=8.0,
        run=True, arm_phase=-0.08,
    )  # fmt: skip
    pose = stepping(take, gait, _along(take, speed * size), carriage)
    pose.arms_2T5[:, :, FLEX] -= 0.15
    return pose


def sidestep(take: Take) -> Pose:
    """Step to the left, close with the right foot, again and again."""
    frequency = take.speed((0.45, 0.58), (0.95, 1.1))
    stride = take.speed((0.42, 0.52), (0.5, 0.6)) * take.body.leg / 0.8
    gait = Gait(
        frequency=frequency, duty=0.6, phase=take.uniform(0.0, 1.0), half_width=0.5 * (0.16 + stride / 2),
        ahead=take.body.toe_ahead, lift=take.vary(0.1), heel_off=0.12, swing_pitch=0.1, toe_up=0.05,
    )  # fmt: skip
    carriage = Carriage(
        sway=0.0, bob=0.012, lean=4.0, arm_swing=0.0, elbow=take.uniform(15, 45), hip_turn=0.0, height=-0.03
    )
    pose = stepping(take, gait, _along(take, stride * frequency, np.pi / 2), carriage)
    beat = 0.5 - 0.5 * np.cos(2.0 * np.pi * gait.cycles(take.t))
    pose.arms_2T5[:, :, 1] += np.deg2rad(take.uniform(8, 18)) * beat
    return pose


def crouch(take: Take) -> Pose:
    """Walk with deeply bent knees and the trunk bent forward."""
    back = take.action.get("direction") == "backward"
    gait = Gait(
        frequency=take.uniform(0.78, 0.95), duty=0.64, phase=take.uniform(0.0, 1.0), half_width=take.vary(0.11),
        ahead=take.body.toe_ahead * 1.2, lift=take.vary(0.125), heel_off=0.5, backward=back,
    )  # fmt: skip
    carriage = Carriage(
        height=-take.uniform(0.22, 0.3), bob=0.01, lean=take.uniform(38, 50), arm_swing=9.0, elbow=take.uniform(55, 80)
    )
    speed = take.uniform(0.55, 0.75) * (0.85 if back else 1.0)
    pose = stepping(take, gait, _along(take, speed, np.pi if back else 0.0), carriage)
    pose.arms_2T5[:, :, FLEX] += np.deg2rad(take.uniform(25, 40))
    pose.head_T3[:, 0] -= 0.5
    return pose


def march(take: Take) -> Pose:
    """March on the spot: knees high, arms swing straight."""
    gait = Gait(
        frequency=take.speed((0.5, 0.62), (1.0, 1.15)), duty=0.56, phase=take.uniform(0.0, 1.0),
        half_width=take.vary(0.09), ahead=take.body.toe_ahead, lift=take.vary(0.4) * take.body.leg / 0.8, heel_off=0.1,
        swing_pitch=0.3, toe_up=0.0, in_place=True,
    )  # fmt: skip
    still = travel(take.duration, np.zeros_like, np.zeros_like)
    carriage = Carriage(
        arm_swing=take.vary(36.0), elbow=take.uniform(14, 40), bob=0.012, arm_phase=-0.22, swing_from_path=False
    )
    pose = stepping(take, gait, still, carriage)
    pose.spine_T3[:, 0] -= 0.05
    return pose


def turn(take: Take) -> Pose:
    """Turn on the spot to the left with small steps; the head leads."""
    angle = {"quarter": np.pi / 2, "half": np.pi, "full": 2 * np.pi}[take.action.get("angle")] * take.uniform(
        0.94, 1.06
    )
    start, length = take.window({"quarter": 1.0, "half": 1.5, "full": 2.4}[take.action.get("angle")] * take.vary(1.0))

    def heading(time: Array) -> Array:
        x = np.clip((time - start) / length, 0.0, 1.0)
        return angle * (0.5 * ease(x) + 0.5 * x * x * (3.0 - 2.0 * x))

    path = travel(take.duration, np.zeros_like, heading)
    gait = Gait(
        frequency=take.uniform(1.2, 1.4), duty=0.6, phase=take.uniform(0.0, 1.0), half_width=take.vary(0.11),
        ahead=take.body.toe_ahead, lift=take.vary(0.1), heel_off=0.25, swing_pitch=0.15, toe_up=0.0,
    )  # fmt: skip
    pose = stepping(take, gait, path, Carriage(sway=0.0, bob=0.0, arm_swing=0.0, hip_turn=0.0, lean=2.0))
    lead = heading(take.t + 0.15) - heading(take.t)
    pose.head_T3[:, 2] += np.clip(lead, -0.7, 0.7)
    pose.spine_T3[:, 2] += 0.4 * lead
    turning = np.gradient(heading(take.t), take.t)
    pose.arms_2T5[:, :, 1] += 0.05 * turning
    return pose


LOCOMOTION: dict[str, Callable[[Take], Pose]] = {
    f.__name__: f for f in (walk, circle, tiptoe, limp, run, sidestep, crouch, march, turn)
}
