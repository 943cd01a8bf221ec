"""Captions from template grammars: every caption names every attribute of its class, in changing words.

A caption is a clause in a frame. Clauses mark their verbs, "[walk] forward", so that a frame can set them in the
present ("walks") or the progressive ("is walking"). Training uses the first list of frames and of clauses; validation
and test use only the second lists, built from words that training also uses. A held-out caption is thus a sentence
never seen in training whose words are all known.
"""

from __future__ import annotations

import re
from itertools import product

import numpy as np

from data_prep.sources.synthetic_classes import ActionClass

TRAIN_FRAMES = (
    "a person {present}",
    "someone {present}",
    "a person is {progressive}",
    "the figure is {progressive}",
    "a man {present}",
    "the person {present}",
    "a woman is {progressive}",
)
HELD_OUT_FRAMES = ("the figure {present}", "someone is {progressive}", "the man {present}", "the woman {present}")

_PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "speed": {
        "slow": ("slowly", "at a slow pace", "in a slow manner"),
        "normal": ("at a normal pace", "at a moderate pace", "at normal speed"),
        "fast": ("quickly", "at a fast pace", "in a fast manner"),
    },
    "count": {
        "1": ("once", "one time", "a single time"),
        "2": ("twice", "two times", "two times in a row"),
        "3": ("three times", "three times in a row"),
    },
    "angle": {
        "quarter": ("a quarter turn", "ninety degrees"),
        "half": ("a half turn", "one hundred eighty degrees"),
        "full": ("a full turn", "three hundred sixty degrees"),
    },
    "style": {
        "tired": ("wearily", "like a tired person", "in a tired way"),
        "proud": ("proudly", "like a proud person", "in a proud way"),
        "drunk": ("unsteadily", "like a drunk person", "in a drunk way"),
        "arms_spread": ("with arms spread wide", "with both arms held out like wings", "with arms out to the sides"),
        "hands_on_hips": ("with hands on the hips", "keeping both hands on the hips", "with both hands at the waist"),
        "arms_up": ("with arms raised over the head", "with both arms up in the air", "keeping both hands overhead"),
    },
}

# family -> (training clauses, held-out clauses); "family+attribute" goes before "family/value", that before "family"
_CLAUSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "walk": (
        ("[walk] {direction} {speed}", "[stroll] {direction} {speed}", "{speed} [walk] {direction}"),
        ("[walk] {speed} {direction}", "{speed} [stroll] {direction}"),
    ),
    "walk+style": (
        ("[walk] {style}", "[stroll] {style}", "[walk] along {style}"),
        ("[stroll] along {style}", "[walk] ahead {style}"),
    ),
    "run+style": (
        ("[run] {style}", "[jog] {style}", "[run] ahead {style}"),
        ("[jog] along {style}", "[jog] ahead {style}"),
    ),
    "march+style": (
        ("[march] in place {style}", "[march] on the spot {style}", "[lift] the knees in turn {style}, marching"),
        ("[march] {style} in place", "[march] {style} on the spot"),
    ),
    "sidestep+style": (
        ("[step] sideways to the {direction} {style}", "[sidestep] {direction} {style}"),
        ("[sidestep] to the {direction} {style}", "[step] to the {direction} sideways {style}"),
    ),
    "circle+style": (
        ("[walk] in a circle to the {direction} {style}", "[walk] around in a circle, turning {direction}, {style}"),
        ("[walk] around in a circle to the {direction} {style}", "[walk] in a circle, turning {direction}, {style}"),
    ),
    "circle": (
        (
            "[walk] in a circle to the {direction}",
            "[walk] around in a circle, turning {direction}",
            "[move] along a curve to the {direction} while walking",
        ),
        ("[move] in a circle to the {direction} while walking", "[walk] along a circle, turning {direction}"),
    ),
    "tiptoe": (
        ("[walk] on tiptoe", "[move] forward on the tips of the toes", "[walk] carefully on the toes"),
        ("[walk] forward on tiptoe", "carefully [move] on the tips of the toes"),
    ),
    "limp": (
        (
            "[limp] on the {side} leg",
            "[walk] with a limp in the {side} leg",
            "[move] forward with an injured {side} leg",
        ),
        ("[walk] with an injured {side} leg", "[limp] forward on the {side} leg"),
    ),
    "run/slow": (
        ("[jog] forward slowly", "[run] forward at a slow pace", "slowly [run] forward"),
        ("[jog] forward at a slow pace", "slowly [jog] forward"),
    ),
    "run/fast": (
        ("[run] forward quickly", "[sprint] forward", "[run] forward at a fast pace"),
        ("quickly [run] forward", "[sprint] forward at a fast pace"),
    ),
    "jump/up": (
        ("[jump] up {count}", "[jump] straight up in place {count}", "[leap] up into the air {count}"),
        ("[jump] up into the air {count}", "[leap] straight up in place {count}"),
    ),
    "jump/forward": (
        ("[jump] forward {count}", "[leap] forward with both feet {count}", "[jump] ahead {count}"),
        ("[leap] forward {count}", "[jump] forward with both feet {count}"),
    ),
    "jump/backward": (
        ("[jump] backward {count}", "[leap] backward with both feet {count}", "[jump] back {count}"),
        ("[leap] backward {count}", "[jump] backward with both feet {count}"),
    ),
    "jump": (
        (
            "[jump] sideways to the {direction} {count}",
            "[leap] to the {direction} {count}",
            "[jump] {direction} {count}",
        ),
        ("[jump] to the {direction} {count}", "[leap] sideways to the {direction} {count}"),
    ),
    "hop/in_place": (
        (
            "[hop] in place on the {side} leg",
            "[hop] on the spot on the {side} foot",
            "[bounce] in place on one {side} leg",
        ),
        ("[hop] in place on the {side} foot", "[hop] on the spot on the {side} leg"),
    ),
    "hop/forward": (
        (
            "[hop] forward on the {side} leg",
            "[hop] ahead on the {side} foot",
            "[move] forward hopping on the {side} leg",
        ),
        ("[hop] forward on the {side} foot", "[move] ahead hopping on the {side} leg"),
    ),
    "turn": (
        ("[turn] {angle} to the {direction}", "[rotate] {direction} by {angle}", "[spin] {angle} {direction} in place"),
        ("[turn] in place {angle} to the {direction}", "[rotate] {angle} to the {direction}"),
    ),
    "sit": (
        ("[sit] down {speed}", "{speed} [sit] down on a chair", "[take] a seat {speed}"),
        ("{speed} [take] a seat", "[sit] down on a chair {speed}"),
    ),
    "stand": (
        ("[stand] up {speed}", "{speed} [stand] up from a chair", "[rise] from a seat {speed}"),
        ("{speed} [rise] from a chair", "[stand] up from a seat {speed}"),
    ),
    "squat": (
        ("[squat] {count}", "[do] a squat {count}", "[bend] the knees deeply and [rise] {count}"),
        ("[bend] the knees and [squat] {count}", "[squat] deeply {count}"),
    ),
    "wave": (
        (
            "[wave] the {side} hand {speed}",
            "{speed} [wave] with the {side} arm",
            "[greet] with the {side} hand, waving {speed}",
        ),
        ("[wave] with the {side} hand {speed}", "{speed} [wave] the {side} arm"),
    ),
    "raise/both/front": (
        ("[raise] both arms to the front", "[lift] both arms forward", "[hold] both arms out in front"),
        ("[lift] both arms to the front", "[raise] both arms forward"),
    ),
    "raise/both/side": (
        ("[raise] both arms sideways", "[lift] both arms out to the sides", "[hold] both arms out sideways"),
        ("[raise] both arms out to the sides", "[lift] both arms sideways"),
    ),
    "raise/front": (
        ("[raise] the {side} arm to the front", "[lift] the {side} arm forward", "[hold] the {side} arm out in front"),
        ("[lift] the {side} arm to the front", "[raise] the {side} arm forward"),
    ),
    "raise/side": (
        (
            "[raise] the {side} arm sideways",
            "[lift] the {side} arm out to the side",
            "[hold] the {side} arm out sideways",
        ),
        ("[raise] the {side} arm out to the side", "[lift] the {side} arm sideways"),
    ),
    "kick/forward": (
        (
            "[kick] forward with the {side} leg",
            "[kick] the {side} foot to the front",
            "[give] a front kick with the {side} leg",
        ),
        ("[kick] to the front with the {side} leg", "[give] a forward kick with the {side} foot"),
    ),
    "kick/sideways": (
        (
            "[kick] sideways with the {side} leg",
            "[kick] the {side} foot out to the side",
            "[give] a side kick with the {side} leg",
        ),
        ("[kick] out to the side with the {side} leg", "[give] a side kick with the {side} foot"),
    ),
    "punch": (
        (
            "[punch] {count} with the {side} hand",
            "[throw] a {side} punch {count}",
            "[strike] forward with the {side} fist {count}",
        ),
        ("[punch] with the {side} fist {count}", "[strike] with the {side} hand {count}"),
    ),
    "bow/slight": (
        ("[bow] slightly", "[make] a small bow", "[bend] forward a little to bow"),
        ("slightly [bow]", "[bow] a little"),
    ),
    "bow/deep": (
        ("[bow] deeply", "[make] a deep bow", "[bend] far forward to bow"),
        ("deeply [bow]", "[bow] far forward"),
    ),
    "sidestep": (
        (
            "[step] sideways to the {direction} {speed}",
            "{speed} [sidestep] {direction}",
            "[shuffle] to the {direction} {speed}",
        ),
        ("[sidestep] to the {direction} {speed}", "{speed} [shuffle] sideways to the {direction}"),
    ),
    "throw/overhand": (
        (
            "[throw] overhand with the {side} hand",
            "[hurl] a ball overhand with the {side} arm",
            "[throw] over the {side} shoulder",
        ),
        ("[throw] a ball overhand with the {side} arm", "[hurl] overhand with the {side} hand"),
    ),
    "throw/underhand": (
        (
            "[throw] underhand with the {side} hand",
            "[toss] a ball underhand with the {side} arm",
            "[toss] from below with the {side} hand",
        ),
        ("[throw] a ball underhand with the {side} arm", "[toss] underhand with the {side} hand"),
    ),
    "sway": (
        (
            "[dance] in place {speed}",
            "[sway] the hips from side to side {speed}",
            "{speed} [sway] and [dance] on the spot",
        ),
        ("{speed} [dance] on the spot", "{speed} [sway] the hips from side to side"),
    ),
    "crouch": (
        (
            "[walk] {direction} while crouching",
            "[sneak] {direction} with bent knees",
            "[move] {direction} in a low crouch",
        ),
        ("[sneak] {direction} in a low crouch", "[walk] {direction} with bent knees"),
    ),
    "clap/chest": (
        (
            "[clap] the hands {speed} in front of the chest",
            "{speed} [clap] before the chest",
            "[applaud] {speed} with hands at the chest",
        ),
        ("{speed} [applaud] in front of the chest", "[clap] {speed} with hands before the chest"),
    ),
    "clap/overhead": (
        (
            "[clap] the hands {speed} over the head",
            "{speed} [clap] overhead",
            "[applaud] {speed} with hands above the head",
        ),
        ("{speed} [applaud] overhead", "[clap] {speed} with hands over the head"),
    ),
    "march": (
        (
            "[march] in place {speed}",
            "{speed} [march] on the spot with high knees",
            "[lift] the knees in turn {speed}, marching",
        ),
        ("{speed} [march] in place", "[march] on the spot {speed} with high knees"),
    ),
    "stretch/up": (
        ("[stretch] both arms up on tiptoe", "[reach] up high with both hands", "[stretch] the whole body up"),
        ("[reach] up on tiptoe with both arms", "[stretch] up high with both hands"),
    ),
    "stretch": (
        (
            "[bend] the body sideways to the {direction} to stretch",
            "[stretch] to the {direction} side",
            "[lean] {direction} in a side stretch",
        ),
        ("[stretch] the body sideways to the {direction}", "[lean] to the {direction} side in a stretch"),
    ),
    "lunge": (
        (
            "[lunge] forward with the {side} leg",
            "[do] a {side} leg lunge",
            "[step] far forward on the {side} foot and [sink] low",
        ),
        ("[do] a lunge forward with the {side} leg", "[lunge] far forward on the {side} foot"),
    ),
    "jack": (
        (
            "[do] jumping jacks {speed}",
            "{speed} [perform] jumping jacks",
            "[jump] with legs apart and arms up again and again {speed}",
        ),
        ("{speed} [do] jumping jacks", "[perform] jumping jacks {speed}"),
    ),
}

_DOUBLED = frozenset("run jog hop spin sit clap squat step sidestep".split())
_VERB = re.compile(r"\[(\w+)\]")


def present(verb: str) -> str:
    """Return the third person: walks, punches, does."""
    return verb + ("es" if verb.endswith(("ch", "sh", "s", "x", "z", "o")) else "s")


def progressive(verb: str) -> str:
    """Return the -ing form: walking, running, raising."""
    if verb in _DOUBLED:
        return verb + verb[-1] + "ing"
    return (verb[:-1] if verb.endswith("e") else verb) + "ing"


def clauses(action: ActionClass, held_out: bool) -> tuple[str, ...]:
    """Return the clauses of a class with every attribute filled in and verbs still marked."""
    values = [value for _, value in action.attributes]
    named = (f"{action.family}+{name}" for name, _ in action.attributes)
    options = [*named, "/".join((action.family, *values)), *(f"{action.family}/{v}" for v in values), action.family]
    templates = _CLAUSES[next(key for key in options if key in _CLAUSES)][held_out]
    filled = []
    for template in templates:
        slots = [(name, value) for name, value in action.attributes if f"{{{name}}}" in template]
        for words in product(*(_PHRASES.get(name, {}).get(value, (value,)) for name, value in slots)):
            filled.append(template.format(**{name: word for (name, _), word in zip(slots, words)}))
    return tuple(dict.fromkeys(filled))


def all_captions(action: ActionClass, held_out: bool) -> tuple[str, ...]:
    """Return every caption the grammar can make for a class."""
    frames = HELD_OUT_FRAMES if held_out else TRAIN_FRAMES
    return tuple(_sentence(frame, clause) for frame in frames for clause in clauses(action, held_out))


def draw_captions(action: ActionClass, held_out: bool, count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Return `count` different captions of a class, of different clauses as far as there are enough."""
    frames, choices = HELD_OUT_FRAMES if held_out else TRAIN_FRAMES, clauses(action, held_out)
    order = rng.permutation(len(choices))
    used = rng.permutation(len(frames))
    captions = dict.fromkeys(
        _sentence(frames[used[i % len(frames)]], choices[order[i % len(choices)]])
        for i in range(max(count, len(frames) * len(choices)))
    )
    return tuple(captions)[:count]


def _sentence(frame: str, clause: str) -> str:
    now = _VERB.sub(lambda m: present(m[1]), clause)
    ongoing = _VERB.sub(lambda m: progressive(m[1]), clause)
    return frame.format(present=now, progressive=ongoing)
