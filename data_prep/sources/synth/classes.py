"""What the synthetic set contains: classes as attribute tuples, how each moves, and what people would call it.

A class is a tuple of attributes, not a wording. Each has verb phrases; sentence frames turn them into captions. Some
frames are kept for the validation and test splits, so that those captions are worded as no training caption is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_prep.sources.synth import actions as act
from data_prep.sources.synth.actions import LEFT, RIGHT, Body

SUBJECTS = ("a person", "someone", "a man", "a woman")
FRAMES = ("{s} {v}", "{s} {v} in one take", "in this clip {s} {v}")
HELD_OUT_FRAMES = ("here {s} {v}", "{s} {v} now")
"""Frames of validation and test captions; training never uses them."""


@dataclass(frozen=True)
class Action:
    """One class: its attributes, its movement and its verb phrases."""

    name: str  # "walk|forward|slow"
    move: Callable[[Body], None]
    verbs: tuple[str, ...]

    def captions(self, held_out: bool, rng: np.random.Generator, count: int = 4) -> tuple[str, ...]:
        """Return distinct captions, drawn from the frames of the split."""
        frames = HELD_OUT_FRAMES if held_out else FRAMES
        every = [f.format(s=s, v=v) for f in frames for s in SUBJECTS for v in self.verbs]
        return tuple(every[i] for i in sorted(rng.permutation(len(every))[:count].tolist()))


def _walks() -> list[Action]:
    speeds = {"slow": (0.62, 1.3, "slowly"), "normal": (1.1, 1.08, "at a normal pace"), "fast": (1.6, 0.86, "fast")}
    found = []
    for pace, (speed, period, word) in speeds.items():
        found.append(
            Action(
                f"walk|forward|{pace}",
                lambda b, s=speed, p=period: act.locomotion(b, s, p, 0.6, 0.15),
                (f"walks forward {word}", f"goes straight ahead {word}", f"walks ahead {word}"),
            )
        )
        back = 0.62 * speed
        found.append(
            Action(
                f"walk|backward|{pace}",
                lambda b, s=back, p=period: act.locomotion(b, -s, p, 0.62, 0.14),
                (f"walks backward {word}", f"steps backwards {word}", f"walks back {word}"),
            )
        )
    words = {
        "arms-raised": ("walks forward with both arms raised", "walks with the hands up in the air"),
        "zombie": ("walks like a zombie with arms stretched forward", "walks with both arms held out in front"),
        "tired": ("walks forward bent over and tired", "walks with a bent back as if exhausted"),
        "hands-on-hips": ("walks forward with hands on the hips", "walks with both hands on the waist"),
    }
    for style, verbs in words.items():

        def stylish(b: Body, style: str = style) -> None:
            act.locomotion(b, 0.9, 1.15, 0.6, 0.15)
            act.styled(b, style)

        found.append(Action(f"walk|forward|{style}", stylish, verbs))
    found.append(
        Action(
            "walk|forward|crouched",
            lambda b: act.locomotion(b, 0.7, 1.2, 0.62, 0.14, height=0.66, swing_arms=0.25),
            ("walks forward crouched", "sneaks ahead with bent knees", "walks low in a crouch"),
        )
    )
    for side, sign in (("left", 1.0), ("right", -1.0)):
        found.append(
            Action(
                f"walk|circle|{side}",
                lambda b, r=sign: act.locomotion(b, 0.9, 1.1, 0.6, 0.15, turn=1.1 * r),
                (f"walks in a circle to the {side}", f"walks around turning {side}", f"walks a curve to the {side}"),
            )
        )
    return found


def _runs() -> list[Action]:
    found = []
    for pace, speed, period, word in (("slow", 1.9, 0.78, "slowly"), ("fast", 3.0, 0.62, "fast")):
        found.append(
            Action(
                f"run|forward|{pace}",
                lambda b, s=speed, p=period: _run(b, s, p, 0.0),
                (f"runs forward {word}", f"runs ahead {word}", f"jogs straight on {word}"),
            )
        )
    for side, sign in (("left", 1.0), ("right", -1.0)):
        found.append(
            Action(
                f"run|circle|{side}",
                lambda b, r=sign: _run(b, 2.0, 0.74, 1.1 * r),
                (f"runs in a circle to the {side}", f"runs around turning {side}", f"jogs a curve to the {side}"),
            )
        )
    return found


def _run(b: Body, speed: float, period: float, turn: float) -> None:
    act.locomotion(b, speed, period, 0.36, 0.2, turn=turn, bounce=0.035, swing_arms=0.8, height=0.86)
    b.lean += 0.14


def _steps() -> list[Action]:
    found = []
    for side, sign in (("left", 1.0), ("right", -1.0)):
        for pace, speed, period in (("slow", 0.3, 1.2), ("fast", 0.6, 0.8)):
            word = "slowly" if pace == "slow" else "fast"
            found.append(
                Action(
                    f"sidestep|{side}|{pace}",
                    lambda b, s=sign * speed, p=period: act.locomotion(
                        b, 0.0, p, 0.6, 0.13, sideways=s, swing_arms=0.05
                    ),
                    (
                        f"steps sideways to the {side} {word}",
                        f"sidesteps {side} {word}",
                        f"moves to the {side} side {word}",
                    ),
                )
            )
        for size, angle, word in (("quarter", 0.5, "a quarter"), ("half", 1.0, "half way round")):
            found.append(
                Action(
                    f"turn|{side}|{size}",
                    lambda b, a=sign * angle * np.pi: act.turn_in_place(b, a),
                    (
                        f"turns {word} to the {side} on the spot",
                        f"turns {side} by {word}" if size == "quarter" else f"turns {side} to face the other way",
                    ),
                )
            )
        leg = act.SIDES[side]
        for where, speed, word in (("place", 0.0, "on the spot"), ("forward", 0.75, "forward")):
            found.append(
                Action(
                    f"hop|{side}|{where}",
                    lambda b, k=leg, s=speed: act.hop(b, k, s),
                    (f"hops on the {side} foot {word}", f"jumps {word} on the {side} leg only"),
                )
            )
    for pace, period, lift in (("slow", 1.2, 0.2), ("fast", 0.75, 0.24)):
        word = "slowly" if pace == "slow" else "fast"
        found.append(
            Action(
                f"march|place|{pace}",
                lambda b, p=period, h=lift: act.locomotion(b, 0.0, p, 0.56, h, swing_arms=0.6),
                (f"marches on the spot {word}", f"marches in place {word}"),
            )
        )
    return found


def _jumps() -> list[Action]:
    found = []
    times = {1: "once", 2: "twice", 3: "three times"}
    for count, word in times.items():
        for where, distance, height, text in (
            ("up", 0.0, 0.3, "up"),
            ("forward", 0.65, 0.2, "forward"),
            ("backward", -0.4, 0.2, "backward"),
        ):
            if count == 3 and where == "backward":
                continue
            found.append(
                Action(
                    f"jump|{where}|{count}",
                    lambda b, n=count, d=distance / count**0.5, h=height: act.two_footed(b, n, d, h),
                    (f"jumps {text} {word}", f"jumps {word} {text} with both feet", f"leaps {text} {word}"),
                )
            )
        found.append(
            Action(
                f"squat|{count}",
                lambda b, n=count: act.squat(b, n),
                (f"squats {word}", f"does a squat {word}", f"bends the knees deeply {word}"),
            )
        )
    return found


def _arms() -> list[Action]:
    found = []
    both = {
        "left": ((LEFT,), "the left hand", "the left arm"),
        "right": ((RIGHT,), "the right hand", "the right arm"),
        "both": ((LEFT, RIGHT), "both hands", "both arms"),
    }
    for name, (sides, hand, arm) in both.items():
        for pace, rate, word in (("slow", 0.8, "slowly"), ("fast", 1.9, "fast")):
            found.append(
                Action(
                    f"wave|{name}|{pace}",
                    lambda b, s=sides, r=rate: act.wave(b, s, r),
                    (f"waves {hand} {word}", f"waves with {hand} {word}"),
                )
            )
        for where, word in (("front", "to the front"), ("side", "to the side")):
            found.append(
                Action(
                    f"raise|{name}|{where}",
                    lambda b, s=sides, w=where: act.raise_arms(b, s, w),
                    (f"raises {arm} {word}", f"lifts {arm} {word} and keeps it"),
                )
            )
    for side in ("left", "right"):
        index = act.SIDES[side]
        for count, word in ((1, "once"), (2, "twice"), (3, "three times")):
            found.append(
                Action(
                    f"punch|{side}|{count}",
                    lambda b, k=index, n=count: act.punch(b, k, n),
                    (f"punches with the {side} fist {word}", f"throws a {side} punch {word}"),
                )
            )
        for where, word in (("front", "to the front"), ("side", "to the side")):
            found.append(
                Action(
                    f"kick|{side}|{where}",
                    lambda b, k=index, w=where: act.kick(b, k, w),
                    (f"kicks {word} with the {side} leg", f"kicks the {side} foot out {word}"),
                )
            )
        found.append(
            Action(
                f"throw|{side}",
                lambda b, k=index: act.throw(b, k),
                (f"throws something with the {side} hand", f"throws a ball using the {side} arm"),
            )
        )
        found.append(
            Action(
                f"lunge|{side}",
                lambda b, k=index: act.lunge(b, k),
                (f"lunges forward with the {side} leg", f"takes a deep lunge on the {side} foot"),
            )
        )
    return found


def _rest() -> list[Action]:
    return [
        Action("clap|chest", lambda b: act.clap(b, "chest"), ("claps in front of the chest", "claps the hands")),
        Action("clap|overhead", lambda b: act.clap(b, "overhead"), ("claps above the head", "claps hands overhead")),
        Action("bow|slight", lambda b: act.bow(b, 0.5), ("bows slightly", "gives a small bow")),
        Action("bow|deep", lambda b: act.bow(b, 1.0), ("bows deeply", "gives a deep bow")),
        Action("sit|down", lambda b: act.sit(b, False), ("sits down", "takes a seat")),
        Action("sit|up", lambda b: act.sit(b, True), ("stands up from a chair", "gets up from sitting")),
        Action("jacks|slow", lambda b: act.jacks(b, 1.3), ("does jumping jacks slowly", "does slow jumping jacks")),
        Action("jacks|fast", lambda b: act.jacks(b, 2.0), ("does jumping jacks fast", "does quick jumping jacks")),
        Action("sway|slow", lambda b: act.sway(b, 0.45), ("sways from side to side slowly", "dances gently in place")),
        Action("sway|fast", lambda b: act.sway(b, 1.0), ("sways from side to side fast", "dances wildly in place")),
    ]


@lru_cache(maxsize=1)
def actions() -> tuple[Action, ...]:
    """Return all classes, in a fixed order."""
    found = [*_walks(), *_runs(), *_steps(), *_jumps(), *_arms(), *_rest()]
    assert len({a.name for a in found}) == len(found)
    return tuple(found)
